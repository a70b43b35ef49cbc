"""A captured attention beside the kernel calls that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistvis.attention import Attention

from .witness import Call


@dataclass(frozen=True)
class Reading:
    """One captured attention, and the kernel calls that it is made of."""

    attention: Attention
    calls: list[int]
    along: str
    """How the calls lie in it: "one", "queries" (one under the other), "blocks" or "heads"."""

    def weights(self, calls: list[Call]) -> Tensor:
        parts, shape = [calls[number].weights for number in self.calls], self.attention.shape
        if self.along == "one":
            return parts[0].reshape(shape)
        if self.along == "heads":
            return torch.stack(parts, 1).reshape(shape)
        if self.along == "queries":
            return torch.cat(parts, -2).reshape(shape)
        whole = parts[0].new_zeros(shape)
        q = k = 0
        for part in parts:
            rows, columns = part.shape[-2:]
            whole[..., q : q + rows, k : k + columns] = part.reshape(shape[0], shape[1], rows, -1)
            q, k = q + rows, k + columns
        return whole

    def answers(self, calls: list[Call], other: list[Call]) -> tuple[Tensor, Tensor]:
        """How much each query and each key differs between two runs, `(B, Nq)` and `(B, Nk)`."""
        sides = [calls[n].answers(other[n]) for n in self.calls]
        sizes = self.attention.shape[2], self.attention.shape[3]
        out = []
        for side, size in enumerate(sizes):
            parts = [one[side].reshape(-1, one[side].shape[-1]) for one in sides]
            if self.along == "blocks" or (self.along == "queries" and side == 0):
                joined = torch.cat([part.sum(0, keepdim=True) for part in parts], -1)
            else:
                joined = torch.stack(parts).sum(0)
            assert joined.shape[-1] == size, (joined.shape, size)
            out.append(joined.reshape(self.attention.shape[0], -1, size).sum(1))
        return out[0], out[1]


def match(attention: list[Attention], calls: list[Call], numbers: list[int]) -> list[Reading]:
    """Which kernel calls each captured attention is made of; none if they don't fit."""
    if not attention or len(numbers) % len(attention):
        return []
    size = len(numbers) // len(attention)
    readings = []
    for at, one in enumerate(attention):
        part = numbers[at * size : (at + 1) * size]
        shapes = [calls[number].weights.shape for number in part]
        rows, columns = one.shape[2:]
        total = sum(calls[number].weights.numel() for number in part)
        if size == 1 and tuple(shapes[0][-2:]) == (rows, columns):
            along = "one"
        elif all(tuple(s[-2:]) == (rows, columns) for s in shapes) and total == one.numel():
            along = "heads"
        elif all(s[-1] == columns for s in shapes) and sum(s[-2] for s in shapes) == rows:
            along = "queries"
        elif sum(s[-1] for s in shapes) == columns and sum(s[-2] for s in shapes) == rows:
            along = "blocks"
        else:
            return []
        readings.append(Reading(one, part, along))
    return readings


def largest_errors(reading: Reading, calls: list[Call]) -> tuple[float, float]:
    """Every row and every column of a captured attention against the witness."""
    expected, attention, rows, columns = reading.weights(calls), reading.attention, 0.0, 0.0
    for number in range(attention.shape[2]):
        got = attention.rows(number)[:, :, 0].double()
        rows = max(rows, float((got - expected[:, :, number]).abs().max()))
    for number in range(attention.shape[3]):
        got = attention.columns(number)[..., 0].double()
        columns = max(columns, float((got - expected[..., number]).abs().max()))
    return rows, columns
