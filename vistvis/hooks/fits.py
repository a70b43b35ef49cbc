"""Frames in a row: the order that those tokens show whose patch is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vistvis.attention import TokenOrder
from vistvis.tokens import TokenLayout

# Share of the patches that must be known for the rest to follow from the order that they show.
ENOUGH = 0.5


class Fit(NamedTuple):
    """Frames in a row that known tokens show: special tokens around them, and what is where."""

    before: int
    front: int
    behind: int
    after: int
    pictures: Tensor  # (S,): the picture of each frame of the sequence
    patches: Tensor  # (P',): the patch at each place among a frame's patches


def fit_of(picture: Tensor, patch: Tensor, per_frame: int) -> Fit | None:
    """Frames in a row that a sequence's known tokens `(N,)` show, or None."""
    known = (patch >= 0).nonzero()[:, 0]
    frames = len(set(picture[known].tolist()))
    extra = len(patch) - frames * per_frame
    if not frames or extra < 0 or len(known) < ENOUGH * frames * per_frame:
        return None
    each = range(extra // frames, -1, -1)
    # In front of each frame is usual, then behind; around all frames only if neither fits.
    tries = sorted(
        (
            (before, front, behind, extra - before - frames * (front + behind))
            for front in each
            for behind in range(extra // frames - front + 1)
            for before in range(extra - frames * (front + behind) + 1)
            if frames > 1 or before == 0
        ),
        key=lambda one: (one[0] + one[3], one[2]),
    )
    for places in tries:
        fit = _fitted(picture, patch, known, places, frames, per_frame)
        if fit is not None:
            return fit
    return None


def _fitted(
    picture: Tensor,
    patch: Tensor,
    known: Tensor,
    places: tuple[int, int, int, int],
    frames: int,
    per_frame: int,
) -> Fit | None:
    before, front, behind, _ = places
    if frames == 1 and places[3]:
        return None
    tokens = front + per_frame + behind
    frame = (known - before).div(tokens, rounding_mode="floor")
    at = (known - before) % tokens - front
    inside = (known >= before) & (frame < frames) & (at >= 0) & (at < per_frame)
    if not bool(inside.all()):
        return None
    pictures = _unanimous(frame, picture[known], frames)
    patches = _unanimous(at, patch[known], per_frame)
    if pictures is None or patches is None or bool((pictures < 0).any()):
        return None
    told = patches >= 0
    in_order = bool((patches == torch.arange(per_frame))[told].all())
    if in_order:
        patches = torch.arange(per_frame)
    elif not bool(told.all()):
        return None  # reordered, and not all of the order is known
    return Fit(*places, pictures, patches)


def _unanimous(places: Tensor, values: Tensor, count: int) -> Tensor | None:
    """The one value that each place has, −1 where nothing is said; None if they contradict."""
    out = torch.full((count,), -1)
    out[places] = values
    said = out[out >= 0]
    agree = torch.equal(out[places], values) and len(set(said.tolist())) == len(said)
    return out if agree else None


def order_of(layout: TokenLayout, fits: list[Fit], frames: Tensor) -> TokenOrder | None:
    """Captured index → token of the layout, `(B, N)`; None where all are in order."""
    places = torch.arange(layout.num_tokens)
    start, first = len(layout.before), layout.patch_start_idx
    orders = []
    for fit, order in zip(fits, frames, strict=True):
        inner = torch.arange(layout.tokens_per_frame)
        inner[first : first + layout.num_patches] = first + fit.patches
        moved = places.clone()
        whole = order[:, None] * layout.tokens_per_frame + inner
        moved[start : start + whole.numel()] = start + whole.flatten()
        orders.append(moved)
    tokens = torch.stack(orders)
    return None if torch.equal(tokens, places.expand_as(tokens)) else TokenOrder(tokens)
