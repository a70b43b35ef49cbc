"""Matrices of numbers as panels of coloured cells, on one scale. Draws only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import NullFormatter

from vistvis.views.figures import (
    HAIRLINE,
    INK,
    QUIET,
    NotebookFigure,
    colour_bar,
    inches_of,
    shorten,
    text_height,
    text_width,
    wrap,
)
from vistvis.views.painting import LUMA, colour_map, is_clipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from numpy.typing import NDArray

MISSING = "#b4b4ba"
"""The grey of cells that have no number."""

# Inches: edge, between panels, colour bar and the space it takes, a figure whose width is left to
# us, labels of rows at most, the narrowest cell, and the bar's height.
_EDGE, _GAP, _BAR, _BAR_SPACE = 0.12, 0.18, 0.13, 0.78
_WIDE, _LONGEST, _LEAST, _HIGHEST, _LOWEST = 9.6, 1.9, 0.002, 3.0, 0.9
# Numbers stand in the cells of figures with so many at most.
_WRITTEN = 400


@dataclass(frozen=True, eq=False)
class Panel:
    """A matrix `(rows, cols)`, NaN where there is no number; names of its rows and columns."""

    values: NDArray[np.float64]
    title: str
    left: Sequence[str]
    below: Sequence[str]


def draw_panels(
    panels: Sequence[Panel],
    *,
    normalizer: Normalize,
    cmap: str | Colormap,
    cell: tuple[float, float],
    title: str,
    note: str,
    unit: str,
    down: str = "",
    across: str = "",
    width: str | float | None = None,
) -> NotebookFigure:
    """Draw panels in lines, with cells of `cell` = (width, height) inches or what fits in `width`.

    `down` and `across` are what rows and columns are, `unit` what the numbers are in. Where cells
    are large enough and few, their numbers stand in them; names of rows and columns that would
    touch are left out.
    """
    large, small, tiny = (11.0, 8.5, 7.5) if width is None else (9.0, 7.0, 6.5)
    given = None if width is None else inches_of(width)
    sizes = _Sizes.of(panels, cell, _WIDE if given is None else given, tiny, bool(down))
    if given is None:
        given = max(sizes.whole, 3.6)
    heading = wrap(title, given - 2 * _EDGE, large, weight="bold")
    said = wrap(note, given - 2 * _EDGE, small)
    said_top = _EDGE + text_height(heading, large)
    top = said_top + text_height(said, small) + 0.06
    tops = [top, *(top + step for step in accumulate(sizes.lines))]
    height = max(tops[-1], top + sizes.above + _LOWEST + 0.1) + _EDGE
    figure = NotebookFigure(figsize=(given, height), dpi=150)
    figure.write(_EDGE, _EDGE, heading, size=large, color=INK, fontweight="bold")
    figure.write(_EDGE, said_top, said, size=small, color=QUIET)
    every = np.concatenate([panel.values.ravel() for panel in panels])
    form = _form(every[np.isfinite(every)]) if every.size <= _WRITTEN else None
    grey = colour_map(cmap).with_extremes(bad=MISSING)
    for number, panel in enumerate(panels):
        line, column = divmod(number, sizes.columns)
        rows, cols = panel.values.shape
        x = _EDGE + sizes.lefts[column]
        box = (x, tops[line] + sizes.above, cols * sizes.cell[0], rows * sizes.cell[1])
        axes = figure.add_box(*box)
        room = sizes.cell[0] * cols + _GAP
        text = shorten(panel.title, room, small)
        axes.set_title(text, fontsize=small, pad=2.5, loc="left", color=INK, parse_math=False)
        _cells(axes, panel, normalizer, grey, sizes.cell, tiny, form)
        if down and column == 0:
            axes.set_ylabel(down, fontsize=small, color=QUIET, labelpad=2)
        if across and (number + sizes.columns >= len(panels)):
            axes.set_xlabel(across, fontsize=small, color=QUIET, labelpad=1.5)
    first = panels[0].values.shape[0] * sizes.cell[1]
    span = min(max(first, _LOWEST), _HIGHEST)
    bar = figure.add_box(sizes.bar, top + sizes.above, _BAR, span)
    colour_bar(
        bar,
        normalizer=normalizer,
        cmap=cmap,
        clipped=is_clipped(every, normalizer),
        size=small,
        label=unit,
        short=unit.split()[0] if unit else "",
    )
    bar.yaxis.set_minor_formatter(NullFormatter())  # of a log scale, wider than the space for it
    return figure


@dataclass(frozen=True)
class _Sizes:
    """Where panels lie: cells, how many panels in a line, their left edges, heights of lines."""

    cell: tuple[float, float]
    columns: int
    lefts: Sequence[float]
    lines: Sequence[float]
    above: float
    bar: float
    whole: float

    @classmethod
    def of(
        cls,
        panels: Sequence[Panel],
        cell: tuple[float, float],
        wide: float,
        size: float,
        named: bool,
    ) -> _Sizes:
        names = [_side(panel, cell[1], size) for panel in panels]
        around = 2 * _EDGE + _BAR_SPACE + named * 0.16

        def taken(columns: int, each: float) -> list[float]:
            """The widths of columns of panels with cells so wide."""
            return [
                max(
                    side + each * p.values.shape[1]
                    for side, p in zip(names[first::columns], panels[first::columns], strict=True)
                )
                + _GAP
                for first in range(columns)
            ]

        count = len(panels)
        fitting = [n for n in range(1, count + 1) if sum(taken(n, cell[0])) - _GAP + around <= wide]
        lines = math.ceil(count / max(fitting, default=1))
        columns = math.ceil(count / lines)
        widths = taken(columns, cell[0])
        if (over := sum(widths) - _GAP + around - wide) > 0:
            widest = sum(
                max(p.values.shape[1] for p in panels[first::columns]) for first in range(columns)
            )
            narrow = max(cell[0] - over / widest, _LEAST)
            # Square cells stay square.
            cell = narrow, narrow if cell[0] == cell[1] else cell[1]
            widths = taken(columns, narrow)
        starts = [0.0, *accumulate(widths)]
        sides = [max(names[first::columns]) for first in range(columns)]
        lefts = [named * 0.16 + x + s for x, s in zip(starts, sides, strict=False)]
        above, below = size * 1.7 / 72, size * 1.5 / 72
        rows = [
            max(p.values.shape[0] for p in panels[first : first + columns])
            for first in range(0, count, columns)
        ]
        heights = [above + n * cell[1] + below + 0.08 for n in rows]
        heights[-1] += size / 72
        right = _EDGE + named * 0.16 + starts[columns] - _GAP
        bar = right + 0.12
        return cls(cell, columns, lefts, heights, above, bar, right + _BAR_SPACE + _EDGE)


def _side(panel: Panel, high: float, size: float) -> float:
    """How wide the names of a panel's rows are."""
    widths = (text_width(name, _letters(high, size)) for name in panel.left)
    return min(max(widths, default=0.0), _LONGEST) + 0.07


def _letters(high: float, size: float) -> float:
    """The size of letters beside rows so high; rows that are lower are not all named."""
    return max(min(size, high * 72 / 1.1), 5.0)


def _cells(
    axes: Axes,
    panel: Panel,
    normalizer: Normalize,
    cmap: Colormap,
    cell: tuple[float, float],
    size: float,
    form: str | None,
) -> None:
    """The cells of a panel, their names, and their numbers in a form where there is room."""
    rows, cols = panel.values.shape
    shown = panel.values.astype(np.float32)  # as the scale is
    if isinstance(normalizer, LogNorm):  # what is less than the scale has its lowest colour
        shown = np.maximum(shown, np.float32(normalizer.vmin or 0.0))
    axes.imshow(
        np.ma.masked_invalid(shown), norm=normalizer, cmap=cmap, aspect="auto", interpolation="none"
    )
    letters = _letters(cell[1], size)
    names = [shorten(name, _LONGEST, letters) for name in panel.left]
    down = _every(rows, cell[1], letters * 1.05 / 72)
    axes.set_yticks(down, [names[row] for row in down])
    widest = max((text_width(name, size) for name in panel.below), default=0.0)
    along = _every(cols, cell[0], widest + 0.02)
    axes.set_xticks(along, [panel.below[col] for col in along])
    axes.tick_params(length=0, pad=2, labelcolor=INK)
    axes.tick_params(axis="y", labelsize=letters)
    axes.tick_params(axis="x", labelsize=size)
    for label in (*axes.get_yticklabels(), *axes.get_xticklabels()):
        label.set_parse_math(False)
    for spine in axes.spines.values():
        spine.set(color=HAIRLINE, linewidth=0.5)
    letters = min(size - 0.5, cell[1] * 72 / 1.4)
    if form is None or letters < 5:
        return
    places = np.argwhere(np.isfinite(panel.values))
    texts = {(row, col): form.format(panel.values[row, col]) for row, col in places}
    room = max((text_width(text, letters) for text in texts.values()), default=0.0)
    if room + 0.05 > cell[0]:
        return
    for (row, col), text in texts.items():
        light = np.dot(cmap(normalizer(shown[row, col]))[:3], LUMA) > 0.45
        style: dict[str, Any] = {"fontsize": letters, "ha": "center", "va": "center_baseline"}
        axes.text(col, row, text, color=INK if light else "white", **style)


def _every(count: int, step: float, need: float) -> range:
    """Every so manieth of `count` names that have `step` inches each and need more."""
    return range(0, count, max(1, math.ceil(need / step)))


def _form(values: NDArray[np.float64]) -> str:
    """How numbers are written in cells: counts as they are, others in two or three digits."""
    if not (values % 1).any():
        return "{:.0f}"
    most = np.abs(values).max()
    digits = 1 + (most >= 1) - math.floor(math.log10(most))
    return f"{{:{'+' * bool(values.min() < 0)}.{min(max(digits, 0), 5)}f}}"
