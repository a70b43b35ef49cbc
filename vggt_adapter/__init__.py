"""VGGT and its relatives, made ready to be looked at: names that VGGT's users know.

Importing this package loads neither matplotlib nor PIL nor torch's model code; each name is loaded
on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_adapter.aggregator import Aggregator as Aggregator
    from vggt_adapter.config import VGGTConfig as VGGTConfig
    from vggt_adapter.config import ViTConfig as ViTConfig
    from vggt_adapter.demo import demo_visualize_token_attention as demo_visualize_token_attention
    from vggt_adapter.extractor import AttentionExtractor as AttentionExtractor
    from vggt_adapter.extractor import extract_both_attentions as extract_both_attentions
    from vggt_adapter.figures import visualize_attention_on_image as visualize_attention_on_image
    from vggt_adapter.geometry import ImageGeometry as ImageGeometry
    from vggt_adapter.geometry import preprocess_geometry as preprocess_geometry
    from vggt_adapter.model import VGGT as VGGT
    from vggt_adapter.model import load_checkpoint as load_checkpoint
    from vggt_adapter.model import save_checkpoint as save_checkpoint
    from vggt_adapter.preprocess import LoadedImages as LoadedImages
    from vggt_adapter.preprocess import load_and_preprocess_images as load_and_preprocess_images
    from vggt_adapter.preprocess import load_images as load_images
    from vggt_adapter.values import get_attention_values as get_attention_values

_LAZY = {
    "aggregator": ("Aggregator",),
    "config": ("VGGTConfig", "ViTConfig"),
    "demo": ("demo_visualize_token_attention",),
    "extractor": ("AttentionExtractor", "extract_both_attentions"),
    "figures": ("visualize_attention_on_image",),
    "geometry": ("ImageGeometry", "preprocess_geometry"),
    "model": ("VGGT", "load_checkpoint", "save_checkpoint"),
    "preprocess": ("LoadedImages", "load_and_preprocess_images", "load_images"),
    "values": ("get_attention_values",),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _LAZY.items() for name in names}

# `from vggt_adapter import *` loads them all, and with the figures matplotlib.
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
