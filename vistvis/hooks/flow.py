"""Tracing eager code: from scores through the softmax to the matrix that meets the values."""

from __future__ import annotations

import string
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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


class Flow:
    """Follows scores to weights to the product with values, through a module's torch functions.

    Scores are products of two activations; whatever is done to them, and to the weights that a
    softmax makes of them (bias, talking heads, gates), is in the matrix that is read at the end.
    """

    def __init__(self, reader: KernelReader, notes: Notes, active: Callable[[], bool]) -> None:
        self._reader, self._notes, self._active = reader, notes, active
        # By id, with a weak reference: an id alone may come back as another tensor's.
        self._scores: dict[int, weakref.ref[Tensor]] = {}
        self._weights: dict[int, weakref.ref[Tensor]] = {}
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
            if any(_has(self._weights, tensor) for tensor in inputs):
                if func in _DROPOUT and _dropping(func, args, kwargs):
                    self._notes.problems.append(
                        "dropout is active on its weights; call model.eval()"
                    )
                self._mark(self._weights, out)
            elif any(_has(self._scores, tensor) for tensor in inputs):
                self._mark(self._scores, out)

    def _softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        scores = kwargs.get("input", args[0] if args else None)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(scores, Tensor) or not _has(self._scores, scores):
            return
        if dim not in (-1, scores.ndim - 1):
            self._notes.problems.append(
                f"its softmax runs over dimension {dim} of {tuple(scores.shape)}, not over the last"
            )
        self._mark(self._weights, out)

    def _product(
        self, func: Callable[..., Any], tensors: list[Tensor], args: Sequence[Any], out: Any
    ) -> None:
        if func in (torch.baddbmm, Tensor.baddbmm):
            tensors = tensors[1:3]
        if len(tensors) != 2 or not isinstance(out, Tensor):
            return
        first, second = reversed(tensors) if func is Tensor.__rmatmul__ else tensors
        weights_first = _has(self._weights, first)
        if weights_first or _has(self._weights, second):
            if self._active():
                equation = args[0] if func is torch.einsum else None
                self._notes.take(
                    "softmax", lambda: self._read(first, second, weights_first, out, equation)
                )
        elif not any(isinstance(tensor, nn.Parameter) for tensor in tensors):
            self._mark(self._scores, out)

    def _read(
        self, first: Tensor, second: Tensor, weights_first: bool, out: Tensor, equation: Any
    ) -> Reading:
        if isinstance(equation, str):
            return self._reader.weights(_einsum_weights(equation, first, second, weights_first))
        if weights_first:
            return self._reader.weights(first, second, out)
        return self._reader.weights(second.mT, first.mT, out.mT)

    def _mark(self, marks: dict[int, weakref.ref[Tensor]], out: Any) -> None:
        for tensor in _tensors((out,)):
            if tensor.ndim >= 2:
                self.begun = True
                marks[id(tensor)] = weakref.ref(tensor)


def _has(marks: dict[int, weakref.ref[Tensor]], tensor: Tensor) -> bool:
    mark = marks.get(id(tensor))
    return mark is not None and mark() is tensor


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


def _einsum_weights(equation: str, first: Tensor, second: Tensor, weights_first: bool) -> Tensor:
    """The weights of `einsum("…qk,…kd->…qd", weights, values)`, as `(…, queries, keys)`."""
    terms, _, result = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    mine, other, weights = (left, right, first) if weights_first else (right, left, second)
    if "..." in equation:
        spare = [letter for letter in string.ascii_letters if letter not in equation]
        dots = "".join(spare[: weights.ndim - len(mine.replace("...", ""))])
        mine, other, result = (term.replace("...", dots) for term in (mine, other, result))
    keys = [letter for letter in mine if letter in other and letter not in result]
    queries = [letter for letter in mine if letter not in other and letter in result]
    if len(keys) != 1 or len(queries) != 1:
        raise UnreadableError(f"einsum({equation!r}) leaves unclear what are queries and what keys")
    lead = [letter for letter in mine if letter not in (keys[0], queries[0])]
    return weights.permute([mine.index(letter) for letter in (*lead, queries[0], keys[0])])
