"""Figures that pyplot does not know, and the pieces that several views share.

Lengths are in inches, letters and lines in points (72 to an inch).
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, Normal, Stroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

from vistvis.errors import InputError
from vistvis.files import atomic_file
from vistvis.names import harmless
from vistvis.views.painting import GREEN, colour_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

FORMATS = ("png", "svg", "pdf")
# One column and both of a two-column paper, as IEEE, CVPR and Springer have them within 0.15 in.
WIDTHS = {"column": 3.35, "double": 6.9}
INK, QUIET, HAIRLINE = "#1b1b1f", "#6a6a73", "#c9c9cf"
MARK = "#" + bytes(GREEN).hex()
# Pictures in files of vectors are pixels too, and these are printed.
_PRINT_DPI = 300
# Fonts as TrueType, which journals insist on; letters of an SVG as outlines, because a font that a
# reader's machine lacks would be another one, of other widths.
_SAVED: Any = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path"}


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
        """Write the figure; the ending chooses the format. The file is whole or not there.

        PDF has TrueType fonts, SVG has letters as outlines. `dpi` defaults to the figure's, for the
        pictures within PDF and SVG to 300.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target, sync=False) as file, matplotlib.rc_context(_SAVED):
            ending = target.suffix[1:].lower() or "png"
            # Level 4 takes less than half the time of the default for 4 % more bytes.
            settings: dict[str, Any] = (
                {"pil_kwargs": {"compress_level": 4}} if ending == "png" else {}
            )
            least = self.dpi if ending == "png" else max(self.dpi, _PRINT_DPI)
            self.savefig(file, format=ending, dpi=dpi or least, **settings)
        return target

    def save_as(
        self,
        stem: str | os.PathLike[str],
        formats: str | Sequence[str] = "png",
        *,
        dpi: float | None = None,
    ) -> list[Path]:
        """Write the figure as `stem.png`, `stem.pdf`, …: "png,svg,pdf" is all `formats`.

        Returns the paths; InputError for another format, before anything is written.
        """
        return [self.save(f"{os.fspath(stem)}.{ending}", dpi=dpi) for ending in formats_of(formats)]

    def add_box(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes in a box from the top left in inches; matplotlib counts fractions from below."""
        across, down = self.get_size_inches()
        return self.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))

    def write(self, x: float, y: float, text: str, *, size: float, **style: Any) -> None:
        """A text whose top left lies at (x, y), from the top left in inches."""
        across, down = self.get_size_inches()
        plain: dict[str, Any] = {"va": "top", "linespacing": _LINE, "parse_math": False}
        self.text(x / across, 1 - y / down, text, fontsize=size, **plain, **style)


def formats_of(formats: str | Sequence[str]) -> tuple[str, ...]:
    """Formats of files from "png,svg,pdf" or a sequence, each once; InputError for another."""
    named = formats.split(",") if isinstance(formats, str) else formats
    chosen = tuple(dict.fromkeys(name.strip().lower().lstrip(".") for name in named))
    if not chosen or any(name not in FORMATS for name in chosen):
        raise InputError(f"formats are some of {', '.join(FORMATS)}, got {formats!r}")
    return chosen


def inches_of(width: str | float) -> float:
    """A figure's width: "column" (3.35 in), "double" (6.9 in), or from 2 to 40 inches.

    InputError for anything else.
    """
    if isinstance(width, str) and width in WIDTHS:
        return WIDTHS[width]
    try:
        inches = float(width)
    except (TypeError, ValueError):
        inches = 0.0
    if not 2 <= inches <= 40:
        raise InputError(f"a width is 'column', 'double', or from 2 to 40 inches, got {width!r}")
    return inches


# -- text ----------------------------------------------------------------------------------------

_LINE = 1.25
# Letters fitted to pixels become wider, by so much where there are 72 to an inch or more.
_HINTED = 1.08


def text_width(text: str, size: float, *, weight: str = "normal") -> float:
    """How many inches wide a line of text is at most."""
    font = FontProperties(size=size, weight=weight)
    width, *_ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return _HINTED * float(width) / 72


def text_height(text: str, size: float) -> float:
    """How many inches the lines of a text take, with the space below the last."""
    return (text.count("\n") + 1) * size * _LINE / 72


def wrap(text: str, width: float, size: float, *, weight: str = "normal") -> str:
    """A text in lines of at most `width` inches; a word that is longer is shortened."""
    lines: list[str] = []
    for word in harmless(text).split():
        longer = f"{lines[-1]} {word}" if lines else ""
        if longer and text_width(longer, size, weight=weight) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, width, size, weight=weight))
    return "\n".join(lines)


def shorten(text: str, width: float, size: float, *, weight: str = "normal") -> str:
    """A line of at most `width` inches, what is too much left out of its middle: names differ at
    their ends, and begin alike."""
    text = harmless(text)
    shown, keep = text, len(text)
    while keep > 1 and (wide := text_width(shown, size, weight=weight)) > width:
        # At once to about what fits, then letter by letter.
        keep = min(keep - 1, int(1.2 * len(shown) * width / wide))
        front = keep // 3
        shown = f"{text[:front]}…{text[len(text) - (keep - front) :]}"
    return shown


# -- pictures, marks and scales ------------------------------------------------------------------


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
    strokes: Sequence[tuple[str, float]] = (("black", 3.4), (MARK, 1.8)),
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


def frame_axes(axes: Axes) -> None:
    """A hairline in place of ticks: padded pictures are white at their edge."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=HAIRLINE, linewidth=0.5)


def points_of(axes: Axes, pixels: float) -> float:
    """How many points wide so many pixels of the picture shown are."""
    left, right = axes.get_xlim()
    inches = axes.get_window_extent().width / axes.figure.dpi
    return float(72 * inches * pixels / abs(right - left))


def mark_query(axes: Axes, box: Sequence[float], *, clip_on: bool = False) -> Rectangle:
    """Outline a query's patch, a box as of `outline_box`, in lines that leave its middle free.

    As in overlays, green within white: one of the two stands out on any picture.
    """
    line = min(max(0.14 * points_of(axes, box[2] - box[0]), 0.5), 1.5)
    strokes = (("white", 2.2 * line), (MARK, line))
    return outline_box(axes, box, strokes=strokes, zorder=5, clip_on=clip_on, joinstyle="miter")


def colour_bar(
    axes: Axes,
    *,
    normalizer: Normalize,
    cmap: str | Colormap,
    clipped: bool,
    size: float,
    label: str = "attention weight",
    short: str = "weight",
) -> None:
    """Fill axes with the bar of a scale; an arrow says that some lie above it.

    The label is what the numbers are, `short` the same where that does not fit.
    """
    width, height = axes.get_window_extent().size
    bar = axes.figure.colorbar(
        ScalarMappable(norm=normalizer, cmap=colour_map(cmap)),
        cax=axes,
        extend="max" if clipped else "neither",
        extendfrac=width / height,
    )
    bar.outline.set(color=QUIET, linewidth=0.5)
    logarithmic = axes.get_yscale() == "log"
    fits = text_width(label, size) <= height / axes.figure.dpi
    bar.set_label(label if fits else short, fontsize=size)
    axes.tick_params(labelsize=size - 0.5, length=2.5, width=0.5, color=QUIET, labelcolor=INK)
    axes.tick_params(which="minor", length=1.5, width=0.4, color=QUIET, labelsize=size - 0.5)
    if not logarithmic:
        few = max(2, min(8, int(height / axes.figure.dpi / 0.2)))
        bar.locator = MaxNLocator(few, steps=[1, 2, 2.5, 5, 10])
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axes.yaxis.get_offset_text().set(fontsize=size - 0.5, horizontalalignment="left")
