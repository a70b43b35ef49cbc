"""Window attention, put back in the picture.

Windows are cut from the grid of tokens after it was padded and rolled; each is a batch item of its
own. A `WindowInfo` on the site says how; here a token of the grid finds its window and its place
in it, and a row of weights finds its way back.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from vistvis.attention import Attention
from vistvis.errors import IndexOutOfRange, InputError
from vistvis.siteinfo import WindowInfo


def window_counts(info: WindowInfo) -> tuple[int, int]:
    """Windows down and across one picture."""
    (rows, cols), (height, width) = info.grid, info.window
    return -(-rows // height), -(-cols // width)


def place_in_windows(info: WindowInfo, row: int, col: int) -> tuple[int, int]:
    """`(window, token in window)` of a grid position, windows counted within one picture."""
    down, across = window_counts(info)
    height, width = info.window
    if info.strided:
        return (row % down) * across + col % across, (row // down) * width + col // across
    i = (row - info.shift[0]) % (down * height)
    j = (col - info.shift[1]) % (across * width)
    return (i // height) * across + j // width, (i % height) * width + j % width


def stitch(
    attention: Attention,
    row: SupportsIndex,
    col: SupportsIndex,
    *,
    picture: SupportsIndex = 0,
    heads: Any = None,
) -> Tensor:
    """The weights of one query of window attention over the whole picture.

    Parameters
    ----------
    attention
        Of a site with `site.window`, `(B · windows, h, n, n)`.
    row, col
        The query's place in the grid of tokens.
    picture
        Which picture of the batch.

    Returns
    -------
    `(h', rows, cols)`: zero outside the query's window. With padding, or a mask that keeps
    wrapped-around neighbours apart, a row may sum to less than 1 here: the rest lies on padding.

    Raises
    ------
    InputError
        If the site has no window description.
    IndexOutOfRange
        If the position or the picture does not exist.
    """
    info = attention.site.window if attention.site else None
    if info is None:
        name = repr(attention.site.name) if attention.site else "this attention"
        raise InputError(f"{name} has no window description, so it can't be stitched")
    row, col, picture = operator.index(row), operator.index(col), operator.index(picture)
    down, across = window_counts(info)
    pictures = attention.shape[0] // (down * across)
    rows, cols = info.grid
    if not (0 <= row < rows and 0 <= col < cols and 0 <= picture < pictures):
        raise IndexOutOfRange(
            f"row {row}, col {col} of picture {picture} is outside {pictures} picture(s) of "
            f"{rows}×{cols} tokens"
        )
    window, query = place_in_windows(info, row, col)
    batch = picture * down * across + window
    weights = attention.rows([query], batch=batch, heads=heads)[0, :, 0]
    places = [
        (r, c, place)
        for r in range(rows)
        for c in range(cols)
        for other, place in (place_in_windows(info, r, c),)
        if other == window
    ]
    out = weights.new_zeros(weights.shape[0], rows, cols)
    where = torch.tensor(places, device=weights.device)
    out[:, where[:, 0], where[:, 1]] = weights[:, where[:, 2]]
    return out


def window_of(
    owner: nn.Module, shape: Sequence[int], sizes: Any, attention: Attention
) -> WindowInfo | None:
    """How `owner`, a block that cuts windows, did so; None unless everything fits together.

    Parameters
    ----------
    owner
        A block with `window_size` or `partition_size`, and perhaps `shift_size`.
    shape
        Of its input, `(B, rows, cols, C)`, or `(B, N, C)` with `sizes` as `(rows, cols)`.
    attention
        What its attention module gave, `(B · windows, h, n, n)`.
    """
    window = _pair(getattr(owner, "window_size", getattr(owner, "partition_size", None)))
    grid = _pair(sizes) if len(shape) == 3 else (int(shape[1]), int(shape[2]))
    if not window or not all(window) or grid is None or len(shape) not in (3, 4):
        return None
    shift = _pair(getattr(owner, "shift_size", 0)) or (0, 0)
    strided = getattr(owner, "partition_block", True) is False
    down, across = window_counts(WindowInfo(grid, window))
    if type(owner).__module__.startswith("torchvision."):
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
        number = operator.index(value)
    except TypeError:
        return None
    return number, number


def window_owner(model: nn.Module, name: str, module: nn.Module) -> nn.Module | None:
    """The block around an attention module that cuts windows for it."""
    if type(module).__name__.startswith("ShiftedWindowAttention"):
        return module
    parts = name.split(".")[:-1]
    for count in range(len(parts), max(len(parts) - 2, 0), -1):
        try:
            parent = model.get_submodule(".".join(parts[:count]))
        except AttributeError:
            return None
        if hasattr(parent, "window_size") or hasattr(parent, "partition_size"):
            return parent
    return None
