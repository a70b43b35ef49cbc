"""Blocks along the tokens that see only themselves: where each lies, and how they fill a box."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from vistvis.attention.indexing import ALL, Box, take


def ranges(starts: Tensor, count: int) -> list[slice]:
    """The rows of every segment of `count` tokens."""
    bounds = [*starts.tolist(), count]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def fill_box(
    out: Tensor, box: Box, starts: Tensor, count: int, part: Callable[[slice, Box], Tensor]
) -> Tensor:
    """Put what `part` gives of each segment at its place in `out`, which has the sizes of `box`.

    `part` gets the rows of a segment and the box within it. Cost: only segments in which the box
    has queries and keys are asked.
    """
    tokens = torch.arange(count, device=out.device)
    of_token = torch.searchsorted(starts, tokens, right=True) - 1
    rows, keys = (take(tokens, selection) for selection in box[2:])
    of_row, of_key = of_token[rows], of_token[keys]
    every_key = isinstance(box[3], slice) and box[3] == ALL
    numbers, segments = torch.unique(of_row), ranges(starts, count)
    for number in numbers[torch.isin(numbers, of_key)].tolist():
        segment = segments[number]
        q, k = ((of == number).nonzero()[:, 0] for of in (of_row, of_key))
        chosen = ALL if every_key else keys[k] - segment.start
        out[:, :, q[:, None], k] = part(segment, (*box[:2], rows[q] - segment.start, chosen))
    return out
