"""The hinge: left of `Attention` models are known, right of it they are not."""

from __future__ import annotations

from vistvis.attention.lazy import Attention as Attention
from vistvis.attention.lazy import GivenWeights as GivenWeights
from vistvis.attention.order import TokenOrder as TokenOrder
from vistvis.attention.rows import DENSE_LIMIT as DENSE_LIMIT
from vistvis.attention.site import SiteInfo as SiteInfo
from vistvis.attention.site import WindowInfo as WindowInfo
