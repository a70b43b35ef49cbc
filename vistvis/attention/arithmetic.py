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


def one_by_many(one: Tensor, many: Tensor, scale: float | Tensor) -> Tensor:
    """scale · q·k of one vector `(d,)` with many `(N, d)`: a row or a column of one head."""
    # The scale goes on the one: d multiplications in place of N.
    return torch.mv(many, one * scale)


def logits(
    query: Tensor, key: Tensor, scale: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    """scale · Q Kᵀ, `(B, h, Q, K)`, in the memory of `out` where that can be.

    `query` is `(B, h, Q, d)`, `key` `(B, h_k, K, d)`, `scale` a number or `(h, 1, 1)`.
    """
    if out is not None and isinstance(scale, float) and key.shape[1] == query.shape[1]:
        # The product takes the scale along, without a copy of the queries.
        into, left, right = out.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).mT
        return torch.baddbmm(into, left, right, beta=0, alpha=scale, out=into).view_as(out)
    # Scaling costs a copy of what is scaled, so the shorter side takes it (a column has one key);
    # with grouped heads only queries have a scale of their own for each head.
    if key.shape[2] < query.shape[2] and key.shape[1] == query.shape[1]:
        key = key * scale
    else:
        query = query * scale
    return products(query, key)


def masked(values: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """Logits with masks that broadcast to them: bool, True where a key takes part, or added."""
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
        weights = weights.masked_fill(maximum(logits) == -math.inf, 0.0)
    return weights


def maximum(logits: Tensor) -> Tensor:
    """The maximum of every row, `(…, Q, 1)`; −inf where there are no keys."""
    if not logits.shape[-1]:
        return logits.new_full((*logits.shape[:-1], 1), -math.inf)
    return logits.amax(-1, keepdim=True)


def maximum_and_sum(logits: Tensor) -> Tensor:
    """The maximum of every row and its Σ exp(logits − maximum), `(…, Q, 2)`.

    Apart, because their log-sum-exp can't hold both: beside a maximum of −1e9 log N is lost.
    """
    # The maximum cancels, so no gradient goes through it. A row without any key (−inf alone) takes
    # the lowest number: its sum is 0, where −inf − −inf would be NaN.
    highest = maximum(logits.detach()).clamp_(min=torch.finfo(logits.dtype).min)
    return torch.cat([highest, (logits - highest).exp_().sum(-1, keepdim=True)], -1)


def softmax_of_part(logits: Tensor, maximum_and_sum: Tensor) -> Tensor:
    """Weights of some keys, `(…, Q, K)`, by `(2, …, Q)` of all of them; overwrites logits."""
    highest, total = maximum_and_sum.unsqueeze(-1).unbind()
    # A product computed again may round to more than the maximum, and the weight to more than 1.
    highest = torch.maximum(highest, logits.detach())
    # A sum is 1 at least, but for a row without any key, whose weights are 0.
    return logits.sub_(highest).exp_() / total.clamp(min=1)


def all_finite(values: Tensor) -> bool:
    # The sum is one quick pass, and not finite beside inf or NaN; large numbers may overflow it.
    values = values.detach()
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def unexpanded(mask: Tensor) -> Tensor:
    """A mask without what `expand` repeated; it broadcasts to the same."""
    return mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
