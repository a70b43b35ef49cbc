"""Rows of weights, by number, in blocks, by any index, or all: whatever they are computed from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from vistvis.attention import arithmetic, indexing
from vistvis.attention.checks import bytes_text, check_value
from vistvis.attention.indexing import ALL, Block, Box
from vistvis.attention.order import TokenOrder
from vistvis.attention.site import SiteInfo
from vistvis.attention.tensorlike import TensorLike
from vistvis.errors import CaptureError, DenseLimitError, LayoutError
from vistvis.progress import progress as bar

Selection: TypeAlias = "SupportsIndex | slice | Sequence[int] | Tensor | None"

DENSE_LIMIT = 2 * 2**30


class LazyRows(TensorLike):
    """Weights `(B, h, Nq, Nk)` that a subclass computes where they are asked for."""

    site: SiteInfo | None
    dtype: torch.dtype
    """Of the weights: float32, or float64 for float64 queries (or weights)."""
    device: torch.device
    value: Tensor | None
    # Whether single indices take the short way, `_one_row`.
    _plain: bool

    def _setup(
        self, shape: tuple[int, ...], site: SiteInfo | None, value: Tensor | None, *held: Tensor
    ) -> None:
        self.shape, self.site, self.device = torch.Size(shape), site, held[0].device
        if value is not None:
            check_value(value, shape, self.device)
            held = (*held, value)
        self.value = value
        self.dtype = torch.float64 if held[0].dtype == torch.float64 else torch.float32
        # Later code may write into what it handed to the kernel; then the weights would be wrong
        # without a sign. Tensors made under inference_mode keep no version: capture copies those.
        self._held = [(t, t._version) for t in held if not t.is_inference()]

    def _one_row(self, batch: Any, head: Any, query: Any) -> Tensor:
        """One query's weights over all keys, `(Nk,)`."""
        raise NotImplementedError

    def _block(self, box: Box) -> Tensor:
        """Weights `(B', h', Q, K)`; softmax goes over all keys, whichever are taken."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes held: Q, K, V, mask and, once computed, row maxima and sums (or the weights)."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def num_heads(self) -> int:
        return self.shape[1]

    def check_unwritten(self) -> None:
        """`CaptureError` if the tensors were written into since; whatever computes asks first."""
        for tensor, version in self._held:
            if tensor._version != version:
                raise CaptureError(
                    f"the queries, keys, values or mask of {self._name()} were written into after "
                    "they were taken, so what it gives would be wrong; clone them first, or "
                    'capture with keep="cpu"'
                )

    def rows(
        self,
        queries: Selection,
        *,
        batch: Selection = None,
        heads: Selection = None,
        max_bytes: int = DENSE_LIMIT,
    ) -> Tensor:
        """Weights of chosen queries over all keys, `(B', h', Q, Nk)`.

        Every row sums to 1, or is zero where a mask leaves no key. Each selection is an int, slice,
        list or int tensor; negative counts from the end; None takes all. An int keeps its dimension
        here (unlike in indexing).

        Cost: `B'·h'·Q·Nk·d` multiply-adds; memory of the result and its logits. `DenseLimitError`
        if the result is larger than `max_bytes` (default 2 GiB).
        """
        self.check_unwritten()
        # One query of one head is what a click asks for.
        if self._is_plain(batch, heads, queries):
            return self._one_row(batch, heads, queries).view(1, 1, 1, -1)
        return self._block(self._within(max_bytes, batch, heads, queries, None))

    def token_rows(
        self, tokens: Selection, *, batch: SupportsIndex = 0, heads: Selection = None
    ) -> Tensor:
        """Rows of original query tokens, as weights over all original key tokens, `(h', Q, N)`.

        Tokens are numbered as in the site's layouts, whatever the model did to them since: the
        site's `query_order` says which captured ones they are, its `key_order` whose the weights
        are (`TokenOrder.spread`). Without orders these are the captured tokens themselves, and N is
        Nk; with a key order N is that of the key layout. `batch` is a batch item of the attention
        (`SiteInfo.batch_item` of a picture), the other two are as in `rows`.

        Cost: that of `rows`. `IndexOutOfRange` for a token that does not exist, or that the model
        dropped before this site; `LayoutError` if an order does not fit.
        """
        item = self._whole(batch, 0)
        (queries, query_order), (keys, key_order) = (self._originals(side) for side in (0, 1))
        if query_order is not None:
            chosen = indexing.taken(tokens, queries, "token", torch.device("cpu"))
            numbers = torch.arange(queries)[chosen].tolist()
            tokens = [query_order.index(number, batch=item) for number in numbers]
        rows = self.rows(tokens, batch=item, heads=heads)[0]
        return rows if key_order is None else key_order.spread(rows, keys, batch=item)

    def _originals(self, side: int) -> tuple[int, TokenOrder | None]:
        """How many original tokens the query or key side has, and its order."""
        captured, site = self.shape[2 + side], self.site
        order = None if site is None else (site.query_order, site.key_order)[side]
        if site is None or order is None:
            return captured, None
        layout = (site.query_layout, site.key_layout)[side]
        if layout is None:
            raise LayoutError(f"{self._name()} has an order of tokens and no layout that it is of")
        order.check(self.shape[0], captured)
        return layout.num_tokens, order

    def row_blocks(
        self,
        *,
        batch: Selection = None,
        heads: Selection = None,
        queries: Selection = None,
        max_bytes: int | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[Block, Tensor]]:
        """Walk through rows in blocks, for statistics over more of them than fit in memory.

        Parameters
        ----------
        batch, heads, queries
            As in `rows`.
        max_bytes
            Bound on the weights of one block, which has one row at least. Its logits are held
            beside them for a moment. Default 8 MiB.

        Yields
        ------
        `(index, weights)`, in order, each row once: `index` is three slices, where the block lies
        in the selection `(B', h', Q)`; `weights` are its rows over all keys, `(b, h, q, Nk)`.

        Cost: that of all `rows`; memory of one block.

        >>> entropy = torch.empty(attention.shape[:3])
        >>> for index, weights in attention.row_blocks():
        ...     entropy[index] = torch.special.entr(weights).sum(-1)
        """
        parts = self._parts(self._taken(batch, heads, queries), max_bytes)
        for index, part in bar(parts, "rows of attention", shown=progress, delay=0.5):
            self.check_unwritten()
            yield index, self._block((*part, ALL))

    def dense(self, *, max_bytes: int = DENSE_LIMIT) -> Tensor:
        """The whole matrix; `DenseLimitError` if it is larger than `max_bytes` (default 2 GiB)."""
        self.check_unwritten()
        size = self._bytes_of(self.shape)
        if size > max_bytes:
            raise DenseLimitError(
                f"the dense matrix {tuple(self.shape)} takes {bytes_text(size)}, "
                f"more than the limit of {bytes_text(max_bytes)}. Take what you need: "
                f"rows(queries), columns(keys), attention[batch, head, query] — or "
                f"dense(max_bytes=…) if it does fit in memory"
            )
        return self._block((ALL, ALL, ALL, ALL))

    def __getitem__(self, index: Any) -> Tensor:
        self.check_unwritten()
        if type(index) is tuple and len(index) == 3 and self._is_plain(*index):
            return self._one_row(*index)
        take, rest = indexing.plan(index, tuple(self.shape), self.device)
        shape = self._counts(take)
        size = self._bytes_of(shape)
        if size > DENSE_LIMIT:
            raise DenseLimitError(
                f"this index needs a block of {shape}, {bytes_text(size)}, more than the "
                f"limit of {bytes_text(DENSE_LIMIT)}; take fewer queries, or loop over them"
            )
        return self._block(take)[rest]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[b] for b in range(len(self)))

    def _is_plain(self, *numbers: Any) -> bool:
        return self._plain and all(type(number) is int for number in numbers)

    def _name(self) -> str:
        return f"site {self.site.name!r}" if self.site else "this attention"

    def _tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def _whole(self, number: Any, dim: int) -> int:
        return indexing.whole(number, self.shape[dim], indexing.DIMENSIONS[dim])

    def _taken(self, *selections: Selection) -> Box:
        dims = zip(selections, self.shape, indexing.DIMENSIONS, strict=False)
        return tuple(indexing.taken(one, size, name, self.device) for one, size, name in dims)

    def _within(self, max_bytes: int, *selections: Selection) -> Box:
        box = self._taken(*selections)
        shape = self._counts(box)
        size = self._bytes_of(shape)
        if size > max_bytes:
            raise DenseLimitError(
                f"what is asked for, {shape}, takes {bytes_text(size)}, more than the limit of "
                f"{bytes_text(max_bytes)}; take less at once (row_blocks() walks through rows), or "
                "max_bytes=… if it does fit in memory"
            )
        return box

    def _counts(self, box: Box) -> tuple[int, ...]:
        return tuple(map(indexing.length, box, self.shape))

    def _parts(self, rows: Box, max_bytes: int | None = None) -> list[tuple[Block, Box]]:
        """Chosen rows, cut into blocks: where each lies among them, and what it takes."""
        at_once = arithmetic.rows_at_once(self.shape[3], self.dtype, max_bytes)
        return [
            (index, tuple(map(indexing.part, rows, self.shape, index)))
            for index in indexing.blocks(self._counts(rows), at_once)
        ]

    def _bytes_of(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize
