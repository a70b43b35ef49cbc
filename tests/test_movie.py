"""GIF and MP4: frames there and back, whole or not there, and a query that moves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vistvis.errors import InputError
from vistvis.photos.finding import find_photos
from vistvis.photos.reading import read_photos
from vistvis.tokens import TokenLayout
from vistvis.views.figures import NotebookFigure, image_axes
from vistvis.views.movie import query_path, write_movie, write_query_movie

LAYOUT = TokenLayout(frames=2, grid=(6, 8), special=("cls",), patch_size=4)


def square(number: int, side: int = 33) -> NDArray[np.uint8]:
    """A white square that moves to the right on blue."""
    frame = np.full((side, 64, 3), (0, 0, 200), np.uint8)
    frame[8:24, 8 * number : 8 * number + 8] = 255
    return frame


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_frames_there_and_back(tmp_path: Path, ending: str) -> None:
    if ending == "mp4":
        pytest.importorskip("av")
    path = write_movie(map(square, range(6)), tmp_path / "new" / f"a.{ending}", fps=5, total=6)
    photos, _ = find_photos(path)
    assert [photo.time for photo in photos] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for number, picture in enumerate(read_photos(photos)):
        pixels = np.asarray(picture)[:33].astype(int)
        assert picture.size == (64, 34 if ending == "mp4" else 33)
        # Colour has half the resolution in an MP4, so that edges are soft.
        assert np.abs(pixels - square(number)).mean() < 12
        assert np.abs(pixels - square((number + 1) % 6)).mean() > 15
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_movie_that_fails_leaves_what_was_there(tmp_path: Path, ending: str) -> None:
    if ending == "mp4":
        pytest.importorskip("av")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"before")

    def frames() -> Iterator[NDArray[np.uint8]]:
        yield square(0)
        yield square(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_movie(frames(), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_figures_are_frames(tmp_path: Path) -> None:
    def draw(token: int) -> NotebookFigure:
        figure = NotebookFigure(figsize=(2, 1), dpi=50)
        image_axes(figure.add_subplot(), square(token), title=str(token))
        return figure

    path = write_query_movie([0, 1, 2], draw, tmp_path / "a.gif")
    pictures = list(read_photos(find_photos(path)[0]))
    assert [picture.size for picture in pictures] == [(100, 50)] * 3


def test_a_path_goes_from_patch_to_patch() -> None:
    corners = [LAYOUT.index(frame=1, row=row, col=col) for row, col in ((0, 0), (0, 3), (5, 5))]
    path = query_path(LAYOUT, corners)
    places = [LAYOUT.locate(token) for token in path]
    assert {place.frame_idx for place in places} == {1}
    cells = [(place.row or 0, place.col or 0) for place in places]
    assert cells == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (2, 4), (3, 4), (4, 5), (5, 5)]
    assert query_path(LAYOUT, corners[:1]) == corners[:1]
    for tokens in ([], [0], [corners[0], LAYOUT.index(frame=0, row=0, col=0)]):
        with pytest.raises(InputError, match="path"):
            query_path(LAYOUT, tokens)


@pytest.mark.parametrize(
    ("frames", "name", "options", "text"),
    [
        ([], "a.gif", {}, "at least one frame"),
        ([square(0)], "a.webp", {}, r"ends in \.gif or \.mp4, got 'a\.webp'"),
        ([square(0)], "a.gif", {"fps": 0}, "frames a second, got 0"),
        ([square(0)], "a.gif", {"fps": float("nan")}, "frames a second, got nan"),
        ([square(0), square(0, 34)], "a.gif", {}, r"one size, got \(33, 64\).*frame 1, \(34, 64\)"),
        ([square(0) / 255], "a.gif", {}, "uint8"),
    ],
)
def test_what_is_no_movie(
    tmp_path: Path, frames: Any, name: str, options: dict[str, float], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        write_movie(frames, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_an_mp4_without_pyav_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"a\.mp4: an MP4 needs.*'vistvis\[video\]'"):
        write_movie([square(0)], tmp_path / "a.mp4")
