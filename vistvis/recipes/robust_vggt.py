"""RobustVGGT: which views do not belong to the scene.

Han, Hong, Jung, Jang, An, Wang, Kim, Feng: "Emergent Outlier View Rejection in Visual Geometry
Grounded Transformers", arXiv 2512.04012. The formula as in the authors' code,
github.com/cvlab-kaist/RobustVGGT, `robust_vggt.py`, lines 164–420, commit 8fd46b4.

Of VGGT-1B: `global_block_23`, the last of 24. The softmax goes over all tokens of all frames, the
queries are the patches of the first frame. The authors hook the outputs of `q_norm` and `k_norm`,
which is before RoPE; `capture(model, rope=False)` gives their numbers, a plain capture those of
the model's own softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistvis.errors import InputError
from vistvis.recipes.scaling import min_max
from vistvis.recipes.sites import Captured, Taken, frame_of, take

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

BLOCK = 23
# The authors' guard against views that are all alike.
_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class ViewScores:
    """How well each view fits the reference view; float64 but for `outliers`."""

    scores: Tensor
    """`(B, S)`, 0…1: what `threshold` is compared with."""
    attention: Tensor
    """`(B, S)`, 0…1: mean weight on a view's patches, from the least to the most of the views."""
    similarity: Tensor | None
    """`(B, S)`, 0…1: mean cosine of a view's features and the reference's, scaled likewise."""
    maps: Tensor
    """`(B, S, rows, cols)`: the mean weight that a patch of the reference gives to each patch."""
    outliers: Tensor
    """`(B, S)` bool: scores below the threshold; never the reference."""
    threshold: float
    label: str


def view_scores(
    captured: Captured,
    *,
    features: Tensor | None = None,
    block: int | None = None,
    reference: int = 0,
    threshold: float = 0.4,
    share: float = 0.5,
    max_bytes: int | None = None,
    progress: bool = False,
) -> ViewScores:
    """Score every view by what the reference's patches give to it, and by its features.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture`, `open_run` or the extractor of `vggt_adapter`), or one
        global `Attention`.
    features
        `(S, P, C)` or `(B, S, P, C)`: what the paper mixes in, the tokens that leave its block
        (`model(images)[0][23][..., C:]`). P is that of the patches, or of all tokens of a frame.
        Without, the score is that of attention alone, and the label says so.
    block
        A global block; None: 23, or the one at the same relative depth.
    reference
        The view that all are compared with; the paper's is the first.
    threshold
        Views below are outliers.
    share
        Weight of attention in the score; similarity has the rest.
    max_bytes, progress
        As in `Attention.row_blocks`.

    score = share · m(attention) + (1 − share) · m(similarity), with m(x) = (x − min) / (max − min +
    1e-6) over the views. Attention: mean over heads and over the reference's patches of the softmax
    over all keys; over the patches of all views min–max scaled; its mean over the patches of a view
    (their mean over an enlarged map is the same). Similarity: mean cosine over all pairs of patches
    of the two views.

    Cost: P rows of all heads, `h·P·N·d` multiply-adds a scene. SiteError where there is no such
    block, LayoutError where its tokens are not all frames in order, InputError for features of
    other sizes.
    """
    taken = take(captured, block, BLOCK)
    frame_of(taken, reference, "reference")
    maps = _maps(taken, reference, max_bytes, progress)
    attention = min_max(min_max(maps, 1, 2, 3).mean((2, 3)), 1, eps=_EPS)
    similarity = None if features is None else _similarity(features, taken, reference)
    scores = attention
    if similarity is not None:
        scores = share * attention + (1 - share) * similarity
    outliers = scores < threshold
    outliers[:, reference] = False
    mixed = "attention alone, without features"
    if similarity is not None:
        mixed = f"{share:g} of attention and {1 - share:g} of feature cosine"
    label = (
        f"{taken.text}: mean over heads and the patches of frame {reference} of the softmax over "
        f"all keys ({taken.rope}); score of {mixed}, scaled over the views"
    )
    return ViewScores(scores, attention, similarity, maps, outliers, threshold, label)


def figure(result: ViewScores, *, batch: int = 0, images: Any = None) -> NotebookFigure:
    """Each view's map with its score, over its picture where `images` `(S, 3, H, W)` are given.

    All maps have one colour scale; outliers are named.
    """
    from vistvis.recipes.drawing import frame_maps

    names = [
        f"view {view}: {score:.2f}{' outlier' if outlier else ''}"
        for view, (score, outlier) in enumerate(
            zip(result.scores[batch].tolist(), result.outliers[batch].tolist(), strict=True)
        )
    ]
    return frame_maps(
        result.maps[batch],
        title="View scores (RobustVGGT)",
        note=result.label,
        unit="mean attention weight",
        names=names,
        images=images,
    )


def _maps(taken: Taken, reference: int, max_bytes: int | None, progress: bool) -> Tensor:
    a, layout = taken.attention, taken.layout
    total = torch.zeros(a.shape[0], a.shape[3], dtype=torch.float64, device=a.device)
    walk = a.row_blocks(queries=taken.patches(reference), max_bytes=max_bytes, progress=progress)
    for (batch, _, _), weights in walk:
        total[batch] += weights.detach().sum((1, 2), dtype=torch.float64)
    mean = total / (a.shape[1] * layout.num_patches)
    return layout.maps(mean)


def _similarity(features: Tensor, taken: Taken, reference: int) -> Tensor:
    layout, batch = taken.layout, taken.attention.shape[0]
    given = features if features.ndim == 4 else features[None]
    patches, tokens = layout.num_patches, layout.tokens_per_frame
    if given.ndim != 4 or given.shape[:2] != (batch, layout.frames):
        raise InputError(
            f"features are (S, P, C) or (B, S, P, C) of {batch} scenes of {layout.frames} views, "
            f"got {tuple(features.shape)}"
        )
    if given.shape[2] == tokens:
        first = layout.patch_start_idx
        given = given[:, :, first : first + patches]
    elif given.shape[2] != patches:
        raise InputError(
            f"features have one token for each of {patches} patches, or of {tokens} tokens of a "
            f"frame, got {given.shape[2]}"
        )
    units = torch.nn.functional.normalize(given.detach().double(), dim=-1)
    # The mean of all pairs' products is the product of the means.
    means = units.mean(2)
    cosine = (means * means[:, reference : reference + 1]).sum(-1)
    return min_max(cosine, 1, eps=_EPS).to(taken.attention.device)
