"""The token layout that a model gives to its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistvis.errors import LayoutError
from vistvis.models.families import parts_of
from vistvis.models.family import Inputs
from vistvis.models.vits import LAYOUTS
from vistvis.tokens import TokenLayout


def layout_of_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TokenLayout | None:
    """The layout of what a model is called with; None where it is not known.

    Pictures are a tensor, dicts of views with `img`, or lists of either. `LayoutError` if they are
    of a shape that the model can't take.
    """
    inner: nn.Module = getattr(model, "_orig_mod", model)
    inputs = Inputs(args, kwargs)
    parts = parts_of(inner)
    if parts:
        layouts = (family.layout(part, inputs) for part, family in parts.values())
    else:
        layouts = (layout_of(inner, inputs) for layout_of in LAYOUTS)
    return next((layout for layout in layouts if layout is not None), None)


def layout_from_model(model: nn.Module, images: Tensor | Sequence[Any]) -> TokenLayout:
    """As `TokenLayout.from_model`; a shape will do in place of images."""
    if not isinstance(images, Tensor) and all(isinstance(part, int) for part in images):
        images = torch.empty(tuple(images), device="meta")
    if isinstance(images, Tensor) and images.ndim < 3:
        raise LayoutError(
            f"images are (B, 3, H, W) or (B, S, 3, H, W), got shape {tuple(images.shape)}"
        )
    if isinstance(images, Tensor) and images.ndim == 3:
        images = images[None]
    layout = layout_of_inputs(model, (images,), {})
    if layout is None:
        inner = getattr(model, "_orig_mod", model)
        known = [family.name for _, family in parts_of(inner).values()]
        what = f"these pictures in a model of {known[0]}'s kind" if known else type(inner).__name__
        raise LayoutError(
            f"the token layout of {what} is not known; give one: "
            "TokenLayout(frames, (rows, cols), special=(…), patch_size=…)"
        )
    return layout
