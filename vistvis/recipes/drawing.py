"""The figures of recipes: maps of views, and lines over blocks. They get numbers and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vistvis.errors import InputError
from vistvis.images import to_unit
from vistvis.views.figures import (
    INK,
    QUIET,
    NotebookFigure,
    image_axes,
    text_height,
    wrap,
)
from vistvis.views.painting import ALPHA, CMAP, as_array, colour_map, lay_over, normalizer, resize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_DPI = 200
_TITLE, _LABEL, _SMALL = 9.0, 7.5, 7.0  # points
_EDGE, _GAP, _BAR, _LINE = 0.1, 0.08, 0.09, 0.15  # inches
_TILE, _ACROSS = 1.6, 5
_LEFT = 2.2  # names of rows, at most


def frame_maps(
    maps: Tensor,
    *,
    title: str,
    note: str,
    unit: str,
    names: Sequence[str],
    images: Any = None,
) -> NotebookFigure:
    """Maps `(S, rows, cols)` of views on one colour scale, each under its name.

    `images` `(S, 3, H, W)` in [0, 1] lie below them; InputError unless there is one for each.
    """
    values = as_array(maps)
    count, rows, cols = values.shape
    pictures: NDArray[np.float32] | None = None
    if images is not None:
        pictures = to_unit(images)
        if len(pictures) != count:
            raise InputError(f"images are those of {count} views, got {len(pictures)}")
    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    aspect = rows / cols if pictures is None else pictures.shape[1] / pictures.shape[2]
    width = across * _TILE + (across - 1) * _GAP + 2 * _EDGE
    step = _TILE * aspect + _LINE + _GAP
    figure, top = _page(width, down * step + 0.45, title, note)
    scale = normalizer(values, norm="linear")
    for view, name in enumerate(names):
        x = _EDGE + view % across * (_TILE + _GAP)
        y = top + view // across * step
        figure.write(x, y, name, size=_SMALL, color=INK)
        axes = figure.add_box(x, y + _LINE, _TILE, _TILE * aspect)
        if pictures is None:
            image_axes(axes, values[view], norm=scale, cmap=colour_map(CMAP))
        else:
            large = resize(values[view], pictures.shape[1:3])
            image_axes(axes, lay_over(pictures[view], large, normalizer=scale, alpha=ALPHA))
    _bar(figure, _EDGE, top + down * step + 0.02, scale, unit)
    return figure


def lines(
    at: Sequence[int], values: Mapping[str, Sequence[float]], *, title: str, note: str, unit: str
) -> NotebookFigure:
    """Numbers over blocks, a line for each name."""
    figure, top = _page(4.2, 2.1, title, note)
    axes = figure.add_box(0.55, top + 0.05, 3.5, 1.6)
    for name, line in values.items():
        axes.plot(at, line, marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set_xlabel("global block", fontsize=_LABEL)
    axes.set_ylabel(unit, fontsize=_LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values) > 1:
        axes.legend(fontsize=_SMALL, frameon=False)
    _quiet(axes)
    return figure


def _page(width: float, height: float, title: str, note: str) -> tuple[NotebookFigure, float]:
    """A figure with its title and note, `height` of space below; where that begins, in inches."""
    inner = width - 2 * _EDGE
    heading, small = wrap(title, inner, _TITLE, weight="bold"), wrap(note, inner, _SMALL)
    below = _EDGE + text_height(heading, _TITLE) + 0.03
    top = below + text_height(small, _SMALL) + 0.06
    figure = NotebookFigure(figsize=(width, top + height), dpi=_DPI)
    figure.write(_EDGE, _EDGE, heading, size=_TITLE, color=INK, fontweight="bold")
    figure.write(_EDGE, below, small, size=_SMALL, color=QUIET)
    return figure, top


def _bar(figure: NotebookFigure, x: float, y: float, scale: Normalize, unit: str) -> None:
    axes = figure.add_box(x + 0.15, y, 1.5, _BAR)  # numbers stand out to both sides
    shown = ScalarMappable(norm=scale, cmap=colour_map(CMAP))
    bar = figure.colorbar(shown, cax=axes, orientation="horizontal")
    bar.outline.set(color=QUIET, linewidth=0.5)
    axes.locator_params(nbins=4)
    axes.tick_params(labelsize=_SMALL - 0.5, length=2, width=0.5, color=QUIET, labelcolor=INK)
    figure.write(x + 1.8, y - 0.02, unit, size=_SMALL, color=INK)


def _quiet(axes: Axes) -> None:
    axes.tick_params(labelsize=_SMALL, length=2, width=0.5, color=QUIET, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set(color=QUIET, linewidth=0.5)
