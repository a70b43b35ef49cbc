"""Statistics that need no layout: of each query's row, and of what each key gets."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from vistvis.analysis.walk import walk
from vistvis.attention import Attention
from vistvis.errors import InputError


class TopKeys(NamedTuple):
    """The strongest keys of every query, strongest first, `(B, h, Nq, k)` each."""

    weights: Tensor
    indices: Tensor


class Sinks(NamedTuple):
    """Keys that draw more than their share, one line each.

    `tokens` `(n, 3)` are batch item, head and key; `shares` `(n,)` how many times an even share
    each gets, largest first.
    """

    tokens: Tensor
    shares: Tensor


def by_rows(
    attention: Attention,
    reduce: Callable[[Tensor], Tensor],
    *tail: int,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Tensor:
    """`reduce` of blocks of rows `(b, h, q, Nk)` to `(b, h, q, *tail)`, put together, float64."""
    shape = (*attention.shape[:3], *tail)
    out = torch.empty(shape, dtype=torch.float64, device=attention.device)
    for index, weights in attention.row_blocks(max_bytes=max_bytes, progress=progress):
        out[index] = reduce(weights.detach()).double()
    return out


def entropy(a: Attention, *, max_bytes: int | None = None, progress: bool = False) -> Tensor:
    """−Σ p log p of every row, `(B, h, Nq)` float64, in nats; 0 for a row without any key.

    An even row over N keys has log N, one on a single key 0. (Shannon 1948, section 6.)
    `max_bytes` bounds a block of rows, as in `Attention.row_blocks`; so everywhere here.

    Cost: all rows once, `B·h·Nq·Nk·d` multiply-adds.
    """
    out = torch.empty(a.shape[:3], dtype=torch.float64, device=a.device)
    for rows in walk(a, entropy=True, max_bytes=max_bytes, progress=progress):
        out[rows.index] = rows.entropy
    return out


def effective_rank(a: Attention, *, max_bytes: int | None = None, progress: bool = False) -> Tensor:
    """exp(entropy) of every row, `(B, h, Nq)`: over how many keys it is spread. Cost: `entropy`."""
    return entropy(a, max_bytes=max_bytes, progress=progress).exp()


def top_keys(
    a: Attention, k: SupportsIndex, *, max_bytes: int | None = None, progress: bool = False
) -> TopKeys:
    """The k strongest keys of every query: weights and indices, `(B, h, Nq, k)` each.

    Of equal weights any may come first. InputError unless `1 ≤ k ≤ Nk`. Cost: all rows once.
    """
    count = _count(a, k)
    # In float64 every index up to 2^53 and every float32 is itself.
    both = by_rows(
        a,
        lambda weights: torch.stack([part.double() for part in weights.topk(count)], -1),
        count,
        2,
        max_bytes=max_bytes,
        progress=progress,
    )
    return TopKeys(both[..., 0].to(a.dtype), both[..., 1].long())


def top_mass(
    a: Attention, k: SupportsIndex, *, max_bytes: int | None = None, progress: bool = False
) -> Tensor:
    """The sum of the k largest weights of every row, `(B, h, Nq)` float64.

    InputError unless `1 ≤ k ≤ Nk`. Cost: all rows once.
    """
    count = _count(a, k)

    def reduce(weights: Tensor) -> Tensor:
        return weights.topk(count, sorted=False).values.sum(-1, dtype=torch.float64)

    return by_rows(a, reduce, max_bytes=max_bytes, progress=progress)


def received(a: Attention, *, max_bytes: int | None = None, progress: bool = False) -> Tensor:
    """What each key gets from all queries together, `(B, h, Nk)` float64.

    It sums to Nq over the keys, less the queries that see no key. Cost: all rows once.
    """
    out = torch.zeros(*a.shape[:2], a.shape[3], dtype=torch.float64, device=a.device)
    for rows in walk(a, max_bytes=max_bytes, progress=progress):
        out[rows.index[:2]] += rows.columns()
    return out


def sink_tokens(
    a: Attention, times: float = 10.0, *, max_bytes: int | None = None, progress: bool = False
) -> Sinks:
    """Keys that get more than `times` an even share (Nq / Nk) of a head's attention.

    InputError unless `times` is positive. Cost: `received`.
    """
    return sinks_among(received(a, max_bytes=max_bytes, progress=progress), a.shape[2], times)


def sinks_among(gets: Tensor, queries: int, times: float) -> Sinks:
    """`sink_tokens` where what the keys get `(B, h, Nk)` is known already."""
    if not times > 0:
        raise InputError(f"times is a positive number, how many even shares; got {times!r}")
    shares = gets * (gets.shape[2] / queries)
    tokens = (shares > times).nonzero()
    found = shares[tuple(tokens.T)]
    order = found.argsort(descending=True, stable=True)
    return Sinks(tokens[order], found[order])


def _count(a: Attention, k: SupportsIndex) -> int:
    count = operator.index(k)
    if not 1 <= count <= a.shape[3]:
        raise InputError(f"k is 1 to the number of keys, {a.shape[3]}, got {count}")
    return count
