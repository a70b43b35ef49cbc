"""Functions of indices (`score_mod`, `mask_mod`), kept so that they stay right."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import CellType, FunctionType
from typing import Any

from torch import Tensor

from vistvis.errors import CaptureError
from vistvis.hooks.readings import Keeping


def kept_function(function: Callable[..., Tensor], keeping: Keeping) -> Callable[..., Tensor]:
    """The same function, over the tensors that it closes over as they are now.

    They are moved where queries and keys are, or shared; then a later write into them is a
    `CaptureError` when the function is called.
    """
    held: list[tuple[Tensor, int]] = []
    kept = _kept(function, keeping, held, {})

    @wraps(function)
    def checked(*indices: Tensor) -> Tensor:
        if any(tensor._version != version for tensor, version in held):
            raise CaptureError(
                "a tensor that its score_mod or mask_mod uses was written into after the kernel "
                'ran, so weights would be wrong; capture with keep="cpu", or clone it first'
            )
        out: Tensor = kept(*indices)
        return out

    return checked


def _kept(
    value: Any, keeping: Keeping, held: list[tuple[Tensor, int]], done: dict[int, Any]
) -> Any:
    if id(value) in done:
        return done[id(value)]
    made = value
    if isinstance(value, Tensor):
        made = keeping.mask(value, None)
        if not made.is_inference():
            held.append((made, made._version))
    elif type(value) in (tuple, list):
        made = type(value)(_kept(one, keeping, held, done) for one in value)
    elif isinstance(value, FunctionType) and value.__closure__:
        cells = tuple(CellType() for _ in value.__closure__)
        made = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
        made.__kwdefaults__ = value.__kwdefaults__
        done[id(value)] = made  # before its cells: a function may close over itself
        for new, cell in zip(cells, value.__closure__, strict=True):
            new.cell_contents = _kept(cell.cell_contents, keeping, held, done)
    done[id(value)] = made
    return made
