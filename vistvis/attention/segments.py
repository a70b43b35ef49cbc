"""Blocks along the tokens that see only themselves: attention of each, never an N×N mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistvis.attention.indexing import ALL, Box, take

if TYPE_CHECKING:
    from vistvis.attention.lazy import Attention


def pieces(attention: Attention, numbers: Tensor | None = None) -> Iterator[tuple[int, Attention]]:
    """Segments (all, or some by number) as attention of their own, each with its first token."""
    assert attention.segments is not None
    starts = [*attention.segments.tolist(), attention.shape[2]]
    for number in range(len(starts) - 1) if numbers is None else numbers.tolist():
        rows = slice(starts[number], starts[number + 1])
        mask, known = attention.mask, attention._log_sum_exp
        piece = type(attention)(
            query=attention.query[:, :, rows],
            key=attention.key[:, :, rows],
            scale=attention.scale,
            mask=None if mask is None else mask.expand(attention.shape)[:, :, rows, rows],
            causal=attention.causal,
        )
        if known is not None:
            piece._log_sum_exp = known[:, :, rows]
        yield rows.start, piece


def put_together(
    attention: Attention, box: Box, fill: float, part: Callable[[Attention, Box], Tensor]
) -> Tensor:
    """What `part` gives of each segment, at its place in the box; `fill` outside of segments.

    Cost: only the segments in which the box has queries and keys are computed.
    """
    assert attention.segments is not None
    out = torch.full(attention._counts(box), fill, dtype=attention.dtype, device=attention.device)
    tokens = torch.arange(attention.shape[2], device=attention.device)
    of_token = torch.searchsorted(attention.segments, tokens, right=True) - 1
    rows, keys = (take(tokens, selection) for selection in box[2:])
    of_row, of_key = of_token[rows], of_token[keys]
    every_key = isinstance(box[3], slice) and box[3] == ALL
    both = torch.unique(of_row)
    both = both[torch.isin(both, of_key)]
    for number, (start, piece) in zip(both, pieces(attention, both), strict=True):
        q, k = ((of == number).nonzero()[:, 0] for of in (of_row, of_key))
        chosen = ALL if every_key else keys[k] - start
        out[:, :, q[:, None], k] = part(piece, (*box[:2], rows[q] - start, chosen))
    return out
