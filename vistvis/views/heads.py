"""One query's attention in every head: the picture, then a grid of heat maps on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vistvis.errors import InputError
from vistvis.views.figures import NotebookFigure, colour_bar, heat_axes, image_axes, outline_box
from vistvis.views.painting import as_array, normalizer, resize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vistvis.images import Values


def head_grid(
    image: NDArray[np.uint8],
    maps: Values,
    *,
    title: str = "",
    names: Sequence[str] | None = None,
    box: tuple[int, int, int, int] | None = None,
    norm: str = "linear",
    cmap: str = "inferno",
    alpha: float = 0.6,
    columns: int = 4,
) -> NotebookFigure:
    """Draw the maps `(h, rows, cols)` of all heads over one picture, uint8 `(H, W, 3)`.

    Parameters
    ----------
    names
        One for each map; by default `head 0`, `head 1`, …
    box
        The query patch in pixels, outlined in every picture; None for a special token.
    norm
        "linear", "log" or "percentile": one scale for all heads.

    Raises
    ------
    InputError
        If there is not one name for each map.
    """
    values = as_array(maps)
    if values.ndim != 3:
        raise InputError(f"maps are (heads, rows, cols), got shape {values.shape}")
    labels = list(names) if names is not None else [f"head {i}" for i in range(len(values))]
    if len(labels) != len(values):
        raise InputError(f"{len(values)} maps need as many names, got {len(labels)}")
    scale = normalizer(values, norm=norm)
    height, width = image.shape[:2]
    columns = min(columns, len(values) + 1)
    rows = math.ceil((len(values) + 1) / columns)
    figure = NotebookFigure(
        figsize=(2.6 * columns + 0.9, 2.75 * rows * height / width + 0.5), layout="constrained"
    )
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(len(values) + 1)]
    image_axes(axes[0], image, title="picture")
    for panel, heat, label in zip(axes[1:], resize(values, (height, width)), labels, strict=True):
        colours = heat_axes(
            panel, heat, normalizer=scale, image=image, cmap=cmap, alpha=alpha, title=label
        )
    if box is not None:
        for panel in axes:
            outline_box(panel, box)
    colour_bar(figure, colours, axes, label="attention weight")
    if title:
        figure.suptitle(title)
    return figure
