"""Which leading dimensions of a kernel's tensors are heads, and which belong to the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vistvis.errors import VistvisError


class UnreadableError(VistvisError):
    """Why one kernel call can't be turned into exact weights; the site's name is added later."""


@dataclass(frozen=True)
class Fold:
    """How leading dimensions become `(batch, heads)`: which one is heads, and the target shape."""

    lead: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int]

    @classmethod
    def of(
        cls, lead: tuple[int, ...], heads: int | None, batch: int | None, heads_at: int | None
    ) -> Fold:
        """Find the head dimension among leading dimensions `lead`; `UnreadableError` if it can't.

        `heads` and `batch` are what the module and its input say, `heads_at` is as in
        `ModuleTraits`.
        """
        count = len(lead)
        if count == 2 and heads_at == 0 and heads:
            first = lead[0] // heads
            return cls((first, heads, lead[1]), (0, 2, 1), (first * lead[1], heads))
        if count == 2:
            return cls(lead, (0, 1), (lead[0], lead[1]))
        if count == 0 and batch is not None:
            raise UnreadableError("its weights have no batch dimension, though its input has one")
        if count == 0:
            return cls(lead, (), (1, 1))
        if count == 1:
            if heads and lead[0] % heads == 0 and batch in (None, lead[0] // heads):
                return cls(lead, (0,), (lead[0] // heads, heads))
            return cls(lead, (0,), (lead[0], 1))
        places = [place for place in range(1, count) if lead[place] == heads]
        if heads_at is not None and lead[heads_at] == heads:
            places = [heads_at]
        if not places or (len(places) > 1 and heads != 1):
            raise UnreadableError(
                f"which of its dimensions {lead} are heads is not known (the module says {heads})"
            )
        rest = tuple(dim for dim in range(count) if dim != places[0])
        number = math.prod(lead[dim] for dim in rest)
        return cls(lead, (*rest, places[0]), (number, lead[places[0]]))

    @property
    def changes(self) -> bool:
        return len(self.lead) != 2 or self.order != (0, 1)

    def __call__(self, tensor: Tensor) -> Tensor:
        """`(*lead, N, d)` → `(batch, heads, N, d)`."""
        if not self.changes:
            return tensor
        count = len(self.lead)
        if count == 3 and tensor.ndim == 4:
            tensor = tensor.reshape(*self.lead, *tensor.shape[-2:])
        if tensor.ndim != count + 2:
            raise UnreadableError(f"its tensors have {tensor.ndim} and {count + 2} dimensions")
        if count >= 2:
            tensor = tensor.permute(*self.order, count, count + 1)
        return tensor.reshape(*self.shape, *tensor.shape[-2:])

    def back(self, tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
        """The reverse, to the leading dimensions that a tensor had."""
        if not self.changes:
            return tensor
        sizes = [self.lead[dim] for dim in self.order]
        tensor = tensor.reshape(*sizes, *tensor.shape[-2:])
        places = [self.order.index(dim) for dim in range(len(sizes))]
        tensor = tensor.permute(*places, len(sizes), len(sizes) + 1)
        return tensor.reshape(*lead, *tensor.shape[-2:])
