"""See where vision transformers look: exact attention at any size.

Importing this package loads neither matplotlib nor timm; what needs them is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vistvis.attention import Attention as Attention
from vistvis.attention import SiteInfo as SiteInfo
from vistvis.attention import WindowInfo as WindowInfo
from vistvis.errors import VistvisError as VistvisError
from vistvis.errors import VistvisWarning as VistvisWarning
from vistvis.tokens import TokenLayout as TokenLayout
from vistvis.tokens import TokenPlace as TokenPlace
