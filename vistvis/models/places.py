"""Ways in which the tokens of a site lie, given the layout of all pictures of the pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vistvis.attention.order import TokenOrder
from vistvis.tokens import TokenLayout


@dataclass(frozen=True)
class Placement:
    """The layouts of both sides of a site, as `SiteInfo` has them."""

    query_layout: TokenLayout | None = None
    key_layout: TokenLayout | None = None
    frames_in_batch: bool = False
    query_order: TokenOrder | None = None
    key_order: TokenOrder | None = None
    first_frame: int = 0


@dataclass(frozen=True)
class Sizes:
    """Batch, queries and keys of a site's attention."""

    batch: int
    queries: int
    keys: int

    def are(self, queries: int, keys: int) -> bool:
        """Whether the sides have that many tokens."""
        return (self.queries, self.keys) == (queries, keys)


# What a block's role says: from the layout of all pictures to that of the site. A placement without
# layouts where sizes are others than the role allows: nothing is said rather than something wrong.
Place: TypeAlias = "Callable[[TokenLayout, Sizes], Placement]"

UNKNOWN = Placement()


def nowhere(layout: TokenLayout, sizes: Sizes) -> Placement:
    """Nothing is known of the tokens of this site."""
    return UNKNOWN


def one_frame(layout: TokenLayout, sizes: Sizes) -> Placement:
    """Each frame by itself, folded into the batch: `b · S + s`."""
    one = layout.frame_layout()
    if not sizes.are(one.num_tokens, one.num_tokens):
        return UNKNOWN
    return Placement(one, one, frames_in_batch=sizes.batch % layout.frames == 0)


def all_frames(layout: TokenLayout, sizes: Sizes) -> Placement:
    """All tokens of all frames in one sequence."""
    whole = sizes.are(layout.num_tokens, layout.num_tokens)
    return Placement(layout, layout) if whole else UNKNOWN


def cached_frames(layout: TokenLayout, sizes: Sizes) -> Placement:
    """All frames so far as keys, those of this step as queries."""
    count = layout.tokens_per_frame
    (now, rest), (seen, more) = divmod(sizes.queries, count), divmod(sizes.keys, count)
    if rest or more or not 1 <= now <= seen or now not in (1, layout.frames):
        return UNKNOWN
    sides = replace(layout, frames=now), replace(layout, frames=seen)
    return Placement(*sides, first_frame=seen - now)


def special_only(layout: TokenLayout, sizes: Sizes) -> Placement:
    """The special tokens of all frames, frame by frame; patches pass by."""
    start, first = len(layout.before), layout.patch_start_idx
    frames = torch.arange(layout.frames * layout.tokens_per_frame).view(layout.frames, -1)
    chosen = torch.cat((frames[:, :first], frames[:, first + layout.num_patches :]), 1) + start
    return _chosen(layout, sizes, chosen.flatten(), chosen.flatten())


def between(query: int, key: int | None) -> Place:
    """Queries of one frame, keys of another one; None: of all the others, in order."""

    def place(layout: TokenLayout, sizes: Sizes) -> Placement:
        others = [frame for frame in range(layout.frames) if frame != query]
        keys = others if key is None else [key]
        if max(query, *keys) >= layout.frames:
            return UNKNOWN
        return _chosen(layout, sizes, _tokens_of(layout, [query]), _tokens_of(layout, keys))

    return place


def _tokens_of(layout: TokenLayout, frames: Sequence[int]) -> Tensor:
    count = layout.tokens_per_frame
    every = torch.arange(layout.frames * count).view(-1, count) + len(layout.before)
    return every[list(frames)].flatten()


def _chosen(layout: TokenLayout, sizes: Sizes, queries: Tensor, keys: Tensor) -> Placement:
    if not sizes.are(len(queries), len(keys)):
        return UNKNOWN
    orders = TokenOrder(queries), TokenOrder(keys)
    return Placement(layout, layout, query_order=orders[0], key_order=orders[1])


def one_picture(
    special: Sequence[str] | None,
    patch: tuple[int, int] | None,
    *,
    views: Literal["b s", "s b"] | None = "b s",
) -> Place:
    """A submodule with tokens of its own: pictures in the batch, `special` before the patches.

    `views` is the order of scenes and frames in the batch: which picture is which frame is said for
    "b s", for "s b" only where there is one scene, and for None (one of them at a time) never.
    `special` None: its special tokens are not known. With another patch size than the whole
    model's, or none, nothing is said.
    """

    def place(layout: TokenLayout, sizes: Sizes) -> Placement:
        if special is None or patch != layout.patch_size:
            return UNKNOWN
        own = TokenLayout(layout.frames, layout.grid, tuple(special), patch)
        placed = one_frame(own, sizes)
        told = views == "b s" or (views == "s b" and sizes.batch == own.frames)
        return replace(placed, frames_in_batch=placed.frames_in_batch and told)

    return place


def one_side(side: str, place: Place) -> Place:
    """Only the "query" or the "key" side of a placement: the other one holds no pictures."""

    def placed(layout: TokenLayout, sizes: Sizes) -> Placement:
        count = sizes.queries if side == "query" else sizes.keys
        whole = place(layout, Sizes(sizes.batch, count, count))
        if side == "query":
            return replace(whole, key_layout=None, key_order=None)
        return replace(whole, query_layout=None, query_order=None)

    return placed


def with_special(special: Sequence[str], place: Place) -> Place:
    """The same with other names for the tokens before the patches."""
    return lambda layout, sizes: place(replace(layout, special=tuple(special)), sizes)


def by_count(layout: TokenLayout, sizes: Sizes) -> Placement:
    """A model that nobody described: each side is what its number of tokens fits."""
    queries, keys = layout.sides(sizes.queries, sizes.keys)
    folded = layout.frames > 1 and sizes.batch % layout.frames == 0
    return Placement(queries, keys, folded and queries == layout.frame_layout())
