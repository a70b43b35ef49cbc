"""One walk over all rows, for as many statistics as are asked of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.indexing import ALL, Block
from vistvis.progress import progress as bar

# Logits that are no larger need no maximum taken off: their exponentials are far from the ends of
# float32, and in the entropy they lose no more than 40 eps.
_SMALL = 40.0
# Larger than blocks elsewhere: there are some twenty short steps for each, which then cost less.
_BLOCK = 16 * 2**20


@dataclass(eq=False)
class Rows:
    """A block of rows over all keys.

    `values` `(b, h, q, Nk)` are weights that are not yet divided by `total`: whatever is linear in
    them is divided at its end, which saves a walk over all of them. `room` is as large as they are,
    to compute in. The next block overwrites both.
    """

    index: Block
    values: Tensor
    room: Tensor
    divided: bool = False
    highest: Tensor | None = None
    """Of `values`, `(b, h, q)`, and the key that has it, int64, where they were asked for."""
    strongest: Tensor | None = None
    inner: Tensor | None = None
    """`(b, h, q)`: Σ values · log of values, where the entropy was asked for."""
    patches: Tensor | None = None
    """`(b, h, q, S)`: sums of `values` over the patches of each frame, once somebody took them."""

    @cached_property
    def total(self) -> Tensor:
        """The sum of every row of `values`, `(b, h, q)`; 1 where they are divided already."""
        # Who sums parts of rows that are all of it sets it: a walk less.
        if self.divided:
            return self.values.new_ones(self.values.shape[:3])
        return self.values.sum(-1)

    @property
    def entropy(self) -> Tensor:
        """−Σ p log p, `(b, h, q)` float64, in nats."""
        assert self.inner is not None
        # log p = log value − log total, and 0 log 0 is 0.
        return self.total.double().log() - self.weigh(self.inner)

    def weigh(self, sums: Tensor) -> Tensor:
        """Sums of `values`, `(b, h, q, …)`, as sums of weights, float64."""
        total = self.total.view(*self.total.shape, *(1 for _ in sums.shape[3:]))
        return sums.double() / total

    def dot(self, values: Tensor, factors: Tensor) -> Tensor:
        """Σ over the last dimension of a part of `values` times factors that broadcast to it."""
        room = self.room.view(-1)[: values.numel()].view(values.shape)
        return torch.mul(values, factors, out=room).sum(-1)

    def columns(self, shares: Tensor | None = None) -> Tensor:
        """What each key gets from these queries, `(b, h, Nk)` float64.

        With `shares` that broadcast to `(b, h, q)`, of a query that has so much to give.
        """
        parts = self.total.reciprocal()
        if shares is not None:
            parts = parts * shares.to(parts.dtype)
        return (parts[..., None, :] @ self.values)[..., 0, :].double()


class Buffers:
    """Two blocks of rows, kept from walk to walk: new pages cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._held = torch.empty(2, 0)

    def take(self, count: int, like: Attention) -> Tensor:
        """Room for `(2, count)` numbers at least, of the attention's dtype and on its device."""
        held = self._held
        if held.dtype != like.dtype or held.device != like.device or held.shape[1] < count:
            held = self._held = torch.empty(2, count, dtype=like.dtype, device=like.device)
        return held


def walk(
    a: Attention,
    *,
    strongest: bool = False,
    entropy: bool = False,
    buffers: Buffers | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Iterator[Rows]:
    """All rows in blocks of `max_bytes` (default 16 MiB), with what else is asked for.

    Overwrites what it gave before; memory of two blocks.
    """
    a = a.detach()
    parts = a._parts((ALL, ALL, ALL), _BLOCK if max_bytes is None else max_bytes)
    by_logits = a._plain and a.shape[3] > 0
    largest = max((math.prod(_sizes(index)) for index, _ in parts), default=0) * a.shape[3]
    pair = (buffers or Buffers()).take(largest if by_logits else 0, a)
    bounds = _largest(a) if by_logits else torch.zeros(a.shape[:2])
    for index, part in bar(parts, "rows of attention", shown=progress, delay=0.5):
        a.check_unwritten()
        box = (*part, ALL)
        if by_logits:
            shape = (*_sizes(index), a.shape[3])
            logits, room = (buffer[: math.prod(shape)].view(shape) for buffer in pair)
            # No product can overflow, or be NaN, below the bound: then nobody has to look.
            bound = float(bounds[index[:2]].max())
            finite = bound < torch.finfo(a.dtype).max
            logits = a._logits(box, logits, finite=finite)
            yield _by_logits(index, logits, room, bound < _SMALL, strongest, entropy)
        else:
            yield _by_weights(index, a._block(box), strongest, entropy)


def _largest(a: Attention) -> Tensor:
    """What no |logit| of a head exceeds, `(B, h)`: |q·k| ≤ |q|·|k|. NaN where one is not finite."""
    query, key = (t.to(a.dtype).norm(dim=-1).amax(-1) for t in (a.query, a.key))
    scale = torch.as_tensor(a.scale, device=a.device).abs()
    bounds: Tensor = query * key.repeat_interleave(a.groups, 1) * scale
    return bounds


def _sizes(index: Block) -> tuple[int, ...]:
    return tuple(one.stop - one.start for one in index)


def _by_logits(
    index: Block, logits: Tensor, room: Tensor, small: bool, strongest: bool, entropy: bool
) -> Rows:
    """Without the division of every weight; overwrites logits."""
    highest = key = None
    if strongest:
        highest, key = logits.max(-1)
    elif not small:
        highest = logits.amax(-1)
    if highest is not None and not small:
        logits.sub_(highest[..., None])
        highest = torch.zeros_like(highest)
    rows = Rows(index, torch.exp(logits, out=room), logits)
    if highest is not None and key is not None:
        rows.highest, rows.strongest = highest.exp(), key
    if entropy:
        rows.inner = logits.mul_(rows.values).sum(-1)
    return rows


def _by_weights(index: Block, weights: Tensor, strongest: bool, entropy: bool) -> Rows:
    """Masked rows, which may have no key at all, and weights whose rows need not sum to 1."""
    rows = Rows(index, weights, torch.empty_like(weights), divided=True)
    if strongest:
        rows.highest, rows.strongest = weights.max(-1)
    if entropy:
        terms = torch.special.entr(weights, out=rows.room)
        rows.inner = -terms.sum(-1, dtype=torch.float64)
    return rows
