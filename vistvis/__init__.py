"""See where vision transformers look: exact attention at any size.

Importing this package loads neither matplotlib nor timm; what needs them is loaded on first use.
"""

from __future__ import annotations

from vistvis.attention import Attention as Attention
from vistvis.errors import VistvisError as VistvisError
from vistvis.errors import VistvisWarning as VistvisWarning
from vistvis.siteinfo import SiteInfo as SiteInfo
from vistvis.siteinfo import WindowInfo as WindowInfo
from vistvis.tokens import TokenLayout as TokenLayout
from vistvis.tokens import TokenPlace as TokenPlace
