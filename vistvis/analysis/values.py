"""What keys add by their values, not by their weights alone; for attention that keeps values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vistvis.analysis.rows import received, sink_tokens
from vistvis.attention import Attention
from vistvis.attention.rows import Selection
from vistvis.errors import InputError


class SinkKinds(NamedTuple):
    """What each sink does, one line each, largest share first.

    `tokens` `(n, 3)` are batch item, head and key, and `shares` `(n,)` how many times an even share
    each gets (`sink_tokens`). `norms` `(n,)` are the length of its value over the mean length of
    the head's other values, `ranks` `(n,)` the stable rank of what its head gives to all queries.
    `kinds` are "nop", "broadcast" or "other".
    """

    tokens: Tensor
    shares: Tensor
    norms: Tensor
    ranks: Tensor
    kinds: tuple[str, ...]


def weighted_values(
    a: Attention,
    *,
    queries: Selection = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Weights times the length of the value that they let in, α·‖v‖: how much each key adds.

    Without `queries` the sum over all of them, Σ_q α_qk ‖v_k‖, `(B, h, Nk)`; with a selection of
    queries (as in `Attention.rows`) their rows, `(B, h, Q, Nk)`. Both float64. Values are each
    head's own, before the output projection, which mixes heads and which a site does not show; so
    ‖v‖ stands where Kobayashi et al. ("Attention is Not Only a Weight", EMNLP 2020, section 3)
    have the length of v times the projection.

    InputError if values were not kept, DenseLimitError for rows of more than 2 GiB. Cost: all rows
    once, or the rows asked for.
    """
    norms = _norms(a)
    if queries is None:
        return received(a, max_bytes=max_bytes, progress=progress) * norms
    return a.rows(queries).detach().double() * norms[:, :, None]


def sink_kinds(
    a: Attention,
    *,
    times: float = 10.0,
    negligible: float = 0.2,
    full: float = 0.5,
    rank: float = 1.5,
    max_bytes: int | None = None,
    progress: bool = False,
) -> SinkKinds:
    """What each sink token does for its head: nothing, or one message to everybody.

    A sink is a key that gets more than `times` an even share (`sink_tokens`). It is a "nop" where
    its value is short: its length is at most `negligible` times the mean length of the head's other
    values, so that what goes there adds nearly nothing. It is a "broadcast" where its value has at
    least `full` times that length, and the head's output U = weights @ V for all queries has a
    stable rank ‖U‖²_F / ‖U‖²_2 of at most `rank`: all get nearly the same vector. Everything else
    is "other", such as a sink that takes too little of the attention to rule its head's output;
    with `rank=math.inf` lengths alone tell. A head that attends evenly gives all the same as well:
    `shares` say how strong a sink is. NaN where a head has no other value, or gives nothing.

    After Fesser et al., "A Unifying View of Attention Sinks" (arXiv 2606.08105), with the
    thresholds of the authors' code. Differences: they call a sink a key to which 9 of 10 queries
    give half of their attention; and here values are each head's own, before the output projection.

    InputError if values were not kept, or `times` is not positive. Cost: all rows once, and those
    of the heads that have sinks once more, times V; memory of a block of rows.
    """
    norms = _norms(a)
    tokens, shares = sink_tokens(a, times, max_bytes=max_bytes, progress=progress)
    batch, heads, keys = tokens.unbind(1)
    own = norms[batch, heads, keys]
    lengths = own / ((norms.sum(-1)[batch, heads] - own) / (a.shape[3] - 1))
    ranks = torch.empty_like(lengths)
    for b, h in torch.unique(tokens[:, :2], dim=0).tolist():
        ranks[(batch == b) & (heads == h)] = _stable_rank(a, b, h, max_bytes, progress)
    kinds = ["other"] * len(tokens)
    for number, (length, spread) in enumerate(zip(lengths.tolist(), ranks.tolist(), strict=True)):
        if length <= negligible:
            kinds[number] = "nop"
        elif length >= full and spread <= rank:
            kinds[number] = "broadcast"
    return SinkKinds(tokens, shares, lengths, ranks, tuple(kinds))


def _value(a: Attention) -> Tensor:
    if a.value is None:
        name = f"site {a.site.name!r}" if a.site else "this attention"
        raise InputError(f"{name} has no values; capture them with capture(…, values=True)")
    a.check_unwritten()
    return a.value.detach()


def _norms(a: Attention) -> Tensor:
    """The length of the value of every key, `(B, h, Nk)` float64."""
    value = _value(a)
    norms: Tensor = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float64)
    return norms.repeat_interleave(a.shape[1] // value.shape[1], 1)


def _stable_rank(
    a: Attention, batch: int, head: int, max_bytes: int | None, progress: bool
) -> float:
    """‖U‖²_F / ‖U‖²_2 of U = weights @ V of one head, from the eigenvalues of Uᵀ U, `(dv, dv)`."""
    every = _value(a)
    value = every[batch, head // (a.shape[1] // every.shape[1])].double()
    squares = value.new_zeros(value.shape[1], value.shape[1])
    for _, weights in a.row_blocks(batch=batch, heads=head, max_bytes=max_bytes, progress=progress):
        out = weights[0, 0].detach().double() @ value
        squares += out.T @ out
    if not bool(squares.isfinite().all()):
        return math.nan
    return float(squares.trace() / torch.linalg.eigvalsh(squares)[-1])
