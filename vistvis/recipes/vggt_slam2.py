"""VGGT-SLAM 2.0: whether two views show the same place.

Maggio, Carlone: "VGGT-SLAM 2.0: Real time Dense Feed-forward Scene Reconstruction", arXiv
2601.19887, image retrieval verification. The formula as `get_similarity` and `mean_top_quarter` of
the authors' fork of VGGT have it (MIT-SPARK/VGGT_SPARK, `vggt/models/aggregator.py`), read in a
vendored copy: github.com/zb8c5ek/VGGT-SLAM, `3rdParty/vggt/vggt/models/aggregator.py`, lines 26–59,
commit 1758947. github.com/MIT-SPARK/VGGT-SLAM, `vggt_slam/solver.py`, line 372, commit 66630f7,
takes a pair from 0.85 on.

Of VGGT-1B: `global_block_20` (`target_layer = 20`), q and k after norm and RoPE. This is not the
model's softmax: it goes over the queries, for each key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.arithmetic import rows_at_once
from vistvis.progress import progress as bar
from vistvis.recipes.sites import Captured, Taken, frame_of, plain, take

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

BLOCK = 20
THRESHOLD = 0.85
_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class MatchRatio:
    """How strongly each view matches one of them; float64."""

    ratio: Tensor
    """`(B, S)`: mean of the top quarter of `tokens`; the authors take a pair from 0.85 on."""
    tokens: Tensor
    """`(B, S, P)`: of each token of a view, special tokens too, the largest ratio to a patch of
    `frame`. Of that frame itself it is at most 1."""
    grid: tuple[int, int]
    patch_start_idx: int
    frame: int
    label: str


def match_ratio(
    captured: Captured,
    *,
    frame: int = 0,
    block: int | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> MatchRatio:
    """For each view, how much its tokens ask for the patches of `frame`, against that frame's own.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture`, `open_run` or the extractor of `vggt_adapter`), or one
        global `Attention`. The authors run two frames; with more, the softmax goes over the queries
        of all of them.
    frame
        The view whose patches are the keys; the authors' is the first.
    block
        A global block; None: 20, or the one at the same relative depth.
    max_bytes, progress
        As in `Attention.row_blocks`.

    With p(k, q) the mean over heads of the softmax over all queries q of scale · q·k, for each
    patch k of `frame`: ratio(q) = max over k of p(k, q) / (max over q' of `frame` of p(k, q') +
    1e-8). Its mean over the values from the 75th percentile on, of all tokens of a view, is that
    view's match ratio.

    Cost: `h·P·N·d` multiply-adds a scene, memory of one block. SiteError where there is no such
    block, LayoutError where its tokens are not all frames in order, InputError for attention with a
    mask or of weights alone.
    """
    taken = take(captured, block, BLOCK)
    plain(taken, "match_ratio")
    own = frame_of(taken, frame)
    layout, a = taken.layout, taken.attention
    best = torch.stack([_best(taken, own, item, max_bytes, progress) for item in range(a.shape[0])])
    start = layout.index(frame=0, token=0)
    count = layout.frames * layout.tokens_per_frame
    tokens = rearrange(best[:, start : start + count], "b (s p) -> b s p", s=layout.frames)
    label = (
        f"{taken.text}: softmax over the queries of all frames onto each patch of frame {own} "
        f"({taken.rope}), mean of heads, as a share of that frame's own peak: not the model's "
        "softmax, which goes over keys"
    )
    return MatchRatio(_top_quarter(tokens), tokens, layout.grid, layout.patch_start_idx, own, label)


def figure(result: MatchRatio, *, batch: int = 0, images: Any = None) -> NotebookFigure:
    """The ratio of each patch, and each view's match ratio; `images` as of `robust_vggt.figure`."""
    from vistvis.recipes.drawing import frame_maps

    first, (rows, cols) = result.patch_start_idx, result.grid
    patches = result.tokens[batch, :, first : first + rows * cols]
    maps = rearrange(patches, "s (rows cols) -> s rows cols", rows=rows)
    own = result.frame
    names = [
        f"view {view}: {'the keys' if view == own else format(ratio, '.2f')}"
        for view, ratio in enumerate(result.ratio[batch].tolist())
    ]
    return frame_maps(
        maps,
        title="Match ratio (VGGT-SLAM 2.0)",
        note=result.label,
        unit="ratio to the frame's own peak",
        names=names,
        images=images,
    )


def _best(taken: Taken, own: int, item: int, max_bytes: int | None, progress: bool) -> Tensor:
    """Of every query the largest ratio to a patch of the frame, `(N,)`."""
    a, layout = taken.attention, taken.layout
    # Keys ask, queries answer: rows of this are softmax over the queries.
    turned = Attention(
        query=taken.key()[item : item + 1, :, taken.patches(own)],
        key=taken.query()[item : item + 1],
        scale=a.scale,
    )
    start = layout.index(frame=own, token=0)
    whole = slice(start, start + layout.tokens_per_frame)
    best = torch.zeros(a.shape[2], dtype=torch.float64, device=a.device)
    # Heads have to be together in a block: their mean comes before the peaks.
    heads, keys, queries = turned.shape[1:]
    step = max(1, rows_at_once(queries, turned.dtype, max_bytes) // heads)
    starts = range(0, keys, step)
    for at in bar(starts, "columns of attention", shown=progress, delay=0.5):
        rows = turned.rows(slice(at, at + step)).detach()
        mean = rows.mean(1, dtype=torch.float64)[0]
        peak = mean[:, whole].amax(1, keepdim=True) + _EPS
        best = torch.maximum(best, (mean / peak).amax(0))
    return best


def _top_quarter(tokens: Tensor) -> Tensor:
    """The mean of the values from the 75th percentile on, over the last dimension."""
    # As numpy's percentile, between the two nearest values.
    least = torch.quantile(tokens, 0.75, dim=-1, keepdim=True)
    top = tokens >= least
    return (tokens * top).sum(-1) / top.sum(-1)
