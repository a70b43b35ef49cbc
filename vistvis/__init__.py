"""See where vision transformers look: exact attention at any size.

Importing this package loads neither torch nor matplotlib; each name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# `state` is also the name of its module: bound here, the name means the object from the start.
from vistvis.state import state as state

if TYPE_CHECKING:
    from vistvis.analysis.summary import summarize as summarize
    from vistvis.attention import Attention as Attention
    from vistvis.attention.order import TokenOrder as TokenOrder
    from vistvis.attention.site import SiteInfo as SiteInfo
    from vistvis.attention.site import WindowInfo as WindowInfo
    from vistvis.decorators import visTvis_layer_counter as visTvis_layer_counter
    from vistvis.decorators import visTvis_store as visTvis_store
    from vistvis.decorators.overlays import (
        overlay_query_to_frame_attention as overlay_query_to_frame_attention,
    )
    from vistvis.decorators.overlays import (
        run_overlay_for_reconstruction as run_overlay_for_reconstruction,
    )
    from vistvis.decorators.paths import AttentionPath as AttentionPath
    from vistvis.decorators.paths import StaticMetadata as StaticMetadata
    from vistvis.errors import VistvisError as VistvisError
    from vistvis.errors import VistvisWarning as VistvisWarning
    from vistvis.hooks.capture import Capture as Capture
    from vistvis.hooks.capture import capture as capture
    from vistvis.hooks.finding import find_sites as find_sites
    from vistvis.hooks.trace import trace_layout as trace_layout
    from vistvis.intervention import intervene as intervene
    from vistvis.state import LayerCounter as LayerCounter
    from vistvis.store import Run as Run
    from vistvis.store import RunWriter as RunWriter
    from vistvis.store import open_run as open_run
    from vistvis.store import save_run as save_run
    from vistvis.tokens import TokenLayout as TokenLayout
    from vistvis.tokens import TokenPlace as TokenPlace
    from vistvis.views.explorer.front import explore as explore
    from vistvis.views.overlay_folder import OverlayOutputPath as OverlayOutputPath
    from vistvis.views.pdf import (
        plot_attention_for_reconstruction as plot_attention_for_reconstruction,
    )
    from vistvis.views.plot import plot as plot

# Where the names above live; each module is imported when one of its names is first used.
_LAZY = {
    "vistvis.analysis.summary": ("summarize",),
    "vistvis.attention": ("Attention",),
    "vistvis.attention.order": ("TokenOrder",),
    "vistvis.attention.site": ("SiteInfo", "WindowInfo"),
    "vistvis.decorators": ("visTvis_layer_counter", "visTvis_store"),
    "vistvis.decorators.paths": ("AttentionPath", "StaticMetadata"),
    "vistvis.decorators.overlays": (
        "overlay_query_to_frame_attention",
        "run_overlay_for_reconstruction",
    ),
    "vistvis.errors": ("VistvisError", "VistvisWarning"),
    "vistvis.hooks.capture": ("Capture", "capture"),
    "vistvis.hooks.finding": ("find_sites",),
    "vistvis.hooks.trace": ("trace_layout",),
    "vistvis.intervention": ("intervene",),
    "vistvis.state": ("LayerCounter",),
    "vistvis.store": ("Run", "RunWriter", "open_run", "save_run"),
    "vistvis.tokens": ("TokenLayout", "TokenPlace"),
    "vistvis.views.explorer.front": ("explore",),
    "vistvis.views.overlay_folder": ("OverlayOutputPath",),
    "vistvis.views.pdf": ("plot_attention_for_reconstruction",),
    "vistvis.views.plot": ("plot",),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}
# Wings that are used by their own names: `vistvis.analysis.entropy`.
_WINGS = ("analysis", "recipes")

# `from vistvis import *` loads them all, and with the figures matplotlib.
__all__ = sorted([*_HOME, *_WINGS, "state"])


def __getattr__(name: str) -> Any:
    if name in _WINGS:
        return importlib.import_module(f"vistvis.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
