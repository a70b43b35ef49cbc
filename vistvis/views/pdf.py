"""One PDF page for each query: overlays of all layers and heads side by side."""

from __future__ import annotations

import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistvis.errors import InputError, StoreError
from vistvis.files import atomic_file
from vistvis.progress import progress as progress_bar
from vistvis.views.overlay_folder import (
    Head,
    Layer,
    OverlayOutputPath,
    layer_label,
    natural_order,
    query_order,
)
from vistvis.views.pdffile import QUIET, Box, PdfPage, text_width
from vistvis.views.png import THREADS

# Points of 1/72 inch. The longer side of a picture: large tables have the smallest, which is still
# seen at the zoom at which labels are read; with few pictures each may take more room.
_SMALLEST_CELL, _LARGEST_CELL, _TABLE_SIDE = 116.0, 300.0, 1600.0
_GAP = 5.0
_MARGIN = 24.0
_LABEL = 20.0
_TITLE = 26.0
_TABLE_WITH_TWO_SIDES = 8
_JPEG_QUALITY = 90
_LONGEST_SIDE = 14_400.0  # what readers of PDF accept (ISO 32000-1, annex C)


def plot_attention_for_reconstruction(
    output_path: str | os.PathLike[str] | OverlayOutputPath,
    dpi: int = 300,
    *,
    progress: bool = True,
) -> list[str]:
    """Gather overlays into one PDF for each query: layers are rows, heads are columns.

    Parameters
    ----------
    output_path
        The folder that `run_overlay_for_reconstruction` wrote; from stored layers or from a run.
    dpi
        Pictures with more pixels than that on the page are made smaller; none is made larger.

    Returns
    -------
    Paths of the PDFs, `<output_path>/attention_query_<q>.pdf`; where overlays carry a key frame,
    `attention_query_<q>_frame_<k>.pdf`.

    Raises
    ------
    InputError
        If there are no overlays, or `dpi` is not positive.
    StoreError
        If an overlay can't be read or the PDF not written.

    An overlay that is not there leaves a marked gap. Pages hold one row of pictures in memory;
    photographs are stored as JPEG, with the PNG files beside them for every detail.
    """
    if not dpi > 0:
        raise InputError(f"dpi is positive, got {dpi}")
    output = output_path
    if not isinstance(output, OverlayOutputPath):
        output = OverlayOutputPath(os.fspath(output))
    tables = _tables(output, dpi)
    if not tables:
        raise InputError(
            f"no overlays under {output.output_path}; make them with "
            "run_overlay_for_reconstruction(…, output_path=…)"
        )
    shown = progress and len(tables) > 1
    return [str(_write(t)) for t in progress_bar(tables, "pages", shown=shown, unit="query")]


@dataclass(frozen=True)
class _Table:
    """What one page shows, and from where."""

    output: OverlayOutputPath
    dpi: int
    query: int
    frame: int | None
    layers: tuple[Layer, ...]
    heads: tuple[Head, ...]

    @property
    def stem(self) -> str:
        frame = "" if self.frame is None else f"_frame_{self.frame}"
        return f"attention_query_{self.query}{frame}"

    @property
    def title(self) -> str:
        frame = "" if self.frame is None else f", key frame {self.frame}"
        return f"Attention of query token {self.query}{frame}"

    @property
    def subtitle(self) -> str:
        numbered = _counted(sum(isinstance(head, int) for head in self.heads), "head")
        words = ["the mean" if h == "mean" else h for h in self.heads if isinstance(h, str)]
        columns = " and ".join(([numbered] if len(words) < len(self.heads) else []) + words)
        return (
            f"{_counted(len(self.layers), 'layer')} × {columns}; each overlay runs from its own "
            "minimum to its own maximum"
        )

    @property
    def query_file(self) -> Path:
        return Path(self.output.query_file(self.query))

    def files(self, layer: Layer) -> list[Path]:
        """The overlays of a layer, head by head."""
        overlay = self.output.overlay_file
        return [Path(overlay(layer, head, self.query, self.frame)) for head in self.heads]


def _tables(output: OverlayOutputPath, dpi: int) -> list[_Table]:
    """One table for each query and key frame that any layer and head has."""
    queries = {
        (layer, head): output.list_queries(layer, head)
        for layer in output.list_layers()
        for head in output.list_heads(layer)
    }
    panels = [panel for panel in queries if queries[panel]]
    layers = tuple(dict.fromkeys(layer for layer, _ in panels))
    heads = tuple(sorted({head for _, head in panels}, key=natural_order))
    order = sorted(set().union(*queries.values()), key=query_order)
    return [_Table(output, dpi, token, frame, layers, heads) for token, frame in order]


# -- where things go -----------------------------------------------------------------------------


class _Plan:
    """Where a table's things go: positions and sizes in points, from the top left."""

    def __init__(self, table: _Table) -> None:
        rows, columns = len(table.layers), len(table.heads)
        aspect = _aspect(table)
        side = min(_LARGEST_CELL, max(_SMALLEST_CELL, _TABLE_SIDE / max(rows, columns)))
        wide, high = (side, side * aspect) if aspect <= 1 else (side / aspect, side)
        self.both_sides = columns > _TABLE_WITH_TWO_SIDES
        self.both_ends = rows > _TABLE_WITH_TWO_SIDES
        labels = max(text_width(layer_label(n), _LABEL) for n in table.layers) + _LABEL / 2
        # Heads' labels stand side by side, so narrow cells are widened rather than labels cut.
        wide = max(wide, max(text_width(_head_label(n), _LABEL) for n in table.heads) + 4)
        self.cell = wide, high
        small = 1.6 * _SMALLEST_CELL * min(1.0, aspect) if table.query_file.exists() else 0.0
        self.thumbnail = small / aspect, small
        self.left = _MARGIN + labels
        self.top = _MARGIN + max(small, 2.6 * _TITLE) + 2.2 * _LABEL
        width = self.left + columns * (wide + _GAP) + (labels if self.both_sides else 0) + _MARGIN
        words = max(text_width(table.title, _TITLE), text_width(table.subtitle, 0.6 * _TITLE))
        self.width = max(width, 2 * _MARGIN + small / aspect + _LABEL + words)
        below = 1.6 * _LABEL if self.both_ends else 0
        self.height = self.top + rows * (high + _GAP) + below + _MARGIN
        if max(self.width, self.height) > _LONGEST_SIDE:
            raise InputError(
                f"{rows} layers × {columns} heads don't fit on one page; make overlays of fewer "
                "with layers= and head="
            )

    def box(self, row: int, column: int) -> Box:
        x = self.left + column * (self.cell[0] + _GAP)
        return x, self.top + row * (self.cell[1] + _GAP), *self.cell


def _write(table: _Table) -> Path:
    target = Path(table.output.output_path, f"{table.stem}.pdf")
    plan = _Plan(table)
    picture = functools.partial(_jpeg, dpi=table.dpi)
    try:
        with atomic_file(target, sync=False) as file, ThreadPoolExecutor(THREADS) as pool:
            page = PdfPage(file, plan.width, plan.height, title=table.title)
            _head(page, plan, table)
            _labels(page, plan, table)
            for row, layer in enumerate(table.layers):
                boxes = [plan.box(row, column) for column in range(len(table.heads))]
                pictures = pool.map(picture, table.files(layer), boxes)
                for box, jpeg in zip(boxes, pictures, strict=True):
                    if jpeg is None:
                        page.gap(*box, "missing")
                    else:
                        page.jpeg(*jpeg)
            page.close()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"can't write {target}: {error.strerror or error}") from error
    return target


def _head(page: PdfPage, plan: _Plan, table: _Table) -> None:
    x = _MARGIN
    if any(plan.thumbnail):
        jpeg = _jpeg(table.query_file, (x, _MARGIN, *plan.thumbnail), table.dpi)
        if jpeg is not None:
            page.jpeg(*jpeg)
        x += plan.thumbnail[0] + _LABEL
    page.text(table.title, x, _MARGIN + _TITLE, size=_TITLE, bold=True)
    page.text(table.subtitle, x, _MARGIN + 2.1 * _TITLE, size=0.6 * _TITLE, colour=QUIET)


def _labels(page: PdfPage, plan: _Plan, table: _Table) -> None:
    rows, columns = len(table.layers), len(table.heads)
    for column, head in enumerate(table.heads):
        x, y, width, _ = plan.box(0, column)
        lines = [y - 0.5 * _LABEL]
        if plan.both_ends:
            lines.append(plan.box(rows, 0)[1] + 0.8 * _LABEL)
        for line in lines:
            page.text(_head_label(head), x + width / 2, line, size=_LABEL, anchor=0.5)
    for row, layer in enumerate(table.layers):
        x, y, _, height = plan.box(row, 0)
        line = y + height / 2 + 0.35 * _LABEL
        page.text(layer_label(layer), x - _LABEL / 2, line, size=_LABEL, anchor=1)
        if plan.both_sides:
            right = plan.box(0, columns)[0] + _LABEL / 4
            page.text(layer_label(layer), right, line, size=_LABEL)


def _head_label(head: Head) -> str:
    return f"head {head}" if isinstance(head, int) else head


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


# -- pictures ------------------------------------------------------------------------------------


def _aspect(table: _Table) -> float:
    """Height by width of the first overlay."""
    files = (file for layer in table.layers for file in table.files(layer))
    rgb = next((picture for file in files if (picture := _picture(file)) is not None), None)
    return 1.0 if rgb is None else float(rgb.height / rgb.width)


def _picture(path: Path) -> Any:
    """A picture as Pillow has it; None where there is no file."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError) as error:  # Pillow's word for a damaged PNG
        raise StoreError(f"can't read {path}: {error}; make the overlay again") from error


def _jpeg(path: Path, box: Box, dpi: int) -> tuple[bytes, Box] | None:
    """A picture as JPEG and the largest box of its shape in the middle of `box`; or None."""
    from PIL import Image

    rgb = _picture(path)
    if rgb is None:
        return None
    x, y, width, height = box
    most = max(1, round(width / 72 * dpi)), max(1, round(height / 72 * dpi))
    if rgb.width > most[0] or rgb.height > most[1]:
        rgb.thumbnail(most, Image.Resampling.LANCZOS)
    scale = min(width / rgb.width, height / rgb.height)
    wide, high = rgb.width * scale, rgb.height * scale
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), (x + (width - wide) / 2, y + (height - high) / 2, wide, high)
