"""What a caller hands in, checked against each other: weights, pictures, type, head, batch.

The answer is one layout and one type, or an InputError that says which two things contradict.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vggt_adapter.blocks import TYPES
from vggt_adapter.config import PATCH_SIZE
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.errors import IndexOutOfRange, InputError

# What plain tensors can be, and what comes in pairs of blocks.
ATTENTION_TYPES = ("frame", "global")
HEAD_REDUCTIONS = ("mean", "max")
# What plain tensors can't say about themselves: VGGT's special tokens.
SPECIAL = ("camera", *("register",) * 4)

Weights: TypeAlias = "Attention | Tensor | NDArray[Any]"
Images: TypeAlias = "Tensor | NDArray[Any]"
Head: TypeAlias = "SupportsIndex | str"
FloatArray: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Query:
    """The row that is meant, and its layout, as in `get_attention_values`."""

    token_idx: SupportsIndex
    head_idx: Head = 0
    patch_start_idx: SupportsIndex | None = None
    attention_type: str | None = None
    frame_idx: SupportsIndex | None = None
    batch_idx: SupportsIndex = 0
    patch_size: int | tuple[int, int] | None = None
    renormalize: bool = False
    allow_special: bool = False


def as_attention(weights: Any) -> Attention:
    """Weights of any accepted kind as `Attention`, `(B, h, N, N)`, without copying them."""
    if isinstance(weights, Attention):
        attention = weights
    elif isinstance(weights, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(weights)
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise InputError(
                "attn_weights are floating, (B·S, h, P, P) for frame or (B, h, S·P, S·P) for "
                f"global attention; got {tuple(tensor.shape)} of {tensor.dtype}"
            )
        attention = Attention.from_weights(tensor)
    elif isinstance(weights, Sequence) and weights:
        raise InputError(
            f"attn_weights is a list of {len(weights)} passes (accumulate=True?): choose one, "
            "for example attn_weights[-1]"
        )
    else:
        raise InputError(
            "attn_weights is an Attention, a tensor or an array, for example "
            f"result['global_attention']['attn_weights']; got {type(weights).__name__}"
        )
    if attention.site is None and attention.shape[2] != attention.shape[3]:
        raise InputError(
            f"frame and global attention have as many queries as keys, got {attention.shape[2]} "
            f"and {attention.shape[3]}: these weights come from another kind of attention"
        )
    return attention


def images_shape(images: Images) -> tuple[int, int, int, int]:
    """`(B, S, H, W)` of pictures `(S, 3, H, W)` (B = 1) or `(B, S, 3, H, W)`."""
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) not in (4, 5) or shape[-3] != 3 or 0 in shape:
        raise InputError(
            f"images are (S, 3, H, W) or (B, S, 3, H, W) in [0, 1], got {shape or type(images)}; "
            "load_and_preprocess_images(paths) gives them so"
        )
    batches, frames = (1, shape[0]) if len(shape) == 4 else shape[:2]
    return int(batches), int(frames), int(shape[-2]), int(shape[-1])


@dataclass(frozen=True)
class Sides:
    """What the indices of weights mean, checked against the pictures."""

    kind: str
    """ "frame", "global", "register" or "cross"."""
    layout: TokenLayout
    """All S pictures."""
    query: TokenLayout
    key: TokenLayout


def sides_of(attention: Attention, size: tuple[int, int, int, int], query: Query) -> Sides:
    """From the site where there is one, else from the pictures `(B, S, H, W)`."""
    asked, site = query.attention_type, attention.site
    types = ATTENTION_TYPES if site is None else TYPES
    if asked not in (None, *types):
        raise InputError(f"attention_type is {' or '.join(map(repr, types))}, got {asked!r}")
    if site is None:
        layout = _layout_of_pictures(size[1:], query)
        kind = _kind_by_size(attention, layout, asked)
        query_layout = key_layout = layout.frame_layout() if kind == "frame" else layout
    else:
        query_layout, key_layout = _layouts_of_site(site, size[2:], query)
        layout, kind = key_layout, site.kind
        if key_layout.frames == 1 and kind in ("frame", "self"):
            layout = replace(key_layout, frames=size[1])
        if kind == "self":
            kind = _kind_by_size(attention, layout, asked)
        if kind not in TYPES:
            raise InputError(f"{site.name!r} is {kind} attention, none of {', '.join(TYPES)}")
        if layout.frames != size[1]:
            raise InputError(
                f"{site.name!r} saw {layout.frames} frames, images has {size[1]}; pass the images "
                "that the model got"
            )
    if asked not in (None, kind):
        one, some = layout.tokens_per_frame, attention.shape[-1]
        raise InputError(
            f"attention_type={asked!r}, but {name_of(attention)} is {kind} attention: {some} keys, "
            f"with {one} tokens in a frame. Pass attention_type={kind!r}, or other weights"
        )
    sides = Sides(kind, layout, query_layout, key_layout)
    _check_counts(attention, sides)
    _check_batch(attention, kind, size)
    return sides


def _layout_of_pictures(size: tuple[int, int, int], query: Query) -> TokenLayout:
    """For plain tensors, which say nothing: VGGT's, unless arguments say another one."""
    frames, height, width = size
    special: Any = SPECIAL if query.patch_start_idx is None else query.patch_start_idx
    if special is not SPECIAL and operator.index(special) < 0:
        raise InputError(f"patch_start_idx counts special tokens, got {special}")
    patch: Any = query.patch_size or PATCH_SIZE  # an int or a pair; the layout takes either
    layout = TokenLayout(frames, (1, 1), special, patch)
    down, across = layout.patch_size
    if height % down or width % across:
        raise InputError(
            f"pictures of {_size(height, width)} are no whole number of patches of "
            f"{down}×{across} pixels; pass patch_size=, or the images that the model got"
        )
    return replace(layout, grid=(height // down, width // across))


def _layouts_of_site(
    site: SiteInfo, size: tuple[int, int], query: Query
) -> tuple[TokenLayout, TokenLayout]:
    name, (height, width) = repr(site.name), size
    layout = site.key_layout
    if layout is None or site.query_layout is None:
        side = "keys" if layout is None else "queries"
        raise InputError(
            f"which patches the {side} of {name} are is not known: they are none, or nobody has "
            "described this model. vistvis.capture(model, layout=TokenLayout(frames, (rows, cols), "
            "special=(…), patch_size=…)) says it, vistvis.trace_layout(model, images) measures it"
        )
    start: Any = query.patch_start_idx
    patch: Any = query.patch_size
    if start is not None and operator.index(start) != layout.patch_start_idx:
        raise InputError(
            f"patch_start_idx={start}, but {name} has {layout.patch_start_idx} special tokens in "
            "front of the patches of a frame; leave patch_start_idx out"
        )
    if patch is not None and replace(layout, patch_size=patch) != layout:
        raise InputError(
            f"patch_size={patch}, but {name} has patches of {layout.patch_size}; leave patch_size "
            "out"
        )
    for seen in (layout.image_size, site.query_layout.image_size):
        if seen != (height, width):
            raise InputError(
                f"{name} saw pictures of {_size(*seen)}, the images are "
                f"{_size(height, width)}; pass the images that the model got"
            )
    return site.query_layout, layout


def _kind_by_size(attention: Attention, layout: TokenLayout, asked: str | None) -> str:
    """ "frame" or "global": what the number of tokens says."""
    tokens, one, whole = attention.shape[-1], layout.tokens_per_frame, layout.num_tokens
    if tokens == one == whole:
        return asked or ("frame" if attention.shape[0] > 1 else "global")
    if tokens not in (one, whole):
        raise InputError(
            f"{name_of(attention)} has {tokens} tokens, which fits neither frame attention ({one} "
            f"= {layout.num_special} special + {layout.grid[0]}×{layout.grid[1]} patches) nor "
            f"global attention of {layout.frames} frames ({whole}); pass the images that the model "
            "got, and patch_size and patch_start_idx of that model"
        )
    return "frame" if tokens == one else "global"


def _check_counts(attention: Attention, sides: Sides) -> None:
    """Orders say how captured tokens and layouts fit; where there is none they are the same."""
    site = attention.site
    orders = (site.query_order, site.key_order) if site else (None, None)
    counts, layouts = attention.shape[2:], (sides.query, sides.key)
    for side, count, layout, order in zip(
        ("queries", "keys"), counts, layouts, orders, strict=True
    ):
        if order is None and count != layout.num_tokens:
            raise InputError(
                f"{name_of(attention)} has {count} {side}, its layout ({layout}) has "
                f"{layout.num_tokens} tokens; run capture again with the layout of this model"
            )


def _check_batch(attention: Attention, kind: str, size: tuple[int, int, int, int]) -> None:
    batches, frames = size[:2]
    said, expected = f"B = {batches}", batches
    if kind == "frame":
        said, expected = f"B·S = {batches}·{frames}", batches * frames
    if attention.shape[0] != expected:
        raise InputError(
            f"{name_of(attention)} holds {attention.shape[0]} in its batch dimension, images say "
            f"{said}; pass images (B, S, 3, H, W) as the model got them, and the weights of all of "
            "them"
        )
    site = attention.site
    if kind == "frame" and min(batches, frames) > 1 and site and not site.frames_in_batch:
        raise InputError(
            f"how {name_of(attention)} folds {frames} frames of {batches} scenes into its batch is "
            "not known; run the model on one scene"
        )


def checked_types(attention_types: str | Sequence[str]) -> list[str]:
    """The attention types that are asked for, in their order."""
    asked = [attention_types] if isinstance(attention_types, str) else list(attention_types)
    if not asked or any(kind not in ATTENTION_TYPES for kind in asked):
        raise InputError(
            f"attention types are {' and '.join(map(repr, ATTENTION_TYPES))}, got {asked!r}"
        )
    return list(dict.fromkeys(asked))


def head_of(head_idx: Head, heads: int) -> int | str:
    if isinstance(head_idx, str):
        if head_idx not in HEAD_REDUCTIONS:
            raise InputError(f"head_idx is a head, 'mean' or 'max', got {head_idx!r}")
        return head_idx
    head = operator.index(head_idx)
    if not -heads <= head < heads:
        raise IndexOutOfRange(f"head_idx {head} is outside 0…{heads - 1}; 'mean' takes all heads")
    return head % heads


def within(name: str, value: SupportsIndex, size: int) -> int:
    number = operator.index(value)
    if not 0 <= number < size:
        raise IndexOutOfRange(f"{name} {number} is outside 0…{size - 1}")
    return number


def name_of(attention: Attention) -> str:
    return repr(attention.site.name) if attention.site else "attn_weights"


def _size(height: int, width: int) -> str:
    return f"{width}×{height} pixels"
