"""Figures that pyplot does not know, and the shared pieces of views."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from vistvis.views.figures import NotebookFigure, colour_bar, heat_axes, image_axes, outline_box
from vistvis.views.painting import normalizer

IMAGE = np.full((20, 30, 3), 128, np.uint8)


def test_a_figure_shows_in_notebooks_and_pyplot_never_hears_of_it() -> None:
    figure = NotebookFigure(figsize=(2, 1), dpi=50)
    image_axes(figure.add_subplot(), IMAGE, title="a")
    with Image.open(io.BytesIO(figure._repr_png_())) as picture:
        assert picture.size == (100, 50)
    with Image.open(io.BytesIO(figure.png(dpi=100))) as picture:
        assert picture.size == (200, 100)
    assert not plt.get_fignums()


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_saving_is_whole_or_not_at_all(tmp_path: Path, ending: str) -> None:
    figure = NotebookFigure(figsize=(2, 1))
    path = figure.save(tmp_path / "new" / f"a.{ending}")
    before = path.read_bytes()
    assert before

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    figure.savefig = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no"):
        figure.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [f"a.{ending}"]


def test_an_outline_surrounds_its_pixels() -> None:
    figure = NotebookFigure(figsize=(3, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    image_axes(axes, IMAGE)
    drawn = outline_box(axes, (14, 7, 21, 14))
    assert drawn.get_bbox().extents == pytest.approx((13.5, 6.5, 20.5, 13.5))
    with Image.open(io.BytesIO(figure.png())) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    green = (pixels[..., 1] - pixels[..., 0] > 60).nonzero()
    # Ten screen pixels for each of the picture.
    assert abs(green[0].min() - 70) <= 2
    assert abs(green[0].max() - 140) <= 2
    assert abs(green[1].min() - 140) <= 2
    assert abs(green[1].max() - 210) <= 2


def test_an_outline_has_its_strokes_one_on_the_other() -> None:
    figure = NotebookFigure(figsize=(3, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    image_axes(axes, IMAGE)
    strokes = (("black", 18.0), ("white", 10.0), ("#ff0000", 4.0))
    drawn = outline_box(axes, (10, 8, 20, 14), strokes=strokes, pad=1, joinstyle="miter")
    assert drawn.get_bbox().extents == pytest.approx((8.5, 6.5, 20.5, 14.5))
    assert axes.patches[:] == [drawn]
    with Image.open(io.BytesIO(figure.png())) as picture:
        across = [picture.convert("RGB").getpixel((90 + right, 110)) for right in (0, 4, 8, 20)]
    assert across == [(255, 0, 0), (255, 255, 255), (0, 0, 0), (128, 128, 128)]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_heatmap_has_a_labelled_bar_of_its_scale(alpha: float) -> None:
    heat = np.linspace(0, 0.4, 600, dtype=np.float32).reshape(20, 30)
    scale = normalizer(heat)
    figure = NotebookFigure(figsize=(4, 2))
    axes = figure.add_subplot()
    drawn = heat_axes(axes, heat, normalizer=scale, image=IMAGE, alpha=alpha, title="head 3")
    bar = colour_bar(figure, drawn, axes, label="weight")
    assert bar.ax.get_ylabel() == "weight"
    assert (bar.vmin, bar.vmax) == (0, pytest.approx(0.4))
    assert axes.get_title() == "head 3"
    figure.png()
