"""Torch's indexing, split into what has to be computed and what is left to do to it.

`attention[index]` must return what `dense[index]` would, without the dense matrix. So an index is
split in two: per dimension the smallest selection that covers it (`take`), and an index into the
block that those selections span (`rest`), which torch itself then applies. Result shapes, also of
mixed lists, tensors, None and Ellipsis, are therefore torch's own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vistvis.errors import IndexOutOfRange, InputError

DIMENSIONS = ("batch", "head", "query", "key")

Taken: TypeAlias = slice | Tensor
"""A selection along one dimension: a slice with positive step, or a 1-D int64 tensor."""

ALL = slice(None)


@dataclass(frozen=True)
class Plan:
    """`dense[index] == dense[take][rest]`, where `take` selects along each dimension by itself."""

    take: tuple[Taken, ...]
    rest: tuple[Any, ...]
    taken_shape: tuple[int, ...]


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
    if _is_int(selection):
        start = whole(selection, size, name)
        return slice(start, start + 1)
    if isinstance(selection, slice):
        return _checked_slice(selection, size, name)
    return _checked_list(_as_tensor(selection, name), size, name).reshape(-1).to(device)


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


def plan(index: Any, shape: tuple[int, ...], device: torch.device) -> Plan:
    """Split an index into attention; see `Plan`.

    Raises
    ------
    IndexOutOfRange
        If an index lies outside its dimension, or there are more indices than dimensions.
    InputError
        If an index is of no kind that torch takes.
    """
    items = _expanded(index, len(shape))
    takes: list[Taken] = []
    rest: list[Any] = []
    for item in items:
        if item is None:
            rest.append(None)
            continue
        dim = len(takes)
        size, name = shape[dim], DIMENSIONS[dim]
        if _is_int(item):
            start = whole(item, size, name)
            takes.append(slice(start, start + 1))
            rest.append(0)
        elif isinstance(item, slice):
            takes.append(_checked_slice(item, size, name))
            rest.append(ALL)
        else:
            wanted = _checked_list(_as_tensor(item, name), size, name).to(device)
            unique, inverse = torch.unique(wanted, return_inverse=True)
            takes.append(unique)
            rest.append(inverse)
    takes += [ALL] * (len(shape) - len(takes))
    lengths = tuple(length(t, size) for t, size in zip(takes, shape, strict=True))
    return Plan(tuple(takes), tuple(rest), lengths)


def chunks(counts: tuple[int, int, int], rows_at_once: int) -> list[tuple[slice, slice, slice]]:
    """Cut `(batch, heads, queries)` into blocks of at most `rows_at_once` rows (at least one).

    Small matrices (windows) go many to a block, large ones are cut along their queries.
    """
    batch, heads, queries = counts
    q = min(queries, max(1, rows_at_once))
    h = min(heads, max(1, rows_at_once // max(1, queries))) if q == queries else 1
    b = max(1, rows_at_once // max(1, queries * heads)) if h == heads and q == queries else 1
    return [
        (slice(i, i + b), slice(j, j + h), slice(k, k + q))
        for i in range(0, batch, b)
        for j in range(0, heads, max(1, h))
        for k in range(0, queries, max(1, q))
    ]


def _is_int(item: Any) -> bool:
    if isinstance(item, (bool, np.bool_)):
        return False
    if isinstance(item, Tensor):
        return item.ndim == 0 and not item.is_floating_point() and item.dtype != torch.bool
    return isinstance(item, SupportsIndex) and not isinstance(item, np.ndarray)


def _expanded(index: Any, ndim: int) -> list[Any]:
    """The index as a list: Ellipsis written out, masks of several dimensions as index tensors."""
    items: list[Any] = []
    for item in index if isinstance(index, tuple) else (index,):
        if item is None or item is Ellipsis or isinstance(item, slice) or _is_int(item):
            items.append(item)
            continue
        tensor = _as_tensor(item, "index")
        items.extend(tensor.nonzero(as_tuple=True) if tensor.dtype == torch.bool else [tensor])
    used = sum(item is not None and item is not Ellipsis for item in items)
    ellipses = [place for place, item in enumerate(items) if item is Ellipsis]
    if used > ndim or len(ellipses) > 1:
        raise IndexOutOfRange(
            f"attention has {ndim} dimensions (batch, head, query, key), got {used} indices"
            + (" and more than one Ellipsis" if len(ellipses) > 1 else "")
        )
    if ellipses:
        items[ellipses[0] : ellipses[0] + 1] = [ALL] * (ndim - used)
    return items


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


def _checked_slice(selection: slice, size: int, name: str) -> slice:
    if selection == ALL:
        return ALL
    if selection.step is not None and selection.step < 1:
        raise InputError(f"{name} slices have a positive step, as in torch, got {selection.step}")
    start, stop, step = selection.indices(size)
    return slice(start, max(start, stop), step)


def _checked_list(wanted: Tensor, size: int, name: str) -> Tensor:
    if wanted.dtype == torch.bool:
        if wanted.shape != (size,):
            raise InputError(f"a {name} mask has shape ({size},), got {tuple(wanted.shape)}")
        wanted = wanted.nonzero().reshape(-1)
    wanted = wanted.long()
    wrong = wanted[(wanted < -size) | (wanted >= size)]
    if len(wrong):
        raise IndexOutOfRange(f"{name} {int(wrong[0])} is outside 0…{size - 1}")
    return wanted.remainder(size) if size else wanted
