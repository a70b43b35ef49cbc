"""One query's attention in every head: the picture, then a grid of heat maps on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vistvis.errors import InputError
from vistvis.views.figures import (
    INK,
    QUIET,
    NotebookFigure,
    colour_bar,
    frame_axes,
    inches_of,
    mark_query,
    shorten,
    text_height,
    wrap,
)
from vistvis.views.painting import (
    ALPHA,
    CMAP,
    Own,
    as_array,
    is_clipped,
    lay_over,
    normalizer,
    resize,
    scale_text,
)
from vistvis.views.wholes import WholePhoto, show_view, view_of, words_of

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from vistvis.images import Values

# Inches.
_SIDE, _GAP, _BAR, _BAR_SPACE = 0.12, 0.08, 0.13, 0.8
_PANEL, _LEAST, _HIGHEST_BAR = 2.4, 0.95, 4.0


def head_grid(
    image: NDArray[np.uint8],
    maps: Values,
    *,
    title: str = "",
    names: Sequence[str] | None = None,
    photo: str = "picture",
    box: tuple[int, int, int, int] | None = None,
    norm: str = "auto",
    cmap: str | Colormap = CMAP,
    alpha: float = ALPHA,
    columns: int | None = None,
    width: str | float | None = None,
    untrained: bool = False,
    size: tuple[int, int] | None = None,
    whole: WholePhoto | None = None,
) -> NotebookFigure:
    """Draw the maps `(h, rows, cols)` of all heads over one picture, uint8 `(H, W, 3)`.

    Parameters
    ----------
    names
        One for each map; by default `head 0`, `head 1`, …, and the mean of several heads is drawn
        before them.
    photo
        The picture's name, which stands above it.
    box
        The query patch in the model's pixels, outlined in every picture; None for a special token.
    norm
        "auto", "linear", "log" or "percentile", as in `painting.normalizer`: one scale for all
        heads. What lies above it is white.
    cmap, alpha
        As in `painting.lay_over`.
    columns
        Pictures in a line. Default: what leaves the fewest places empty.
    width
        "column" (3.35 in), "double" (6.9 in) or inches. Default: what the pictures need.
    untrained
        Say in the title that the weights are.
    size
        `(H, W)` of the model's picture; default: of `image`, which may have more pixels than it.
    whole
        The photo: then what was cut off is shown too, faint, and borders are hatched.

    Raises
    ------
    InputError
        If there is not one name for each map, or an option is none of those above.
    """
    values = as_array(maps)
    if values.ndim != 3:
        raise InputError(f"maps are (heads, rows, cols), got shape {values.shape}")
    labels = list(names) if names is not None else [f"head {i}" for i in range(len(values))]
    if len(labels) != len(values):
        raise InputError(f"{len(values)} maps need as many names, got {len(labels)}")
    if names is None and len(values) > 1:
        values = np.concatenate([values.mean(0, keepdims=True), values])
        labels = [f"mean of {len(labels)} heads", *labels]
    height, across = size = size or (image.shape[0], image.shape[1])
    own = None if box is None else _own(box, size, values.shape[1:])
    scale = normalizer(values, norm=norm, own=own)
    wide = None if width is None else inches_of(width)
    wholes = [] if whole is None else [whole]
    view = view_of(size, wholes)
    count, aspect = len(values) + 1, (view[3] - view[1]) / (view[2] - view[0])
    columns = columns or _columns(count, wide)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    around = 2 * _SIDE + _BAR_SPACE + (columns - 1) * _GAP
    if wide is None:
        wide = max(columns * _PANEL * min(1, 1 / aspect) + around, 4.5)
    panel = (wide - around) / columns
    large, small = (12.0, 9.0) if width is None else (9.0, 7.0)
    title = " · ".join([title] * bool(title) + ["untrained weights"] * untrained)
    title = wrap(title, wide - 2 * _SIDE, large, weight="bold")
    said = scale_text(values, scale, norm=norm, own=own), *words_of(size, wholes)
    note = wrap(" · ".join(said), wide - 2 * _SIDE, small)
    label = small * 1.5 / 72
    note_top = _SIDE + (text_height(title, large) if title else 0)
    top = note_top + text_height(note, small) + 0.05
    cell = label + panel * aspect + _GAP
    figure = NotebookFigure(figsize=(wide, top + rows * cell - _GAP + _SIDE), dpi=150)
    figure.write(_SIDE, _SIDE, title, size=large, fontweight="bold")
    figure.write(_SIDE, note_top, note, size=small, color=QUIET)
    picture = image.astype(np.float32) / np.float32(255)
    if whole is not None:
        picture = whole.without_borders(picture, size)
    # Places count in the model's pixels.
    extent = (-0.5, across - 0.5, height - 0.5, -0.5)
    for number, text in enumerate([photo, *labels]):
        row, column = divmod(number, columns)
        place = (_SIDE + column * (panel + _GAP), top + row * cell + label)
        axes = figure.add_box(*place, panel, panel * aspect)
        frame_axes(axes)
        shown = image
        if number:
            heat = resize(values[number - 1], image.shape[:2])
            shown = lay_over(picture, heat, normalizer=scale, cmap=cmap, alpha=alpha)
        axes.imshow(shown, interpolation="antialiased", extent=extent)
        if whole is not None:
            whole.draw(axes, size, heat=number > 0)
        show_view(axes, view)
        text = shorten(text, panel, small)
        axes.set_title(text, fontsize=small, pad=2.5, loc="left", color=INK, parse_math=False)
        if box is not None:
            mark_query(axes, box)
    span = min(rows * cell - _GAP - label, _HIGHEST_BAR)
    bar = figure.add_box(wide - _SIDE - _BAR_SPACE + 0.1, top + label, _BAR, span)
    clipped = is_clipped(values, scale)
    colour_bar(bar, normalizer=scale, cmap=cmap, clipped=clipped, size=small)
    return figure


def _own(box: tuple[int, int, int, int], size: tuple[int, ...], grid: tuple[int, ...]) -> Own:
    """Row and column of the patch that a box outlines, in every map."""
    row, col = (round(start * n / of) for start, n, of in zip(box[1::-1], grid, size, strict=True))
    return slice(None), row, col


def _columns(count: int, width: float | None) -> int:
    """Pictures in a line: of all that are large enough, those that leave the fewest places."""
    most = 6 if width is None else int((width - 2 * _SIDE - _BAR_SPACE) / (_LEAST + _GAP))
    most = max(min(most, count), 1)
    return min(range(most, most // 2, -1), key=lambda columns: -count % columns)
