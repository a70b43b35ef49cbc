"""One PDF page for each query: overlays of all layers and heads side by side."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistvis.errors import InputError, StoreError
from vistvis.files import atomic_file
from vistvis.views.overlay_folder import Head, Layer, OverlayOutputPath
from vistvis.views.pdffile import QUIET, PdfPage, text_width

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
_THREADS = min(4, os.cpu_count() or 1)


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
    progress
        Show a progress bar.

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
        output = OverlayOutputPath(output_path=os.fspath(output))
    tables = _tables(output)
    if not tables:
        raise InputError(
            f"no overlays under {output.output_path}; make them with "
            "run_overlay_for_reconstruction(…, output_path=…)"
        )
    return [str(_write(table, output, dpi)) for table in _bar(tables, progress)]


@dataclass(frozen=True)
class _Table:
    """What one page shows."""

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


def _tables(output: OverlayOutputPath) -> list[_Table]:
    """One table for each query and key frame that any layer and head has."""
    layers = output.list_layers()
    heads: dict[Head, None] = {}
    queries: set[tuple[int, int | None]] = set()
    drawn = []
    for layer in layers:
        of_layer = set()
        for head in output.list_heads(layer):
            if found := output.list_queries(layer, head):
                heads[head] = None
                of_layer.update(found)
        if of_layer:
            drawn.append(layer)
        queries |= of_layer
    numbers: list[Head] = sorted(h for h in heads if isinstance(h, int))
    others: list[Head] = sorted(h for h in heads if isinstance(h, str))
    order = sorted(queries, key=lambda pair: (pair[0], -1 if pair[1] is None else pair[1]))
    return [_Table(q, k, tuple(drawn), (*numbers, *others)) for q, k in order]


# -- where things go -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Positions in points, from the top left."""

    cell: tuple[float, float]
    left: float
    top: float
    width: float
    height: float
    both_sides: bool
    both_ends: bool
    thumbnail: float

    @classmethod
    def of(cls, table: _Table, aspect: float, thumbnail: bool) -> _Plan:
        rows, columns = len(table.layers), len(table.heads)
        side = min(_LARGEST_CELL, max(_SMALLEST_CELL, _TABLE_SIDE / max(rows, columns)))
        cell = (side, side * aspect) if aspect <= 1 else (side / aspect, side)
        both_sides, both_ends = (count > _TABLE_WITH_TWO_SIDES for count in (columns, rows))
        labels = max(text_width(_row_label(layer), _LABEL) for layer in table.layers) + _LABEL / 2
        # Heads' labels stand side by side, so narrow cells are widened rather than labels cut.
        widest = max(text_width(_column_label(head), _LABEL) for head in table.heads) + 4
        cell = (max(cell[0], widest), cell[1])
        left = _MARGIN + labels
        small = 1.6 * _SMALLEST_CELL * min(1.0, aspect) if thumbnail else 0.0
        top = _MARGIN + max(small, 2.6 * _TITLE) + 2.2 * _LABEL
        width = left + columns * (cell[0] + _GAP) + (labels if both_sides else 0) + _MARGIN
        height = top + rows * (cell[1] + _GAP) + (1.6 * _LABEL if both_ends else 0) + _MARGIN
        thumb = small / aspect
        words = max(text_width(table.title, _TITLE), text_width(table.subtitle, 0.6 * _TITLE))
        width = max(width, 2 * _MARGIN + thumb + _LABEL + words)
        if max(width, height) > _LONGEST_SIDE:
            raise InputError(
                f"{rows} layers × {columns} heads don't fit on one page; make overlays of fewer "
                "with layers= and head="
            )
        return cls(cell, left, top, width, height, both_sides, both_ends, small)

    def at(self, row: int, column: int) -> tuple[float, float]:
        x = self.left + column * (self.cell[0] + _GAP)
        return x, self.top + row * (self.cell[1] + _GAP)


def _write(table: _Table, output: OverlayOutputPath, dpi: int) -> Path:
    target = Path(output.output_path, f"{table.stem}.pdf")
    query_file = Path(output.query_file(table.query))
    aspect = _aspect(table, output)
    plan = _Plan.of(table, aspect, query_file.exists())
    try:
        with atomic_file(target, sync=False) as file:
            page = PdfPage(file, plan.width, plan.height, title=table.title)
            _head(page, plan, table, query_file, aspect, dpi)
            _labels(page, plan, table)
            with ThreadPoolExecutor(_THREADS) as pool:
                for row, layer in enumerate(table.layers):
                    files = [
                        Path(output.overlay_file(layer, head, table.query, table.frame))
                        for head in table.heads
                    ]
                    pictures = pool.map(lambda f: _jpeg(f, plan.cell, dpi), files)
                    for column, picture in enumerate(pictures):
                        x, y = plan.at(row, column)
                        if picture is None:
                            page.gap(x, y, *plan.cell, "missing")
                        else:
                            page.jpeg(picture[0], _centred((x, y, *plan.cell), picture[1]))
            page.close()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"can't write {target}: {error.strerror or error}") from error
    return target


def _head(
    page: PdfPage, plan: _Plan, table: _Table, query_file: Path, aspect: float, dpi: int
) -> None:
    x = _MARGIN
    if plan.thumbnail:
        box = (x, _MARGIN, plan.thumbnail / aspect, plan.thumbnail)
        picture = _jpeg(query_file, box[2:], dpi)
        if picture is not None:
            page.jpeg(picture[0], _centred(box, picture[1]))
        x += box[2] + _LABEL
    page.text(table.title, x, _MARGIN + _TITLE, size=_TITLE, bold=True)
    page.text(table.subtitle, x, _MARGIN + 2.1 * _TITLE, size=0.6 * _TITLE, colour=QUIET)


def _labels(page: PdfPage, plan: _Plan, table: _Table) -> None:
    for column, head in enumerate(table.heads):
        x, y = plan.at(0, column)
        middle = x + plan.cell[0] / 2
        page.text(_column_label(head), middle, y - 0.5 * _LABEL, size=_LABEL, anchor=0.5)
        if plan.both_ends:
            below = plan.at(len(table.layers), 0)[1] + 0.8 * _LABEL
            page.text(_column_label(head), middle, below, size=_LABEL, anchor=0.5)
    for row, layer in enumerate(table.layers):
        x, y = plan.at(row, 0)
        middle = y + plan.cell[1] / 2 + 0.35 * _LABEL
        page.text(_row_label(layer), x - _LABEL / 2, middle, size=_LABEL, anchor=1)
        if plan.both_sides:
            right = plan.at(0, len(table.heads))[0] + _LABEL / 4
            page.text(_row_label(layer), right, middle, size=_LABEL)


def _row_label(layer: Layer) -> str:
    return f"layer {layer}" if isinstance(layer, int) else layer


def _column_label(head: Head) -> str:
    return f"head {head}" if isinstance(head, int) else head


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


# -- pictures ------------------------------------------------------------------------------------


def _aspect(table: _Table, output: OverlayOutputPath) -> float:
    """Height by width of the first overlay."""
    from PIL import Image

    for layer in table.layers:
        for head in table.heads:
            path = output.overlay_file(layer, head, table.query, table.frame)
            if os.path.exists(path):
                try:
                    with Image.open(path) as picture:
                        return picture.height / picture.width
                except OSError as error:
                    raise _unreadable(Path(path), error) from error
    return 1.0


def _jpeg(path: Path, cell: tuple[float, ...], dpi: int) -> tuple[bytes, tuple[int, int]] | None:
    """A picture as JPEG with its size in pixels; None where there is no file."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            rgb: Any = picture.convert("RGB")
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError) as error:  # Pillow's word for a damaged PNG
        raise _unreadable(path, error) from error
    most = max(1, round(cell[0] / 72 * dpi)), max(1, round(cell[1] / 72 * dpi))
    if rgb.width > most[0] or rgb.height > most[1]:
        rgb.thumbnail(most, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), (rgb.width, rgb.height)


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(f"can't read {path}: {error}; make the overlay again")


def _centred(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The largest box of the picture's shape in the middle of `(x, y, width, height)`."""
    x, y, width, height = box
    scale = min(width / size[0], height / size[1])
    wide, high = size[0] * scale, size[1] * scale
    return x + (width - wide) / 2, y + (height - high) / 2, wide, high


def _bar(tables: list[_Table], shown: bool) -> Iterable[_Table]:
    if not shown or len(tables) == 1:
        return tables
    from tqdm.auto import tqdm

    bar: Iterable[_Table] = tqdm(tables, desc="pages", unit="query")
    return bar
