"""All numbers that a figure or a file of one query token shows, from one row per head."""

from __future__ import annotations

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
    Weights,
    as_attention,
    head_of,
    images_shape,
    kind_of,
    layout_of,
    name_of,
    within,
)
from vistvis import Attention, SiteInfo, TokenLayout, TokenPlace
from vistvis.errors import InputError, VistvisWarning
from vistvis.images import to_unit
from vistvis.views.painting import resize


@dataclass(frozen=True)
class Match:
    """The patch of one frame that a query attends to most."""

    place: TokenPlace
    weight: float
    share: float
    """Sum over all patches of that frame."""


@dataclass(frozen=True, eq=False)
class QueryValues:
    """What one query token attends to."""

    attention_type: str
    layout: TokenLayout
    """All S frames."""
    query: TokenPlace
    """Counted absolutely over all frames."""
    requested: int
    """The token index that was asked for, before it was moved to a patch."""
    maps: FloatArray
    """`(F, rows, cols)`, the frames shown: F = S for global attention, 1 for frame attention."""
    images: FloatArray
    """`(S, H, W, 3)` in [0, 1]."""
    head: int | str
    num_heads: int
    batch: int
    patch_mass: float
    """Sum of the raw weights on patches; the rest lies on special tokens."""
    renormalized: bool
    """`maps` were divided by `patch_mass`."""
    site: SiteInfo | None = None

    @property
    def frames(self) -> range:
        """The frames that `maps` shows."""
        first = self.query.frame_idx if self.attention_type == "frame" else 0
        return range(first, first + len(self.maps))

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

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The strongest patch of every frame shown."""
        layout = self.layout
        return tuple(
            Match(
                layout.locate(layout.index(frame=frame, patch=int(weights.argmax()))),
                float(weights.max()),
                float(weights.sum()),
            )
            for frame, weights in zip(self.frames, self.maps, strict=True)
        )

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
            "patch_mass": self.patch_mass,
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
    batches, frames, height, width = images_shape(images)
    layout = layout_of(attention, (frames, height, width), query)
    kind = kind_of(attention, layout, batches, query.attention_type)
    batch = within("batch_idx", query.batch_idx, batches)

    token, special = operator.index(query.token_idx), query.allow_special
    if kind == "frame":
        frame = within("frame_idx", 0 if query.frame_idx is None else query.frame_idx, frames)
        inner = resolve_token(layout.frame_layout(), token, allow_special=special, of=layout)
        place = layout.locate(layout.index(frame=frame, token=inner.token))
        row, keys, at = inner.token, layout.frame_layout(), batch * frames + frame
    else:
        place = resolve_token(layout, token, allow_special=special)
        if query.frame_idx is not None and operator.index(query.frame_idx) != place.frame:
            raise InputError(
                f"global attention counts tokens over all frames: token {place.token} lies in "
                f"frame {place.frame}, not in frame_idx={query.frame_idx}. Leave frame_idx out, or "
                f"take token_idx=frame_idx * {layout.tokens_per_frame} + token_in_frame"
            )
        row, keys, at = place.token, layout, batch

    head = head_of(query.head_idx, attention.shape[1])
    maps: FloatArray = keys.maps(_row(attention, at, head, row))
    mass = float(maps.sum(dtype=np.float64))
    if query.renormalize:
        if mass <= 0:
            raise InputError(
                f"{place} gives no weight to any patch, so it can't be renormalised; "
                "leave renormalize=False"
            )
        maps = maps / mass
    return QueryValues(
        attention_type=kind,
        layout=layout,
        query=place,
        requested=token,
        maps=maps,
        images=to_unit(images[batch] if images.ndim == 5 else images),
        head=head,
        num_heads=int(attention.shape[1]),
        batch=batch,
        patch_mass=mass,
        renormalized=query.renormalize,
        site=attention.site,
    )


def resolve_token(
    layout: TokenLayout,
    token_idx: SupportsIndex,
    *,
    allow_special: bool = False,
    of: TokenLayout | None = None,
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
        stacklevel=4,
    )
    return moved


def _row(attention: Attention, batch: int, head: int | str, query: int) -> FloatArray:
    """Weights of one query over all keys, `(Nk,)`."""
    with torch.no_grad():
        chosen = head if isinstance(head, int) else None
        rows = attention.rows(query, batch=batch, heads=chosen)[0, :, 0]
        row = rows.amax(0) if head == "max" else rows.mean(0)  # one head is its own mean
    values: FloatArray = row.detach().cpu().numpy()
    if not np.isfinite(values).all():
        raise InputError(
            f"the weights of {name_of(attention)}, token {query}, hold NaN or infinity: the model "
            "overflowed (float16?); run it in bfloat16 or float32"
        )
    return values
