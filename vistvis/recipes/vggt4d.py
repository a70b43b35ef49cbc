"""VGGT4D: what moves, by Gram matrices of queries and keys over a window of frames.

Hu, Cheng, Yu, Guo, Wang: "VGGT4D: Mining Motion Cues in Visual Geometry Transformers for 4D Scene
Reconstruction", arXiv 2511.19971. The formula as in the authors' code (3DAgentWorld/VGGT4D), read
in a fork: github.com/DGFX/VGGT4D, `vggt4d/masks/dynamic_mask.py`, `extract_dyn_map` and
`adaptive_multiotsu_variance`, commit 53c0f70.

Of VGGT-1B: global blocks 0, 3–7 and 17–21, patches alone, q and k after norm and RoPE, products
neither scaled nor through a softmax: not attention. The authors then average the maps over 64
clusters (k-means of the patch embedding) and enlarge them before they threshold; `clusters=` and
`size=` do so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from vistvis.attention import Attention
from vistvis.errors import InputError
from vistvis.recipes.otsu import adaptive_threshold
from vistvis.recipes.scaling import min_max
from vistvis.recipes.sites import PAPER_DEPTH, Captured, Taken, plain, scaled, take_all

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

Side = Literal["query", "key"]
# Name, the two sides of the products, mean or standard deviation over the other frame's patches,
# global blocks of 24, and whether the cue counts where it is low.
CUES: tuple[tuple[str, Side, Side, str, range, bool], ...] = (
    ("mean, early", "query", "query", "mean", range(3, 8), True),
    ("spread, late", "query", "query", "std", range(18, 20), True),
    ("mean, late", "query", "query", "mean", range(17, 22), False),
    ("key mean, first", "key", "key", "mean", range(1), True),
    ("spread, first", "query", "key", "std", range(1), False),
)
OFFSETS = (-6, -4, -2, 2, 4, 6)
_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Dynamic:
    """How much each patch looks as if it moved."""

    maps: Tensor
    """`(B, S, rows, cols)` float64, 0…1 in each frame."""
    mask: Tensor
    """`(B, S, rows, cols)` bool, or `(B, S, H, W)` with a size: above the threshold."""
    threshold: Tensor
    """`(B,)` float64: one for all frames of a scene."""
    cues: Mapping[str, Tensor]
    """The five maps `(B, S, rows, cols)` that `maps` is made of, 0…1 in each frame."""
    label: str


def dynamic(
    captured: Captured,
    *,
    offsets: Sequence[int] = OFFSETS,
    clusters: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Dynamic:
    """Maps of what moves, and a mask of it.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture`, `open_run` or the extractor of `vggt_adapter`) with the
        global blocks named above; of fewer than 24, those at the same relative depth.
    offsets
        Which frames each one is compared with: those of frame + offset that exist.
    clusters
        `(S, rows, cols)` or `(B, S, rows, cols)` int: groups of patches that look alike, whose
        mean every patch gets before the threshold (the authors': k-means, 64 of them).
    size
        `(height, width)` in pixels to enlarge to, bilinearly, before the threshold.

    Each cue, for a patch p of frame f: the mean over blocks, heads and compared frames of the
    products a_p·b_t with their patches t; then the mean over t or its standard deviation (n − 1);
    min–max in the frame, with 1e-6 below. The map is the product of the cues, of 1 − cue where low
    counts, min–max again. The threshold: `otsu.adaptive_threshold` over all frames.

    Cost: `P²·h·d` multiply-adds for each of 3 blocks and frame, memory of P². SiteError where a
    block is missing, LayoutError where tokens are not all frames in order, InputError where a frame
    has none to be compared with, and as in `match_ratio`.
    """
    if isinstance(captured, Attention):
        raise InputError(
            "dynamic goes over several blocks: hand over what was captured of them all"
        )
    found = take_all(captured)
    taken = next(iter(found.values()))
    layout, rows = taken.layout, taken.layout.grid[0]
    windows = [_window(frame, offsets, layout.frames) for frame in range(layout.frames)]
    cues, every = {}, None
    for name, left, right, what, numbers, low in CUES:
        chosen = _chosen(found, numbers)
        per_frame = [_cue(chosen, left, right, what, f, w) for f, w in enumerate(windows)]
        cue = rearrange(torch.stack(per_frame, 1), "b s (rows cols) -> b s rows cols", rows=rows)
        cues[name] = min_max(cue, 2, 3, eps=_EPS)
        factor = 1 - cues[name] if low else cues[name]
        every = factor if every is None else every * factor
    assert every is not None
    maps = min_max(every, 2, 3, eps=_EPS)
    shown = maps if clusters is None else _clustered(maps, clusters)
    if size is not None:
        shown = torch.nn.functional.interpolate(shown, size=size, mode="bilinear")
    # As the authors' maps, which are float32: a value on the edge of a bin falls on one side.
    threshold = torch.tensor([adaptive_threshold(scene.float()) for scene in shown]).double()
    depth = max(found) + 1
    fewer = "" if depth == PAPER_DEPTH else f" of {depth}, at the depths of the paper's of 24"
    label = (
        f"Gram matrices of q and k of global blocks{fewer} ({taken.rope}), neither scaled nor "
        f"through a softmax, frames {', '.join(f'{o:+d}' for o in offsets)}: not attention"
    )
    mask = shown > threshold[:, None, None, None].to(shown)
    return Dynamic(maps, mask, threshold, cues, label)


def figure(result: Dynamic, *, batch: int = 0, images: Any = None) -> NotebookFigure:
    """The maps with the share of each frame that is masked; `images` as of `robust_vggt.figure`."""
    from vistvis.recipes.drawing import frame_maps

    shares = result.mask[batch].double().mean((1, 2)).tolist()
    return frame_maps(
        result.maps[batch],
        title="What moves (VGGT4D)",
        note=result.label,
        unit="least to most of the frame",
        names=[f"frame {frame}: {share:.0%} masked" for frame, share in enumerate(shares)],
        images=images,
    )


def _window(frame: int, offsets: Sequence[int], frames: int) -> list[int]:
    near = [frame + offset for offset in offsets if 0 <= frame + offset < frames]
    if not near:
        raise InputError(
            f"frame {frame} of {frames} has no frame at {', '.join(f'{o:+d}' for o in offsets)} to "
            "be compared with: give nearer offsets, such as (-1, 1)"
        )
    return near


def _chosen(found: Mapping[int, Taken], numbers: range) -> list[Taken]:
    """The blocks of a cue, each once."""
    wanted = dict.fromkeys(scaled(number, found) for number in numbers)
    missing = [number for number in wanted if number not in found]
    if missing:
        raise InputError(
            f"dynamic needs global blocks {', '.join(map(str, wanted))} (the paper's "
            f"{numbers[0]}…{numbers[-1]} of 24): capture {', '.join(map(str, missing))} too"
        )
    for number in wanted:
        plain(found[number], "dynamic")
    return [found[number] for number in wanted]


def _cue(
    chosen: Sequence[Taken], left: Side, right: Side, what: str, frame: int, window: Sequence[int]
) -> Tensor:
    """Of each patch of a frame, `(B, P)`; not yet scaled."""
    products: Tensor | None = None
    for taken in chosen:
        one, other = (_tokens(taken, side) for side in (left, right))
        here = one[:, :, taken.patches(frame)].double()
        there = torch.stack([other[:, :, taken.patches(f)].double() for f in window]).mean(0)
        if what == "mean":  # the mean of products is the product with the mean
            there = there.mean(2, keepdim=True)
        part = torch.einsum("bhpd,bhtd->bpt", here, there) / (here.shape[1] * len(chosen))
        products = part if products is None else products + part
    assert products is not None
    return products[..., 0] if what == "mean" else products.std(-1)


def _tokens(taken: Taken, side: Side) -> Tensor:
    return (taken.query() if side == "query" else taken.key()).detach()


def _clustered(maps: Tensor, clusters: Tensor) -> Tensor:
    if clusters.shape not in (maps.shape, maps.shape[1:]) or clusters.is_floating_point():
        raise InputError(
            f"clusters are whole numbers of the shape {tuple(maps.shape[1:])}, got "
            f"{clusters.dtype} {tuple(clusters.shape)}"
        )
    labels = clusters.expand(maps.shape)
    out = torch.empty_like(maps)
    for scene, numbers, target in zip(maps, labels, out, strict=True):
        which = numbers.unique(return_inverse=True)[1].to(maps.device)
        sums = maps.new_zeros(int(which.max()) + 1).index_add_(0, which.ravel(), scene.ravel())
        target.copy_((sums / which.ravel().bincount())[which])
    return min_max(out, 2, 3, eps=_EPS)
