"""A PDF file of one page: photographs, words and lines, written as it goes.

A page of overlays holds hundreds of photographs. The drawing library keeps every one of them as an
uncompressed array and cannot store JPEG; here each is written when it is drawn, as JPEG, so that
24 layers of 17 heads take megabytes, and words stay words that can be searched.

The format is ISO 32000-1; numbers of sections are given where they help.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import BinaryIO

Colour = tuple[float, float, float]

INK: Colour = (0.1, 0.1, 0.12)
QUIET: Colour = (0.45, 0.45, 0.5)

# Widths of Helvetica's characters in thousandths of the size; those that labels are made of.
_WIDTHS = {
    **dict.fromkeys("0123456789_", 556),
    **dict.fromkeys("abdeghnopqu", 556),
    **dict.fromkeys("cksvxyzJ", 500),
    **dict.fromkeys("il'|j", 222),
    **dict.fromkeys(" .,/:;ft!I", 278),
    **dict.fromkeys("r-()", 333),
    **dict.fromkeys("mM", 833),
    **dict.fromkeys("wCDHNRU", 722),
    "W": 944,
    "@": 1015,
}
_USUAL_WIDTH = 640


class PdfPage:
    """One page, `width` × `height` points of 1/72 inch; positions count from the top left.

    Images are written at once and the rest at `close`; without `close` the file is no PDF.
    """

    def __init__(self, file: BinaryIO, width: float, height: float, *, title: str) -> None:
        self._file, self._height, self._title = file, height, title
        self._size = width, height
        self._offsets: dict[int, int] = {}
        self._images: list[int] = []
        self._marks: list[str] = []
        self._position = 0
        # Four bytes above 127 tell programs that the file is binary (7.5.2).
        self._write(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")

    def jpeg(
        self, data: bytes, size: tuple[int, int], box: tuple[float, float, float, float]
    ) -> None:
        """Draw an RGB JPEG of `(width, height)` pixels into `(x, y, width, height)` in points."""
        # 1 to 5 are the catalogue, the pages, the page, the marks and the font.
        number = 6 + len(self._images)
        self._object(
            number,
            {
                "Type": "/XObject",
                "Subtype": "/Image",
                "Width": f"{size[0]}",
                "Height": f"{size[1]}",
                "ColorSpace": "/DeviceRGB",
                "BitsPerComponent": "8",
                "Filter": "/DCTDecode",
                "Interpolate": "false",
            },
            data,
        )
        self._images.append(number)
        x, y, width, height = box
        low = self._height - y - height
        self._marks.append(f"q {width:.2f} 0 0 {height:.2f} {x:.2f} {low:.2f} cm /I{number} Do Q")

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
        x -= anchor * text_width(text, size)
        letters = text.encode("cp1252", "replace").replace(b"\\", rb"\\")
        letters = letters.replace(b"(", rb"\(").replace(b")", rb"\)")
        font = "/Bold" if bold else "/Plain"
        self._marks.append(
            f"BT {_rgb(colour)} rg {font} {size:.2f} Tf {x:.2f} {self._height - y:.2f} Td "
            f"({letters.decode('latin-1')}) Tj ET"
        )

    def gap(self, x: float, y: float, width: float, height: float, words: str) -> None:
        """A crossed-out box that says in words what is not there."""
        low = self._height - y - height
        box = f"{x:.2f} {low:.2f} {width:.2f} {height:.2f} re"
        right, top = x + width, low + height
        self._marks.append(
            f"q 0.94 g {box} f 0.75 G 1 w {box} S {x:.2f} {low:.2f} m {right:.2f} {top:.2f} l S "
            f"{x:.2f} {top:.2f} m {right:.2f} {low:.2f} l S Q"
        )
        size = min(height / 6, 0.8 * width / text_width(words, 1.0))
        wide = text_width(words, size) + size
        middle = y + height / 2
        self._marks.append(
            f"q 0.94 g {x + width / 2 - wide / 2:.2f} {self._height - middle - 0.75 * size:.2f} "
            f"{wide:.2f} {1.5 * size:.2f} re f Q"
        )
        self.text(words, x + width / 2, middle + 0.35 * size, size=size, colour=QUIET, anchor=0.5)

    def close(self) -> None:
        """Write the page itself, and the table of where everything lies (7.5.4)."""
        width, height = self._size
        pictures = " ".join(f"/I{n} {n} 0 R" for n in self._images)
        fonts = "/Plain 5 0 R /Bold << {} /BaseFont /Helvetica-Bold >>".format(
            "/Type /Font /Subtype /Type1 /Encoding /WinAnsiEncoding"
        )
        page = {
            "Type": "/Page",
            "Parent": "2 0 R",
            "MediaBox": f"[0 0 {width:.2f} {height:.2f}]",
            "Contents": "4 0 R",
            "Resources": f"<< /XObject << {pictures} >> /Font << {fonts} >> >>",
        }
        self._object(1, {"Type": "/Catalog", "Pages": "2 0 R"})
        self._object(2, {"Type": "/Pages", "Kids": "[3 0 R]", "Count": "1"})
        self._object(3, page)
        marks = zlib.compress("\n".join(self._marks).encode("latin-1"))
        self._object(4, {"Filter": "/FlateDecode"}, marks)
        font = {"Type": "/Font", "Subtype": "/Type1", "BaseFont": "/Helvetica"}
        self._object(5, {**font, "Encoding": "/WinAnsiEncoding"})
        start, count = self._position, len(self._offsets) + 1
        lines = [f"{self._offsets[n]:010d} 00000 n \n" for n in range(1, count)]
        title = "FEFF" + self._title.encode("utf-16-be").hex().upper()
        self._write(f"xref\n0 {count}\n0000000000 65535 f \n{''.join(lines)}".encode())
        self._write(
            f"trailer\n<< /Size {count} /Root 1 0 R /Info << /Title <{title}> >> >>\n"
            f"startxref\n{start}\n%%EOF\n".encode()
        )

    def _object(self, number: int, entries: Mapping[str, str], data: bytes | None = None) -> None:
        self._offsets[number] = self._position
        if data is not None:
            entries = {**entries, "Length": f"{len(data)}"}
        inside = " ".join(f"/{name} {value}" for name, value in entries.items())
        self._write(f"{number} 0 obj\n<< {inside} >>\n".encode())
        if data is not None:
            self._write(b"stream\n" + data + b"\nendstream\n")
        self._write(b"endobj\n")

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._position += len(data)


def text_width(text: str, size: float) -> float:
    """About how wide a line in Helvetica is, in the unit of `size`."""
    return size * sum(_WIDTHS.get(letter, _USUAL_WIDTH) for letter in text) / 1000


def _rgb(colour: Colour) -> str:
    return " ".join(f"{part:.3f}" for part in colour)
