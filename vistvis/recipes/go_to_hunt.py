"""Good Token Hunting: how spread the attention of each global block is, as a budget for its tokens.

Zheng, Oechsle, Sandström, Rakotosaona, Tombari, Gilitschenski: "Good Token Hunting: A Hitchhiker's
Guide to Token Selection for Visual Geometry Transformers", arXiv 2605.23892, section 3.3, equation
3 and figure 4. Read in the paper; no code of the authors was to be had.

Of VGGT-1B: `global_block_0` … `global_block_23`, the model's own softmax over all keys. The paper
takes 4 heads and 50 queries of each (which is not said); here all are taken unless some are chosen.
It reads two thresholds off the curve by eye: frame attention alone in blocks below 2, fewer tokens
in blocks below 9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistvis.attention.rows import Selection
from vistvis.recipes.sites import Captured, take_all

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure


@dataclass(frozen=True, eq=False)
class LayerEntropy:
    """Of each captured global block, how spread its rows are; L blocks."""

    blocks: tuple[int, ...]
    entropy: Tensor
    """`(B, L)` float64, 0…1: mean entropy over heads and queries, of log(S · P), which an even row
    has."""
    top: Tensor
    """`(B, L)` float64: the mean over heads and queries of the largest weight."""
    label: str


def layer_entropy(
    captured: Captured,
    *,
    heads: Selection = None,
    queries: Selection = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> LayerEntropy:
    """H_norm = Σ over heads and queries of the row's entropy / (H · Q · log(N · L)), by block.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture`, `open_run` or the extractor of `vggt_adapter`), of which
        every global block is taken, or one global `Attention`.
    heads, queries
        As in `Attention.rows`; the paper samples 4 heads and 50 queries.
    max_bytes, progress
        As in `Attention.row_blocks`.

    N · L is the number of keys: frames times tokens of a frame.

    Cost: the chosen rows of every global block once, `H·Q·Nk·d` multiply-adds a block. SiteError
    where there is no global block, LayoutError where its tokens are not all frames in order.
    """
    found = take_all(captured)
    entropies, tops = [], []
    for taken in found.values():
        a = taken.attention
        both = torch.zeros(2, a.shape[0], dtype=torch.float64, device=a.device)
        rows = 0
        walk = a.row_blocks(heads=heads, queries=queries, max_bytes=max_bytes, progress=progress)
        for (batch, _, _), weights in walk:
            p = weights.detach()
            both[0, batch] += torch.special.entr(p).sum((1, 2, 3), dtype=torch.float64)
            both[1, batch] += p.amax(-1).sum((1, 2), dtype=torch.float64)
            rows += p.shape[:3].numel()
        mean = both / (rows / a.shape[0])
        entropies.append(mean[0] / math.log(a.shape[3]))
        tops.append(mean[1])
    some = "all" if heads is None and queries is None else "the chosen"
    label = (
        f"mean over {some} heads and queries of the entropy of softmax over all keys, of log "
        f"{next(iter(found.values())).attention.shape[3]} ({next(iter(found.values())).rope})"
    )
    return LayerEntropy(tuple(found), torch.stack(entropies, 1), torch.stack(tops, 1), label)


def figure(result: LayerEntropy, *, batch: int = 0) -> NotebookFigure:
    """Both curves over the global blocks."""
    from vistvis.recipes.drawing import lines

    return lines(
        result.blocks,
        {
            "normalised entropy": result.entropy[batch].tolist(),
            "largest weight": result.top[batch].tolist(),
        },
        title="Entropy over depth (Good Token Hunting)",
        note=result.label,
        unit="0…1",
    )
