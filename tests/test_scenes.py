"""The renderer's geometry against independent witnesses: closed forms, pictures, round trips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rendering as scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rendering import Camera, Texture

from vistvis.errors import InputError

SIZE = (84, 112)
SAMPLES = Path(__file__).parents[1] / "vggt_adapter" / "samples"


def smooth_texture(seed: int, *, size: int = 96) -> Texture:
    """A texture without edges, so that a picture can be read between its pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.full((size, size, 3), 0.5)
    for _ in range(6):
        fx, fy, phase = rng.uniform(-5, 5), rng.uniform(-5, 5), rng.uniform(0, 7, 3)
        wave = np.sin(2 * np.pi * (fx * x + fy * y)[..., None] + phase)
        picture += 0.07 * wave
    return Texture(np.clip(picture, 0, 1).astype(np.float32))


def make_scene() -> tuple[list[scenes.Surface], list[Camera]]:
    surfaces = [
        scenes.rectangle(centre=(0, 0, 6), size=(16, 12), texture=smooth_texture(0), yaw=10),
        scenes.rectangle(
            centre=(-0.7, 0, 3), size=(1.2, 1.4), texture=smooth_texture(1), label=1, yaw=-25
        ),
        *scenes.box(
            centre=(0.9, 0.3, 3.4),
            size=(0.9, 0.9, 0.9),
            textures=[smooth_texture(n) for n in (2, 3, 4)],
            label=2,
            yaw=30,
            pitch=10,
        ),
    ]
    cameras = [
        Camera.look_at((-0.5, 0, 0), (0, 0, 4), focal=100, size=SIZE),
        Camera.look_at((0.5, -0.2, 0.2), (0.1, 0, 4), focal=110, size=SIZE, roll=8),
    ]
    return surfaces, cameras


def read(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Colours between pixels, written apart from the renderer's own sampling."""
    x, y = xy[:, 0] - 0.5, xy[:, 1] - 0.5
    x0 = np.clip(np.floor(x).astype(int), 0, image.shape[1] - 2)
    y0 = np.clip(np.floor(y).astype(int), 0, image.shape[0] - 2)
    total = np.zeros((len(xy), 3))
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - abs(x - x0 - dx)) * (1 - abs(y - y0 - dy))
            total += weight[:, None] * image[y0 + dy, x0 + dx]
    return total


def photometric_error(
    surfaces: list[scenes.Surface], cameras: list[Camera], shift: tuple[float, float] = (0, 0)
) -> float:
    """Mean colour difference (of 255) at places that should show the same point."""
    first, second = (scenes.render(surfaces, c, per_pixel=3) for c in cameras)
    xy = cameras[0].pixel_centres()[6:-6:3, 6:-6:3]
    there = scenes.correspond(surfaces, cameras[0], cameras[1], xy)
    seen = there.visible
    assert seen.sum() > 200
    here = read(first.image.astype(float), xy[seen])
    other = read(second.image.astype(float), there.xy[seen] + np.array(shift))
    return float(np.median(np.abs(here - other)))


def test_visible_places_show_the_same_colour_in_both_pictures() -> None:
    surfaces, cameras = make_scene()
    right = photometric_error(surfaces, cameras)
    assert right < 2.0
    # The oracle can fail: three pixels off shows other colours.
    assert photometric_error(surfaces, cameras, shift=(3, 2)) > 4 * right


def test_a_correspondence_leads_back() -> None:
    surfaces, cameras = make_scene()
    xy = cameras[0].pixel_centres()[::2, ::2]
    there = scenes.correspond(surfaces, *cameras, xy)
    back = scenes.correspond(surfaces, cameras[1], cameras[0], there.xy[there.visible])
    assert np.abs(back.xy - xy[there.visible]).max() < 0.02
    assert back.visible.all()


def test_one_plane_is_a_homography() -> None:
    surfaces, cameras = make_scene()
    plane = surfaces[0]
    # Textbook form (Hartley & Zisserman, result 13.1), with the plane n·X = c in the first frame.
    k = [
        np.array([[c.focal, 0, SIZE[1] / 2], [0, c.focal, SIZE[0] / 2], [0, 0, 1]]) for c in cameras
    ]
    turn = cameras[1].axes.T @ cameras[0].axes
    move = cameras[1].axes.T @ (cameras[0].position - cameras[1].position)
    normal = cameras[0].axes.T @ np.cross(plane.u, plane.v)
    distance = np.cross(plane.u, plane.v) @ (plane.corner - cameras[0].position)
    homography = k[1] @ (turn + np.outer(move, normal) / distance) @ np.linalg.inv(k[0])
    xy = cameras[0].pixel_centres()[::5, ::5].reshape(-1, 2)
    mapped = np.c_[xy, np.ones(len(xy))] @ homography.T
    there = scenes.correspond([plane], *cameras, xy)
    np.testing.assert_allclose(there.xy, mapped[:, :2] / mapped[:, 2:], atol=5e-3)


def test_parallel_cameras_give_disparity_from_depth() -> None:
    cameras = [Camera.look_at((x, 0, 0), (x, 0, 1), focal=90, size=SIZE) for x in (0.0, 0.4)]
    wall = scenes.rectangle(centre=(0, 0, 5), size=(20, 20), texture=smooth_texture(0))
    view = scenes.render([wall], cameras[0], per_pixel=1)
    np.testing.assert_allclose(view.depth, 5, rtol=1e-5)
    xy = cameras[0].pixel_centres()[::7, ::7].reshape(-1, 2)
    there = scenes.correspond([wall], *cameras, xy)
    np.testing.assert_allclose(xy[:, 0] - there.xy[:, 0], 90 * 0.4 / 5, atol=1e-3)
    np.testing.assert_allclose(xy[:, 1], there.xy[:, 1], atol=1e-3)


def test_what_lies_behind_is_hidden() -> None:
    cameras = [Camera.look_at((x, 0, 0), (x, 0, 1), focal=90, size=SIZE) for x in (0.0, 0.6)]
    wall = scenes.rectangle(centre=(0, 0, 6), size=(20, 20), texture=smooth_texture(0))
    card = scenes.rectangle(centre=(0.6, 0, 3), size=(0.5, 0.5), texture=smooth_texture(1), label=1)
    # The wall point straight ahead of the second camera lies behind the card for it alone.
    place = cameras[0].project(np.array([[0.6, 0, 6], [-1.5, 0, 6]]))[0]
    assert scenes.correspond([wall], *cameras, place).visible.tolist() == [True, True]
    assert scenes.correspond([wall, card], *cameras, place).visible.tolist() == [False, True]
    # By brute force from the drawn depth: hidden exactly where the second view is nearer.
    surfaces = [wall, card]
    views = [scenes.render(surfaces, c, per_pixel=1) for c in cameras]
    xy = cameras[0].pixel_centres()
    there = scenes.correspond(surfaces, *cameras, xy)
    depth = views[0].depth.astype(float)
    col = np.floor(there.xy[..., 0]).astype(int)
    row = np.floor(there.xy[..., 1]).astype(int)
    inside = (col >= 0) & (col < SIZE[1]) & (row >= 0) & (row < SIZE[0])
    drawn = np.zeros(SIZE, bool)
    drawn[inside] = depth[inside] <= views[1].depth[row[inside], col[inside]] * 1.01
    assert 0.05 < 1 - drawn.mean() < 0.6
    # Parallel cameras and walls: only pixels cut by the card's outline may differ.
    assert (drawn != there.visible).mean() < 0.02


@settings(max_examples=30, deadline=None)
@given(
    st.floats(-60, 60), st.floats(-40, 40), st.floats(-180, 180), st.floats(-1, 1), st.floats(-1, 1)
)
def test_projecting_undoes_casting(
    yaw: float, pitch: float, roll: float, x: float, y: float
) -> None:
    axes = scenes.rotation(yaw=yaw, pitch=pitch, roll=roll)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    camera = Camera(np.array([x, y, 0.3]), axes, 77.0, SIZE)
    xy = camera.pixel_centres()[::20, ::20]
    depth = 2.5
    back, far = camera.project(camera.position + camera.rays(xy) * depth)
    np.testing.assert_allclose(back, xy, atol=1e-9)
    np.testing.assert_allclose(far, depth, atol=1e-9)


def test_a_box_shows_its_outside_upright() -> None:
    marked = np.zeros((32, 32, 3), np.uint8)
    marked[:8, :8] = 255  # a white corner, top left
    sides = scenes.box(centre=(0, 0, 4), size=(2, 2, 2), textures=[Texture(marked)], label=3)
    for around in (0, 90, 180, 270):
        place = scenes.rotation(yaw=around) @ np.array([0, 0, -4.0]) + np.array([0, 0, 4.0])
        camera = Camera.look_at(place, (0, 0, 4), focal=60, size=(60, 60))
        view = scenes.render(sides, camera, per_pixel=1)
        rows, cols = np.nonzero(view.image[..., 0] > 140)
        assert rows.max() < 25
        assert cols.max() < 25
        assert set(np.unique(view.labels)) == {-1, 3}


def test_far_textures_are_averaged_not_picked() -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    texture = Texture(np.repeat(board[..., None], 3, 2).astype(np.uint8))
    wall = scenes.rectangle(centre=(0, 0, 4), size=(4, 4), texture=texture)
    camera = Camera.look_at((0, 0, 0), (0, 0, 1), focal=20, size=(16, 16))
    image = scenes.render([wall], camera, per_pixel=1).image[2:-2, 2:-2]
    assert np.abs(image.astype(int) - 127).max() < 5


def test_patch_centres_lie_in_the_middle_of_patches() -> None:
    centres = scenes.patch_centres((28, 42))
    assert centres.shape == (2, 3, 2)
    assert centres[1, 2].tolist() == [35, 21]
    with pytest.raises(InputError, match=r"whole patches of 14, got 30×42"):
        scenes.patch_centres((30, 42))


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 9, 3)])
def test_a_texture_must_be_a_colour_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="texture must be"):
        Texture(np.zeros(shape, np.uint8))


def test_a_camera_cannot_look_straight_down() -> None:
    with pytest.raises(InputError, match="straight up or down"):
        Camera.look_at((0, 0, 0), (0, 5, 0), focal=50, size=SIZE)


def test_sample_views_are_wide_small_and_licensed() -> None:
    files = sorted(SAMPLES.glob("*.jpg"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 300_000
    assert all(Image.open(file).size[0] >= 518 for file in files)
    told = (SAMPLES / "LICENCES.txt").read_text(encoding="utf-8")
    for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "brick", "grass"):
        assert name in told


def test_sample_views_are_what_the_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "training"))
    import samples

    surfaces, cameras = samples.sample_scene()
    for number, camera in enumerate(cameras, 1):
        drawn = scenes.render(surfaces, camera, per_pixel=2).image.astype(float)
        stored = np.asarray(Image.open(SAMPLES / f"view_{number}.jpg")).astype(float)
        assert np.abs(drawn - stored).mean() < 8  # JPEG
        assert scenes.render(surfaces, camera, per_pixel=1).labels.min() >= 0
    xy = scenes.patch_centres(samples.SIZE)
    shares = [
        scenes.correspond(surfaces, cameras[i], cameras[j], xy).visible.mean()
        for i, j in ((0, 1), (1, 2), (0, 2))
    ]
    assert min(shares) > 0.4
    assert max(shares) < 0.95  # there is occlusion to see
