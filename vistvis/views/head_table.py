"""Numbers of every head of every site, as coloured tables beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from vistvis.errors import InputError
from vistvis.views.figures import (
    HAIRLINE,
    INK,
    QUIET,
    NotebookFigure,
    frame_axes,
    text_height,
    text_width,
    wrap,
)
from vistvis.views.painting import CMAP, LUMA, as_array, colour_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from vistvis.images import Values

# Inches, and points for letters.
_EDGE, _GAP, _ROW, _BAR = 0.12, 0.28, 0.24, 0.1
_LARGE, _SMALL, _CELL = 11.0, 8.0, 7.0
_LEAST = 1.9


class HeadTable(NamedTuple):
    """One table: `values` `(sites, heads)`, NaN where there is no number.

    `form` writes a number into its cell, unless `texts` has the words of all cells; changes are
    coloured from a middle of 0, others from the least to the largest.
    """

    title: str
    values: Values
    unit: str
    form: str = "{:.0f}"
    changes: bool = False
    texts: Sequence[Sequence[str]] | None = None


def head_tables(
    tables: Sequence[HeadTable], *, sites: Sequence[str], title: str, note: str = ""
) -> NotebookFigure:
    """Draw tables of the same sites, each with its own scale, and the number in every cell.

    `InputError` unless every table has a line for each site, and as many heads as the others.
    """
    grids = [as_array(table.values) for table in tables]
    if not grids or any(g.shape != (len(sites), grids[0].shape[-1]) for g in grids):
        shapes = ", ".join(str(grid.shape) for grid in grids)
        raise InputError(
            f"tables are ({len(sites)} sites, heads), all alike; got {shapes or 'none'}"
        )
    heads = grids[0].shape[1]
    texts = [
        [table.form.format(v).replace("-", "−") for v in grid.flat]
        if table.texts is None
        else [text for line in table.texts for text in line]
        for table, grid in zip(tables, grids, strict=True)
    ]
    cell = max(0.3, *(text_width(text, _CELL) + 0.1 for some in texts for text in some))
    panel = max(heads * cell, _LEAST)
    names = max(text_width(name, _SMALL) for name in sites) + 0.08
    wide = 2 * _EDGE + names + len(tables) * panel + (len(tables) - 1) * _GAP
    title = wrap(title, wide - 2 * _EDGE, _LARGE, weight="bold")
    note = wrap(note, wide - 2 * _EDGE, _SMALL)
    heads_of = [wrap(table.title, panel, _SMALL, weight="bold") for table in tables]
    note_top = _EDGE + text_height(title, _LARGE)
    head_top = note_top + (text_height(note, _SMALL) if note else 0) + 0.08
    top = head_top + max(text_height(text, _SMALL) for text in heads_of) + 0.18
    high = len(sites) * _ROW
    figure = NotebookFigure(figsize=(wide, top + high + 0.62 + _EDGE), dpi=150)
    figure.write(_EDGE, _EDGE, title, size=_LARGE, fontweight="bold")
    figure.write(_EDGE, note_top, note, size=_SMALL, color=QUIET)
    for number, (table, grid) in enumerate(zip(tables, grids, strict=True)):
        left = _EDGE + names + number * (panel + _GAP)
        figure.write(left, head_top, heads_of[number], size=_SMALL, fontweight="bold", color=INK)
        axes = figure.add_box(left, top, panel, high)
        scale, cmap = _scale(grid, changes=table.changes)
        _cells(axes, grid, texts[number], scale, cmap)
        if number == 0:
            axes.set_yticks(range(len(sites)), list(sites), fontsize=_SMALL, color=INK)
        bar = figure.add_box(left, top + high + 0.12, panel, _BAR)
        _bar(bar, scale, cmap, table.unit)
    return figure


def _scale(grid: NDArray[np.float32], *, changes: bool) -> tuple[Normalize, Colormap]:
    real = grid[np.isfinite(grid)]
    low, high = (float(real.min()), float(real.max())) if real.size else (0.0, 1.0)
    if changes:
        most = max(-low, high) or 1.0
        return Normalize(-most, most), colour_map("RdBu").with_extremes(bad=HAIRLINE)
    cmap = colour_map(CMAP).with_extremes(bad=HAIRLINE)
    return Normalize(low, high if high > low else low + 1.0), cmap


def _cells(
    axes: Axes, grid: NDArray[np.float32], texts: Sequence[str], scale: Normalize, cmap: Colormap
) -> None:
    """The colours of a table, with its numbers; empty cells stay grey."""
    frame_axes(axes)
    axes.imshow(np.ma.masked_invalid(grid), norm=scale, cmap=cmap, aspect="auto")
    for (row, column), text in zip(np.ndindex(grid.shape), texts, strict=True):
        if np.isfinite(grid[row, column]):
            light = np.dot(cmap(scale(grid[row, column]))[:3], LUMA)
            colour = "black" if light > 0.5 else "white"
            axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=_CELL)
    axes.set_xticks(range(grid.shape[1]), map(str, range(grid.shape[1])), fontsize=_CELL, color=INK)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.tick_params(length=0, pad=2)


def _bar(axes: Axes, scale: Normalize, cmap: Colormap, unit: str) -> None:
    bar = axes.figure.colorbar(
        ScalarMappable(norm=scale, cmap=cmap), cax=axes, orientation="horizontal"
    )
    bar.outline.set(color=QUIET, linewidth=0.5)
    bar.locator = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
    bar.set_label(unit, fontsize=_SMALL, color=INK)
    axes.tick_params(labelsize=_CELL, length=2, width=0.5, color=QUIET, labelcolor=INK)
