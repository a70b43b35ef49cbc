"""`Attention`: softmax(scale · Q Kᵀ + mask), computed only where it is asked for.

The queries and keys of one block over 8 frames of 518×518 take 90 MB; the matrix they stand for
takes 7.7 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vistvis.attention import arithmetic
from vistvis.attention.checks import (
    bytes_text,
    check_pair,
    checked_mask,
    checked_scale,
    checked_segments,
    describe,
)
from vistvis.attention.indexing import ALL, Box, take
from vistvis.attention.rows import DENSE_LIMIT, LazyRows, Selection
from vistvis.attention.segments import fill_box, ranges
from vistvis.attention.site import SiteInfo
from vistvis.errors import InputError
from vistvis.names import html_table
from vistvis.progress import progress as bar
from vistvis.tokens import TokenLayout


class Attention(LazyRows):
    """Attention weights of one site, `(B, h, Nq, Nk)`, computed when they are asked for.

    Parameters
    ----------
    query, key
        `(B, h, Nq, d)` and `(B, h_k, Nk, d)` as they entered the dot product: after projection,
        norm and rotary embedding, not yet scaled. `h_k` divides `h`: with fewer key heads, each
        serves `h / h_k` neighbouring query heads, without being copied.
    scale
        A number, or `(h,)` for one that differs by head. Default `d ** -0.5`.
    mask
        As in `scaled_dot_product_attention`: broadcastable to `(B, h, Nq, Nk)`; bool, True where a
        key takes part, or floating, added to the scaled logits. A query without any key has
        weights of zero.
    causal
        Query i sees keys 0…i, counted from the first key also where Nq ≠ Nk.
    segments
        `(n,)`: the start rows of blocks of tokens that see only themselves (windows, pictures of
        one sequence), where Nq = Nk; weights outside are 0. The first is 0. Each is as attention of
        its own: `causal` counts from its first token. No N×N mask is made: N tokens in blocks of n
        cost N·n where all tokens cost N².
    score_mod, mask_mod
        As in `flex_attention`: `score_mod(score, b, h, q_idx, kv_idx)` changes scaled logits,
        `mask_mod(b, h, q_idx, kv_idx)` is True where a key takes part. They are called for the
        rows asked for, on the device of the queries, and not together with segments.
    value
        `(B, h_v, Nk, dv)`, what the weights are multiplied with, where it is kept; `h_v` divides
        `h` as `h_k` does. No weight depends on it.
    site
        Where it comes from; carried along, so that nothing downstream has to be told again.

    Weights are float32, or float64 where the queries are; queries and keys stay in their own dtype.
    Indexing follows torch (`attention[0, 3, 500]` is one row) and returns real tensors. Any torch
    function, tensor method or `np.asarray` builds the dense matrix, under the limit of `dense`.
    `weights` is None, but for attention made by `from_weights`; `value` is None where it was not
    kept. `InputError` if shapes, dtypes or
    devices do not fit together, and from whatever computes where a product of query and key is not
    finite, or a mask or `score_mod` makes NaN or +inf of it. The formula: Vaswani et al.,
    "Attention Is All You Need", 3.2.1.

    Pickled and deep-copied as it is; with functions of indices, which can't be, as its dense
    weights (`from_weights`), or a `DenseLimitError`.

    Cost, with N tokens and h heads of width d: one row is N·h·d multiply-adds, one column the same
    once each row's maximum and sum are known, which take N²·h·d once and are kept, `(B, h, Nq)`
    each.
    """

    weights: Tensor | None = None
    _kept: Tensor | None = None  # what `_maximum_and_sum` gave

    def __init__(
        self,
        *,
        query: Tensor,
        key: Tensor,
        scale: float | Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        segments: Tensor | Sequence[int] | None = None,
        score_mod: Callable[..., Tensor] | None = None,
        mask_mod: Callable[..., Tensor] | None = None,
        value: Tensor | None = None,
        site: SiteInfo | None = None,
    ) -> None:
        check_pair(query, key)
        shape = (*query.shape[:3], key.shape[2])
        self.query, self.key, self.causal = query, key, bool(causal)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.scale = checked_scale(scale, shape[1], query.device)
        self.mask = None if mask is None else checked_mask(mask, shape, query.device)
        self.segments = None
        if segments is not None:
            self.segments = checked_segments(segments, shape, query.device)
            if score_mod or mask_mod:
                raise InputError(
                    "segments don't go with score_mod and mask_mod: use mask_mod alone"
                )
        self.score_mod, self.mask_mod = score_mod, mask_mod
        extras = [tensor for tensor in (self.mask, self.segments) if tensor is not None]
        self._plain = not (extras or self.causal or score_mod or mask_mod)
        self._setup(shape, site, value, query, key, *extras)

    @staticmethod
    def from_weights(
        weights: Tensor, *, value: Tensor | None = None, site: SiteInfo | None = None
    ) -> Attention:
        """Attention of a source that only ever had weights, floating, `(B, h, Nq, Nk)`.

        They are taken as they are: rows of talking heads, say, need not sum to 1. `value` is as
        above. Other tensors are an `InputError`.
        """
        return GivenWeights(weights, value=value, site=site)

    @property
    def groups(self) -> int:
        """Query heads that share one key head; 1 without grouped heads."""
        return self.shape[1] // self.key.shape[1]

    @property
    def query_layout(self) -> TokenLayout | None:
        """How the queries lie in pictures, where the site says it."""
        return self.site.query_layout if self.site else None

    @property
    def key_layout(self) -> TokenLayout | None:
        """How the keys lie in pictures, where the site says it."""
        return self.site.key_layout if self.site else None

    def __repr__(self) -> str:
        batch, heads, queries, keys = self.shape
        parts = [repr(self.site.name)] if self.site else []
        parts.append(f"batch {batch}, heads {heads}, queries {queries}, keys {keys}")
        parts.append(f"Q and K {self.query.dtype}" if self.weights is None else "given weights")
        if self.value is not None:
            parts.append("with V")
        if self.groups > 1:
            parts.append(f"{heads // self.groups} key heads")
        if self.causal:
            parts.append("causal")
        if self.mask is not None:
            parts.append("masked")
        if self.segments is not None:
            parts.append(f"in {len(self.segments)} segments")
        parts += [name for name in ("score_mod", "mask_mod") if getattr(self, name)]
        if self.site and self.site.rope is False:
            parts.append("WITHOUT rope")
        if self.site and self.site.intervened:
            parts.append(f"INTERVENED: {self.site.intervened}")
        held, dense = bytes_text(self.nbytes), bytes_text(self._bytes_of(self.shape))
        return f"Attention({', '.join(parts)}; holds {held}, dense would be {dense})"

    def _repr_html_(self) -> str:
        return html_table(
            [
                ("Attention", self.site.name if self.site else "without a site"),
                ("kind", self.site.kind if self.site else "not said"),
                ("weights", f"{' × '.join(map(str, self.shape))} (batch, heads, queries, keys)"),
                ("keys are", str((self.site and self.site.key_layout) or "not said")),
                ("holds", f"{bytes_text(self.nbytes)}"),
                ("dense", bytes_text(self._bytes_of(self.shape))),
            ]
        )

    def with_site(self, site: SiteInfo | None) -> Attention:
        """The same weights (nothing is copied) from another site description."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        other.site = site
        return other

    def replace(self, **parts: Any) -> Attention:
        """The same with other parts, by the names that it is made with; nothing is copied.

        `CaptureError` if its tensors were written into, `InputError` if the parts don't fit.
        """
        self.check_unwritten()
        return self.__class__(**{**self._made_of(), **parts})

    def _made_of(self) -> dict[str, Any]:
        """What it was made of, by name."""
        names = ("query", "key", "scale", "mask", "causal", "segments", "score_mod", "mask_mod")
        return {name: getattr(self, name) for name in (*names, "value", "site")}

    def to(self, *args: Any, **kwargs: Any) -> Attention:
        """Move or cast as `torch.Tensor.to`, staying lazy. Cost: a copy of Q and K, and of V."""
        query, mask = self.query.to(*args, **kwargs), self.mask
        if mask is not None:
            # A bool mask follows the device but keeps its dtype.
            is_bool = mask.dtype == torch.bool
            mask = mask.to(query.device) if is_bool else mask.to(*args, **kwargs)
        value = None if self.value is None else self.value.to(*args, **kwargs)
        return self.replace(query=query, key=self.key.to(*args, **kwargs), mask=mask, value=value)

    def __reduce__(self) -> tuple[Any, ...]:
        self.check_unwritten()
        if self.score_mod or self.mask_mod:
            parts = {"weights": self.dense(), "value": self.value, "site": self.site}
            return _rebuilt, (GivenWeights, parts)
        parts = {
            n: part for n, part in self._made_of().items() if n not in ("score_mod", "mask_mod")
        }
        return _rebuilt, (self.__class__, parts)

    def cpu(self) -> Attention:
        return self.to("cpu")

    def detach(self) -> Attention:
        """Cut from the autograd graph, staying lazy."""
        other = self.with_site(self.site)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.detach())
        # A detached tensor counts its versions together with its origin, and drops the graph.
        other._held = [(tensor.detach(), version) for tensor, version in self._held]
        return other

    def columns(
        self,
        keys: Selection,
        *,
        batch: Selection = None,
        heads: Selection = None,
        max_bytes: int = DENSE_LIMIT,
    ) -> Tensor:
        """Weights that all queries give to chosen keys, `(B', h', Nq, K)`; as in `rows`.

        Exact: each row's softmax runs over all keys, through its maximum and sum. Within
        8·eps·max(1, max |logit|) of softmax in float64, and between 0 and 1.

        Cost: `B'·h'·Nq·K·d` multiply-adds once the maxima and sums are known (`log_sum_exp`).
        """
        self.check_unwritten()
        if self._kept is not None and self._is_plain(batch, heads, keys):
            query, every_key, scale = self._head(batch, heads)
            key = every_key[self._whole(keys, 3)].to(self.dtype)
            column = arithmetic.one_by_many(key, query.to(self.dtype), scale).view(1, 1, -1, 1)
            return arithmetic.softmax_of_part(self._finite(column), self._kept[:, batch, heads])
        return self._block(self._within(max_bytes, batch, heads, None, keys))

    def log_sum_exp(self, *, progress: bool = False) -> Tensor:
        """log Σ exp(logits) of every row, `(B, h, Nq)`; −inf for a row without any key.

        Cost: `B·h·Nq·Nk·d` multiply-adds the first time, in chunks of a few tens of megabytes; then
        each row's maximum and sum are kept. `InputError` for attention made from weights, which has
        no logits.
        """
        self.check_unwritten()
        maximum, total = self._maximum_and_sum(progress).unbind()
        return maximum + total.log()

    def logits(
        self,
        queries: Selection,
        *,
        batch: Selection = None,
        heads: Selection = None,
        max_bytes: int = DENSE_LIMIT,
    ) -> Tensor:
        """What enters the softmax, `scale · q·k + mask`, `(B', h', Q, Nk)`; as in `rows`.

        `InputError` as for `log_sum_exp`.
        """
        self.check_unwritten()
        return self._logits(self._within(max_bytes, batch, heads, queries, None))

    def _maximum_and_sum(self, progress: bool = False) -> Tensor:
        """Of every row, as in `arithmetic` but `(2, B, h, Nq)`; kept."""
        if self._kept is not None:
            return self._kept
        if self.segments is not None:
            parts = ranges(self.segments, self.shape[2])
            parts = bar(parts, "log-sum-exp", shown=progress, delay=0.5)
            values = torch.cat([self._segment(rows)._maximum_and_sum() for rows in parts], 3)
        else:
            shape = (*self.shape[:3], 2)
            reduce = arithmetic.maximum_and_sum
            values = self._by_blocks(reduce, (ALL, ALL, ALL), shape, progress)
            values = values.movedim(-1, 0).contiguous()  # a column reads one, then the other
        if not values.requires_grad:  # a kept graph would serve one backward pass only
            self._kept = values
        return values

    def _finite(self, products: Tensor) -> Tensor:
        """The products, or an `InputError`; asked of what is computed, not of all Q and K."""
        if not arithmetic.all_finite(products):
            raise InputError(
                f"scale · q·k must be finite, and {self._name()} has NaN or inf among them: its "
                "queries, keys or scale hold some (where they were captured, the model itself "
                f"gives NaN or inf), or the products overflow {self.dtype}: use .to(torch.float64)"
            )
        return products

    def _below_inf(self, logits: Tensor) -> Tensor:
        """Logits with their masks, or an `InputError`: −inf is a mask, +inf and NaN are none."""
        added = self.mask is not None and self.mask.dtype != torch.bool
        if (added or self.score_mod) and logits.numel() and not logits.detach().max() < math.inf:
            what = "score_mod" if self.score_mod else "mask"
            raise InputError(
                f"logits are finite, or −inf where a key takes no part, and the {what} of "
                f"{self._name()} makes NaN or +inf of some; use -math.inf or a bool mask"
            )
        return logits

    def _head(self, batch: Any, head: Any) -> tuple[Tensor, Tensor, float | Tensor]:
        """Queries `(Nq, d)`, keys `(Nk, d)` and scale of one head."""
        b, h = self._whole(batch, 0), self._whole(head, 1)
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale[h].to(self.dtype)
        return self.query[b, h], self.key[b, h // self.groups], scale

    def _one_row(self, batch: Any, head: Any, query: Any) -> Tensor:
        queries, key, scale = self._head(batch, head)
        one = queries[self._whole(query, 2)].to(self.dtype)
        logits = self._finite(arithmetic.one_by_many(one, key.to(self.dtype), scale))
        return torch.softmax(logits, 0)

    def _logits(self, box: Box, out: Tensor | None = None, *, finite: bool = False) -> Tensor:
        """Logits, into `out` where that can be; `finite` where they are known to be."""
        if self.segments is not None:
            return self._by_segments(Attention._logits, box, -math.inf)
        b, h, q, k = box
        key_heads = h
        if self.groups > 1 and h != ALL:  # all heads: the groups are paired without copying keys
            key_heads = torch.arange(self.shape[1], device=self.device)[h] // self.groups
        query = take(self.query, b, h, q).to(self.dtype)
        key = take(self.key, b, key_heads, k).to(self.dtype)
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = take(scale, h).to(self.dtype).view(-1, 1, 1)
        masks = []
        if self.causal:
            tokens = torch.arange(max(self.shape[2:]), device=self.device)
            rows, columns = take(tokens[: self.shape[2]], q), take(tokens[: self.shape[3]], k)
            masks.append(columns <= rows[:, None])
        if self.mask is not None:
            masks.append(take(self.mask.expand(self.shape), *box))
        logits = arithmetic.logits(query, key, scale, out=out)
        if not finite:
            self._finite(logits)
        if not (self.score_mod or self.mask_mod):
            return self._below_inf(arithmetic.masked(logits, masks))
        numbers = [
            take(torch.arange(n, device=self.device), chosen)
            for n, chosen in zip(self.shape, box, strict=True)
        ]
        if self.score_mod and logits.numel():
            made = arithmetic.at_indices(self.score_mod, numbers, logits)
            logits = made.to(self.dtype).contiguous()
        if self.mask_mod and logits.numel():
            masks.append(arithmetic.at_indices(self.mask_mod, numbers).bool())
        return self._below_inf(arithmetic.masked(logits, masks))

    def _block(self, box: Box) -> Tensor:
        shape, k = self._counts(box), box[3]
        masked = self.mask is not None or bool(self.score_mod or self.mask_mod)
        some = not (isinstance(k, slice) and k == ALL)
        # The sums of all rows are kept; those of some cost as much as their weights.
        few = self._is_small(shape) or shape[:3] != self.shape[:3]
        by_sum = some and (self._kept is not None or not few)
        if self.segments is not None:
            if by_sum:
                self._maximum_and_sum()  # its segments use it
            return self._by_segments(Attention._block, box, 0.0)
        if by_sum:
            sums = take(self._maximum_and_sum(), ALL, *box[:3])
            return arithmetic.softmax_of_part(self._logits(box), sums)

        def weights(logits: Tensor) -> Tensor:
            return take(arithmetic.softmax(logits, masked=masked), ALL, ALL, ALL, k)

        return self._by_blocks(weights, box[:3], shape)

    def _by_blocks(
        self,
        reduce: Callable[[Tensor], Tensor],
        rows: Box,
        shape: tuple[int, ...],
        progress: bool = False,
    ) -> Tensor:
        """What `reduce` makes of the logits of whole rows, block by block into one buffer."""
        # So the peak is the result and a chunk; but autograd needs the plain expression.
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors())
        if graph or self._is_small(shape):
            return reduce(self._logits((*rows, ALL)))
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for index, part in bar(self._parts(rows), "log-sum-exp", shown=progress, delay=0.5):
            out[index] = reduce(self._logits((*part, ALL)))
        return out

    def _by_segments(
        self, compute: Callable[[Attention, Box], Tensor], box: Box, outside: float
    ) -> Tensor:
        out = torch.full(self._counts(box), outside, dtype=self.dtype, device=self.device)
        starts, count = self.segments, self.shape[2]
        assert starts is not None
        return fill_box(out, box, starts, count, lambda r, part: compute(self._segment(r), part))

    def _segment(self, rows: slice) -> Attention:
        """One segment as attention of its own."""
        mask, kept = self.mask, self._kept
        one = Attention(
            query=self.query[:, :, rows],
            key=self.key[:, :, rows],
            scale=self.scale,
            mask=None if mask is None else mask.expand(self.shape)[:, :, rows, rows],
            causal=self.causal,
            site=self.site,
        )
        one._kept = None if kept is None else kept[..., rows]
        return one

    def _is_small(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape[:3]) <= arithmetic.rows_at_once(self.shape[3], self.dtype)


class GivenWeights(Attention):
    """What `Attention.from_weights` makes; `query`, `key`, `mask` and such are None."""

    query = key = mask = segments = score_mod = mask_mod = None  # type: ignore[assignment]
    scale, causal, groups = 1.0, False, 1
    _plain = False
    weights: Tensor

    def __init__(
        self, weights: Tensor, *, value: Tensor | None = None, site: SiteInfo | None = None
    ) -> None:
        if not isinstance(weights, Tensor) or weights.ndim != 4 or not weights.is_floating_point():
            raise InputError(
                f"weights are a floating tensor (B, h, Nq, Nk), got {describe(weights)}"
            )
        self.weights = weights
        self._setup(weights.shape, site, value, weights)

    def _made_of(self) -> dict[str, Any]:
        return {"weights": self.weights, "value": self.value, "site": self.site}

    def to(self, *args: Any, **kwargs: Any) -> Attention:
        """Move or cast as `torch.Tensor.to`. Cost: a copy."""
        value = None if self.value is None else self.value.to(*args, **kwargs)
        return self.replace(weights=self.weights.to(*args, **kwargs), value=value)

    def _logits(self, box: Box, out: Tensor | None = None, *, finite: bool = False) -> Tensor:
        raise InputError(
            f"logits need queries and keys, and {self._name()} was made from weights alone"
        )

    def _block(self, box: Box) -> Tensor:
        return take(self.weights, *box).to(self.dtype)


def _rebuilt(kind: type[Attention], arguments: dict[str, Any]) -> Attention:
    """What a pickle says, made: tensors count their versions anew."""
    return kind(**arguments)
