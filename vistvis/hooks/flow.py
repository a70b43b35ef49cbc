"""Tracing eager code: from scores through the softmax to the matrix that meets the values."""

from __future__ import annotations

import string
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistvis.hooks.folding import UnreadableError
from vistvis.hooks.readings import KernelReader, Notes, Reading

PRODUCTS = {
    torch.matmul, torch.bmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.bmm, Tensor.baddbmm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_DROPOUT = {F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}


class Origin(NamedTuple):
    """Which product scores and weights come from, and whether it was turned round since."""

    product: object
    turned: bool


# By id, with a weak reference: an id alone may come back as another tensor's.
Marks: TypeAlias = dict[int, tuple["weakref.ref[Tensor]", Origin]]


class Flow:
    """Follows scores to weights to the product with values, through a module's torch functions.

    Scores are products of two activations; whatever is done to them, and to the weights that a
    softmax makes of them (bias, talking heads, gates), is in the matrix that is read at the end.
    """

    def __init__(self, reader: KernelReader, notes: Notes, active: Callable[[], bool]) -> None:
        self._reader, self._notes, self._active = reader, notes, active
        self._scores: Marks = {}
        self._weights: Marks = {}
        self._odd, self._seen = False, ""
        self.unmet = 0
        """Softmaxes over scores whose weights have met no values."""
        self.begun = False
        """Whether there is anything to follow yet."""

    def follow(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Take note of one torch function that the module called."""
        if func in PRODUCTS:
            self._product(func, list(_tensors((*args, *kwargs.values()))), args, out)
        elif func in SOFTMAX:
            self._softmax(args, kwargs, out)
        elif self.begun:
            inputs = list(_tensors((*args, *kwargs.values())))
            for marks in (self._weights, self._scores):
                pairs = ((tensor, _found(marks, tensor)) for tensor in inputs)
                source, found = next((pair for pair in pairs if pair[1]), (None, None))
                if source is None or found is None:
                    continue
                if marks is self._scores:
                    found = Origin(found.product, found.turned != _is_turned(source, out))
                elif func in _DROPOUT and _dropping(func, args, kwargs):
                    self._notes.problems.append(
                        "dropout is active on its weights; call model.eval()"
                    )
                self._mark(marks, out, found)
                break

    def _softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        scores = kwargs.get("input", args[0] if args else None)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        found = _found(self._scores, scores) if isinstance(scores, Tensor) else None
        if found is None:
            return
        last = scores.ndim - 1
        self.unmet += 1
        self._odd = self._odd or dim not in (-1, last)
        self._seen = f"its softmax runs over dimension {dim} of {tuple(scores.shape)}"
        turned = found.turned != (dim in (-2, last - 1))
        self._mark(self._weights, out, Origin(found.product, turned))

    def _product(
        self, func: Callable[..., Any], tensors: list[Tensor], args: Sequence[Any], out: Any
    ) -> None:
        if func in (torch.baddbmm, Tensor.baddbmm):
            tensors = tensors[1:3]
        if len(tensors) != 2 or not isinstance(out, Tensor):
            return
        first, second = reversed(tensors) if func is Tensor.__rmatmul__ else tensors
        weights_first = _found(self._weights, first)
        found = weights_first or _found(self._weights, second)
        if found:
            self.unmet = max(0, self.unmet - 1)
            if self._active():
                equation = args[0] if func is torch.einsum else None
                if weights_first is None:
                    first, second = second, first
                self._notes.take(
                    "softmax",
                    lambda: self._read(first, second, weights_first is not None, out, equation),
                )
        elif not any(isinstance(tensor, nn.Parameter) for tensor in tensors):
            self._mark(self._scores, out, Origin(object(), False))

    def _read(
        self, weights: Tensor, value: Tensor, weights_first: bool, out: Tensor, equation: Any
    ) -> Reading:
        made, values, output = weights, None, None
        if isinstance(equation, str):
            weights, values, output = _einsum_parts(equation, weights, value, weights_first, out)
        elif weights_first:
            values, output = value, out
        else:
            weights, values, output = weights.mT, value.mT, out.mT
        moved = weights.stride(-1) != made.stride(-1) or weights.shape[-1] != made.shape[-1]
        self._check_rows(weights, odd=self._odd or moved)
        reading = self._reader.weights(weights, values, output)
        return replace(reading, scores=_found(self._weights, made))

    def _check_rows(self, weights: Tensor, *, odd: bool) -> None:
        """`UnreadableError` if the softmax ran over another side than the keys.

        Rows of talking heads, say, need not sum to 1; but where the softmax was `odd` they must.
        """
        if _sums_to_one(weights, -1):
            return
        if _sums_to_one(weights, -2):
            raise UnreadableError(
                "its softmax runs over the queries, so columns sum to 1 and there is no row of "
                "weights"
            )
        if odd:
            raise UnreadableError(f"{self._seen}, not over the keys")

    def _mark(self, marks: Marks, out: Any, found: Origin) -> None:
        for tensor in _tensors((out,)):
            if tensor.ndim >= 2:
                self.begun = True
                marks[id(tensor)] = (weakref.ref(tensor), found)


def _found(marks: Marks, tensor: Tensor) -> Origin | None:
    mark = marks.get(id(tensor))
    return mark[1] if mark is not None and mark[0]() is tensor else None


def _is_turned(tensor: Tensor, out: Any) -> bool:
    """Whether `out` is a view of `tensor` with its last two dimensions in each other's place."""
    if not isinstance(out, Tensor) or out.ndim != tensor.ndim or out.ndim < 2:
        return False
    sizes, strides = (tensor.shape[-2:], out.shape[-2:]), (tensor.stride()[-2:], out.stride()[-2:])
    turned = all(tuple(old) == tuple(new)[::-1] for old, new in (sizes, strides))
    return turned and strides[0] != strides[1] and out.data_ptr() == tensor.data_ptr()


def _sums_to_one(weights: Tensor, dim: int) -> bool:
    """Along a dimension; what is masked as a whole sums to 0, or is NaN."""
    sums = weights.sum(dim, dtype=torch.float32)
    return not bool((torch.minimum((sums - 1).abs(), sums.abs()) > 0.01).any())


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _dropping(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    third = "train" if func is torch.dropout else "training"
    on = kwargs.get(third, args[2] if len(args) > 2 else True)
    return bool(on) and float(p) > 0


def _einsum_parts(
    equation: str, weights: Tensor, value: Tensor, weights_first: bool, out: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights of `einsum("…qk,…kd->…qd", weights, values)`, as `(…, queries, keys)`; and if they
    have the same leading dimensions, values and output."""
    terms, _, result = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    mine, other = (left, right) if weights_first else (right, left)
    if "..." in equation:
        spare = [letter for letter in string.ascii_letters if letter not in equation]
        dots = "".join(spare[: weights.ndim - len(mine.replace("...", ""))])
        mine, other, result = (term.replace("...", dots) for term in (mine, other, result))
    keys = [letter for letter in mine if letter in other and letter not in result]
    queries = [letter for letter in mine if letter not in other and letter in result]
    if len(keys) != 1 or len(queries) != 1:
        raise UnreadableError(f"einsum({equation!r}) leaves unclear what are queries and what keys")
    lead = [letter for letter in mine if letter not in (keys[0], queries[0])]

    def ordered(tensor: Tensor, letters: str, wanted: list[str]) -> Tensor | None:
        if sorted(letters) != sorted(wanted) or tensor.ndim != len(wanted):
            return None
        return tensor.permute([letters.index(letter) for letter in wanted])

    read = weights.permute([mine.index(letter) for letter in (*lead, queries[0], keys[0])])
    width = [letter for letter in other if letter not in mine]
    values = ordered(value, other, [*lead, keys[0], *width])
    output = ordered(out, result, [*lead, queries[0], *width])
    if len(width) != 1 or values is None or output is None:
        return read, None, None
    return read, values, output
