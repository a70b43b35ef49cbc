"""All numbers that a figure or a file of one query token shows, from one row per head."""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex

import numpy as np
import torch

from vggt_adapter.inputs import (
    FloatArray,
    Head,
    Images,
    Query,
    Sides,
    Weights,
    as_attention,
    head_of,
    images_shape,
    name_of,
    sides_of,
    within,
)
from vistvis import Attention, SiteInfo, TokenLayout, TokenPlace
from vistvis.errors import InputError, VistvisWarning
from vistvis.images import to_unit
from vistvis.views.painting import Own, dark_maps, normalizer, resize

# A patch is looked at where it gets more than so many times what each key would get if all got the
# same, in a frame whose patches get at least such a part of what they would get then. Below that a
# largest weight is there, because there always is one, but it says nothing.
_TIMES, _PART = 5.0, 0.05


@dataclass(frozen=True)
class Match:
    """The patch of one frame that a query attends to most."""

    place: TokenPlace
    weight: float
    share: float
    """Sum over all patches of that frame; NaN for "max": maxima over heads add up to nothing."""
    weak: bool
    """Hardly more than if the query looked nowhere in particular: it says nothing of the scene."""


@dataclass(frozen=True, eq=False)
class QueryValues:
    """What one query token attends to."""

    attention_type: str
    layout: TokenLayout
    """All S frames, in the order in which the pictures came in."""
    query: TokenPlace
    """Counted absolutely over all frames."""
    requested: int
    """The token index that was asked for, before it was moved to a patch."""
    frames: tuple[int, ...]
    """Those that the keys lie in: of frame attention one, of global attention all."""
    maps: FloatArray
    """`(F, rows, cols)`, one for each of `frames`."""
    images: FloatArray
    """`(S, H, W, 3)` in [0, 1]."""
    head: int | str
    num_heads: int
    batch: int
    patch_mass: float
    """Sum of the raw weights on patches; the rest lies on special tokens. (For "max" no share.)"""
    renormalized: bool
    """`maps` were divided by `patch_mass`."""
    uniform: float
    """The weight of each key if all had the same, in the units of `maps`."""
    site: SiteInfo | None = None

    @property
    def pictures(self) -> tuple[int, ...]:
        """The frames of a figure: those of the keys, and before them the query's own."""
        own = self.query.frame
        return self.frames if own is None or own in self.frames else (own, *self.frames)

    @property
    def merged(self) -> bool:
        """Whether keys are merged tokens, whose patches share their weight equally."""
        return self.site is not None and _is_merged(self.site)

    @property
    def head_text(self) -> str:
        """For people: "head 3", or "mean of 16 heads"."""
        if isinstance(self.head, int):
            return f"head {self.head}"
        return f"{self.head} of {self.num_heads} heads"

    @cached_property
    def resized(self) -> FloatArray:
        """`(F, H, W)`: the maps at the size of the pictures, bilinear."""
        return resize(self.maps, size=self.layout.image_size)

    @property
    def own(self) -> Own | None:
        """The query's patch in `maps`, as `normalizer` takes it."""
        place = self.query
        if not place.is_patch or place.frame not in self.frames:
            return None
        assert place.row is not None
        assert place.col is not None
        return self.frames.index(place.frame), place.row, place.col

    def dark_frames(self, *, norm: str = "auto") -> tuple[int, ...]:
        """The frames whose maps are dark on this scale, though there is something in them."""
        dark = dark_maps(self.maps, normalizer(self.maps, norm=norm, own=self.own))
        return tuple(self.frames[number] for number in dark)

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The strongest patch of every frame shown."""
        return tuple(
            self._match(frame, weights)
            for frame, weights in zip(self.frames, self.maps, strict=True)
        )

    def _match(self, frame: int, weights: FloatArray) -> Match:
        """The strongest patch of one frame."""
        layout, largest = self.layout, float(weights.max())
        share = float(weights.sum()) if self.head != "max" else math.nan
        weak = largest <= _TIMES * self.uniform or share < _PART * self.uniform * weights.size
        place = layout.locate(layout.index(frame=frame, patch=int(weights.argmax())))
        return Match(place, largest, share, weak)

    @property
    def metadata(self) -> dict[str, Any]:
        """The plain numbers that go with the maps."""
        (rows, cols), (height, width) = self.layout.grid, self.layout.image_size
        query, single = self.query, self.attention_type == "frame"
        return {
            "grid_h": rows,
            "grid_w": cols,
            "H": height,
            "W": width,
            "S": self.layout.frames,
            "token_idx": query.token_in_frame if single else query.token,
            "head_idx": self.head,
            "attention_type": self.attention_type,
            "patch_start_idx": self.layout.patch_start_idx,
            # Maxima over heads may well add up to more than 1.
            "patch_mass": self.patch_mass if self.head != "max" else None,
            "frame_idx": query.frame,
            "token_in_frame": query.token_in_frame,
            "batch_idx": self.batch,
            "requested_token_idx": self.requested,
            "renormalized": self.renormalized,
            "patch_size": self.layout.patch_size,
            "block_idx": self.site.block if self.site else None,
        }

    def as_dict(self) -> dict[str, Any]:
        """What `get_attention_values` returns."""
        shown = 0 if self.attention_type == "frame" else slice(None)
        return {
            "attention_maps": self.maps[shown],
            "attention_maps_resized": self.resized[shown],
            "images": self.images.copy(),
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
        a plain tensor or array. Only an `Attention` can be of register or cross blocks, of a
        cache, or of tokens that the model reordered or merged; it knows which is which.
    images
        `(S, 3, H, W)` or `(B, S, 3, H, W)` in [0, 1], all pictures that the weights are about, in
        the order in which the model got them.
    token_idx
        Within its frame for frame attention, absolute over all pictures otherwise, whatever the
        model did to the order. One that is no patch is moved to the nearest patch of its frame
        (past the end: the last patch of the last frame), with a `VistvisWarning` that names both.
    head_idx
        A head, or "mean" or "max" over all heads.
    patch_start_idx
        Special tokens in front of a frame's patches. Default: what the weights say; for plain
        tensors VGGT's 5.
    attention_type
        "frame", "global", "register" or "cross". Default: what the weights say, else what their
        size says.
    frame_idx
        The frame of frame attention; default 0. Other kinds take it from `token_idx`.
    batch_idx
        Which of the B batches.
    patch_size
        In pixels. Default: what the weights say; for plain tensors VGGT's 14.
    renormalize
        Divide by the mass on patches, so that the maps sum to 1. Default: raw softmax weights over
        all tokens, special ones included.
    allow_special
        Take a camera or register token as the query, where one is asked for.

    Returns
    -------
    dict
        'attention_maps': `(rows, cols)` for frame attention, `(S, rows, cols)` for global, and for
        cross attention one for each picture that its keys lie in;
        'attention_maps_resized': the same at `(H, W)`, bilinear; 'images': `(S, H, W, 3)` in
        [0, 1]; 'metadata': grid_h, grid_w, H, W, S, token_idx, head_idx, attention_type,
        patch_start_idx, patch_mass (None for "max", whose maxima add up to no share), frame_idx,
        token_in_frame, batch_idx, requested_token_idx, renormalized, patch_size, block_idx.

    InputError if weights, pictures and arguments contradict each other; IndexOutOfRange if the
    head, frame or batch does not exist.

    Cost: one row of each head asked for, `S·P·d` multiply-adds a head, and the resizing.
    """
    query = Query(
        token_idx,
        head_idx,
        patch_start_idx,
        attention_type,
        frame_idx,
        batch_idx,
        patch_size,
        renormalize,
        allow_special,
    )
    return query_values(attn_weights, images, query).as_dict()


def query_values(attn_weights: Weights, images: Images, query: Query) -> QueryValues:
    """The same as `get_attention_values`, as an object that figures are drawn from."""
    attention = as_attention(attn_weights)
    size = images_shape(images)
    sides = sides_of(attention, size, query)
    batch = within("batch_idx", query.batch_idx, size[0])
    place = _place_of(attention, sides, query)
    head = head_of(query.head_idx, attention.shape[1])
    row = _row(attention, sides, batch, head, place)
    frames = _frames_of(attention.site, sides, batch, place)
    maps: FloatArray = sides.key.maps(row)
    if sides.kind == "cross":
        maps = maps[list(frames)]
    mass = float(maps.sum(dtype=np.float64))
    if query.renormalize:
        if mass <= 0:
            raise InputError(
                f"{place} gives no weight to any patch, so it can't be renormalised; "
                "leave renormalize=False"
            )
        maps = maps / mass
    # Merged tokens share their weight among the tokens that the row is spread over.
    merged = attention.site is not None and _is_merged(attention.site)
    keys = row.size if merged else attention.shape[3]
    return QueryValues(
        attention_type=sides.kind,
        layout=sides.layout,
        query=place,
        requested=operator.index(query.token_idx),
        frames=frames,
        maps=maps,
        images=to_unit(images[batch] if images.ndim == 5 else images),
        head=head,
        num_heads=int(attention.shape[1]),
        batch=batch,
        patch_mass=mass,
        renormalized=query.renormalize,
        uniform=1 / keys / (mass if query.renormalize else 1),
        site=attention.site,
    )


def _place_of(attention: Attention, sides: Sides, query: Query) -> TokenPlace:
    """The query token, counted over all frames."""
    layout, token, special = sides.layout, operator.index(query.token_idx), query.allow_special
    if sides.kind == "frame":
        asked = 0 if query.frame_idx is None else query.frame_idx
        frame = within("frame_idx", asked, layout.frames)
        one = layout.frame_layout()
        inner = resolve_token(one, token, allow_special=special, of=layout, stacklevel=5)
        return layout.locate(layout.index(frame=frame, token=inner.token))
    if sides.kind == "register":
        _check_register(attention, layout, token, allowed=special)
    place = resolve_token(layout, token, allow_special=special, stacklevel=5)
    if query.frame_idx is not None and operator.index(query.frame_idx) != place.frame:
        raise InputError(
            f"{sides.kind} attention counts tokens over all frames: token {place.token} lies in "
            f"frame {place.frame}, not in frame_idx={query.frame_idx}. Leave frame_idx out, or "
            f"take token_idx=frame_idx * {layout.tokens_per_frame} + token_in_frame"
        )
    return place


def _check_register(
    attention: Attention, layout: TokenLayout, token: int, *, allowed: bool
) -> None:
    if allowed and 0 <= token < layout.num_tokens and not layout.locate(token).is_patch:
        return
    raise InputError(
        f"register blocks hold no patches, and token_idx={token} of {name_of(attention)} is to be "
        "one; ask for a camera or register token, for example token_idx=0, with allow_special=True"
    )


def _row(
    attention: Attention, sides: Sides, batch: int, head: int | str, place: TokenPlace
) -> FloatArray:
    """Weights of the query token over all tokens of the key layout, `(N,)`."""
    site, item, token = attention.site, batch, _token_of_queries(attention, sides, place)
    if sides.kind == "frame":
        frame, frames = place.frame_idx, sides.layout.frames
        item = batch * frames + frame
        if site is not None and site.frames_in_batch:
            item = site.batch_item(batch, frame, frames=frames)
    with torch.no_grad():
        chosen = head if isinstance(head, int) else None
        rows = attention.token_rows(token, batch=item, heads=chosen)[:, 0]
        row = rows.amax(0) if head == "max" else rows.mean(0)  # one head is its own mean
    values: FloatArray = row.detach().cpu().numpy()
    if not np.isfinite(values).all():
        raise InputError(
            f"the weights of {name_of(attention)}, token {place.token}, hold NaN or infinity: the "
            "model overflowed (float16?); run it in bfloat16 or float32"
        )
    return values


def _token_of_queries(attention: Attention, sides: Sides, place: TokenPlace) -> int:
    """The query token's number in the layout of the queries."""
    if sides.kind == "frame":
        return place.token_in_frame
    if sides.query.frames == sides.layout.frames:
        return place.token
    site = attention.site
    first, count = (site.first_frame if site else 0), sides.query.frames
    if place.frame is None or not first <= place.frame < first + count:
        raise InputError(
            f"{name_of(attention)} holds queries of frames {first}…{first + count - 1} only, the "
            f"others are keys from a cache; {place} is none of them: take the pass of its frame"
        )
    return sides.query.index(frame=place.frame - first, token=place.token_in_frame)


def _is_merged(site: SiteInfo) -> bool:
    """Whether keys stand for several tokens each."""
    return site.key_order is not None and site.key_order.members is not None


def _frames_of(
    site: SiteInfo | None, sides: Sides, batch: int, place: TokenPlace
) -> tuple[int, ...]:
    """The frames that keys lie in."""
    if sides.kind == "frame":
        return (place.frame_idx,)
    if sides.kind != "cross" or site is None or site.key_order is None:
        return tuple(range(sides.layout.frames))
    tokens = site.key_order.tokens
    ours = (tokens if tokens.ndim == 1 else tokens[batch]).tolist()
    frames = {sides.key.locate(token).frame for token in ours if token >= 0}
    return tuple(sorted(frame for frame in frames if frame is not None))


def resolve_token(
    layout: TokenLayout,
    token_idx: SupportsIndex,
    *,
    allow_special: bool = False,
    of: TokenLayout | None = None,
    stacklevel: int = 4,
) -> TokenPlace:
    """The query token that is meant in `layout`, moved to the nearest patch where it is none.

    A special token is kept with `allow_special=True`. Moving it warns (`VistvisWarning`); where
    `layout` is one frame of the layout `of`, the warning says what the index would be there.
    """
    token = operator.index(token_idx)
    if 0 <= token < layout.num_tokens:
        place = layout.locate(token)
        if place.is_patch or allow_special:
            return place
        what, fix = f"is a {place.kind} token", "; allow_special=True keeps it"
    else:
        what, fix = f"is outside 0…{layout.num_tokens - 1}", ""
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
        stacklevel=stacklevel,
    )
    return moved
