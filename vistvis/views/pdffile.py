"""A PDF file of one page: photographs, words and lines, over fpdf2.

fpdf2 and not the plotting library, because a page of overlays holds hundreds of photographs: they
go in as the JPEG files they are, so that 24 layers of 17 heads take megabytes, and words stay words
that can be searched.
"""

from __future__ import annotations

import functools
import io
from typing import BinaryIO, TypeAlias

from fpdf import FPDF

Colour: TypeAlias = tuple[float, float, float]
Box: TypeAlias = tuple[float, float, float, float]
"""`(x, y, width, height)` in points."""

INK: Colour = (0.1, 0.1, 0.12)
QUIET: Colour = (0.45, 0.45, 0.5)
_PAPER_GREY = 240
_LINE_GREY = 191
# The fonts every PDF reader has know Latin letters only; these have a spelling in them.
_SPELLED = str.maketrans({"–": "-", "—": "-", "−": "-", "…": "...", "→": "->"})


class PdfPage:
    """One page, `width` × `height` points of 1/72 inch; positions count from the top left.

    The file is written at `close`; without it there is none.
    """

    def __init__(self, file: BinaryIO, width: float, height: float, *, title: str) -> None:
        self._file = file
        self._page = FPDF(unit="pt", format=(width, height))
        self._page.set_auto_page_break(False)
        self._page.set_margin(0)
        self._page.add_page()
        self._page.set_title(title)

    def jpeg(self, data: bytes, box: Box) -> None:
        """Draw an RGB JPEG; it goes in as it is."""
        x, y, width, height = box
        self._page.image(io.BytesIO(data), x=x, y=y, w=width, h=height)

    def text(
        self,
        text: str,
        x: float,
        y: float,
        *,
        size: float,
        colour: Colour = INK,
        anchor: float = 0.0,
        bold: bool = False,
    ) -> None:
        """Write a line; `y` is its base line, `anchor` 0 starts it at `x`, 0.5 centres, 1 ends."""
        self._page.set_font("Helvetica", "B" if bold else "", size)
        self._page.set_text_color(*(round(255 * part) for part in colour))
        written = _latin(text)
        self._page.text(x - anchor * self._page.get_string_width(written), y, written)

    def gap(self, x: float, y: float, width: float, height: float, words: str) -> None:
        """A crossed-out box that says in words what is not there."""
        page = self._page
        page.set_fill_color(_PAPER_GREY)
        page.set_draw_color(_LINE_GREY)
        page.set_line_width(1)
        page.rect(x, y, width, height, style="DF")
        page.line(x, y + height, x + width, y)
        page.line(x, y, x + width, y + height)
        size = min(height / 6, 0.8 * width / text_width(words, 1.0))
        wide = text_width(words, size) + size
        middle = y + height / 2
        page.rect(x + (width - wide) / 2, middle - 0.75 * size, wide, 1.5 * size, style="F")
        self.text(words, x + width / 2, middle + 0.35 * size, size=size, colour=QUIET, anchor=0.5)

    def close(self) -> None:
        """Write the file."""
        self._page.output(self._file)


def text_width(text: str, size: float) -> float:
    """How wide a line in Helvetica is, in the unit of `size`."""
    # Measured at a size where rounding does not show; widths grow in proportion.
    return float(_ruler().get_string_width(_latin(text))) * size / 100


@functools.cache
def _ruler() -> FPDF:
    ruler = FPDF(unit="pt")
    ruler.set_font("Helvetica", "", 100)
    return ruler


def _latin(text: str) -> str:
    return text.translate(_SPELLED).encode("latin-1", "replace").decode("latin-1")
