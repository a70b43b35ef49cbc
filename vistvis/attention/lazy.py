"""`Attention`: softmax(scale · Q Kᵀ + mask), computed only where it is asked for.

The queries and keys of one block over 8 frames of 518×518 take 90 MB; the matrix they stand for
takes 7.7 GB. So the matrix is never built here unless `dense` (or a torch function, which needs a
tensor) asks for it, and then only under a limit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from vistvis.attention import indexing
from vistvis.attention.checks import bytes_text, check_pair, checked_mask, checked_scale, describe
from vistvis.attention.indexing import ALL, Taken, take
from vistvis.attention.site import SiteInfo
from vistvis.errors import CaptureError, DenseLimitError, InputError

Selection: TypeAlias = "SupportsIndex | slice | Sequence[int] | Tensor | None"

DENSE_LIMIT = 2 * 2**30
# Logits held at once by chunked passes. With its temporaries this keeps the log-sum-exp of any
# block to a few tens of megabytes; larger chunks were measured to be no faster.
_CHUNK_BYTES = 8 * 2**20


class Attention:
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
    site
        Where it comes from; carried along, so that nothing downstream has to be told again.

    Weights are float32, or float64 where query or key is; queries and keys stay in their own dtype.
    Indexing follows torch (`attention[0, 3, 500]` is one row) and returns real tensors. Any torch
    function, tensor method or `np.asarray` builds the dense matrix, under the limit of `dense`.

    Raises
    ------
    InputError
        If shapes, dtypes or devices do not fit together.

    Notes
    -----
    With N tokens, h heads of width d: one row costs N·h·d multiply-adds, one column, after the
    log-sum-exp is known, the same. The log-sum-exp costs N²·h·d once and is kept, `(B, h, Nq)`.
    The formula is Vaswani et al., "Attention Is All You Need", section 3.2.1.
    """

    def __init__(
        self,
        *,
        query: Tensor,
        key: Tensor,
        scale: float | Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        site: SiteInfo | None = None,
    ) -> None:
        check_pair(query, key)
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        self.query: Tensor | None = query
        self.key: Tensor | None = key
        self.scale: float | Tensor = query.shape[-1] ** -0.5 if scale is None else scale
        if isinstance(self.scale, Tensor):
            self.scale = checked_scale(self.scale, shape[1]).to(query.device)
        self.mask = None if mask is None else checked_mask(mask, shape, query.device)
        self.causal = bool(causal)
        self.weights: Tensor | None = None
        self._setup(shape, site, query, key, *(() if self.mask is None else (self.mask,)))

    @classmethod
    def from_weights(cls, weights: Tensor, *, site: SiteInfo | None = None) -> Attention:
        """Attention of a source that only ever had weights, `(B, h, Nq, Nk)`.

        The weights are taken as they are: rows of talking heads, say, need not sum to 1.

        Raises
        ------
        InputError
            If `weights` is not a floating tensor of four dimensions.
        """
        if not isinstance(weights, Tensor) or weights.ndim != 4 or not weights.is_floating_point():
            raise InputError(
                f"weights are a floating tensor (B, h, Nq, Nk), got {describe(weights)}"
            )
        self = cls.__new__(cls)
        self.query = self.key = self.mask = None
        self.scale, self.causal, self.weights = 1.0, False, weights
        batch, heads, queries, keys = weights.shape
        self._setup((batch, heads, queries, keys), site, weights)
        return self

    def _setup(
        self, shape: tuple[int, int, int, int], site: SiteInfo | None, *held: Tensor
    ) -> None:
        self._shape = torch.Size(shape)
        self.site = site
        self._log_sum_exp: Tensor | None = None
        # Later code may write into what it handed to the kernel; then the weights would be wrong
        # without a sign. Tensors made under inference_mode keep no version: capture copies those.
        self._held = [(t, t._version) for t in held if not t.is_inference()]

    # -- what it is ----------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """`(B, h, Nq, Nk)`."""
        return self._shape

    @property
    def ndim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As `torch.Tensor.size`."""
        return self._shape if dim is None else self._shape[dim]

    def dim(self) -> int:
        return 4

    def numel(self) -> int:
        return math.prod(self._shape)

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computed weights: float32, or float64 for float64 queries and keys."""
        return torch.float64 if self._first.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def nbytes(self) -> int:
        """Bytes held: Q, K, mask and, once computed, the log-sum-exp (or the weights)."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def num_heads(self) -> int:
        return self._shape[1]

    @property
    def groups(self) -> int:
        """Query heads that share one key head; 1 without grouped heads."""
        return 1 if self.key is None else self._shape[1] // self.key.shape[1]

    @property
    def _first(self) -> Tensor:
        first = self.query if self.weights is None else self.weights
        assert first is not None
        return first

    def _tensors(self) -> Iterator[Tensor]:
        for item in (self.query, self.key, self.mask, self.weights, self._log_sum_exp, self.scale):
            if isinstance(item, Tensor):
                yield item

    def __repr__(self) -> str:
        batch, heads, queries, keys = self._shape
        name = f"{self.site.name!r}, " if self.site else ""
        parts = [f"{name}batch {batch}, heads {heads}, queries {queries}, keys {keys}"]
        parts.append(
            "given weights" if self.weights is not None else f"Q and K {self._first.dtype}"
        )
        if self.groups > 1:
            parts.append(f"{heads // self.groups} key heads")
        if self.causal:
            parts.append("causal")
        if self.mask is not None:
            parts.append("masked")
        if self.site and self.site.rope is False:
            parts.append("WITHOUT rope")
        held, dense = bytes_text(self.nbytes), bytes_text(self._dense_bytes())
        return f"Attention({', '.join(parts)}; holds {held}, dense would be {dense})"

    # -- making others -------------------------------------------------------------------------

    def with_site(self, site: SiteInfo | None) -> Attention:
        """The same weights (nothing is copied) from another site description."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        other.site = site
        return other

    def to(self, *args: Any, **kwargs: Any) -> Attention:
        """Move or cast as `torch.Tensor.to`, staying lazy. Cost: a copy of Q and K."""
        self._check_unwritten()

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            # A bool mask follows the device but keeps its dtype.
            return tensor.to(tensor.new_empty(0, dtype=torch.float32).to(*args, **kwargs).device)

        if self.weights is not None:
            weights = moved(self.weights)
            assert weights is not None
            return self.from_weights(weights, site=self.site)
        query, key = moved(self.query), moved(self.key)
        assert query is not None
        assert key is not None
        scale = self.scale.to(query.device) if isinstance(self.scale, Tensor) else self.scale
        return Attention(
            query=query,
            key=key,
            scale=scale,
            mask=moved(self.mask),
            causal=self.causal,
            site=self.site,
        )

    def cpu(self) -> Attention:
        """Q and K in host memory, staying lazy."""
        return self.to("cpu")

    def detach(self) -> Attention:
        """Cut from the autograd graph, staying lazy."""
        other = self.with_site(self.site)
        for name in ("query", "key", "mask", "weights", "_log_sum_exp"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.detach())
        return other

    # -- weights -------------------------------------------------------------------------------

    def rows(
        self, queries: Selection, *, batch: Selection = None, heads: Selection = None
    ) -> Tensor:
        """Weights of chosen queries over all keys.

        Parameters
        ----------
        queries, batch, heads
            An int, slice, list or int tensor; negative counts from the end; None takes all. An int
            keeps its dimension here (unlike in indexing).

        Returns
        -------
        `(B', h', Q, Nk)`; every row sums to 1, or is zero where a mask leaves no key.

        Cost: `B'·h'·Q·Nk·d` multiply-adds; memory of the result and its logits.
        """
        self._check_unwritten()
        # One query of one head is what a click asks for.
        if self._is_plain(batch, heads, queries):
            row = self._one_row(batch, heads, queries)  # type: ignore[arg-type]
            return row.view(1, 1, 1, -1)
        b, h, q = self._select(batch, 0), self._select(heads, 1), self._select(queries, 2)
        if self.weights is not None:
            return take(self.weights, b, h, q).to(self.dtype)
        return self._softmax_of(b, h, q)

    def columns(
        self, keys: Selection, *, batch: Selection = None, heads: Selection = None
    ) -> Tensor:
        """Weights that all queries give to chosen keys.

        Exact: each row's softmax runs over all keys, through its log-sum-exp, which is computed in
        chunks the first time (`log_sum_exp`) and kept.

        Returns
        -------
        `(B', h', Nq, K)`.

        Cost: `B'·h'·Nq·K·d` multiply-adds once the log-sum-exp is known.
        """
        self._check_unwritten()
        if self._log_sum_exp is not None and self._is_plain(batch, heads, keys):
            return self._one_column(batch, heads, keys)  # type: ignore[arg-type]
        b, h, k = self._select(batch, 0), self._select(heads, 1), self._select(keys, 3)
        return self._block(b, h, ALL, k)

    def log_sum_exp(self, *, progress: bool = False) -> Tensor:
        """log Σ exp(logits) of every row, `(B, h, Nq)`; −inf for a row without any key. Kept.

        Cost: `B·h·Nq·Nk·d` multiply-adds the first time, in chunks of a few tens of megabytes.

        Raises
        ------
        InputError
            For attention made from weights, which has no logits.
        """
        self._check_unwritten()
        self._need_logits("log-sum-exps")
        if self._log_sum_exp is not None:
            return self._log_sum_exp
        values = self._chunked_log_sum_exp(ALL, ALL, ALL, progress=progress)
        if not values.requires_grad:  # a kept graph would serve one backward pass only
            self._log_sum_exp = values
        return values

    def logits(
        self, queries: Selection, *, batch: Selection = None, heads: Selection = None
    ) -> Tensor:
        """What enters the softmax, `scale · q·k + mask`, `(B', h', Q, Nk)`: not weights."""
        self._check_unwritten()
        self._need_logits("logits")
        b, h, q = self._select(batch, 0), self._select(heads, 1), self._select(queries, 2)
        return self._logits(b, h, q, ALL)

    def dense(self, *, max_bytes: int = DENSE_LIMIT) -> Tensor:
        """The whole matrix, `(B, h, Nq, Nk)`.

        Raises
        ------
        DenseLimitError
            If it would be larger than `max_bytes` (default 2 GiB).
        """
        self._check_unwritten()
        if self._dense_bytes() > max_bytes:
            raise DenseLimitError(
                f"the dense matrix {tuple(self._shape)} takes {bytes_text(self._dense_bytes())}, "
                f"more than the limit of {bytes_text(max_bytes)}. Take what you need: "
                f"rows(queries), columns(keys), attention[batch, head, query] — or "
                f"dense(max_bytes=…) if it does fit in memory"
            )
        if self.weights is not None:
            return self.weights.to(self.dtype)
        # Written block by block into one buffer, so that the peak is the result and a chunk; but
        # autograd needs the plain expression.
        if torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors()):
            return self._softmax_of(ALL, ALL, ALL)
        out = torch.empty(self._shape, dtype=self.dtype, device=self.device)
        batch, heads, queries, _ = self._shape
        for piece in indexing.chunks((batch, heads, queries), self._rows_at_once()):
            out[piece] = self._softmax_of(*piece)
        return out

    def __getitem__(self, index: Any) -> Tensor:
        self._check_unwritten()
        if type(index) is tuple and len(index) == 3 and self._is_plain(*index):
            return self._one_row(*index)
        plan = indexing.plan(index, tuple(self._shape), self.device)
        b, h, q, k = plan.take
        size = math.prod(plan.taken_shape) * torch.finfo(self.dtype).bits // 8
        if size > DENSE_LIMIT:
            raise DenseLimitError(
                f"this index needs a block of {plan.taken_shape}, {bytes_text(size)}, more than "
                f"the limit of {bytes_text(DENSE_LIMIT)}; take fewer queries, or loop over them"
            )
        return self._block(b, h, q, k)[plan.rest]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[b] for b in range(self._shape[0]))

    # -- as a tensor ---------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, Attention):
                return value.dense()
            if isinstance(value, (list, tuple)) and any(isinstance(v, Attention) for v in value):
                return type(value)(real(v) for v in value)
            return value

        return func(*map(real, args), **{k: real(v) for k, v in (kwargs or {}).items()})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError(
                "attention weights are computed when asked for: a copy can't be avoided"
            )
        array = self.dense().detach().cpu().numpy()
        return array if dtype is None else array.astype(dtype)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names this class does not have: tensor methods such as `.mean(1)`.
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"Attention has no attribute {name!r}")
        if name.endswith("_") or callable(getattr(Tensor, name)) is False:
            raise AttributeError(
                f"Attention has no {name!r}; its weights are computed when asked for. "
                "Use .dense() for a tensor"
            )
        return functools.partial(self._tensor_method, name)

    def _tensor_method(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.dense(), name)(*args, **kwargs)

    # -- how it is computed --------------------------------------------------------------------

    def _one_row(self, batch: int, head: int, query: int) -> Tensor:
        """One query's weights over all keys, `(Nk,)`."""
        b, h, q = self._wholes((batch, head, query), (0, 1, 2))
        assert self.query is not None
        assert self.key is not None
        # The scale goes on q: d multiplications in place of N.
        vector = self.query[b, h, q].to(self.dtype) * self._scale_of(h)
        logits = torch.mv(self.key[b, h // self.groups].to(self.dtype), vector)
        return torch.softmax(logits, 0)

    def _one_column(self, batch: int, head: int, key: int) -> Tensor:
        """All queries' weights of one key, `(1, 1, Nq, 1)`, once the log-sum-exp is known."""
        b, h, k = self._wholes((batch, head, key), (0, 1, 3))
        assert self.query is not None
        assert self.key is not None
        assert self._log_sum_exp is not None
        vector = self.key[b, h // self.groups, k].to(self.dtype) * self._scale_of(h)
        logits = torch.mv(self.query[b, h].to(self.dtype), vector)
        return logits.sub_(self._log_sum_exp[b, h]).exp_().view(1, 1, -1, 1)

    def _is_plain(self, *wanted: Any) -> bool:
        """Single indices into unmasked Q and K: no more work than a matrix–vector product."""
        plain = self.mask is None and not self.causal and self.weights is None
        return plain and all(type(number) is int for number in wanted)

    def _wholes(self, numbers: Sequence[int], dims: Sequence[int]) -> Iterator[int]:
        return (
            indexing.whole(number, self._shape[dim], indexing.DIMENSIONS[dim])
            for number, dim in zip(numbers, dims, strict=True)
        )

    def _scale_of(self, head: int) -> float | Tensor:
        return self.scale[head] if isinstance(self.scale, Tensor) else self.scale

    def _select(self, selection: Selection, dim: int) -> Taken:
        return indexing.taken(selection, self._shape[dim], indexing.DIMENSIONS[dim], self.device)

    def _count(self, *selections: Taken) -> int:
        sizes = zip(selections, self._shape, strict=False)
        return math.prod(indexing.length(selection, size) for selection, size in sizes)

    def _logits(self, b: Taken, h: Taken, q: Taken, k: Taken) -> Tensor:
        """scale · Q Kᵀ + mask of a block, `(B', h', Q, K)`."""
        assert self.query is not None
        assert self.key is not None
        query = take(self.query, b, h, q).to(self.dtype)
        key = take(self.key, b, self._key_heads(h), k).to(self.dtype)
        scale = take(self.scale, h).view(-1, 1, 1) if isinstance(self.scale, Tensor) else self.scale
        # Scaling costs a copy of what is scaled, so the shorter side takes it (a column has one
        # key); with grouped heads only queries have a scale of their own for each head.
        if key.shape[2] < query.shape[2] and self.groups == 1:
            key = key * scale
        else:
            query = query * scale
        logits = _products(query, key)
        if self.causal:
            places = torch.arange(max(self._shape[2:]), device=self.device)
            rows, columns = take(places[: self._shape[2]], q), take(places[: self._shape[3]], k)
            logits = logits.masked_fill(columns > rows[:, None], -math.inf)
        if self.mask is not None:
            mask = take(self.mask.expand(self._shape), b, h, q, k)
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, -math.inf)
            else:
                logits = logits + mask.to(self.dtype)
        return logits

    def _softmax_of(self, b: Taken, h: Taken, q: Taken) -> Tensor:
        """Weights of whole rows, `(B', h', Q, Nk)`."""
        return _softmax(self._logits(b, h, q, ALL), masked=self.mask is not None)

    def _key_heads(self, h: Taken) -> Taken:
        if self.groups == 1 or h == ALL:
            return h  # all heads: `_products` pairs the groups without copying keys
        return torch.arange(self._shape[1], device=self.device)[h] // self.groups

    def _block(self, b: Taken, h: Taken, q: Taken, k: Taken) -> Tensor:
        """Weights `(B', h', Q, K)`; softmax goes over all keys, whatever `k` is."""
        if self.weights is not None:
            return take(self.weights, b, h, q, k).to(self.dtype)
        known = self._log_sum_exp is not None
        if isinstance(k, slice) and k == ALL:
            return self._softmax_of(b, h, q)
        if not known and self._count(b, h, q) <= self._rows_at_once():
            return take(self._softmax_of(b, h, q), ALL, ALL, ALL, k)
        if known or self._count(b, h, q) == math.prod(self._shape[:3]):
            lse = take(self.log_sum_exp(), b, h, q)
        else:
            lse = self._chunked_log_sum_exp(b, h, q)
        if self.mask is not None:
            # A row without any key has lse = −inf; its logits are −inf too, and exp(−inf − 0) = 0.
            lse = lse.masked_fill(lse == -math.inf, 0.0)
        return self._logits(b, h, q, k).sub_(lse.unsqueeze(-1)).exp_()

    def _chunked_log_sum_exp(
        self, b: Taken, h: Taken, q: Taken, *, progress: bool = False
    ) -> Tensor:
        sizes = (self._count(b), indexing.length(h, self._shape[1]))
        counts = (*sizes, indexing.length(q, self._shape[2]))
        out = torch.empty(counts, dtype=self.dtype, device=self.device)
        steps = indexing.chunks(counts, self._rows_at_once())
        for piece in _progress(steps, "log-sum-exp", progress):
            bs, hs, qs = (
                indexing.part(selection, size, chunk)
                for selection, size, chunk in zip((b, h, q), self._shape, piece, strict=False)
            )
            out[piece] = torch.logsumexp(self._logits(bs, hs, qs, ALL), -1)
        return out

    def _rows_at_once(self) -> int:
        return max(1, _CHUNK_BYTES // (self._shape[3] * torch.finfo(self.dtype).bits // 8 or 1))

    def _dense_bytes(self) -> int:
        return math.prod(self._shape) * torch.finfo(self.dtype).bits // 8

    def _need_logits(self, what: str) -> None:
        if self.weights is not None:
            raise InputError(
                f"{what} need queries and keys, and {self._name()} was made from weights alone"
            )

    def _name(self) -> str:
        return f"site {self.site.name!r}" if self.site else "this attention"

    def _check_unwritten(self) -> None:
        for tensor, version in self._held:
            if tensor._version != version:
                raise CaptureError(
                    f"the queries, keys or mask of {self._name()} were written into after they "
                    "were taken, so its weights would be wrong; clone them first, or capture "
                    'with keep="cpu"'
                )


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Q Kᵀ, `(B, h, Q, K)`; key heads that serve several query heads are not repeated."""
    if key.shape[1] != query.shape[1]:
        batch, heads, count, width = query.shape
        grouped = query.reshape(batch, key.shape[1], -1, width) @ key.transpose(-1, -2)
        return grouped.reshape(batch, heads, count, key.shape[2])
    if key.shape[2] == 1:
        # A batched (N, d) × (d, 1) is up to four times slower than (1, d) × (d, N).
        return (key @ query.transpose(-1, -2)).transpose(-1, -2)
    return query @ key.transpose(-1, -2)


def _softmax(logits: Tensor, *, masked: bool) -> Tensor:
    """Softmax over the last dimension; a row of −inf alone gives zeros (plain softmax: NaN)."""
    weights = torch.softmax(logits, -1)
    if masked:
        weights = weights.masked_fill(logits.amax(-1, keepdim=True) == -math.inf, 0.0)
    return weights


def _progress(steps: list[Any], label: str, shown: bool) -> Any:
    if not shown:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc=label, leave=False)


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Attention, *args: Any) -> Any:
        return self._tensor_method(name, *args)

    operate.__name__ = operate.__qualname__ = name
    return operate


# Python looks operators up on the class, past `__getattr__`.
for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("radd", "rsub", "rmul", "rtruediv", "rpow", "rmatmul"),
    *("neg", "abs", "lt", "le", "gt", "ge"),
):
    setattr(Attention, f"__{_name}__", _operator(f"__{_name}__"))
