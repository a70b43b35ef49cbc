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

from vggt_adapter.config import PATCH_SIZE
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.errors import IndexOutOfRange, InputError

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
    if attention.shape[2] != attention.shape[3]:
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


def layout_of(attention: Attention, size: tuple[int, int, int], query: Query) -> TokenLayout:
    """The layout of all frames, from the site where there is one, else from pictures (S, H, W)."""
    site = attention.site
    if site is not None and site.key_layout is not None:
        return _layout_of_site(site, site.key_layout, size, query)
    frames, height, width = size
    given = query.patch_start_idx
    start = len(SPECIAL) if given is None else operator.index(given)
    if start < 0:
        raise InputError(f"patch_start_idx counts special tokens, got {start}")
    special = SPECIAL if start == len(SPECIAL) else ("special",) * start
    patch: Any = query.patch_size or PATCH_SIZE  # an int or a pair; the layout takes either
    layout = TokenLayout(frames, (1, 1), special, patch)
    down, across = layout.patch_size
    if height % down or width % across:
        raise InputError(
            f"pictures of {_size(height, width)} are no whole number of patches of "
            f"{down}×{across} pixels; pass patch_size=, or the images that the model got"
        )
    return replace(layout, grid=(height // down, width // across))


def _layout_of_site(
    site: SiteInfo, layout: TokenLayout, size: tuple[int, int, int], query: Query
) -> TokenLayout:
    (frames, height, width), name = size, repr(site.name)
    start: Any = query.patch_start_idx
    patch: Any = query.patch_size
    if start is not None and operator.index(start) != layout.patch_start_idx:
        raise InputError(
            f"patch_start_idx={start}, but {name} has {layout.patch_start_idx} special tokens per "
            "frame; leave patch_start_idx out"
        )
    if patch is not None and replace(layout, patch_size=patch) != layout:
        raise InputError(
            f"patch_size={patch}, but {name} has patches of {layout.patch_size}; leave patch_size "
            "out"
        )
    if layout.image_size != (height, width):
        raise InputError(
            f"{name} saw pictures of {_size(*layout.image_size)}, the images are "
            f"{_size(height, width)}; pass the images that the model got"
        )
    if site.kind == "global" and layout.frames != frames:
        raise InputError(
            f"{name} saw {layout.frames} frames, images has {frames}; pass the images that the "
            "model got"
        )
    return replace(layout, frames=frames)


def kind_of(
    attention: Attention, layout: TokenLayout, batches: int, attention_type: str | None
) -> str:
    """ "frame" or "global": `attention_type`, checked against what the weights are and hold."""
    if attention_type is not None and attention_type not in ATTENTION_TYPES:
        raise InputError(f"attention_type is 'frame' or 'global', got {attention_type!r}")
    name, tokens = name_of(attention), attention.shape[-1]
    one, whole = layout.tokens_per_frame, layout.num_tokens
    kind = attention.site.kind if attention.site else "self"
    if kind not in (*ATTENTION_TYPES, "self"):
        raise InputError(f"{name} is {kind} attention, neither frame nor global")
    if kind == "self" and tokens == one == whole:
        kind = attention_type or ("frame" if attention.shape[0] > 1 else "global")
    elif kind == "self":
        kind = "frame" if tokens == one else "global"
    if tokens != (one if kind == "frame" else whole):
        raise InputError(
            f"{name} has {tokens} tokens, which fits neither frame attention ({one} = "
            f"{layout.num_special} special + {layout.grid[0]}×{layout.grid[1]} patches) nor global "
            f"attention of {layout.frames} frames ({whole}); pass the images that the model got, "
            "and patch_size and patch_start_idx of that model"
        )
    if attention_type is not None and attention_type != kind:
        here, there = ("one frame", "all frames") if kind == "frame" else ("all frames", "one")
        raise InputError(
            f"attention_type={attention_type!r}, but {name} is {kind} attention: {tokens} tokens "
            f"are {here} of {one}, not {there}. Pass attention_type={kind!r}, or "
            f"result['{attention_type}_attention']['attn_weights']"
        )
    size, expected = f"B = {batches}", batches
    if kind == "frame":
        size, expected = f"B·S = {batches}·{layout.frames}", batches * layout.frames
    if attention.shape[0] != expected:
        raise InputError(
            f"{name} holds {attention.shape[0]} in its batch dimension, images say {size}; pass "
            "images (B, S, 3, H, W) as the model got them, and the weights of all of them"
        )
    return kind


def checked_types(attention_types: str | Sequence[str]) -> list[str]:
    """The attention types that are asked for, frame first."""
    asked = [attention_types] if isinstance(attention_types, str) else list(attention_types)
    if not asked or any(kind not in ATTENTION_TYPES for kind in asked):
        raise InputError(
            f"attention types are {' and '.join(map(repr, ATTENTION_TYPES))}, got {asked!r}"
        )
    return [kind for kind in ATTENTION_TYPES if kind in asked]


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
