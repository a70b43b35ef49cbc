"""Block-sparse VGGT: which blocks of queries and keys hold the attention, by pooled tokens.

Wang et al.: "Faster VGGT with Block-Sparse Global Attention", arXiv 2509.07120. The formula as in
the authors' code, github.com/brianwang00001/sparse-vggt, `src/sparse_vggt/models/attention.py`,
`predict_attention`, and `utils/sparse_wrapper.py`, `get_block_mask`, commit a2520f8.

Of VGGT-1B: every global block (their README's call: shares of 0.97); the default here is
`global_block_23`. q and k after norm and RoPE, patches alone, in the order of frames (they may go
along a Hilbert curve, which this does not). Pooled scores are an estimate, not the model's
attention: a softmax over means of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange
from torch import Tensor

from vistvis.errors import InputError
from vistvis.recipes.sites import Captured, plain, take

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

BLOCK = 23
# So that rounding does not leave out a block.
_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class BlockCoverage:
    """How few blocks of keys hold a share of the pooled attention; Q and K count blocks."""

    scores: Tensor
    """`(B, h, Q, K)`: softmax over K of scale · pooled q · pooled k."""
    needed: Tensor
    """`(B, h, Q)` int64: the fewest blocks of keys whose scores reach the share."""
    kept: Tensor
    """`(B, h, Q, K)` bool: the blocks that the authors' code keeps for that share."""
    coverage: Tensor
    """`(B, h, Q)`: what the kept blocks hold of the scores."""
    sparsity: Tensor
    """`(B, h)`: the share of blocks that are not kept."""
    share: float
    label: str


def block_coverage(
    captured: Captured,
    *,
    share: float = 0.97,
    block: int | None = None,
    query_block: int = 128,
    key_block: int = 64,
    pool: Literal["avg", "max"] = "avg",
    sparse_ratio: float | None = None,
) -> BlockCoverage:
    """How many blocks of keys each block of queries needs to reach a share of its pooled attention.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture`, `open_run` or the extractor of `vggt_adapter`), or one
        global `Attention`.
    share
        Between 0 and 1: `cdf_threshold` of the authors.
    block
        A global block; None: 23, or the one at the same relative depth.
    query_block, key_block
        How many patches are pooled into one, the last of fewer.
    pool
        "avg" or "max".
    sparse_ratio
        At least ⌊K·(1 − sparse_ratio)⌋ blocks are kept then.

    softmax(scale · pool(Q) · pool(K)ᵀ). Sorted from the largest, `kept` are the blocks of which the
    sum up to and with them is at most the share (and 1e-5), at least one; so they may hold less
    than the share, by up to one block: `needed` counts the blocks that reach it.

    Cost: `(S·P)²·h·d / (query_block · key_block)` multiply-adds, memory of as many scores.
    InputError for numbers outside of these, and as in `match_ratio`; SiteError and LayoutError too.
    """
    if not 0 < share <= 1 or not (sparse_ratio is None or 0 <= sparse_ratio <= 1):
        raise InputError(f"share and sparse_ratio are from 0 to 1, got {share!r}, {sparse_ratio!r}")
    if query_block < 1 or key_block < 1 or pool not in ("avg", "max"):
        raise InputError(
            f'blocks have one token or more, and pool is "avg" or "max"; got query_block='
            f"{query_block!r}, key_block={key_block!r}, pool={pool!r}"
        )
    taken = take(captured, block, BLOCK)
    plain(taken, "block_coverage")
    tokens = taken.patch_tokens().to(taken.attention.device)
    query = _pooled(taken.query()[:, :, tokens], query_block, pool)
    key = _pooled(taken.key()[:, :, tokens], key_block, pool)
    scale = taken.attention.scale
    scale = scale.double().view(-1, 1, 1) if isinstance(scale, Tensor) else scale
    scores = torch.softmax(scale * (query @ key.mT), -1)
    ordered, order = scores.sort(-1, descending=True)
    total = ordered.cumsum(-1)
    count = scores.shape[-1]
    needed = ((total < share).sum(-1) + 1).clamp_max(count)
    least = 1 if sparse_ratio is None else max(int(count * (1 - sparse_ratio)), 1)
    most = (total <= share + _EPS).sum(-1).clamp_min(least)
    first = torch.arange(count, device=scores.device) < most[..., None]
    kept = torch.zeros_like(first).scatter_(-1, order, first)
    label = (
        f"{taken.text}: softmax over blocks of {key_block} keys of {pool}-pooled q and k, "
        f"{query_block} queries a block ({taken.rope}), patches alone: an estimate, not the "
        "model's attention"
    )
    return BlockCoverage(
        scores, needed, kept, (scores * kept).sum(-1), 1 - kept.double().mean((2, 3)), share, label
    )


def figure(result: BlockCoverage, *, batch: int = 0) -> NotebookFigure:
    """Each head's pooled scores, queries down and keys across, with the share of kept blocks."""
    from vistvis.recipes.drawing import frame_maps

    return frame_maps(
        result.scores[batch],
        title=f"Blocks that hold {result.share:.0%} (block-sparse VGGT)",
        note=result.label,
        unit="pooled weight",
        names=[
            f"head {head}: {1 - sparsity:.0%} of blocks kept"
            for head, sparsity in enumerate(result.sparsity[batch].tolist())
        ],
    )


def _pooled(tokens: Tensor, size: int, pool: str) -> Tensor:
    """`(B, h, N, d)` → `(B, h, ⌈N / size⌉, d)` float64; the last is of what is left."""
    values = rearrange(tokens.detach().double(), "b h n d -> (b h) d n")
    pooling = torch.nn.functional.avg_pool1d if pool == "avg" else torch.nn.functional.max_pool1d
    pooled = pooling(values, size, ceil_mode=True)
    return rearrange(pooled, "(b h) d n -> b h n d", b=len(tokens))
