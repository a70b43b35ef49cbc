"""Which tokens a sequence holds, and what the description of a site says of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vistvis.attention import SiteInfo, TokenOrder
from vistvis.errors import CaptureError
from vistvis.hooks.merging import Merge
from vistvis.tokens import TokenLayout


@dataclass(frozen=True)
class Tokens:
    """Which tokens a sequence holds: `count` in each of `samples`, named by `layout`.

    `ids` `(B, M)` are their numbers, −1 for what is no token of the layout; None: all, in order.
    `lost` says that they were moved in a way that can't be told, `problem` why they are refused.
    """

    samples: int
    count: int
    layout: TokenLayout | None = None
    ids: Tensor | None = None
    lost: bool = False
    problem: str = ""

    def numbers(self, device: torch.device) -> Tensor:
        """`ids`, written out."""
        if self.ids is not None:
            return self.ids
        numbers = torch.arange(self.count, device=device) + self._first
        return numbers.expand(self.samples, self.count)

    @property
    def _first(self) -> int:
        """The number of the first one in order: frames alone leave out the tokens before them."""
        layout = self.layout
        return len(layout.before) if layout and self.count < layout.num_tokens else 0

    def moved(self, ids: Tensor) -> Tokens:
        """The same sequence with these tokens in it."""
        made = replace(self, count=ids.shape[1], ids=None, lost=False, problem="")
        layout = self.layout
        full = layout is None or made.count in (
            layout.num_tokens,
            layout.frames * layout.tokens_per_frame,
        )
        plain = full and torch.equal(ids, made.numbers(ids.device))
        return made if plain else replace(made, ids=ids)

    def frames_of(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Frame `(R,)` and place in it `(R, n)` of tokens folded into `batch` rows of one each.

        None if a row mixes frames.
        """
        layout = self.layout
        assert layout is not None
        ids = self.numbers(torch.device("cpu")).reshape(batch, -1)
        real = ids >= 0
        inside = ids - len(layout.before)
        frame = inside // layout.tokens_per_frame
        which = torch.where(real, frame, -1).amax(1)
        if bool((real & (frame != which[:, None])).any()):
            return None
        return which, torch.where(real, inside % layout.tokens_per_frame, -1)


@dataclass(frozen=True)
class Placing:
    """What one run of a site got: its input `(B, n, …)`, whose tokens, and how they were merged."""

    batch: int
    count: int
    queries: Tokens
    keys: Tokens | None  # None: of the other side, and unknown
    merge: Merge | None = None

    def onto(self, info: SiteInfo, shape: Sequence[int]) -> SiteInfo:
        """The description of attention of this shape, with the order of its tokens.

        `CaptureError` if what the tokens are contradicts the layout.
        """
        batch, _, queries, keys = shape
        for side in (self.queries, self.keys):
            if side is not None and side.problem:
                raise CaptureError(side.problem)
        if batch != self.batch or info.window is not None:
            return info
        if queries == keys < self.count:
            return self._merged(info, queries)
        changes: dict[str, Any] = {}
        if queries == self.count and not _told(info.query_order, self.queries):
            changes = _side(self.queries, batch, "query")
        known = self.keys is not None and self.keys.count * self.keys.samples == keys * batch
        if self.keys is not None and known and not _told(info.key_order, self.keys):
            changes |= _side(self.keys, batch, "key")
        return replace(info, **changes)

    def _merged(self, info: SiteInfo, count: int) -> SiteInfo:
        """Fewer tokens reached the kernel: with their map, or without layouts."""
        unknown = replace(info, query_layout=None, key_layout=None, frames_in_batch=False)
        tokens, merge = self.queries, self.merge
        if tokens.lost or tokens.layout is None or tokens.samples != self.batch or merge is None:
            return unknown
        order = merge.order(count) if merge.shape[:2] == (self.batch, self.count) else None
        if order is None:
            return unknown
        ids = tokens.numbers(order.tokens.device).gather(1, order.tokens)
        order = _order(ids.cpu(), None if order.members is None else order.members.cpu())
        return replace(
            unknown,
            query_layout=tokens.layout,
            key_layout=tokens.layout,
            query_order=order,
            key_order=order,
        )


def _told(order: TokenOrder | None, tokens: Tokens) -> bool:
    """Whether a model's family has said which tokens a side holds, and nothing contradicts it."""
    if order is None or tokens.ids is None:
        return order is not None
    return torch.equal(order.tokens.expand_as(tokens.ids), tokens.ids.cpu())


def _side(tokens: Tokens, batch: int, side: str) -> dict[str, Any]:
    """What `SiteInfo` says of one side, where it is more than counting tells."""
    if tokens.lost:
        return {f"{side}_layout": None, "frames_in_batch": False}
    if tokens.ids is None:
        return {}
    if tokens.layout is None or tokens.samples == batch:
        layout = {f"{side}_layout": tokens.layout} if tokens.layout else {}
        return {**layout, f"{side}_order": _order(tokens.ids.cpu())}
    folded = replace(tokens, ids=tokens.ids.cpu()).frames_of(batch)
    if folded is None:
        return {f"{side}_layout": None, "frames_in_batch": False}
    frame, within = folded
    order = frame.view(tokens.samples, -1)
    said: dict[str, Any] = {
        f"{side}_layout": tokens.layout.frame_layout(),
        "frames_in_batch": True,
    }
    if not torch.equal(order, torch.arange(order.shape[1]).expand_as(order)):
        said["frame_order"] = order
    plain = torch.arange(tokens.layout.tokens_per_frame)
    if not (within.shape[1] == len(plain) and torch.equal(within, plain.expand_as(within))):
        said[f"{side}_order"] = _order(within)
    return said


def _order(tokens: Tensor, members: Tensor | None = None) -> TokenOrder:
    """One order for all of the batch, where it is the same for all."""
    if torch.equal(tokens, tokens[:1].expand_as(tokens)) and (
        members is None or torch.equal(members, members[:1].expand_as(members))
    ):
        return TokenOrder(tokens[0], None if members is None else members[0])
    return TokenOrder(tokens, members)
