"""Masks, scales and indices that are none: torch's answer, or an error of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vistvis import Attention
from vistvis.errors import IndexOutOfRange, InputError


def pair(**options: Any) -> Attention:
    generator = torch.Generator().manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    groups = options.pop("groups", 1)
    query = torch.randn(1, 4, 9, 8, generator=generator, dtype=dtype)
    key = torch.randn(1, 4 // groups, 9, 8, generator=generator, dtype=dtype)
    return Attention(query=query, key=key, **options)


COMPUTING: list[Callable[[Attention], object]] = [
    lambda a: a.dense(),
    lambda a: a[0, 1, 2],
    lambda a: a.rows(2),
    lambda a: a.columns(3),
    lambda a: a.logits(2),
    lambda a: a.log_sum_exp(),
    lambda a: list(a.row_blocks(max_bytes=400)),
]


@pytest.mark.parametrize("compute", COMPUTING)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("segments", [None, [0, 4]])
def test_masks_are_finite_or_minus_infinity(
    compute: Callable[[Attention], object], value: float, segments: list[int] | None
) -> None:
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 2, 3] = -math.inf
    compute(pair(mask=mask, segments=segments))
    mask[..., 2, 3] = value
    segments = segments and [0, 1]  # the second holds both
    with pytest.raises(InputError, match="the mask of this attention makes NaN"):
        compute(pair(mask=mask, segments=segments))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_mod_gives_no_nan(value: float) -> None:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where((q == 2) & (k == 3), value, score)

    attention = pair(score_mod=score_mod)
    assert attention.rows(1).isfinite().all()  # its row is not touched
    with pytest.raises(InputError, match="the score_mod of"):
        attention.rows(2)
    hidden = pair(score_mod=score_mod, mask_mod=lambda b, h, q, k: k != 3)
    assert hidden.rows(2)[..., 3].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_scale", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_scale_of_another_dtype(dtype: torch.dtype, of_scale: torch.dtype, groups: int) -> None:
    scale = torch.tensor([1, 2, 3, 4], dtype=of_scale)
    attention = pair(dtype=dtype, scale=scale, groups=groups)
    same = pair(dtype=dtype, scale=scale.to(attention.dtype), groups=groups)
    dense = same.dense()
    assert attention.scale.dtype == of_scale  # type: ignore[union-attr]
    assert attention.dense().equal(dense)
    assert attention[0, 1, 2].dtype == attention.dtype
    torch.testing.assert_close(attention[0, 1, 2], dense[0, 1, 2])
    attention.log_sum_exp()
    torch.testing.assert_close(
        attention.columns(3, batch=0, heads=1)[0, 0, :, 0], dense[0, 1, :, 3]
    )
    empty = Attention(query=torch.ones(1, 4, 2, 8), key=torch.ones(1, 4, 0, 8), scale=scale)
    assert empty.dense().dtype == torch.float32


@pytest.mark.parametrize(
    "index", [(0, 0, [0, 1], [0, 1, 2]), (0, torch.zeros(2, 3, dtype=torch.int64), [1, 2])]
)
def test_indices_that_do_not_broadcast(index: Any) -> None:
    attention = pair()
    with pytest.raises(IndexError):
        attention.dense()[index]
    with pytest.raises(IndexOutOfRange, match="broadcast"):
        attention[index]


def test_an_array_without_dimensions_is_a_number() -> None:
    attention = pair()
    dense = attention.dense()
    for index in (np.array(0), (0, np.array(-1, np.int16), [1, 2]), (..., np.array(3))):
        torch.testing.assert_close(attention[index], dense[index])
    assert attention.rows(np.array(2)).shape == (1, 4, 1, 9)  # type: ignore[arg-type]
    for wrong in (np.array(0.0), np.array(True), np.array("a")):
        with pytest.raises(InputError):
            attention[wrong]


def test_uint8_is_neither_a_mask_nor_a_number() -> None:
    attention = pair()
    for index in (torch.tensor([0, 1], dtype=torch.uint8), np.array([0, 1], np.uint8)):
        for use in (
            lambda: attention[0, 0, index],  # noqa: B023 - called at once
            lambda: attention.rows(index),  # type: ignore[arg-type]  # noqa: B023
        ):
            with pytest.raises(InputError, match=r"uint8.*\.bool\(\)"):
                use()
    with pytest.raises(InputError):
        attention[torch.tensor(1, dtype=torch.uint8)]
