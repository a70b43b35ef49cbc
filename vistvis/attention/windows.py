"""Window attention, put back in the picture as a `WindowInfo` says that it was cut."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.site import WindowInfo
from vistvis.errors import IndexOutOfRange, InputError

Index = TypeVar("Index", int, Tensor)


def window_counts(info: WindowInfo) -> tuple[int, int]:
    """Windows down and across one picture."""
    (rows, cols), (height, width) = info.grid, info.window
    return -(-rows // height), -(-cols // width)


def place_in_windows(info: WindowInfo, row: Index, col: Index) -> tuple[Index, Index]:
    """`(window, token in window)` of a grid position, or of many; windows count in one picture."""
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
        Of a site with `site.window`, `(B · windows, h, n, n)`; another is an `InputError`.
    row, col, picture
        The query's place in the grid of tokens, and which picture of the batch it lies in;
        `IndexOutOfRange` if there is none.

    Returns
    -------
    `(h', rows, cols)`: zero outside the query's window. With padding, or a mask that keeps
    wrapped-around neighbours apart, a row may sum to less than 1 here: the rest lies on padding.
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
    every_row, every_col = (torch.arange(n, device=weights.device) for n in info.grid)
    windows, tokens = place_in_windows(info, every_row[:, None], every_col)
    seen = windows == window
    out = weights.new_zeros(weights.shape[0], rows, cols)
    out[:, seen] = weights[:, tokens[seen]]
    return out
