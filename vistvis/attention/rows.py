"""Rows of weights, by number, in blocks, by any index, or all: whatever they are computed from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from vistvis.attention import arithmetic, indexing
from vistvis.attention.checks import bytes_text
from vistvis.attention.indexing import ALL, Block, Taken
from vistvis.attention.tensorlike import TensorLike
from vistvis.errors import DenseLimitError
from vistvis.progress import progress as bar

Selection: TypeAlias = "SupportsIndex | slice | Sequence[int] | Tensor | None"

DENSE_LIMIT = 2 * 2**30


class LazyRows(TensorLike):
    """Weights `(B, h, Nq, Nk)` that a subclass computes where they are asked for."""

    dtype: torch.dtype
    """Of the weights: float32, or float64 where what they come from is."""
    device: torch.device
    # Whether single indices take the short way, `_one_row`.
    _plain: bool

    def check_unwritten(self) -> None:
        raise NotImplementedError

    def _one_row(self, batch: Any, head: Any, query: Any) -> Tensor:
        """One query's weights over all keys, `(Nk,)`."""
        raise NotImplementedError

    def _block(self, b: Taken, h: Taken, q: Taken, k: Taken) -> Tensor:
        """Weights `(B', h', Q, K)`; softmax goes over all keys, whatever `k` is."""
        raise NotImplementedError

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
        self.check_unwritten()
        # One query of one head is what a click asks for.
        if self._is_plain(batch, heads, queries):
            return self._one_row(batch, heads, queries).view(1, 1, 1, -1)
        return self._block(*self._taken(batch, heads, queries, None))

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
            Which rows, as in `rows`; by default all.
        max_bytes
            Bound on the weights of one block, which has one row at least. Its logits are held
            beside them for a moment. Default 8 MiB.

        Yields
        ------
        `(index, weights)`, in order: `index` is three slices, where the block lies in the selection
        `(B', h', Q)`; `weights` are its rows over all keys, `(b, h, q, Nk)`, as from `rows`. The
        blocks cover the selection, each row once.

        Cost: that of all `rows`; memory of one block.

        >>> entropy = torch.empty(attention.shape[:3])
        >>> for index, weights in attention.row_blocks():
        ...     entropy[index] = torch.special.entr(weights).sum(-1)
        """
        parts = self._parts(*self._taken(batch, heads, queries), max_bytes=max_bytes)
        for index, (b, h, q) in bar(parts, "rows of attention", shown=progress, delay=0.5):
            self.check_unwritten()
            yield index, self._block(b, h, q, ALL)

    def dense(self, *, max_bytes: int = DENSE_LIMIT) -> Tensor:
        """The whole matrix, `(B, h, Nq, Nk)`.

        Raises
        ------
        DenseLimitError
            If it would be larger than `max_bytes` (default 2 GiB).
        """
        self.check_unwritten()
        size = self._bytes_of(self.shape)
        if size > max_bytes:
            raise DenseLimitError(
                f"the dense matrix {tuple(self.shape)} takes {bytes_text(size)}, "
                f"more than the limit of {bytes_text(max_bytes)}. Take what you need: "
                f"rows(queries), columns(keys), attention[batch, head, query] — or "
                f"dense(max_bytes=…) if it does fit in memory"
            )
        return self._block(ALL, ALL, ALL, ALL)

    def __getitem__(self, index: Any) -> Tensor:
        self.check_unwritten()
        if type(index) is tuple and len(index) == 3 and self._is_plain(*index):
            return self._one_row(*index)
        plan = indexing.plan(index, tuple(self.shape), self.device)
        size = self._bytes_of(plan.taken_shape)
        if size > DENSE_LIMIT:
            raise DenseLimitError(
                f"this index needs a block of {plan.taken_shape}, {bytes_text(size)}, more than "
                f"the limit of {bytes_text(DENSE_LIMIT)}; take fewer queries, or loop over them"
            )
        return self._block(*plan.take)[plan.rest]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[b] for b in range(len(self)))

    # -- for subclasses ------------------------------------------------------------------------

    def _is_plain(self, *numbers: Any) -> bool:
        return self._plain and all(type(number) is int for number in numbers)

    def _whole(self, number: Any, dim: int) -> int:
        return indexing.whole(number, self.shape[dim], indexing.DIMENSIONS[dim])

    def _taken(self, *selections: Selection) -> tuple[Taken, ...]:
        dims = zip(selections, self.shape, indexing.DIMENSIONS, strict=False)
        return tuple(indexing.taken(one, size, name, self.device) for one, size, name in dims)

    def _counts(self, *taken: Taken) -> tuple[int, ...]:
        return tuple(map(indexing.length, taken, self.shape))

    def _parts(
        self, *rows: Taken, max_bytes: int | None = None
    ) -> list[tuple[Block, tuple[Taken, ...]]]:
        """Chosen (batch, heads, queries), cut into blocks: where each lies in them, and itself."""
        at_once = arithmetic.rows_at_once(self.shape[3], self.dtype, max_bytes)
        return [
            (index, tuple(map(indexing.part, rows, self.shape, index)))
            for index in indexing.blocks(self._counts(*rows), at_once)
        ]

    def _bytes_of(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.dtype.itemsize
