"""The token layout that a model gives to its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vistvis.errors import LayoutError
from vistvis.models.families import LAYOUTS
from vistvis.tokens import TokenLayout


def layout_from_model(model: nn.Module, images: Tensor | Sequence[int]) -> TokenLayout:
    """As `TokenLayout.from_model`; a shape will do in place of images."""
    shape = tuple(int(n) for n in (images.shape if isinstance(images, Tensor) else images))
    inner: Any = getattr(model, "_orig_mod", model)
    if len(shape) < 3:
        raise LayoutError(f"images are (B, 3, H, W) or (B, S, 3, H, W), got shape {shape}")
    for layout_of in LAYOUTS:
        layout = layout_of(inner, shape)
        if layout is not None:
            return layout
    raise LayoutError(
        f"the token layout of {type(inner).__name__} is not known; give one: "
        "TokenLayout(frames, (rows, cols), special=(…), patch_size=…)"
    )
