"""softmax(scale · Q Kᵀ + mask) as functions of tensors: they know of no site and keep nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor

# Weights or logits held at once by chunked passes. With its temporaries this keeps the log-sum-exp
# of any block to a few tens of megabytes; larger chunks were measured to be no faster.
_CHUNK_BYTES = 8 * 2**20


def rows_at_once(keys: int, dtype: torch.dtype, max_bytes: int | None = None) -> int:
    """How many rows over so many keys fit in `max_bytes`; at least one."""
    limit = _CHUNK_BYTES if max_bytes is None else max_bytes
    return max(1, limit // max(1, keys * dtype.itemsize))


def row(query: Tensor, key: Tensor, scale: float | Tensor) -> Tensor:
    """The weights `(K,)` of one query `(d,)` over keys `(K, d)`, without a mask."""
    # The scale goes on q: d multiplications in place of K.
    return torch.softmax(torch.mv(key, query * scale), 0)


def column(query: Tensor, key: Tensor, scale: float | Tensor, log_sum_exp: Tensor) -> Tensor:
    """The weights `(Q,)` of queries `(Q, d)` on one key `(d,)`, without a mask."""
    return torch.mv(query, key * scale).sub_(log_sum_exp).exp_()


def logits(
    query: Tensor, key: Tensor, scale: float | Tensor, masks: Iterable[Tensor] = ()
) -> Tensor:
    """scale · Q Kᵀ + masks, `(B, h, Q, K)`.

    `query` is `(B, h, Q, d)`, `key` `(B, h_k, K, d)`, `scale` a number or `(h, 1, 1)`; masks are
    bool, True where a key takes part, or floating, and broadcast to the result.
    """
    # Scaling costs a copy of what is scaled, so the shorter side takes it (a column has one key);
    # with grouped heads only queries have a scale of their own for each head.
    if key.shape[2] < query.shape[2] and key.shape[1] == query.shape[1]:
        key = key * scale
    else:
        query = query * scale
    return masked(products(query, key), masks)


def masked(values: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """Logits with masks, as `logits` takes them."""
    for mask in masks:
        if mask.dtype == torch.bool:
            values = values.masked_fill(~mask, -math.inf)
        else:
            values = values + mask.to(values.dtype)
    return values


def at_indices(
    function: Callable[..., Tensor], indices: Sequence[Tensor], logits: Tensor | None = None
) -> Tensor:
    """A function of `(batch, head, query, key)` at every combination of numbers, `(B, h, Q, K)`.

    With `logits` of that shape, each goes in front. The function sees tensors without dimensions,
    as in `flex_attention`, so that those that index tensors of their own work.
    """
    front = () if logits is None else (logits,)
    for dim in reversed(range(4)):
        places: list[int | None] = [0 if dim == place else None for place in range(4)]
        function = torch.vmap(function, in_dims=(*(0 for _ in front), *places))
    return function(*front, *indices)


def products(query: Tensor, key: Tensor) -> Tensor:
    """Q Kᵀ, `(B, h, Q, K)`; key heads that serve several query heads are not repeated."""
    key_heads = key.shape[1]
    if key_heads != query.shape[1]:
        groups = query.shape[1] // key_heads
        together = rearrange(query, "b (k g) q d -> b k (g q) d", g=groups)
        return rearrange(together @ key.mT, "b k (g q) n -> b (k g) q n", g=groups)
    if key.shape[2] == 1:
        # A batched (N, d) × (d, 1) is up to four times slower than (1, d) × (d, N).
        return (key @ query.mT).mT
    return query @ key.mT


def softmax(logits: Tensor, *, masked: bool) -> Tensor:
    """Softmax over the last dimension; a row of −inf alone gives zeros (plain softmax: NaN)."""
    weights = torch.softmax(logits, -1)
    if masked:
        weights = weights.masked_fill(logits.amax(-1, keepdim=True) == -math.inf, 0.0)
    return weights


def softmax_of_part(logits: Tensor, log_sum_exp: Tensor, *, masked: bool) -> Tensor:
    """Weights of some keys, from the log-sum-exp `(…, Q)` of all; overwrites logits `(…, Q, K)`."""
    if masked:
        # A row without any key has lse = −inf; its logits are −inf too, and exp(−inf − 0) = 0.
        log_sum_exp = log_sum_exp.masked_fill(log_sum_exp == -math.inf, 0.0)
    return logits.sub_(log_sum_exp.unsqueeze(-1)).exp_()


def unexpanded(mask: Tensor) -> Tensor:
    """A mask without what `expand` repeated; it broadcasts to the same."""
    return mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
