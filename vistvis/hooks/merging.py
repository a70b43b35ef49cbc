"""Merging inside an attention module: which tokens are part of each token that the kernel saw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vistvis.attention import TokenOrder
from vistvis.models import families


class Merge(NamedTuple):
    """A call of a merging function: the two functions that it gave, for tokens `(B, N, C)`."""

    merge: Callable[[Tensor], Tensor]
    unmerge: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, args: tuple[Any, ...], out: Any) -> Merge | None:
        """What a call showed; None if it is not one of these."""
        if not (isinstance(out, tuple) and len(out) == 2 and all(map(callable, out))):
            return None
        if not (args and isinstance(args[0], Tensor) and args[0].ndim == 3):
            return None
        return cls(*out, tuple(args[0].shape), args[0].device)

    def order(self, count: int) -> TokenOrder | None:
        """Members of `count` merged tokens, numbered as they came in; None if it is not certain."""
        try:
            return self._order(count)
        except (IndexError, RuntimeError, TypeError):  # functions of the same name that do other
            return None

    def _order(self, count: int) -> TokenOrder | None:
        """As `order`.

        Handing the merged tokens' numbers back says whose output each token gets. A token that was
        kept twice is part of one more, which its number in that one's mean tells.
        """
        batch, total, _ = self.shape
        numbers = torch.arange(count, dtype=torch.float64, device=self.device)
        members = self.unmerge(numbers.expand(batch, count)[..., None].contiguous())[..., 0].long()
        if members.shape != (batch, total) or not bool(((members >= 0) & (members < count)).all()):
            return None
        codes = self._codes()
        means = self.merge(codes)
        if means.shape != (batch, count, 2):
            return None
        tokens = torch.arange(total, device=self.device).expand(batch, total)
        sums, sizes = _sums(codes, members, count)
        more = ((means * sizes - sums).abs() > 1e-6 * total).any(-1) | (sizes[..., 0] == 0)
        if len(set(more.sum(1).tolist())) > 1:
            return None  # of unequal length
        twice = (means * (sizes + 1) - sums)[..., 0].round().long()[more].view(batch, -1)
        captured = more.nonzero()[:, 1].view(batch, -1)
        if not bool(((twice >= 0) & (twice < total)).all()):
            return None
        tokens, members = torch.cat((tokens, twice), 1), torch.cat((members, captured), 1)
        held = codes.gather(1, tokens[..., None].expand(-1, -1, 2))
        sums, sizes = _sums(held, members, count)
        if not torch.allclose(sums / sizes, means, rtol=1e-9, atol=1e-9 * total):
            return None
        return TokenOrder(tokens, members)

    def _codes(self) -> Tensor:
        """Two numbers for each token: its own, and one that no sum of others gives."""
        batch, total, _ = self.shape
        generator = torch.Generator().manual_seed(0)
        second = total * torch.rand(total, dtype=torch.float64, generator=generator)
        codes = torch.stack((torch.arange(total, dtype=torch.float64), second), -1)
        return codes.to(self.device).repeat(batch, 1, 1)


def _sums(codes: Tensor, members: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums `(B, count, 2)` of the members' numbers, and how many members each has."""
    out = codes.new_zeros(len(codes), count, 2)
    where = members[..., None].expand(-1, -1, 2)
    return out.scatter_add(1, where, codes), out.scatter_add(1, where, torch.ones_like(codes))


def merging_functions(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where the code of an attention module looks up a merging function: namespace and name."""
    for cls in type(module).__mro__:
        namespace = sys.modules.get(cls.__module__)
        names = getattr(namespace, "__dict__", None)
        for function in vars(cls).values():
            if isinstance(function, FunctionType) and function.__globals__ is names:
                for name in families.MERGES.intersection(function.__code__.co_names):
                    if name in names:
                        yield namespace, name
