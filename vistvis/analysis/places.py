"""Where the captured tokens of a side lie, whatever the model did to their order."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.order import TokenOrder
from vistvis.errors import LayoutError
from vistvis.tokens import TokenLayout


@dataclass(frozen=True, eq=False)
class Side:
    """The queries or the keys of an attention: `count` captured tokens, of a layout's n.

    Tables have a first dimension of B where an order differs by batch item, else of 1.
    """

    name: str
    layout: TokenLayout
    count: int
    order: TokenOrder | None = None

    @classmethod
    def of(cls, a: Attention, side: Literal["query", "key"]) -> Side:
        """LayoutError if the site does not say where its tokens lie."""
        name = f"site {a.site.name!r}" if a.site else "this attention"
        layout = a.query_layout if side == "query" else a.key_layout
        count = a.shape[2] if side == "query" else a.shape[3]
        if a.site is None or layout is None:
            raise LayoutError(f"{name} does not say where its {side} tokens lie; give it a layout")
        order: TokenOrder | None = getattr(a.site, f"{side}_order")
        if order is not None:
            order.check(a.shape[0], count)
        elif layout.num_tokens != count:
            raise LayoutError(f"{name} has {count} {side} tokens, its layout {layout.num_tokens}")
        return cls(name, layout, count, order)

    def rows(self) -> Tensor:
        """The captured token that each original one is (part of), `(B|1, n)`; −1: dropped."""
        originals, captured = self._pairs()
        n = self.layout.num_tokens
        rows = torch.full((len(originals), n + 1), self.count)
        # The first of several is its row.
        known = torch.where(originals < 0, n, originals)
        rows.scatter_reduce_(1, known, captured, "amin")
        rows = rows[:, :n]
        return torch.where(rows == self.count, -1, rows)

    def shares(self, table: Tensor) -> Tensor:
        """What is true of original tokens `(n, G)` as of captured ones `(B|1, count, G)`.

        Merged tokens share alike, as in `TokenOrder.spread`; one outside the layout counts as 0.
        """
        if self.order is None:
            return table[None]
        originals, captured = self._pairs()
        values = table[originals.clamp_min(0)] * (originals >= 0)[..., None]
        shape = (len(originals), self.count, table.shape[1])
        index = captured[..., None].expand_as(values)
        total = values.new_zeros(shape).scatter_add_(1, index, values)
        sizes = values.new_zeros(shape[:2]).scatter_add_(
            1, captured, torch.ones_like(values[..., 0])
        )
        return total / sizes.clamp_min(1)[..., None]

    def originals(self) -> Tensor:
        """The original token that each captured one is, `(B|1, count)`; −1: outside the layout.

        LayoutError where tokens are merged, which lie in several places.
        """
        if self.order is not None and self.order.members is not None:
            raise LayoutError(f"{self.name} has merged tokens, which lie in several places")
        return self._pairs()[0]

    def patches(self, frame: int) -> Tensor:
        """The captured token of each patch of a frame, `(B|1, rows·cols)`; −1: dropped."""
        first = self.layout.index(frame=frame, patch=0)
        return self.rows()[:, first : first + self.layout.num_patches]

    def groups(self) -> Tensor:
        """Of each original token 2 · frame, and 1 more for a patch, `(n,)`; −1: of no frame."""
        return _table(self.layout).groups

    def kinds(self) -> list[str]:
        """The kind of each original token."""
        return _table(self.layout).kinds

    def spots(self) -> tuple[Tensor, Tensor]:
        """Of each original token its frame, −1 if it is no patch, `(n,)`, and its place on the
        grid `(n, 2)` float64."""
        groups = self.groups()
        return torch.where(groups % 2 == 1, groups // 2, -1), _table(self.layout).spots

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Original tokens and the captured ones that they are part of, `(B|1, M)` both."""
        if self.order is None:
            every = torch.arange(self.count)[None]
            return every, every
        tokens = self.order.tokens.cpu().reshape(-1, self.order.tokens.shape[-1])
        members = self.order.members
        if members is None:
            return tokens, torch.arange(self.count).expand_as(tokens)
        return tokens, members.cpu().reshape(tokens.shape)


class _Table(NamedTuple):
    groups: Tensor
    kinds: list[str]
    spots: Tensor


@functools.lru_cache(maxsize=8)
def _table(layout: TokenLayout) -> _Table:
    """Of every token of a layout; sites share layouts, and 10,992 tokens take 30 ms one by one."""
    start, size = len(layout.before), layout.tokens_per_frame
    one = [layout.locate(start + token) for token in range(size)]
    groups = torch.full((layout.num_tokens,), -1)
    spots = torch.zeros(layout.num_tokens, 2, dtype=torch.float64)
    framed = slice(start, start + layout.frames * size)
    parts = torch.tensor([int(place.is_patch) for place in one])
    groups[framed] = (2 * torch.arange(layout.frames)[:, None] + parts).flatten()
    places = torch.tensor([(place.row or 0, place.col or 0) for place in one])
    spots[framed] = places.repeat(layout.frames, 1).double()
    kinds = [*layout.before, *[place.kind for place in one] * layout.frames, *layout.after]
    return _Table(groups, kinds, spots)
