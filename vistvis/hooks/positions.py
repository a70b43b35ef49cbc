"""Positions that rotary embeddings get: a witness of where tokens lie in their picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistvis.errors import CaptureError
from vistvis.tokens import TokenLayout

_NAMES = ("pos", "xpos", "qpos", "kpos")


def position_tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Positions `(B, n, 2)` or `(n, 2)` among the arguments of a block or an attention module."""
    values = [*args[1:], *(kwargs[name] for name in _NAMES if name in kwargs)]
    return [value for value in values if _is_positions(value)]


def _is_positions(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.ndim not in (2, 3):
        return False
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return whole and value.shape[-1] == 2


def places(pos: Tensor, layout: TokenLayout) -> Tensor | None:
    """Which token of its frame each token is, `(R, n)`, for positions `(R, n, 2)` of a frame each.

    None where positions say nothing: patches all at one place, or of a part of the frame that may
    be a smaller picture, or whose special tokens can't be told. `CaptureError` if they contradict
    the layout.

    Special tokens lie at (0, 0) and patches from (1, 1); without special tokens in front, or with
    those at (−1, −1), patches start at (0, 0).
    """
    pos = pos.long()
    whole = pos.shape[1] == layout.tokens_per_frame
    start, count = layout.patch_start_idx, layout.num_patches
    if whole:
        patches = pos[:, start : start + count]
        if count > 1 and bool((patches == patches[:, :1]).all()):
            return None
        cells = _cells(patches - patches.amin().clamp(0, 1), layout)
        seen = cells.sort(1).values == torch.arange(count, device=pos.device)
        if not bool(seen.all()):
            _contradict(patches, layout)
        _check_axes(cells, layout)
        every = torch.arange(layout.tokens_per_frame, device=pos.device).repeat(len(pos), 1)
        every[:, start : start + count] = start + cells
        return every
    below = bool((pos < 0).any())
    origin = int(start > 0 and not below)
    special = (pos < origin).all(-1)
    if bool(((pos < origin).any(-1) & ~special).any()):
        return None  # patches from (0, 0): of a part of the model without these special tokens
    if bool((special.sum(1) != layout.num_special).any()):
        return None
    cells = _cells(pos - origin, layout)
    nth = special.cumsum(1) - 1
    marks = torch.where(special, -1 - nth, cells).sort(1).values
    if bool((marks[:, 1:] == marks[:, :-1]).any() or (marks == count).any()):
        _contradict(pos, layout)
    last = torch.where(special[..., None], origin, pos).amax(1) - origin + 1
    if bool((last.prod(-1) == (~special).sum(1)).all()):
        return None  # all cells from the first to the last: a smaller picture, not a part of this
    nth = torch.where(nth < start, nth, nth + count)
    return torch.where(special, nth, start + cells)


def _cells(places: Tensor, layout: TokenLayout) -> Tensor:
    rows, cols = layout.grid
    inside = (places >= 0).all(-1) & (places[..., 0] < rows) & (places[..., 1] < cols)
    # A place outside the grid is a cell of its own that no patch may have.
    return torch.where(inside, places[..., 0] * cols + places[..., 1], rows * cols)


def _check_axes(cells: Tensor, layout: TokenLayout) -> None:
    """Refuse what may be (x, y) in place of (row, column): on a square grid both are possible."""
    rows, cols = layout.grid
    turned = torch.arange(rows * cols, device=cells.device).view(rows, cols).T.flatten()
    if rows == cols > 1 and bool((cells == turned).all()):
        raise CaptureError(
            "its RoPE positions are those of the layout with rows and columns exchanged, so either "
            "its tokens go by columns or its positions are (x, y), and nothing says which: pass "
            "sites= without it"
        )


def _contradict(patches: Tensor, layout: TokenLayout) -> None:
    low, high = patches.amin((0, 1)).tolist(), patches.amax((0, 1)).tolist()
    raise CaptureError(
        "its RoPE positions contradict the layout: patches lie at rows "
        f"{low[0]}…{high[0]} and columns {low[1]}…{high[1]}, and are not each cell of {layout} "
        "once; pass layout="
    )
