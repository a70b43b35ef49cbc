"""Numbers of one query token: its attention over every patch, laid out as pictures.

Everything that a figure or a file shows is computed here, from one row of the attention per head;
the N×N matrix is never touched.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vistvis import Attention, SiteInfo, TokenLayout, TokenPlace
from vistvis.errors import IndexOutOfRange, InputError, VistvisWarning

ATTENTION_TYPES = ("frame", "global")
HEAD_REDUCTIONS = ("mean", "max")
# What plain tensors can't say about themselves: VGGT's numbers.
PATCH_SIZE = 14
PATCH_START = 5

Weights: TypeAlias = "Attention | Tensor | NDArray[Any]"
Images: TypeAlias = "Tensor | NDArray[Any]"
Head: TypeAlias = "SupportsIndex | str"
FloatArray: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Match:
    """The patch of one frame that a query attends to most.

    `weight` is its value, `share` the sum over all patches of that frame.
    """

    place: TokenPlace
    weight: float
    share: float


@dataclass(frozen=True, eq=False)
class QueryValues:
    """What one query token attends to.

    Attributes
    ----------
    attention_type
        "frame" or "global".
    layout
        All S frames.
    query
        Where the query lies, counted absolutely over all frames.
    requested
        The token index that was asked for, before it was moved to a patch.
    maps
        `(F, rows, cols)`: weights of the patches of the frames shown, F = S for global attention,
        1 for frame attention.
    images
        `(S, H, W, 3)` in [0, 1].
    head, batch
        Which head (or "mean", "max" over `num_heads`) and picture batch.
    patch_mass
        Sum of the raw weights on patches; the rest lies on special tokens.
    renormalized
        `maps` were divided by `patch_mass`.
    site
        Where the weights come from, as far as they say.
    """

    attention_type: str
    layout: TokenLayout
    query: TokenPlace
    requested: int
    maps: FloatArray
    images: FloatArray
    head: int | str
    num_heads: int
    batch: int
    patch_mass: float
    renormalized: bool
    site: SiteInfo | None = None

    @property
    def frames(self) -> range:
        """The frames that `maps` shows."""
        if self.attention_type == "global":
            return range(self.layout.frames)
        return range(self.query.frame, self.query.frame + 1)

    @property
    def token_idx(self) -> int:
        """The query as its attention counts: within its frame, or absolutely."""
        return self.query.token_in_frame if self.attention_type == "frame" else self.query.token

    @cached_property
    def resized(self) -> FloatArray:
        """`(F, H, W)`: the maps at the size of the pictures, bilinear."""
        from vistvis.overlay import resize

        return resize(self.maps, size=self.layout.image_size)

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The strongest patch of every frame shown."""
        found = []
        for frame, weights in zip(self.frames, self.maps, strict=True):
            patch = int(weights.argmax())
            place = self.layout.locate(self.layout.index(frame=frame, patch=patch))
            found.append(Match(place, float(weights.max()), float(weights.sum())))
        return tuple(found)

    @property
    def metadata(self) -> dict[str, Any]:
        """The plain numbers that go with the maps."""
        height, width = self.layout.image_size
        return {
            "grid_h": self.layout.grid[0],
            "grid_w": self.layout.grid[1],
            "H": height,
            "W": width,
            "S": self.layout.frames,
            "token_idx": self.token_idx,
            "head_idx": self.head,
            "attention_type": self.attention_type,
            "patch_start_idx": self.layout.patch_start_idx,
            "patch_mass": self.patch_mass,
            "frame_idx": self.query.frame,
            "token_in_frame": self.query.token_in_frame,
            "batch_idx": self.batch,
            "requested_token_idx": self.requested,
            "renormalized": self.renormalized,
            "patch_size": self.layout.patch_size,
            "block_idx": self.site.block if self.site else None,
        }

    def as_dict(self) -> dict[str, Any]:
        """What `get_attention_values` returns."""
        single = self.attention_type == "frame"
        return {
            "attention_maps": self.maps[0] if single else self.maps,
            "attention_maps_resized": self.resized[0] if single else self.resized,
            "images": self.images,
            "metadata": self.metadata,
        }


def get_attention_values(
    attn_weights: Weights,
    images: Images,
    token_idx: SupportsIndex,
    head_idx: Head = 0,
    patch_start_idx: SupportsIndex | None = None,
    attention_type: str | None = None,
    *,
    frame_idx: SupportsIndex | None = None,
    batch_idx: SupportsIndex = 0,
    patch_size: int | tuple[int, int] | None = None,
    renormalize: bool = False,
    allow_special: bool = False,
) -> dict[str, Any]:
    """Attention of one query token over the patches, as arrays.

    Parameters
    ----------
    attn_weights
        `(B·S, h, P, P)` of a frame block or `(B, h, S·P, S·P)` of a global one: an `Attention`, or
        a plain tensor or array.
    images
        `(S, 3, H, W)` or `(B, S, 3, H, W)` in [0, 1], as the model got them.
    token_idx
        Within its frame for frame attention, absolute for global attention. One that is no patch
        is moved to the nearest patch of its frame (past the end: the last patch of the last
        frame), with a `VistvisWarning` that names both.
    head_idx
        A head, or "mean" or "max" over all heads.
    patch_start_idx
        Special tokens per frame. Default: what the weights say, else 5.
    attention_type
        "frame" or "global". Default: what the weights say, else what their size says.
    frame_idx
        The frame of frame attention; default 0. Global attention takes it from `token_idx`.
    batch_idx
        Which of the B batches.
    patch_size
        In pixels. Default: what the weights say, else 14.
    renormalize
        Divide by the mass on patches, so that the maps sum to 1. Default: raw softmax weights over
        all tokens, special ones included.
    allow_special
        Take a camera or register token as the query, where one is asked for.

    Returns
    -------
    dict
        'attention_maps': `(rows, cols)` for frame attention, `(S, rows, cols)` for global;
        'attention_maps_resized': the same at `(H, W)`, bilinear; 'images': `(S, H, W, 3)` in
        [0, 1]; 'metadata': grid_h, grid_w, H, W, S, token_idx, head_idx, attention_type,
        patch_start_idx, patch_mass, frame_idx, token_in_frame, batch_idx, requested_token_idx,
        renormalized, patch_size, block_idx.

    Raises
    ------
    InputError
        If weights, pictures and arguments contradict each other.
    IndexOutOfRange
        If the head, frame or batch does not exist.

    Cost: one row of each head asked for, `S·P·d` multiply-adds a head, and the resizing.
    """
    return query_values(
        attn_weights,
        images,
        token_idx,
        head_idx=head_idx,
        patch_start_idx=patch_start_idx,
        attention_type=attention_type,
        frame_idx=frame_idx,
        batch_idx=batch_idx,
        patch_size=patch_size,
        renormalize=renormalize,
        allow_special=allow_special,
    ).as_dict()


def query_values(
    attn_weights: Weights,
    images: Images,
    token_idx: SupportsIndex,
    *,
    head_idx: Head = 0,
    patch_start_idx: SupportsIndex | None = None,
    attention_type: str | None = None,
    frame_idx: SupportsIndex | None = None,
    batch_idx: SupportsIndex = 0,
    patch_size: int | tuple[int, int] | None = None,
    renormalize: bool = False,
    allow_special: bool = False,
) -> QueryValues:
    """The same as `get_attention_values`, as an object that figures are drawn from."""
    attention = as_attention(attn_weights)
    batches, frames, height, width = images_shape(images)
    layout = _layout(attention, (frames, height, width), patch_start_idx, patch_size)
    kind = _attention_type(attention, layout, attention_type)
    _check_batches(attention, kind, batches, frames)
    batch = _within("batch_idx", batch_idx, batches)

    token = operator.index(token_idx)
    if kind == "frame":
        frame = _within("frame_idx", 0 if frame_idx is None else frame_idx, frames)
        inner = resolve_token(layout.frame_layout(), token, allow_special=allow_special, of=layout)
        query = layout.locate(layout.index(frame=frame, token=inner.token))
        row, keys, at = inner.token, layout.frame_layout(), batch * frames + frame
    else:
        query = resolve_token(layout, token, allow_special=allow_special)
        if frame_idx is not None and operator.index(frame_idx) != query.frame:
            raise InputError(
                f"global attention counts tokens over all frames: token {query.token} lies in "
                f"frame {query.frame}, not in frame_idx={frame_idx}. Leave frame_idx out, or take "
                f"token_idx=frame_idx * {layout.tokens_per_frame} + token_in_frame"
            )
        row, keys, at = query.token, layout, batch

    head = _head(head_idx, attention.shape[1])
    weights = _row(attention, at, head, row)
    maps: FloatArray = keys.maps(weights)
    mass = float(maps.sum(dtype=np.float64))
    if renormalize:
        if mass <= 0:
            raise InputError(
                f"{query} gives no weight to any patch, so it can't be renormalised; "
                "leave renormalize=False"
            )
        maps = maps / mass
    return QueryValues(
        attention_type=kind,
        layout=layout,
        query=query,
        requested=token,
        maps=maps,
        images=pictures(images, batch=batch),
        head=head,
        num_heads=int(attention.shape[1]),
        batch=batch,
        patch_mass=mass,
        renormalized=renormalize,
        site=attention.site,
    )


def resolve_token(
    layout: TokenLayout,
    token_idx: SupportsIndex,
    *,
    allow_special: bool = False,
    of: TokenLayout | None = None,
) -> TokenPlace:
    """The query token that is meant, moved to the nearest patch where it is none.

    Parameters
    ----------
    layout
        What `token_idx` counts in.
    of
        The layout of all frames, where `layout` is one frame of it; only for the warning's text.

    A special token is kept with `allow_special=True`. Moving it warns (`VistvisWarning`).
    """
    token = operator.index(token_idx)
    inside = 0 <= token < layout.num_tokens
    if inside:
        place = layout.locate(token)
        if place.is_patch or allow_special:
            return place
        what = f"is a {place.kind} token"
        fix = "; allow_special=True keeps it"
    else:
        what = f"is outside 0…{layout.num_tokens - 1}"
        fix = ""
        if of is not None and 0 <= token < of.num_tokens:
            meant = of.locate(token)
            fix = (
                f". Frame attention counts within its frame: the absolute token {token} is "
                f"frame_idx={meant.frame}, token_idx={meant.token_in_frame}"
            )
    moved = layout.locate(layout.nearest_patch(token))
    warnings.warn(
        f"token_idx {token} {what}; using the nearest patch instead, {moved}{fix}",
        VistvisWarning,
        stacklevel=4,
    )
    return moved


def as_attention(weights: Weights) -> Attention:
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
    return np.clip(array, 0, 1)


# -- what fits what ------------------------------------------------------------------------------


def _layout(
    attention: Attention,
    size: tuple[int, int, int],
    patch_start_idx: SupportsIndex | None,
    patch_size: int | tuple[int, int] | None,
) -> TokenLayout:
    """The layout of all S frames, from the site where there is one, else from the pictures."""
    frames, height, width = size
    known = attention.site.key_layout if attention.site else None
    if known is not None:
        layout = replace(known, frames=frames)
        start = (
            known.patch_start_idx if patch_start_idx is None else operator.index(patch_start_idx)
        )
        if start != known.patch_start_idx:
            raise InputError(
                f"patch_start_idx={start}, but {_name(attention)} has {known.patch_start_idx} "
                "special tokens per frame; leave patch_start_idx out"
            )
        if patch_size is not None and replace(known, patch_size=patch_size) != known:
            raise InputError(
                f"patch_size={patch_size}, but {_name(attention)} has patches of "
                f"{known.patch_size}; leave patch_size out"
            )
        if known.image_size != (height, width):
            raise InputError(
                f"{_name(attention)} saw pictures of {_size(*known.image_size)}, the images are "
                f"{_size(height, width)}; pass the images that the model got"
            )
        whole = attention.site is not None and attention.site.kind == "global"
        if whole and known.frames != frames:
            raise InputError(
                f"{_name(attention)} saw {known.frames} frames, images has {frames}; pass the "
                "images that the model got"
            )
        return layout
    start = PATCH_START if patch_start_idx is None else operator.index(patch_start_idx)
    if start < 0:
        raise InputError(f"patch_start_idx counts special tokens, got {start}")
    special = ("camera", *("register",) * 4) if start == PATCH_START else ("special",) * start
    one = TokenLayout(1, (1, 1), special, PATCH_SIZE if patch_size is None else patch_size)  # type: ignore[arg-type]
    if height % one.patch_size[0] or width % one.patch_size[1]:
        raise InputError(
            f"pictures of {_size(height, width)} are no whole number of patches of "
            f"{one.patch_size[0]}×{one.patch_size[1]} pixels; pass patch_size=, or the images that "
            "the model got"
        )
    return replace(
        one, frames=frames, grid=(height // one.patch_size[0], width // one.patch_size[1])
    )


def _attention_type(attention: Attention, layout: TokenLayout, wanted: str | None) -> str:
    """ "frame" or "global", checked against what the weights are."""
    if wanted is not None and wanted not in ATTENTION_TYPES:
        raise InputError(f"attention_type is 'frame' or 'global', got {wanted!r}")
    tokens = attention.shape[-1]
    one, whole = layout.tokens_per_frame, layout.num_tokens
    said = attention.site.kind if attention.site else ""
    if said and said not in (*ATTENTION_TYPES, "self"):
        raise InputError(f"{_name(attention)} is {said} attention, neither frame nor global")
    is_a = said if said in ATTENTION_TYPES else ""
    if not is_a:
        if tokens == one == whole:
            is_a = wanted or ("frame" if attention.shape[0] > 1 else "global")
        elif tokens in (one, whole):
            is_a = "frame" if tokens == one else "global"
    expected = {"frame": one, "global": whole}.get(is_a)
    if tokens != expected:
        raise InputError(
            f"{_name(attention)} has {tokens} tokens, which fits neither frame attention "
            f"({one} = {layout.num_special} special + {layout.grid[0]}×{layout.grid[1]} patches) "
            f"nor global attention of {layout.frames} frames ({whole}); pass the images that the "
            "model got, and patch_size and patch_start_idx of that model"
        )
    if wanted is not None and wanted != is_a:
        here, there = ("one frame", "all frames") if is_a == "frame" else ("all frames", "one")
        raise InputError(
            f"attention_type={wanted!r}, but {_name(attention)} is {is_a} attention: {tokens} "
            f"tokens are {here} of {one}, not {there}. Pass attention_type={is_a!r}, or "
            f"result['{wanted}_attention']['attn_weights']"
        )
    return is_a


def _check_batches(attention: Attention, kind: str, batches: int, frames: int) -> None:
    found = attention.shape[0]
    expected = batches * frames if kind == "frame" else batches
    if found != expected:
        size = f"B·S = {batches}·{frames}" if kind == "frame" else f"B = {batches}"
        raise InputError(
            f"{_name(attention)} holds {found} in its batch dimension, images say {size}; pass "
            "images (B, S, 3, H, W) as the model got them, and the weights of all of them"
        )


def _head(head_idx: Head, heads: int) -> int | str:
    if isinstance(head_idx, str):
        if head_idx not in HEAD_REDUCTIONS:
            raise InputError(f"head_idx is a head, 'mean' or 'max', got {head_idx!r}")
        return head_idx
    head = operator.index(head_idx)
    if not -heads <= head < heads:
        raise IndexOutOfRange(f"head_idx {head} is outside 0…{heads - 1}; 'mean' takes all heads")
    return head % heads


def _row(attention: Attention, batch: int, head: int | str, query: int) -> FloatArray:
    """Weights of one query over all keys, `(Nk,)`."""
    with torch.no_grad():
        if isinstance(head, int):
            row = attention.rows(query, batch=batch, heads=head)[0, 0, 0]
        else:
            rows = attention.rows(query, batch=batch)[0, :, 0]
            row = rows.mean(0) if head == "mean" else rows.amax(0)
    values: FloatArray = row.detach().cpu().numpy()
    if not np.isfinite(values).all():
        raise InputError(
            f"the weights of {_name(attention)}, token {query}, hold NaN or infinity: the model "
            "overflowed (float16?); run it in bfloat16 or float32"
        )
    return values


def _within(name: str, value: SupportsIndex, size: int) -> int:
    number = operator.index(value)
    if not 0 <= number < size:
        raise IndexOutOfRange(f"{name} {number} is outside 0…{size - 1}")
    return number


def _name(attention: Attention) -> str:
    return repr(attention.site.name) if attention.site else "attn_weights"


def _size(height: int, width: int) -> str:
    return f"{width}×{height} pixels"
