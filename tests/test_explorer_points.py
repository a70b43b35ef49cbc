"""Points in a page: which are taken, what is refused."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch

from vggt_adapter.sample_scene import sample_points
from vistvis import TokenLayout
from vistvis.errors import InputError
from vistvis.views.explorer.points import point_record

LAYOUT = TokenLayout(frames=2, grid=(3, 4), special=("camera",))


def numbers(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)


def points(rows: int = 3, cols: int = 4, frames: int = 2) -> torch.Tensor:
    return torch.randn(frames, rows, cols, 3, generator=torch.Generator().manual_seed(0))


def test_a_point_for_each_patch_is_taken_as_it_is() -> None:
    given, sure = points(), torch.rand(2, 3, 4)
    cameras = torch.eye(3, 4).repeat(2, 1, 1)
    record = point_record(LAYOUT, points=given[None], confidence=sure, cameras=cameras[None])
    assert record.keys() == {"positions", "confidence", "cameras", "left_out"}
    np.testing.assert_array_equal(numbers(record["positions"], 2, 3, 4, 3), given)
    np.testing.assert_array_equal(numbers(record["confidence"], 2, 3, 4), sure)
    np.testing.assert_array_equal(numbers(record["cameras"], 2, 3, 4), cameras)
    assert record["left_out"] == 0


@pytest.mark.parametrize("step", [2, 3, 14])
def test_of_a_point_a_pixel_those_in_the_middle_are_taken(step: int) -> None:
    given = points(3 * step, 4 * step).double()
    record = point_record(LAYOUT, points=given)
    middle = given[:, step // 2 :: step, step // 2 :: step].float()
    np.testing.assert_array_equal(numbers(record["positions"], 2, 3, 4, 3), middle)
    assert record.keys() == {"positions", "left_out"}


def test_points_that_are_no_numbers_are_counted() -> None:
    given = points()
    given[0, 1, 2, 0], given[1, 0, 0] = torch.nan, torch.inf
    assert point_record(LAYOUT, points=given)["left_out"] == 2


def test_half_and_brain_floats_are_read() -> None:
    given = points().bfloat16()
    record = point_record(LAYOUT, points=given)
    np.testing.assert_array_equal(numbers(record["positions"], 2, 3, 4, 3), given.float())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"points": points(frames=3)}, r"of 2 frames of 3×4 patches.*got 3 of 3×4"),
        ({"points": points(4, 4)}, r"whole multiple.*got 2 of 4×4"),
        ({"points": points()[..., :2]}, r"points are floating \(S, rows, cols, 3\)"),
        ({"points": points() * torch.nan}, r"got none; leave points= out"),
        ({"points": points(), "confidence": torch.rand(2, 4, 4)}, "one size"),
        ({"points": points(), "cameras": torch.eye(3, 4)[None].repeat(3, 1, 1)}, "cameras of 3"),
        ({"points": points(), "cameras": torch.full((2, 3, 4), torch.inf)}, "cameras are finite"),
    ],
)
def test_points_that_do_not_fit_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        point_record(LAYOUT, **given)


def test_the_points_of_the_sample_views_fit() -> None:
    layout = TokenLayout(frames=3, grid=(18, 24), special=("camera",))
    seen, cameras = sample_points(layout.grid)
    record = point_record(layout, points=seen, cameras=cameras)
    np.testing.assert_array_equal(numbers(record["positions"], 3, 18, 24, 3), seen)
    assert record["left_out"] == 0
