"""A PDF file of pages: photographs, words and lines, over fpdf2.

fpdf2 and not the plotting library, because a page of overlays holds hundreds of photographs: they
go in as the JPEG files they are, so that 24 layers of 17 heads take megabytes, and words stay words
that can be searched. What is used of their font, the figures' own, is embedded as TrueType.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

from fpdf import FPDF
from matplotlib import get_data_path

Colour: TypeAlias = tuple[float, float, float]
Box: TypeAlias = tuple[float, float, float, float]
"""`(x, y, width, height)` in points."""

INK: Colour = (0.1, 0.1, 0.12)
QUIET: Colour = (0.4, 0.4, 0.45)
_PAPER_GREY = 240
_LINE_GREY = 191
_FONT = "DejaVuSans"
# Of the size asked for: smaller words are shortened instead.
_SMALLEST = 0.6


class PdfFile:
    """Pages of `width` × `height` units; positions count from the top left.

    A unit is `unit` points of 1/72 inch; sizes of letters are in units too. The file is written at
    `close`; without it there is none.
    """

    def __init__(self, file: BinaryIO, *, title: str, unit: float = 1.0) -> None:
        self._file, self._unit = file, unit
        self._pages = _with_fonts(FPDF(unit=unit))
        self._pages.set_auto_page_break(False)
        self._pages.set_margin(0)
        self._pages.set_title(title)

    def page(self, width: float, height: float) -> None:
        """Begin the next page, on which everything goes from here."""
        self._pages.add_page(format=(width, height))

    def jpeg(self, data: bytes, box: Box) -> None:
        """Draw an RGB JPEG; it goes in as it is."""
        x, y, width, height = box
        self._pages.image(io.BytesIO(data), x=x, y=y, w=width, h=height)

    def text(
        self,
        text: str,
        x: float,
        y: float,
        *,
        size: float,
        room: float | None = None,
        colour: Colour = INK,
        anchor: float = 0.0,
        bold: bool = False,
    ) -> None:
        """Write a line; `y` is its base line, `anchor` 0 starts it at `x`, 0.5 centres, 1 ends.

        A line wider than `room` is made smaller, and if need be shortened in its middle.
        """
        if room is not None:
            text, size = fitted(text, size, room, bold=bold)
        self._pages.set_font(_FONT, "B" if bold else "", size * self._unit)
        self._pages.set_text_color(*(round(255 * part) for part in colour))
        self._pages.text(x - anchor * text_width(text, size, bold=bold), y, text)

    def gap(self, x: float, y: float, width: float, height: float, words: str) -> None:
        """A crossed-out box that says in words what is not there."""
        page = self._pages
        page.set_fill_color(_PAPER_GREY)
        page.set_draw_color(_LINE_GREY)
        page.set_line_width(0.5)
        page.rect(x, y, width, height, style="DF")
        page.line(x, y + height, x + width, y)
        page.line(x, y, x + width, y + height)
        size = min(height / 6, 0.8 * width / text_width(words, 1.0))
        wide = text_width(words, size) + size
        middle = y + height / 2
        page.rect(x + (width - wide) / 2, middle - 0.75 * size, wide, 1.5 * size, style="F")
        self.text(words, x + width / 2, middle + 0.35 * size, size=size, colour=QUIET, anchor=0.5)

    def bar(self, box: Box, colours: Sequence[tuple[int, int, int]]) -> None:
        """A box in these colours from left to right, with a thin line around it."""
        x, y, width, height = box
        step = width / len(colours)
        for number, colour in enumerate(colours):
            self._pages.set_fill_color(*colour)
            # One box reaches under the next, so that no paper shines through between them.
            reach = width - number * step if number + 2 > len(colours) else 2 * step
            self._pages.rect(x + number * step, y, reach, height, style="F")
        self._pages.set_draw_color(_LINE_GREY)
        self._pages.set_line_width(0.5)
        self._pages.rect(x, y, width, height, style="D")

    def close(self) -> None:
        """Write the file."""
        self._pages.output(self._file)


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """How wide a line is, in the unit of `size`."""
    # Measured at a size where rounding does not show; widths grow in proportion.
    return float(_ruler(bold).get_string_width(text)) * size / 100


def fitted(text: str, size: float, room: float, *, bold: bool = False) -> tuple[str, float]:
    """The line, and at which size it takes at most `room`; its middle is left out at the worst."""
    wide = text_width(text, size, bold=bold)
    if wide <= room:
        return text, size
    if wide * _SMALLEST <= room:
        return text, size * room / wide
    small, kept, shown = _SMALLEST * size, len(text), text
    while kept > 2 and text_width(shown, small, bold=bold) > room:
        kept = min(kept - 1, int(kept * room / text_width(shown, small, bold=bold)) + 1)
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown, small


@functools.cache
def _ruler(bold: bool) -> FPDF:
    ruler = _with_fonts(FPDF(unit="pt"))
    ruler.set_font(_FONT, "B" if bold else "", 100)
    return ruler


def _with_fonts(pages: FPDF) -> FPDF:
    for style, ending in (("", ""), ("B", "-Bold")):
        pages.add_font(_FONT, style, Path(get_data_path(), "fonts", "ttf", f"{_FONT}{ending}.ttf"))
    return pages
