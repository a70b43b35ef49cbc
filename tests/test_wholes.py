"""Photos around what a model saw of them: where they lie, what is faint, what is hatched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vistvis.cli import main
from vistvis.commands._wholes import whole_photos
from vistvis.photos.geometry import ImageGeometry
from vistvis.photos.photo import Photo, SeenPhoto
from vistvis.views.heads import head_grid
from vistvis.views.wholes import WholePhoto, show_view, view_of, words_of

SIZE = (28, 42)  # (H, W) of the model's picture


def rendered(whole: WholePhoto) -> np.ndarray:
    """The model's picture, red, with what surrounds it, one output pixel for each of its own."""
    view = view_of(SIZE, [whole])
    width, height = view[2] - view[0], view[3] - view[1]
    figure = Figure(figsize=(width / 10, height / 10), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    red = np.zeros((*SIZE, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    axes.imshow(whole.without_borders(red, SIZE), extent=(-0.5, 41.5, 27.5, -0.5))
    whole.draw(axes, SIZE)
    show_view(axes, view)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_what_was_cut_off_is_faint_and_lies_around() -> None:
    blue = np.zeros((48, 42, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
    whole = WholePhoto((0, -10, 42, 38), blue)
    assert whole.is_cut(SIZE)
    assert not whole.has_borders(SIZE)
    shown = rendered(whole)
    assert shown.shape[:2] == (480, 420)
    assert (shown[140:340, 60:360] == [255, 0, 0]).all()  # what the model saw is as it was
    for part in (shown[20:70, 60:360], shown[410:460, 60:360]):
        assert (abs(part - [158, 158, 234]) <= 1).all()  # 62 % of the way to white
    assert words_of(SIZE, [whole]) == ["faint: cut off, not seen by the model"]


def test_borders_are_hatched_and_never_look_like_photo() -> None:
    whole = WholePhoto((7, 0, 35, 28))
    assert whole.has_borders(SIZE)
    assert not whole.is_cut(SIZE)
    shown = rendered(whole)
    assert (shown[30:250, 90:330] == [255, 0, 0]).all()
    for part in (shown[:, :60], shown[:, 360:]):
        assert not (part == [255, 0, 0]).all(-1).any()
        assert part.std() > 0.5  # lines, not one grey
    assert words_of(SIZE, [whole]) == ["hatched: border without photo"]


def test_a_photo_that_was_seen_whole_is_drawn_as_it_is() -> None:
    whole = WholePhoto((0, 0, 42, 28))
    assert (rendered(whole) == [255, 0, 0]).all()
    assert words_of(SIZE, [whole]) == []
    assert view_of(SIZE, [whole]) == (0, 0, 42, 28)


def test_heat_stays_in_what_the_model_saw_and_the_outline_is_one_patch() -> None:
    maps = np.full((1, 2, 3), 0.1, np.float32)
    maps[0, 1, 2] = 0.5
    whole = WholePhoto((0, -10, 42, 38), np.full((48, 42, 3), 90, np.uint8))
    picture = np.full((*SIZE, 3), 128, np.uint8)
    figure = head_grid(
        *(picture, maps),
        title="t",
        names=["head 0"],
        photo="p",
        box=(14, 14, 28, 28),
        size=SIZE,
        whole=whole,
    )
    heat = figure.axes[1]
    assert [-0.5, 41.5, 27.5, -0.5] in [list(image.get_extent()) for image in heat.images]
    assert heat.get_ylim() == (37.5, -10.5)
    widths = {
        (patch.get_width(), patch.get_height())
        for patch in heat.patches
        if isinstance(patch, Rectangle)
    }
    assert (14, 14) in widths


def test_only_photos_that_were_cut_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 60), (1, 2, 3)).save(path)
    cut = ImageGeometry((60, 40), (42, 28), (28, 28), (-7, 0))
    kept = ImageGeometry((60, 40), (42, 28), (42, 28), (0, 0))
    photos = [Photo(path, "a"), Photo(tmp_path / "gone.png", "b")]
    seen = [SeenPhoto("a", None, cut), SeenPhoto("b", None, kept)]
    first, second = whole_photos(photos, seen)
    assert first.box == (0, -7, 28, 35)
    assert first.pixels is not None
    assert first.pixels.shape == (60, 40, 3)
    assert second.pixels is None
    unknown = [SeenPhoto("a", None, None), seen[1]]
    assert whole_photos(photos, unknown) == []


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_commands_show_the_whole_of_a_tall_photo(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tall.png"
    Image.new("RGB", (300, 500), (90, 160, 90)).save(path)
    out = tmp_path / "out"
    words = ["vit", str(path), "--model", "vit_tiny_patch16_224@random", "--head", "0"]
    assert main([*words, "--format", kind, "--out", str(out)]) == 0
    (drawn,) = out.glob(f"*.{kind}")
    if kind == "svg":
        assert "faint: cut off" in drawn.read_text()
