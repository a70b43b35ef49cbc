"""The true points of the sample views: what the renderer drew, and what a run of them carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rendering as scenes

import vistvis
from vggt_adapter.sample_scene import FOLDER, sample_points, sample_views, scene_of
from vistvis.photos.photo import Photo

SIZE = (420, 560)
GRID = (30, 40)


@pytest.fixture
def drawn() -> tuple[list[scenes.Surface], list[scenes.Camera]]:
    pytest.importorskip("skimage")
    import samples

    return samples.sample_scene()


def seen_by(camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ camera[:, :3].T + camera[:, 3]


def test_the_stored_scene_is_the_one_that_the_script_draws() -> None:
    pytest.importorskip("skimage")
    import samples

    with np.load(FOLDER / "scene.npz") as stored:
        assert set(stored) == set(samples.scene_arrays())
        for name, array in samples.scene_arrays().items():
            np.testing.assert_allclose(stored[name], array, atol=1e-12)
    assert (FOLDER / "scene.npz").stat().st_size < 5000


def test_points_are_what_the_renderer_sees(
    drawn: tuple[list[scenes.Surface], list[scenes.Camera]],
) -> None:
    surfaces, cameras = drawn
    points, matrices = sample_points(SIZE)
    assert points.dtype == np.float32
    assert points.shape == (3, *SIZE, 3)
    for camera, matrix, seen in zip(cameras, matrices, points, strict=True):
        view = scenes.render(surfaces, camera, per_pixel=1)
        true = camera.position + camera.rays(camera.pixel_centres()) * view.depth[..., None]
        apart = np.abs(true - seen).max(-1)
        # The renderer casts in float32: pixels on an edge may fall to either side.
        assert (apart > 1e-3).mean() < 1e-4
        np.testing.assert_allclose(
            seen_by(matrix, seen)[..., 2], camera.project(seen)[1], rtol=1e-6
        )


@pytest.mark.parametrize("grid", [GRID, (18, 24), (7, 5)])
def test_points_lie_in_the_middle_of_their_patches(grid: tuple[int, int]) -> None:
    points, cameras = sample_points(grid)
    for camera, seen in zip(cameras, points, strict=True):
        there = seen_by(camera, seen)
        xy = there[..., :2] / there[..., 2:] * 520 + np.array(SIZE[::-1]) / 2
        rows, cols = grid
        x, y = (np.arange(cols) + 0.5) * 560 / cols, (np.arange(rows) + 0.5) * 420 / rows
        np.testing.assert_allclose(xy, np.stack(np.meshgrid(x, y), -1), atol=1e-3)
        assert (there[..., 2] > 0).all()


def test_patches_that_match_across_frames_have_near_points(
    drawn: tuple[list[scenes.Surface], list[scenes.Camera]],
) -> None:
    surfaces, cameras = drawn
    points, _ = sample_points(GRID)
    found = scenes.correspond(surfaces, cameras[0], cameras[2], scenes.patch_centres(SIZE))
    col, row = (found.xy[found.visible] // 14).astype(int).T
    apart = np.linalg.norm(points[0][found.visible] - points[2][row, col], axis=-1)
    depth = np.linalg.norm(points[0][found.visible] - cameras[0].position, axis=-1)
    # Half a patch aside is 7 pixels of a focal length of 520; on slanting floors it is more.
    assert np.median(apart / depth) < 0.02
    other = np.linalg.norm(points[0][found.visible] - points[2][row[::-1], col], axis=-1)
    assert np.median(other) > 5 * np.median(apart)


def test_only_sample_views_have_points_in_the_order_asked(tmp_path: Path) -> None:
    photos = [Photo(path, path.name) for path in sample_views()]
    points, cameras = sample_points((6, 8))
    turned = scene_of([photos[2], photos[0]], (6, 8))
    np.testing.assert_array_equal(turned["points"], points[[2, 0]])
    np.testing.assert_array_equal(turned["cameras"], cameras[[2, 0]])
    other = tmp_path / "view_1.jpg"
    other.write_bytes(photos[0].path.read_bytes())
    assert scene_of([photos[0], Photo(other, "view_1.jpg")], (6, 8)) == {}


def test_a_stored_run_of_the_sample_views_carries_them(tmp_path: Path) -> None:
    from vistvis.cli import main

    views = [str(path) for path in sample_views()]
    out = str(tmp_path / "run")
    assert (
        main(["store", *views, "--model", "vggt:tiny", "--sites", "frame_block_0", "--out", out])
        == 0
    )
    run = vistvis.open_run(out)
    assert run.points is not None
    assert run.cameras is not None
    grid = tuple(run.points.shape[1:3])
    np.testing.assert_array_equal(run.points, sample_points(grid)[0])
    layout = run["frame_block_0"].site.query_layout
    assert layout is not None
    assert grid == layout.grid
