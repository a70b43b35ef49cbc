"""Where the pictures of a table go: blocks of its rows and columns on pages of a standard size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

from vistvis.errors import InputError
from vistvis.views.pdffile import Box

# Points of 1/72 inch, upright.
PAPER = {"A4": (595.276, 841.89), "letter": (612.0, 792.0)}
SINGLE = "single"
"""One page as large as the table."""

MARGIN = 30.0
HEAD, FOOT = 70.0, 24.0
LABEL = 8.0
GAP = 2.5
_LABELS_ABOVE = 1.5 * LABEL
_BETWEEN = 10.0
# The root of a picture's area: below 2 cm details are lost in print.
_SMALLEST = 57.0
# On one page as large as the table.
_SIDE_AT_ONCE, _LARGEST_AT_ONCE, _TABLE_AT_ONCE = 116.0, 300.0, 1600.0
_LEAST_WIDTH, _LARGEST_UNIT = 480.0, 2.5
_LONGEST_SIDE = 14_400.0  # what readers of PDF accept (ISO 32000-1, annex C)
# Of the last page, or rather all beyond the full ones: more of it empty is a waste of paper.
_EMPTY = 0.25
# A split into several blocks has to win this much in size for each.
_WORTH = 0.97


@dataclass(frozen=True)
class Block:
    """Rows and columns of the table that stand together, with labels, and where on which page."""

    page: int
    rows: range
    columns: range
    x: float
    y: float
    """Of the corner of the first picture."""


@dataclass(frozen=True)
class Layout:
    """Pages of one size, and blocks of pictures of one size on them; all is `unit` points."""

    width: float
    height: float
    cell: tuple[float, float]
    labels: float
    blocks: tuple[Block, ...]
    unit: float = 1.0

    @property
    def pages(self) -> int:
        return self.blocks[-1].page + 1

    def box(self, block: Block, row: int, column: int) -> Box:
        """Where a picture goes, by its row and column of the table."""
        wide, high = self.cell
        x = block.x + (column - block.columns.start) * (wide + GAP)
        return x, block.y + (row - block.rows.start) * (high + GAP), wide, high


@dataclass(frozen=True)
class _Split:
    """How a table is cut into `down × across` blocks, of which a page has `beside × below`."""

    rows: int
    columns: int
    down: int
    across: int
    beside: int
    below: int

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the largest block."""
        return math.ceil(self.rows / self.down), math.ceil(self.columns / self.across)

    @property
    def pages(self) -> int:
        return math.ceil(self.down * self.across / (self.beside * self.below))

    @property
    def empty(self) -> float:
        """The part of all pages that has no block."""
        return 1 - self.down * self.across / (self.beside * self.below * self.pages)

    def cell_width(self, size: tuple[float, float], labels: float, aspect: float) -> float:
        """How wide a picture of that height by width can be on a page of that size."""
        rows, columns = self.block
        width, height = size[0] - 2 * MARGIN, size[1] - 2 * MARGIN - HEAD - FOOT
        wide = ((width - (self.beside - 1) * _BETWEEN) / self.beside - labels) / columns - GAP
        high = ((height - (self.below - 1) * _BETWEEN) / self.below - _LABELS_ABOVE) / rows - GAP
        return min(wide, high / aspect)


def lay_out(rows: int, columns: int, *, aspect: float, labels: float, page: str) -> Layout:
    """Lay out a table of pictures that are `aspect` times as high as wide.

    `labels` is the width of the rows' labels; `page` is "A4", "letter" or "single". Few pages
    first, then large pictures, upright or across; InputError for other pages, and where a single
    one would be larger than a PDF can have.
    """
    if page == SINGLE:
        return _at_once(rows, columns, aspect, labels)
    if page not in PAPER:
        names = ", ".join(map(repr, (*PAPER, SINGLE)))
        raise InputError(f"page is one of {names}, got {page!r}")
    upright = PAPER[page]
    best: tuple[tuple[bool, int, bool, float], _Split, tuple[float, float], float] | None = None
    for size, split in product((upright, upright[::-1]), _splits(rows, columns)):
        wide = split.cell_width(size, labels, aspect)
        if wide <= 0:
            continue
        small = wide * math.sqrt(aspect) < _SMALLEST
        worth = wide * _WORTH ** (split.down * split.across / split.pages - 1)
        rank = (small, split.pages, split.empty > _EMPTY, -worth)
        if best is None or rank < best[0]:
            best = rank, split, size, wide
    if best is None:
        raise InputError(f"labels of {labels:.0f} points leave no room for pictures")
    _, split, size, wide = best
    return _placed(split, size, (wide, wide * aspect), labels)


def _splits(rows: int, columns: int) -> Iterator[_Split]:
    for down, across in product(_cuts(rows), _cuts(columns)):
        count = down * across
        for beside in range(1, min(count, 12) + 1):
            for below in range(1, min(math.ceil(count / beside), 40) + 1):
                yield _Split(rows, columns, down, across, beside, below)


def _cuts(count: int) -> list[int]:
    """Into how many parts something is cut: one number for each size of the largest part."""
    return sorted({math.ceil(count / size) for size in range(1, count + 1)})


def _at_once(rows: int, columns: int, aspect: float, labels: float) -> Layout:
    side = min(_LARGEST_AT_ONCE, max(_SIDE_AT_ONCE, _TABLE_AT_ONCE / max(rows, columns)))
    wide, high = (side, side * aspect) if aspect <= 1 else (side / aspect, side)
    # Large pages are seen from afar: their words are larger.
    unit = min(max(1.0, columns * wide / _LEAST_WIDTH), _LARGEST_UNIT)
    # Laid out as on paper that is enlarged afterwards.
    cell = wide / unit, high / unit
    width = 2 * MARGIN + labels + columns * (cell[0] + GAP)
    height = 2 * MARGIN + HEAD + _LABELS_ABOVE + rows * (cell[1] + GAP) + FOOT
    if max(width, height) * unit > _LONGEST_SIDE:
        raise InputError(
            f"{rows} layers × {columns} heads don't fit on a single page; use page='A4', which "
            "takes several"
        )
    size = max(width, _LEAST_WIDTH), height
    return _placed(_Split(rows, columns, 1, 1, 1, 1), size, cell, labels, unit)


def _placed(
    split: _Split,
    size: tuple[float, float],
    cell: tuple[float, float],
    labels: float,
    unit: float = 1.0,
) -> Layout:
    most_rows, most_columns = split.block
    width = labels + most_columns * (cell[0] + GAP) + _BETWEEN
    height = _LABELS_ABOVE + most_rows * (cell[1] + GAP) + _BETWEEN
    left = MARGIN + (size[0] - 2 * MARGIN - split.beside * width + _BETWEEN) / 2
    blocks = []
    parts = product(_parts(split.rows, split.down), _parts(split.columns, split.across))
    for number, (rows, columns) in enumerate(parts):
        page, slot = divmod(number, split.beside * split.below)
        beside, below = divmod(slot, split.below)
        x = left + beside * width + labels
        y = MARGIN + HEAD + below * height + _LABELS_ABOVE
        blocks.append(Block(page, rows, columns, x, y))
    return Layout(*size, cell, labels, tuple(blocks), unit)


def _parts(count: int, parts: int) -> list[range]:
    """0 to `count` in parts that differ by at most one, the larger first."""
    least, more = divmod(count, parts)
    starts = [number * least + min(number, more) for number in range(parts + 1)]
    return [range(*pair) for pair in pairwise(starts)]
