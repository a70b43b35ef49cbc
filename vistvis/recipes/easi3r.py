"""Easi3R: what moves, by the cross-attention of DUSt3R over pairs of frames.

Chen, Chen, Xiu, Geiger, Chen: "Easi3R: Estimating Disentangled Motion from DUSt3R Without
Training", arXiv 2503.24391. The formula as in the authors' code, github.com/Inception3D/Easi3R,
`dust3r/model.py` (`_get_attn_k`) and `dust3r/cloud_opt/base_opt.py` (`aggregate_attention_maps` and
lines 168–192), commit 146a77d.

Of DUSt3R and its relatives: the cross-attention of both decoders, all 12 blocks and heads, q and k
after RoPE; scale · q·k before the softmax, so not attention: `cross_block_0` … `cross_block_11` of
the extractor, and `cross_block_0_dec_blocks2` … The model is run on all pairs of frames, a pair a
batch item. Of VGGT there is no second decoder: global blocks stand in for both, each pair of frames
for a pair of pictures, and the label says so. Clusters and threshold of a mask: `vggt4d.dynamic`
shares them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from vistvis.attention import Attention
from vistvis.errors import InputError, LayoutError
from vistvis.recipes.otsu import adaptive_threshold
from vistvis.recipes.scaling import min_max
from vistvis.recipes.sites import Captured, one, plain_attention, take_all

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

Pair = tuple[int, int]
_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Dynamic:
    """How much each patch looks as if it moved, in S frames of one scene."""

    maps: Tensor
    """`(S, rows, cols)` float64, 0…1 in each frame."""
    mask: Tensor
    """`(S, rows, cols)` bool: above the threshold."""
    threshold: float
    cues: Mapping[str, Tensor]
    """`(S, rows, cols)` each, 0…1 over all frames: mean and spread, of the first decoder's products
    onto its source and of the second's onto its reference."""
    label: str


def dynamic(captured: Captured, *, pairs: Sequence[Pair] | None = None) -> Dynamic:
    """Maps of what moves, and a mask of it.

    Parameters
    ----------
    captured
        A mapping of sites: the cross-attention of both decoders of a DUSt3R, run on all pairs at
        once; or global blocks of a VGGT.
    pairs
        Of DUSt3R: the frames (i, j) of each batch item, i first; every frame in at least two pairs
        on each side. Of VGGT they are all pairs of its frames, and not given.

    Of a pair, block and head: the mean over queries of scale · q·k, a map over keys. The first
    decoder's lies on frame j, the second's on i. Of each frame: mean and standard deviation (n − 1)
    over its pairs, then min–max over all frames, mean over blocks and heads, min–max again, with
    1e-6 below; the top left patch of a map takes the mean of its two neighbours, as the authors do.
    With a for the first decoder, b for the second: (1 − mean a) · spread a · mean b · (1 − spread
    b), min–max in each frame.

    Cost: `E·N·h·d` multiply-adds for each of E pairs and each block. InputError where pairs do not
    fit, a decoder is missing, or frames have fewer than two pairs; LayoutError where keys are not
    the patches of one picture.
    """
    if isinstance(captured, Attention):
        raise InputError(
            "dynamic goes over several blocks: hand over what was captured of them all"
        )
    onto, text = _of_decoders(captured, pairs) if pairs is not None else _of_global(captured)
    cues = {}
    for name, maps in zip("ab", onto, strict=True):
        short = sorted(frame for frame, several in maps.items() if len(several) < 2)
        if short or sorted(maps) != list(range(len(maps))):
            raise InputError(
                f"every frame is in two pairs or more on each side, got {_counts(maps)} (frame: "
                "pairs): take all pairs, of three frames or more"
            )
        stacks = [torch.stack(maps[frame], -1) for frame in range(len(maps))]
        for stack in stacks:
            stack[0, 0] = (stack[0, 1] + stack[1, 0]) / 2
        cues[f"mean {name}"] = _fused([stack.mean(-1) for stack in stacks])
        cues[f"spread {name}"] = _fused([stack.std(-1) for stack in stacks])
    product = (1 - cues["mean a"]) * cues["spread a"] * cues["mean b"] * (1 - cues["spread b"])
    every = min_max(product, 1, 2, eps=_EPS)
    threshold = adaptive_threshold(every.float())
    label = f"{text}: scale · q·k before the softmax, mean over queries, so not attention"
    return Dynamic(every, every > threshold, threshold, cues, label)


def figure(result: Dynamic, *, images: Any = None) -> NotebookFigure:
    """The maps with the share of each frame that is masked; `images` as of `robust_vggt.figure`."""
    from vistvis.recipes.drawing import frame_maps

    shares = result.mask.double().mean((1, 2)).tolist()
    return frame_maps(
        result.maps,
        title="What moves (Easi3R)",
        note=result.label,
        unit="least to most of the frame",
        names=[f"frame {frame}: {share:.0%} masked" for frame, share in enumerate(shares)],
        images=images,
    )


Maps = dict[int, list[Tensor]]


def _of_decoders(
    captured: Mapping[str, Attention], pairs: Sequence[Pair]
) -> tuple[tuple[Maps, Maps], str]:
    """Of each decoder, by frame, a map `(rows, cols, blocks · heads)` for each of its pairs."""
    decoders: dict[str, list[Tensor]] = defaultdict(list)
    for name in captured:
        a = one(captured, name)
        site = a.site
        if site is None or site.kind != "cross":
            continue
        plain_attention(a, name, "dynamic")
        if a.shape[0] != len(pairs):
            raise InputError(
                f"{name} has {a.shape[0]} pairs of frames, and pairs= names {len(pairs)}: run the "
                "model on all pairs at once"
            )
        if site.key_layout is None or site.key_layout.num_patches != a.shape[3]:
            raise LayoutError(
                f"{name} has {a.shape[3]} keys, which have to be the patches of one picture, and "
                f"its layout is {site.key_layout}"
            )
        decoders["b" if "dec_blocks2" in site.path else "a"].append(_products(a))
    if sorted(decoders) != ["a", "b"]:
        raise InputError(
            "dynamic needs the cross-attention of both decoders (dec_blocks, dec_blocks2): capture "
            "cross_attn of all blocks"
        )
    onto: tuple[Maps, Maps] = defaultdict(list), defaultdict(list)
    for maps, name, side in zip(onto, "ab", (1, 0), strict=True):
        for pair, products in zip(pairs, torch.cat(decoders[name], -1), strict=True):
            maps[pair[side]].append(products)
    return onto, f"cross-attention of two decoders, {len(pairs)} pairs"


def _of_global(captured: Captured) -> tuple[tuple[Maps, Maps], str]:
    """The same of global blocks, whose frames are the pictures of a pair: both sides are one."""
    found = take_all(captured)
    first = next(iter(found.values()))
    frames = range(first.layout.frames)
    if first.attention.shape[0] != 1:
        raise InputError(f"dynamic is about one scene, got a batch of {first.attention.shape[0]}")
    maps: Maps = defaultdict(list)
    for i in frames:
        for j in frames:
            if i == j:
                continue
            parts = []
            for taken in found.values():
                plain_attention(taken.attention, taken.text, "dynamic")
                query, key = (
                    tokens.detach()[0, :, taken.patches(frame)].double()
                    for tokens, frame in ((taken.query(), i), (taken.key(), j))
                )
                scale = torch.as_tensor(taken.attention.scale, dtype=torch.float64)
                products = torch.einsum("hd,hnd->nh", query.mean(1), key) * scale
                parts.append(rearrange(products, "(r c) h -> r c h", r=taken.layout.grid[0]))
            maps[j].append(torch.cat(parts, -1))
    return (maps, maps), "global blocks in place of both decoders, all pairs of frames"


def _products(a: Attention) -> Tensor:
    """The mean over queries of scale · q·k, `(E, rows, cols, h)` float64."""
    layout = a.key_layout
    assert layout is not None
    key = a.key.repeat_interleave(a.groups, 1).detach().double()
    scale = torch.as_tensor(a.scale, dtype=torch.float64)
    mean = a.query.detach().double().mean(2)
    products = torch.einsum("ehd,ehnd->enh", mean, key) * scale
    return rearrange(products, "e (r c) h -> e r c h", r=layout.grid[0])


def _fused(maps: Sequence[Tensor]) -> Tensor:
    """`(S, rows, cols)`, from `(rows, cols, channels)` of each frame."""
    channels = min_max(torch.stack(list(maps)), 0, 1, 2, 3, eps=_EPS)
    return min_max(channels.mean(-1), 0, 1, 2, eps=_EPS)


def _counts(maps: Maps) -> str:
    return ", ".join(f"{frame}: {len(several)}" for frame, several in sorted(maps.items()))
