"""From least to largest, as papers scale what they then compare or multiply."""

from __future__ import annotations

from torch import Tensor


def min_max(values: Tensor, *dims: int, eps: float = 0.0) -> Tensor:
    """`(x − min) / (max − min + eps)` over some dimensions; 0 where all are alike and eps is 0."""
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    span = high - low + eps
    return ((values - low) / span).where(span > 0, 0.0)
