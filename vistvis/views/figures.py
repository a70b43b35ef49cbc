"""Figures that pyplot does not know, and the pieces that several views share."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, Normal, Stroke

from vistvis.files import atomic_file

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray


class NotebookFigure(Figure):
    """A figure that belongs to whoever holds it: nothing to close, nothing kept by pyplot.

    It shows as the value of a notebook cell.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self, *, dpi: float | None = None) -> bytes:
        """The figure as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi or self.dpi)
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str], *, dpi: float | None = None) -> Path:
        """Write the figure; the ending chooses the format. The file is whole or not there."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target, sync=False) as file:
            ending = target.suffix[1:].lower() or "png"
            # Level 4 takes less than half the time of the default for 4 % more bytes.
            settings: dict[str, Any] = (
                {"pil_kwargs": {"compress_level": 4}} if ending == "png" else {}
            )
            self.savefig(file, format=ending, dpi=dpi or self.dpi, **settings)
        return target


def image_axes(
    axes: Axes, image: NDArray[Any], *, title: str | None = None, **kwargs: Any
) -> AxesImage:
    """Show a picture `(H, W, 3)`, or a map `(H, W)` in colours, without ticks."""
    shown = axes.imshow(image, interpolation="antialiased", **kwargs)
    axes.set_axis_off()
    if title is not None:
        axes.set_title(title)
    return shown


def outline_box(
    axes: Axes,
    box: Sequence[float],
    *,
    strokes: Sequence[tuple[str, float]] = (("black", 3.4), ("#00e05a", 1.8)),
    pad: float = 0.0,
    **style: Any,
) -> Rectangle:
    """Outline a pixel box `(x0, y0, x1, y1)`, `x1` and `y1` exclusive, `pad` pixels around it.

    `strokes` are `(colour, width in points)` from the widest, which lies lowest, to the narrowest,
    so that one of them shows on any picture; `style` is the rectangle's (`joinstyle`, `zorder`, …).
    Returns the rectangle: one artist with all its lines.
    """
    x0, y0, x1, y1 = box
    *under, (colour, width) = strokes
    # imshow puts the centre of pixel 0 at 0, so the pixel's edge is at -0.5.
    corner = (x0 - 0.5 - pad, y0 - 0.5 - pad)
    size = (x1 - x0 + 2 * pad, y1 - y0 + 2 * pad)
    outline = Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width, **style)
    effects: list[AbstractPathEffect] = [Stroke(foreground=c, linewidth=w) for c, w in under]
    outline.set_path_effects([*effects, Normal()])
    axes.add_patch(outline)
    return outline


def heat_axes(
    axes: Axes,
    heat: NDArray[np.float32],
    *,
    normalizer: Normalize,
    image: NDArray[np.uint8],
    cmap: str | Colormap = "inferno",
    alpha: float = 1.0,
    title: str | None = None,
) -> ScalarMappable:
    """Show a map `(H, W)` in colour over a picture; returns what `colour_bar` needs."""
    image_axes(axes, image)
    heatmap = image_axes(axes, heat, title=title, cmap=cmap, norm=normalizer, alpha=alpha)
    if alpha == 1.0:
        return heatmap
    # The bar of a see-through map would be as pale as the map over white.
    return ScalarMappable(norm=normalizer, cmap=cmap)


def colour_bar(
    figure: Figure, mappable: ScalarMappable, axes: Axes | Sequence[Axes], *, label: str
) -> Colorbar:
    """One labelled bar beside the axes given."""
    bar = figure.colorbar(mappable, ax=axes, label=label, fraction=0.035, pad=0.02)
    bar.outline.set_visible(False)
    return bar
