"""A board of many small maps on one colour scale: heads and sites of one query. Draws only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.cm import ScalarMappable
from matplotlib.ticker import MaxNLocator

from vistvis.names import harmless
from vistvis.views.figures import (
    INK,
    QUIET,
    NotebookFigure,
    inches_of,
    mark_query,
    shorten,
    text_height,
    text_width,
    wrap,
)
from vistvis.views.painting import colour_map, is_clipped, lay_over, resize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from numpy.typing import NDArray

    Tiles = Mapping[int, "NDArray[np.float32] | None"]

DPI = 200
# Points.
TITLE, LABEL, SMALL = 9.0, 7.5, 7.0
# All other lengths are in inches: between cells, between the frames of a cell, and at the edge;
_GAP, _THIN, _EDGE = 0.07, 0.02, 0.1
# the widest and the narrowest map of a figure whose width is left to us, and what all maps then
# fill, across and down (or so many times a width that was asked for); the tallest picture above the
# maps; the colour bar.
_WIDEST, _NARROWEST, _FILLED, _DOWN = 1.7, 0.34, (9.0, 8.0), 1.5
_TALLEST, _BAR = 1.15, (2.4, 0.09)
_LINE = 0.13  # of small letters


@dataclass(frozen=True)
class Board:
    """What is drawn: at each (row, column) a cell, a map `(rows, cols)` for each of its frames.

    A map that is None is the frame's picture, in colour. The query's frame alone fills a cell that
    has several rows of frames. `left` are labels of rows, `above` of cells. `pictures` are
    `(H, W, 3)` in [0, 1] by frame. `box` is the query's patch in `query_frame`, `(x0, y0, x1, y1)`
    as shares of the picture.
    """

    cells: Mapping[tuple[int, int], Tiles]
    frames: Sequence[int]
    names: Mapping[int, str]
    aspect: float
    """Width by height of a picture."""
    left: Sequence[str] = ()
    above: Mapping[tuple[int, int], str] = field(default_factory=dict)
    pictures: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    query_frame: int | None = None
    box: tuple[float, float, float, float] | None = None
    strip: bool = False
    """Whether the pictures of all frames are shown above the maps, under their names."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns of cells."""
        rows, cols = zip(*self.cells, strict=True)
        return max(rows) + 1, max(cols) + 1

    def values(self) -> Iterator[NDArray[np.float32]]:
        """Every map."""
        for tiles in self.cells.values():
            yield from (heat for heat in tiles.values() if heat is not None)


def draw_board(
    board: Board,
    *,
    normalizer: Normalize,
    cmap: str | Colormap,
    alpha: float,
    title: str,
    scale: str,
    width: str | float | None = None,
) -> NotebookFigure:
    """Draw a board as wide as of `inches_of` (default: what it needs); `scale` is the bar's words.

    InputError for a width, a colour map or an opacity that there is not.

    Cost: 2 to 5 ms a map, and memory of the figure's pixels, at 200 to an inch or one to a patch.
    """
    given = None if width is None else inches_of(width)
    rows, cols = board.shape
    side = max((text_width(harmless(text), LABEL) for text in board.left), default=-0.08) + 0.08
    side = side if given is None else min(side, given / 3)
    size = _FILLED if given is None else (given - side - 2 * _EDGE, _DOWN * given)
    down, across = inner = _inner(board, size)
    gaps = (cols - 1) * _GAP + cols * (across - 1) * _THIN
    if given is None:
        tile = min(max(_fitting(board, inner, size), _NARROWEST), _WIDEST)
        whole = max(side + cols * across * tile + gaps + 2 * _EDGE, _BAR[0] + 0.6)
    else:
        tile, whole = (size[0] - gaps) / (cols * across), given
    cell = (
        across * tile + (across - 1) * _THIN,
        down * tile / board.aspect + (down - 1) * _THIN,
    )
    label = _LINE if board.above else 0.0
    every_row = label if any(row for row, _ in board.above) else 0.0
    heading = wrap(title, whole - 2 * _EDGE, TITLE)
    band_top = _EDGE + text_height(heading, TITLE) + 0.06
    strip = _strip(board, whole - 2 * _EDGE)
    bar = _Bar(normalizer, scale, board, _EDGE + strip[2] + 0.15, whole)
    band = max(strip[1] + _LINE + 0.03, bar.height) + 0.1
    top = band_top + band + label
    height = top + rows * cell[1] + (rows - 1) * (_GAP + every_row) + _EDGE

    figure = NotebookFigure(figsize=(whole, height), dpi=DPI)
    # Axes of the whole figure, in inches from its top left.
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, whole), ylim=(height, 0), autoscale_on=False)
    page.set_axis_off()
    # As many pixels as the page is drawn with, and at least one for each patch.
    patches = max(heat.shape[1] for heat in board.values())
    pixels = max(DPI, patches / tile)
    canvas = np.full((round(height * pixels), round(whole * pixels), 3), 255, np.uint8)
    painter = _Painter(page, canvas, pixels, board, inner, normalizer, cmap, alpha)
    figure.write(_EDGE, _EDGE, heading, size=TITLE, color=INK)
    x = _EDGE
    if board.strip:
        for frame in board.frames:
            painter.tile(None, frame, (x, band_top, *strip[:2]))
            _label(page, board.names[frame], x, band_top + strip[1] + 0.03, strip[0], va="top")
            x += strip[0] + _THIN
    bar.draw(figure, band_top + (band - 0.1 - bar.height) / 2, cmap)
    for (row, col), tiles in board.cells.items():
        x = _EDGE + side + col * (cell[0] + _GAP)
        y = top + row * (cell[1] + _GAP + every_row)
        painter.cell(tiles, (x, y, *cell), tile)
        if (row, col) in board.above:
            _label(page, board.above[row, col], x, y - 0.02, cell[0], va="bottom")
    letters = min(LABEL, (cell[1] + _GAP) * 72 / 1.05)
    style: dict[str, Any] = {"fontsize": letters, "color": INK, "parse_math": False}
    for row, text in enumerate(board.left):
        y = top + (row + 0.5) * cell[1] + row * (_GAP + every_row)
        shown = shorten(text, side - 0.06, letters)
        page.text(_EDGE + side - 0.06, y, shown, ha="right", va="center", **style)
    # Shown in slabs, cut where it is white: matplotlib takes some 90 bytes for each pixel of one.
    step = cell[1] + _GAP + every_row
    cuts = [round((top + row * step - _GAP / 2) * pixels) for row in range(rows)]
    for above, below in pairwise([0, *cuts, len(canvas)]):
        extent = (0, whole, below / pixels, above / pixels)
        style = {"interpolation": "antialiased", "aspect": "auto"}
        page.imshow(canvas[above:below], extent=extent, **style)
    return figure


def _label(page: Axes, text: str, x: float, y: float, wide: float, *, va: Any) -> None:
    """A text in the middle above or below something `wide`."""
    style: dict[str, Any] = {"fontsize": SMALL, "color": INK, "parse_math": False}
    page.text(x + wide / 2, y, shorten(text, wide, SMALL), ha="center", va=va, **style)


def _fitting(board: Board, inner: tuple[int, int], size: tuple[float, float]) -> float:
    """The width of a map with which a board of cells of `inner` frames fits into a size."""
    (rows, cols), (down, across) = board.shape, inner
    return min(size[0] / (cols * across), size[1] * board.aspect / (rows * down))


def _inner(board: Board, size: tuple[float, float]) -> tuple[int, int]:
    """Rows and columns of the frames within a cell: for large maps and few empty places."""
    several = any(len(tiles) > 1 for tiles in board.cells.values())
    count = len(board.frames) if several else 1
    ways = ((math.ceil(count / across), across) for across in range(count, 0, -1))
    return max(ways, key=lambda way: _fitting(board, way, size) * (count / math.prod(way)) ** 2)


class _Painter:
    """Puts maps and pictures on the canvas of a page, `pixels` to an inch, and outlines on it.

    Each picture is resized once for each size. One canvas, because matplotlib takes long for a
    thousand images.
    """

    def __init__(
        self,
        page: Axes,
        canvas: NDArray[np.uint8],
        pixels: float,
        board: Board,
        inner: tuple[int, int],
        normalizer: Normalize,
        cmap: str | Colormap,
        alpha: float,
    ) -> None:
        self._page, self._canvas, self._pixels = page, canvas, pixels
        self._board, self._inner = board, inner
        self._style: dict[str, Any] = {"normalizer": normalizer, "cmap": cmap, "alpha": alpha}
        self._pictures: dict[tuple[int, tuple[int, int]], NDArray[np.float32]] = {}

    def cell(self, tiles: Tiles, box: tuple[float, float, float, float], tile: float) -> None:
        """All frames of a cell; `tile` is the width of one of them."""
        x, y, width, height = box
        high = tile / self._board.aspect
        down, across = self._inner
        alone = len(tiles) == 1 and self._board.query_frame in tiles and min(down, across) > 1
        for frame, heat in tiles.items():
            if alone or (down, across) == (1, 1):
                wide = min(width, height * self._board.aspect)
                self.tile(heat, frame, (x, y, wide, wide / self._board.aspect))
                continue
            row, col = divmod(self._board.frames.index(frame), across)
            place = (x + col * (tile + _THIN), y + row * (high + _THIN), tile, high)
            self.tile(heat, frame, place)

    def tile(
        self,
        heat: NDArray[np.float32] | None,
        frame: int,
        box: tuple[float, float, float, float],
    ) -> None:
        """One map, or the picture of a frame, at `(x, y, width, height)`."""
        x, y, width, height = box
        left, right, above, below = (
            round(edge * self._pixels) for edge in (x, x + width, y, y + height)
        )
        size = below - above, right - left
        shown = self._picture(frame, size)
        self._canvas[above:below, left:right] = (
            np.rint(shown * 255)
            if heat is None
            else lay_over(shown, resize(heat, size), **self._style)
        )
        patch = self._board.box
        if frame == self._board.query_frame and patch is not None:
            # Boxes are in pixels, whose edges lie half a pixel before their centres.
            sides = (width, height) * 2
            edges = [s * n + o + 0.5 for s, n, o in zip(patch, sides, (x, y) * 2, strict=True)]
            mark_query(self._page, edges)

    def _picture(self, frame: int, size: tuple[int, int]) -> NDArray[np.float32]:
        """The picture of a frame; black where there is none."""
        if (frame, size) not in self._pictures:
            picture = self._board.pictures.get(frame)
            shown = np.zeros((*size, 3), np.float32)
            if picture is not None:
                planes = rearrange(torch.from_numpy(picture), "h w c -> 1 c h w")
                small = torch.nn.functional.interpolate(
                    planes, size=size, mode="bilinear", antialias=True
                )
                shown = rearrange(small, "1 c h w -> h w c").clamp(0, 1).numpy()
            self._pictures[frame, size] = shown
        return self._pictures[frame, size]


def _strip(board: Board, width: float) -> tuple[float, float, float]:
    """Of the pictures above the board: each one's width and height, and how wide all are.

    They take three fifths of the page's width at most: the colour bar lies beside them.
    """
    if not board.strip:
        return 0.0, 0.0, 0.0
    gaps = (len(board.frames) - 1) * _THIN
    fits = (0.6 * width - gaps) / len(board.frames)
    wide = min(_TALLEST * board.aspect, _WIDEST, fits)
    return wide, wide / board.aspect, len(board.frames) * wide + gaps


class _Bar:
    """The colour bar of a board under the words that say what it shows, at `left` of a page."""

    def __init__(
        self, normalizer: Normalize, scale: str, board: Board, left: float, page: float
    ) -> None:
        self._clipped = any(is_clipped(heat, normalizer) for heat in board.values())
        self._normalizer, self._left = normalizer, left
        self._width = min(_BAR[0], page - _EDGE - 0.15 - left)
        self._words = wrap(scale, self._width + 0.15, SMALL)
        self._bar_top = text_height(self._words, SMALL) + 0.03
        self.height = self._bar_top + _BAR[1] + 0.17

    def draw(self, figure: NotebookFigure, top: float, cmap: str | Colormap) -> None:
        """Draw it from `top` of the figure on, in inches."""
        figure.write(self._left, top, self._words, size=SMALL, color=INK)
        axes = figure.add_box(self._left, top + self._bar_top, self._width, _BAR[1])
        bar = figure.colorbar(
            ScalarMappable(norm=self._normalizer, cmap=colour_map(cmap)),
            cax=axes,
            orientation="horizontal",
            extend="max" if self._clipped else "neither",
        )
        if axes.get_xscale() != "log":
            bar.locator = MaxNLocator(4 if self._width > 1.5 else 2)
        axes.tick_params(labelsize=SMALL - 0.5, length=2, pad=1.5, width=0.5, labelcolor=INK)
        bar.outline.set(color=QUIET, linewidth=0.5)
