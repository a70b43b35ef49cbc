"""What attention weights are, in float64 and plain torch, and how far float32 may be from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor


def tensor_of(
    random: Random, shape: Sequence[int], dtype: torch.dtype, *, size: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    return (torch.randn(list(shape), generator=generator) * size).to(dtype)


def chosen(tensor: Tensor, box: tuple[Any, ...]) -> Tensor:
    """Each dimension's numbers, or slice, by itself."""
    for dim, numbers in enumerate(box):
        if not isinstance(numbers, slice):
            tensor = tensor.index_select(dim, torch.tensor(numbers, dtype=torch.int64))
    return tensor


@dataclass(frozen=True)
class Truth:
    """Weights and logits `(B, h, Nq, Nk)` in float64, and how far those of a computation may be.

    Products of width d err by (d + 2) half steps of the largest sum of |q·k|; a mask is added in
    the computation's own numbers, as kernels do, and what rounding does to that sum is tried out.
    """

    weights: Tensor
    tolerance: Tensor
    logits: Tensor
    logit_tolerance: Tensor
    dtype: torch.dtype
    has_logits: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weights.shape)

    @staticmethod
    def given(weights: Tensor) -> Truth:
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        none = torch.zeros_like(weights.double())
        return Truth(weights.double(), none, none, none, dtype, has_logits=False)

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        *,
        scale: Any = None,
        causal: bool = False,
        mask: Tensor | None = None,
        segments: Any = None,
        score_mod: Any = None,
        mask_mod: Any = None,
    ) -> Truth:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        eps, width = torch.finfo(dtype).eps, query.shape[-1]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        factor: Any = width**-0.5 if scale is None else scale
        factor = factor.double().view(1, -1, 1, 1) if isinstance(factor, Tensor) else factor
        logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()) * factor
        largest = torch.einsum("bhqd,bhkd->bhqk", query.double().abs(), key.double().abs())
        largest = largest * (abs(factor) if not isinstance(factor, Tensor) else factor.abs())
        error = (width + 3) * eps / 2 * largest
        b, h, q, k = (
            torch.arange(n).view([-1 if i == d else 1 for i in range(4)])
            for d, n in enumerate(logits.shape)
        )
        if score_mod is not None:
            logits = score_mod(logits, b, h, q, k)
            error = error + 4 * eps * logits.abs()
        seen = torch.ones_like(logits, dtype=torch.bool)
        first = torch.zeros(logits.shape[3], dtype=torch.int64)
        if segments is not None:
            starts = torch.as_tensor(segments)
            first = (torch.arange(logits.shape[3])[:, None] >= starts).sum(1) - 1
            seen &= first[:, None] == first
        if causal:
            seen &= q >= k
        if mask_mod is not None:
            seen &= mask_mod(b, h, q, k)
        if mask is not None and mask.dtype == torch.bool:
            seen &= mask
        elif mask is not None:
            logits, error = added(logits, error, mask, dtype)
        return Truth.softmax(logits.masked_fill(~seen, -math.inf), error, dtype)

    @staticmethod
    def softmax(logits: Tensor, error: Tensor, dtype: torch.dtype) -> Truth:
        eps, keys, lowest = torch.finfo(dtype).eps, logits.shape[-1], torch.finfo(torch.float64).min
        if not keys:
            return Truth(logits, logits, logits, logits, dtype)
        highest = logits.amax(-1, keepdim=True)
        exps = torch.where(logits == -math.inf, 0.0, (logits - highest.clamp(min=lowest)).exp())
        weights = exps / exps.sum(-1, keepdim=True).clamp(min=1e-300)
        # A logit that is off by e is a weight that is off by a factor of exp(e), twice.
        error = torch.where(logits == -math.inf, 0.0, error)
        worst = error.amax(-1, keepdim=True) * 2
        step = torch.where(logits == -math.inf, 0.0, (logits - highest).abs()).clamp(max=200) * eps
        factor = (worst + step + (keys + 8) * eps).expm1()
        return Truth(weights, weights * factor + 1e-37, logits, error + eps * highest.abs(), dtype)

    # -- comparing ---------------------------------------------------------------------------------

    def compare(self, found: Any, box: tuple[Any, ...], *, what: str) -> None:
        """`found` is the part of the weights (or logits) that the box means."""
        logits = what == "logits"
        wanted = chosen(self.logits if logits else self.weights, box)
        allowed = chosen(self.logit_tolerance if logits else self.tolerance, box)
        self.compare_tensors(found, wanted, allowed, what=what)

    def compare_tensors(self, found: Any, wanted: Tensor, allowed: Tensor, *, what: str) -> None:
        assert type(found) is Tensor, f"{what}: {type(found)}"
        assert found.shape == wanted.shape, f"{what}: {found.shape} is not {wanted.shape}"
        assert found.dtype == self.dtype, f"{what}: {found.dtype}"
        if not found.numel():
            return
        found = found.double()
        if what != "logits" and self.has_logits:
            assert bool(((found >= 0) & (found <= 1)).all()), f"{what}: below 0 or above 1"
        apart = torch.where(found == wanted, 0.0, (found - wanted).abs())
        excess = torch.where(apart.isnan(), math.inf, apart - allowed)
        worst = int(excess.argmax())
        assert bool((excess <= 0).all()), (
            f"{what}: {found.reshape(-1)[worst]} where {wanted.reshape(-1)[worst]} is right"
        )

    def compare_sums(self, found: Tensor) -> None:
        wanted = torch.logsumexp(self.logits, -1)
        empty = (self.logits == -math.inf).all(-1)
        worst = self.logit_tolerance.amax(-1) if self.shape[3] else torch.zeros_like(wanted)
        eps = torch.finfo(self.dtype).eps
        allowed = worst + 4 * eps * (wanted.abs().nan_to_num(0, 0, 0) + self.shape[3] + 1)
        assert found.shape == wanted.shape
        right = torch.where(empty, found == -math.inf, (found.double() - wanted).abs() <= allowed)
        assert bool(right.all()), f"log_sum_exp: {found[~right]} where {wanted[~right]} is right"


def added(logits: Tensor, error: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and a floating mask, added in `dtype`, and by how much that may be off."""
    mask = mask.to(dtype)
    low, middle, high = ((logits + e).to(dtype) + mask for e in (-error, 0.0, error))
    total = middle.double()
    off = torch.maximum((high.double() - total).abs(), (total - low.double()).abs())
    # Equal infinities are no error; the sum itself is rounded again.
    return total, torch.where(total.isinf(), 0.0, off)
