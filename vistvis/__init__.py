"""See where vision transformers look: exact attention at any size.

Importing this package loads neither matplotlib nor timm; what needs them is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vistvis.attention import Attention as Attention
from vistvis.capture import Capture as Capture
from vistvis.capture import capture as capture
from vistvis.errors import VistvisError as VistvisError
from vistvis.errors import VistvisWarning as VistvisWarning
from vistvis.siteinfo import SiteInfo as SiteInfo
from vistvis.siteinfo import WindowInfo as WindowInfo
from vistvis.sites import find_sites as find_sites

# `state` is also the name of its module: bound here, the name means the object from the start.
from vistvis.state import LayerCounter as LayerCounter
from vistvis.state import state as state
from vistvis.tokens import TokenLayout as TokenLayout
from vistvis.tokens import TokenPlace as TokenPlace

if TYPE_CHECKING:
    from vistvis.decorators import visTvis_layer_counter as visTvis_layer_counter
    from vistvis.decorators import visTvis_store as visTvis_store
    from vistvis.paths import AttentionPath as AttentionPath
    from vistvis.paths import OverlayOutputPath as OverlayOutputPath
    from vistvis.paths import StaticMetadata as StaticMetadata
    from vistvis.reconstruction import (
        overlay_query_to_frame_attention as overlay_query_to_frame_attention,
    )
    from vistvis.reconstruction import (
        run_overlay_for_reconstruction as run_overlay_for_reconstruction,
    )
    from vistvis.store import Run as Run
    from vistvis.store import RunWriter as RunWriter
    from vistvis.store import open_run as open_run
    from vistvis.store import save_run as save_run
    from vistvis.views.pdf import (
        plot_attention_for_reconstruction as plot_attention_for_reconstruction,
    )

# Where the names above live; each module is imported when one of its names is first used.
_LAZY = {
    "vistvis.decorators": ("visTvis_layer_counter", "visTvis_store"),
    "vistvis.paths": ("AttentionPath", "OverlayOutputPath", "StaticMetadata"),
    "vistvis.reconstruction": (
        "overlay_query_to_frame_attention",
        "run_overlay_for_reconstruction",
    ),
    "vistvis.store": ("Run", "RunWriter", "open_run", "save_run"),
    "vistvis.views.pdf": ("plot_attention_for_reconstruction",),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
