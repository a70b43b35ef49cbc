"""What a caller hands in, checked against each other: weights, pictures, type, head, batch.

Plain tensors say little about themselves; an `Attention` that was captured says everything. Either
way the answer is one layout and one type, or an error that says which two things contradict.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vistvis import Attention, TokenLayout
from vistvis.errors import IndexOutOfRange, InputError

ATTENTION_TYPES = ("frame", "global")
HEAD_REDUCTIONS = ("mean", "max")
# What plain tensors can't say about themselves: VGGT's numbers.
PATCH_SIZE = 14
PATCH_START = 5

Weights: TypeAlias = "Attention | Tensor | NDArray[Any]"
Images: TypeAlias = "Tensor | NDArray[Any]"
Head: TypeAlias = "SupportsIndex | str"
FloatArray: TypeAlias = NDArray[np.floating[Any]]


def as_attention(weights: Any) -> Attention:
    """Weights of any accepted kind as `Attention`, `(B, h, N, N)`, without copying them.

    Raises
    ------
    InputError
        If they are something else.
    """
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
    """`(B, S, H, W)` of pictures `(S, 3, H, W)` (B = 1) or `(B, S, 3, H, W)`.

    Raises
    ------
    InputError
        If they have another shape, or there are none.
    """
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) not in (4, 5) or shape[-3] != 3 or 0 in shape:
        raise InputError(
            f"images are (S, 3, H, W) or (B, S, 3, H, W) in [0, 1], got {shape or type(images)}; "
            "load_and_preprocess_images(paths) gives them so"
        )
    batches, frames = (1, shape[0]) if len(shape) == 4 else shape[:2]
    return int(batches), int(frames), int(shape[-2]), int(shape[-1])


def pictures(images: Images, *, batch: int = 0) -> FloatArray:
    """One batch of `images` as `(S, H, W, 3)` float32 in [0, 1].

    Raises
    ------
    InputError
        If the values are not those of a picture in [0, 1] (or uint8).
    """
    tensor = torch.as_tensor(images)
    chosen = (tensor[batch] if tensor.ndim == 5 else tensor).detach().cpu()
    if chosen.dtype == torch.uint8:
        chosen = chosen.float() / 255
    array: FloatArray = chosen.float().permute(0, 2, 3, 1).numpy()
    low, high = float(array.min()), float(array.max())
    # Bicubic resizing overshoots a little; anything beyond is another scale.
    if not (low >= -0.5 and high <= 1.5):
        raise InputError(
            f"images are in [0, 1], got values {low:.3g} … {high:.3g}; divide by 255, or undo the "
            "normalisation"
        )
    # Of eight frames a copy takes 26 MB; most pictures need none.
    return np.clip(array, 0, 1) if low < 0 or high > 1 else array


def layout_of(
    attention: Attention,
    size: tuple[int, int, int],
    patch_start_idx: SupportsIndex | None,
    patch_size: int | tuple[int, int] | None,
) -> TokenLayout:
    """The layout of all S frames, from the site where there is one, else from the pictures.

    `size` is `(S, H, W)` of the pictures.
    """
    frames, height, width = size
    wanted: Any = patch_size  # an int or a pair; the layout takes either
    known = attention.site.key_layout if attention.site else None
    if known is not None:
        layout = replace(known, frames=frames)
        start = (
            known.patch_start_idx if patch_start_idx is None else operator.index(patch_start_idx)
        )
        if start != known.patch_start_idx:
            raise InputError(
                f"patch_start_idx={start}, but {name_of(attention)} has {known.patch_start_idx} "
                "special tokens per frame; leave patch_start_idx out"
            )
        if patch_size is not None and replace(known, patch_size=wanted) != known:
            raise InputError(
                f"patch_size={patch_size}, but {name_of(attention)} has patches of "
                f"{known.patch_size}; leave patch_size out"
            )
        if known.image_size != (height, width):
            raise InputError(
                f"{name_of(attention)} saw pictures of {_size(*known.image_size)}, the images are "
                f"{_size(height, width)}; pass the images that the model got"
            )
        whole = attention.site is not None and attention.site.kind == "global"
        if whole and known.frames != frames:
            raise InputError(
                f"{name_of(attention)} saw {known.frames} frames, images has {frames}; pass the "
                "images that the model got"
            )
        return layout
    start = PATCH_START if patch_start_idx is None else operator.index(patch_start_idx)
    if start < 0:
        raise InputError(f"patch_start_idx counts special tokens, got {start}")
    special = ("camera", *("register",) * 4) if start == PATCH_START else ("special",) * start
    one = TokenLayout(1, (1, 1), special, wanted or (PATCH_SIZE, PATCH_SIZE))
    if height % one.patch_size[0] or width % one.patch_size[1]:
        raise InputError(
            f"pictures of {_size(height, width)} are no whole number of patches of "
            f"{one.patch_size[0]}×{one.patch_size[1]} pixels; pass patch_size=, or the images that "
            "the model got"
        )
    return replace(
        one, frames=frames, grid=(height // one.patch_size[0], width // one.patch_size[1])
    )


def type_of(attention: Attention, layout: TokenLayout, wanted: str | None) -> str:
    """ "frame" or "global", checked against what the weights are."""
    if wanted is not None and wanted not in ATTENTION_TYPES:
        raise InputError(f"attention_type is 'frame' or 'global', got {wanted!r}")
    tokens = attention.shape[-1]
    one, whole = layout.tokens_per_frame, layout.num_tokens
    said = attention.site.kind if attention.site else ""
    if said and said not in (*ATTENTION_TYPES, "self"):
        raise InputError(f"{name_of(attention)} is {said} attention, neither frame nor global")
    is_a = said if said in ATTENTION_TYPES else ""
    if not is_a:
        if tokens == one == whole:
            is_a = wanted or ("frame" if attention.shape[0] > 1 else "global")
        elif tokens in (one, whole):
            is_a = "frame" if tokens == one else "global"
    expected = {"frame": one, "global": whole}.get(is_a)
    if tokens != expected:
        raise InputError(
            f"{name_of(attention)} has {tokens} tokens, which fits neither frame attention "
            f"({one} = {layout.num_special} special + {layout.grid[0]}×{layout.grid[1]} patches) "
            f"nor global attention of {layout.frames} frames ({whole}); pass the images that the "
            "model got, and patch_size and patch_start_idx of that model"
        )
    if wanted is not None and wanted != is_a:
        here, there = ("one frame", "all frames") if is_a == "frame" else ("all frames", "one")
        raise InputError(
            f"attention_type={wanted!r}, but {name_of(attention)} is {is_a} attention: {tokens} "
            f"tokens are {here} of {one}, not {there}. Pass attention_type={is_a!r}, or "
            f"result['{wanted}_attention']['attn_weights']"
        )
    return is_a


def check_batches(attention: Attention, kind: str, batches: int, frames: int) -> None:
    found = attention.shape[0]
    expected = batches * frames if kind == "frame" else batches
    if found != expected:
        size = f"B·S = {batches}·{frames}" if kind == "frame" else f"B = {batches}"
        raise InputError(
            f"{name_of(attention)} holds {found} in its batch dimension, images say {size}; pass "
            "images (B, S, 3, H, W) as the model got them, and the weights of all of them"
        )


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
