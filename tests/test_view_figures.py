"""Figures that pyplot does not know, and the shared pieces of views."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from vistvis.errors import InputError
from vistvis.views.figures import (
    NotebookFigure,
    colour_bar,
    formats_of,
    image_axes,
    inches_of,
    mark_query,
    outline_box,
    shorten,
    text_width,
    wrap,
)
from vistvis.views.heads import head_grid
from vistvis.views.painting import NORMS, normalizer

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


def test_the_bar_of_a_scale_says_what_lies_above_it() -> None:
    for norm in NORMS:
        scale = normalizer(np.linspace(0.01, 0.4, 60), norm=norm)
        for clipped in (False, True):
            figure = NotebookFigure(figsize=(4, 2))
            axes = figure.add_box(3, 0.2, 0.1, 1.6)
            colour_bar(axes, normalizer=scale, cmap="viridis", clipped=clipped, size=8)
            assert axes.get_ylabel() == "attention weight"
            assert axes.get_ylim() == pytest.approx((scale.vmin, scale.vmax))
            figure.canvas.draw()
            (bar,) = (a._colorbar for a in figure.axes if hasattr(a, "_colorbar"))
            assert bar.extend == ("max" if clipped else "neither")
            assert bar.cmap.get_over() == pytest.approx((1, 1, 1, 1))
            assert axes.get_tightbbox().x1 <= 4 * figure.dpi


def test_a_file_for_each_format(tmp_path: Path) -> None:
    figure = NotebookFigure(figsize=(2, 1))
    figure.write(0.1, 0.1, "Straße $ α_1", size=9)
    stem = tmp_path / "new" / "blocks.5.attn"
    written = figure.save_as(stem, "png, svg,.PDF,png")
    assert [path.name for path in written] == [f"blocks.5.attn.{e}" for e in ("png", "svg", "pdf")]
    pdf = written[2].read_bytes()
    assert b"/Type3" not in pdf
    assert b"/FontFile2" in pdf  # TrueType
    assert b"<text" not in written[1].read_bytes()
    for wrong in ("jpg", "", "png,,svg", ()):
        with pytest.raises(InputError, match="png, svg, pdf"):
            figure.save_as(tmp_path / "other", wrong)
    assert formats_of(["svg"]) == ("svg",)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_widths() -> None:
    assert [inches_of(width) for width in ("column", "double", 5, "4.5")] == [3.35, 6.9, 5, 4.5]
    for wrong in ("columns", 0, -3, float("nan"), 1e9, ""):
        with pytest.raises(InputError, match="'column', 'double', or from 2 to 40 inches"):
            inches_of(wrong)


def test_text_is_wrapped_and_names_keep_their_ends() -> None:
    text = "a long title that says what a figure shows, and more than fits into one line"
    wrapped = wrap(text, 2.0, 9)
    assert wrapped.split() == text.split()
    assert wrapped.count("\n") >= 2
    assert all(text_width(line, 9) <= 2.0 for line in wrapped.split("\n"))
    name = shorten("holiday/2024-07-01/IMG_000123.jpg", 1.0, 8)
    assert name.startswith("hol")
    assert name.endswith("123.jpg")
    assert text_width(name, 8) <= 1.0
    assert wrap("x" * 300, 1.0, 8).count("\n") == 0
    assert shorten("a\x1b[2Jb", 5, 8) == "a\\x1b[2Jb"


def test_a_query_is_outlined_along_its_patch() -> None:
    for inches in (1.0, 6.0):
        figure = NotebookFigure(figsize=(inches, inches))
        axes = figure.add_box(0, 0, inches, inches)
        axes.imshow(np.zeros((518, 518, 3), np.uint8))
        outline = mark_query(axes, (14, 28, 28, 42))
        assert outline.get_bbox().extents == pytest.approx((13.5, 27.5, 27.5, 41.5))
        widest = outline.get_path_effects()[0]._gc["linewidth"]
        assert widest <= max(1.3, 0.4 * 72 * inches / 37)  # points: the middle can be seen


def maps(heads: int) -> np.ndarray:
    weights = np.random.default_rng(0).random((heads, 4, 6)) / 100
    weights[:, 1, 2] = 0.6
    return weights


@pytest.mark.parametrize(
    ("heads", "width"), [(1, None), (3, "column"), (6, None), (12, "column"), (12, "double")]
)
def test_heads_fill_their_page(heads: int, width: str | None) -> None:
    figure = head_grid(
        IMAGE, maps(heads), box=(10, 5, 15, 10), title="a model, a site, " * 6, width=width
    )
    figure.canvas.draw()
    across, down = figure.canvas.get_width_height()
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == heads + 1 + (heads > 1)  # the picture, and the mean
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [text.get_window_extent() for text in figure.texts]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= across
        assert box.y1 <= down
    for number, one in enumerate(boxes):
        assert not any(one.padded(-1).overlaps(other) for other in boxes[:number])
    # The pictures take most of the width and reach down to the edge.
    ends = [axes.get_window_extent() for axes in panels]
    assert min(box.y0 for box in ends) < 0.25 * figure.dpi
    assert max(box.x1 for box in ends) > across - 1.1 * figure.dpi
    if width is not None:
        assert across == pytest.approx(inches_of(width) * figure.dpi, abs=1)


def test_heads_share_one_scale_that_leaves_out_the_query() -> None:
    figure = head_grid(IMAGE, maps(3), box=(10, 5, 15, 10), untrained=True, photo="a$b.jpg")
    title, note = (text.get_text().replace("\n", " ") for text in figure.texts)
    assert title == "untrained weights"
    assert note == (
        "scale: to the largest weight outside the query's patch (white: above it, up to 0.6)"
    )
    assert figure.axes[-1].get_ylim()[1] <= 0.01
    assert figure.axes[0].get_title(loc="left") == "a$b.jpg"
    titles = [axes.get_title(loc="left") for axes in figure.axes[1:-1]]
    assert titles == ["mean of 3 heads", "head 0", "head 1", "head 2"]
    mean = head_grid(IMAGE, maps(3).mean(0, keepdims=True), norm="linear").axes[1].images[0]
    alike = head_grid(IMAGE, np.repeat(maps(3).mean(0, keepdims=True), 2, 0), norm="linear")
    assert (mean.get_array() == alike.axes[1].images[0].get_array()).all()
    assert (figure.axes[1].images[0].get_array()[7, 12] == 255).all()
    figure.png()
    linear = head_grid(IMAGE, maps(3), box=(10, 5, 15, 10), norm="linear")
    assert linear.axes[-1].get_ylim()[1] == pytest.approx(0.6)
    assert linear.texts[1].get_text() == "scale: to the largest weight"
    with pytest.raises(InputError, match="as many names"):
        head_grid(IMAGE, maps(3), names=["a"])
