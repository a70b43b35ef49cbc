"""Blocks that cut windows for their attention module, and how they cut them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from vistvis.attention import Attention, WindowInfo
from vistvis.attention.windows import window_counts
from vistvis.models.families import CUTS_FOR_ITSELF, WINDOW_SIZES


def window_of(
    cutter: nn.Module, shape: Sequence[int], sizes: Any, attention: Attention
) -> WindowInfo | None:
    """How `cutter`, a block that cuts windows, did so; None unless everything fits together.

    `shape` is that of its input, `(B, rows, cols, C)`, or `(B, N, C)` with `sizes` as
    `(rows, cols)`; its attention module gave `attention`, `(B · windows, h, n, n)`.
    """
    window = _pair(next((getattr(cutter, n) for n in WINDOW_SIZES if hasattr(cutter, n)), None))
    grid = _pair(sizes) if len(shape) == 3 else (int(shape[1]), int(shape[2]))
    if not window or not all(window) or grid is None or len(shape) not in (3, 4):
        return None
    shift = _pair(getattr(cutter, "shift_size", 0)) or (0, 0)
    strided = getattr(cutter, "partition_block", True) is False
    down, across = window_counts(WindowInfo(grid, window))
    if type(cutter).__module__.startswith("torchvision."):
        # It decides while it runs that a window as large as the picture is not shifted.
        shift = (0 if down == 1 else shift[0], 0 if across == 1 else shift[1])
    fits = attention.shape[0] == int(shape[0]) * down * across
    if not fits or tuple(attention.shape[2:]) != (window[0] * window[1],) * 2:
        return None
    return WindowInfo(grid, window, shift, strided)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, (tuple, list)):
        return (int(value[0]), int(value[1])) if len(value) == 2 else None
    try:
        return (operator.index(value),) * 2
    except TypeError:
        return None


def window_cutter(model: nn.Module, name: str, module: nn.Module) -> nn.Module | None:
    """The block around an attention module that cuts windows for it."""
    if type(module).__name__.startswith(CUTS_FOR_ITSELF):
        return module
    parts = name.split(".")[:-1]
    for count in range(len(parts), max(len(parts) - 2, 0), -1):
        try:
            parent = model.get_submodule(".".join(parts[:count]))
        except AttributeError:
            return None
        if any(hasattr(parent, name) for name in WINDOW_SIZES):
            return parent
    return None
