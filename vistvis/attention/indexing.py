"""Torch's indexing, split into what has to be computed and what is left to do to it.

`attention[index]` must return what `dense[index]` would, without the dense matrix. So an index is
split in two: per dimension the smallest selection that covers it (`take`), and an index into the
block that those selections span (`rest`), which torch itself then applies. Result shapes, also of
mixed lists, tensors, None and Ellipsis, are therefore torch's own.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vistvis.errors import IndexOutOfRange, InputError

DIMENSIONS = ("batch", "head", "query", "key")

ALL = slice(None)

# What torch takes as a mask; as for uint8, it warns.
_MASKS = (torch.bool, torch.uint8)

Taken: TypeAlias = slice | Tensor
"""A selection along one dimension: a slice with positive step, or a 1-D int64 tensor."""
Box: TypeAlias = tuple[Taken, ...]
"""A selection along each of (batch, heads, queries, keys), or of the first three of them: rows."""
Block: TypeAlias = tuple[slice, slice, slice]
"""Where a block of rows lies among chosen (batch, heads, queries)."""


def whole(value: SupportsIndex, size: int, name: str) -> int:
    """`value` as a non-negative index below `size`."""
    number = operator.index(value)
    if not -size <= number < size:
        raise IndexOutOfRange(f"{name} {number} is outside 0…{size - 1}")
    return number % size


def taken(selection: Any, size: int, name: str, device: torch.device) -> Taken:
    """An int, slice, range, list, array or int tensor as a `Taken`; None takes everything."""
    if selection is None:
        return ALL
    chosen = _checked(selection, size, name, device)
    return chosen.reshape(-1) if isinstance(chosen, Tensor) else chosen


def length(selection: Taken, size: int) -> int:
    """How many indices a selection along a dimension of `size` has."""
    return len(range(size)[selection]) if isinstance(selection, slice) else len(selection)


def part(selection: Taken, size: int, chunk: slice) -> Taken:
    """The `chunk` of a selection, itself a selection."""
    if isinstance(selection, Tensor):
        return selection[chunk]
    piece = range(size)[selection][chunk]
    return slice(piece.start, piece.stop, piece.step)


def take(tensor: Tensor, *selections: Taken) -> Tensor:
    """Select along the first dimensions, each by itself; a view where all selections are slices."""
    if any(s != ALL for s in selections if isinstance(s, slice)):
        tensor = tensor[tuple(s if isinstance(s, slice) else ALL for s in selections)]
    for dim, selection in enumerate(selections):
        if isinstance(selection, Tensor):
            tensor = tensor.index_select(dim, selection)
    return tensor


def plan(index: Any, shape: tuple[int, ...], device: torch.device) -> tuple[Box, tuple[Any, ...]]:
    """`take` and `rest` with `dense[index] == dense[take][rest]`, `take` dimension by dimension."""
    takes: list[Taken] = []
    rest: list[Any] = []
    for item in _expanded(index, shape):
        if item is None:
            rest.append(None)
            continue
        left: Any = 0 if _is_int(item) else ALL
        chosen = _checked(item, shape[len(takes)], DIMENSIONS[len(takes)], device)
        if isinstance(chosen, Tensor):
            chosen, left = torch.unique(chosen, return_inverse=True)
        takes.append(chosen)
        rest.append(left)
    takes += [ALL] * (len(shape) - len(takes))
    shapes = [left.shape for left in rest if isinstance(left, Tensor)]
    try:
        np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise IndexOutOfRange(
            "indices that are lists or tensors go together, as in torch, so their shapes must "
            f"broadcast; got {', '.join(str(tuple(one)) for one in shapes)}"
        ) from error
    return tuple(takes), tuple(rest)


def blocks(counts: Sequence[int], rows_at_once: int) -> list[Block]:
    """Cut `(batch, heads, queries)` into blocks of at most `rows_at_once` rows (at least one)."""
    # Small matrices (windows) go many to a block, large ones are cut along their queries.
    _, heads, queries = counts
    q = max(1, min(queries, rows_at_once))
    h = max(1, min(heads, rows_at_once // max(1, queries)))
    b = max(1, rows_at_once // max(1, queries * heads))
    steps = zip(counts, (b, h, q), strict=True)
    cuts = ([slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in steps)
    return list(itertools.product(*cuts))


def _is_int(item: Any) -> bool:
    if type(item) is int:  # at once: the isinstance of a protocol below takes microseconds
        return True
    if isinstance(item, (bool, np.bool_)):
        return False
    if isinstance(item, Tensor):
        return item.ndim == 0 and not item.is_floating_point() and item.dtype not in _MASKS
    if isinstance(item, np.ndarray):
        return item.ndim == 0 and item.dtype.kind in "iu"
    return isinstance(item, SupportsIndex)


def _expanded(index: Any, shape: tuple[int, ...]) -> list[Any]:
    """The index as a list: Ellipsis written out, masks as index tensors."""
    items: list[Any] = []
    for item in index if isinstance(index, tuple) else (index,):
        plain = item is None or item is Ellipsis or isinstance(item, slice) or _is_int(item)
        items.append(item if plain else _as_tensor(item, "index"))
    ndim, used = len(shape), sum(map(_dimensions, items))
    ellipses = [position for position, item in enumerate(items) if item is Ellipsis]
    if used > ndim or len(ellipses) > 1:
        raise IndexOutOfRange(
            f"attention has {ndim} dimensions (batch, head, query, key), got {used} indices"
            + (" and more than one Ellipsis" if len(ellipses) > 1 else "")
        )
    if ellipses:
        items[ellipses[0] : ellipses[0] + 1] = [ALL] * (ndim - used)
    written: list[Any] = []
    at = 0
    for item in items:
        start, at = at, at + _dimensions(item)
        if not _is_mask(item):
            written.append(item)
            continue
        if item.shape != shape[start:at]:
            raise IndexOutOfRange(
                f"a mask over {', '.join(DIMENSIONS[start:at])} has shape "
                f"{tuple(shape[start:at])}, got {tuple(item.shape)}"
            )
        written.extend(item.nonzero(as_tuple=True))
    return written


def _is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _dimensions(item: Any) -> int:
    """How many dimensions an item of an index takes up."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if _is_mask(item) else 1


def _as_tensor(item: Any, name: str) -> Tensor:
    if isinstance(item, (Sequence, np.ndarray, Tensor)) and not isinstance(item, str):
        values = item if isinstance(item, (Tensor, np.ndarray)) else list(item)
        try:
            # An empty list has no dtype of its own; torch would make it float.
            empty = isinstance(values, list) and not values
            tensor = torch.as_tensor(values, dtype=torch.int64 if empty else None)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} takes whole numbers, got {item!r}") from error
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.ndim:
            return tensor
    raise InputError(f"{name} takes an int, slice, list or tensor of ints, got {item!r}")


def _checked(item: Any, size: int, name: str, device: torch.device) -> Taken:
    """One item of an index as a `Taken`; tensors keep their shape here."""
    if _is_int(item):
        start = whole(item, size, name)
        return slice(start, start + 1)
    if isinstance(item, slice):
        if item == ALL:
            return ALL
        if item.step is not None and item.step < 1:
            raise InputError(f"{name} slices have a positive step, as in torch, got {item.step}")
        start, stop, step = item.indices(size)
        return slice(start, max(start, stop), step)
    indices = _as_tensor(item, name)
    if indices.dtype == torch.uint8:
        raise InputError(
            f"a {name} index of uint8 was a mask in older versions of torch; say which: .bool() "
            "for a mask, .long() for numbers"
        )
    if indices.dtype == torch.bool:
        if indices.shape != (size,):
            raise IndexOutOfRange(f"a {name} mask has shape ({size},), got {tuple(indices.shape)}")
        indices = indices.nonzero().reshape(-1)
    indices = indices.long()
    wrong = indices[(indices < -size) | (indices >= size)]
    if len(wrong):
        raise IndexOutOfRange(f"{name} {int(wrong[0])} is outside 0…{size - 1}")
    return (indices.remainder(size) if size else indices).to(device)
