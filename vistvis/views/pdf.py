"""PDF pages of overlays: one file for each query and key frame, layers and heads side by side."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistvis.errors import InputError, StoreError
from vistvis.files import atomic_file
from vistvis.images import open_photo
from vistvis.names import harmless
from vistvis.progress import progress as progress_bar
from vistvis.views.overlay_folder import (
    Head,
    Layer,
    OverlayOutputPath,
    layer_label,
    natural_order,
    query_order,
)
from vistvis.views.overlay_manifest import Drawing, read_records
from vistvis.views.painting import colour_map
from vistvis.views.pdf_layout import HEAD, LABEL, MARGIN, Block, Layout, lay_out
from vistvis.views.pdffile import QUIET, Box, PdfFile, text_width
from vistvis.views.png import THREADS, checksum

_TITLE, _LINE = 13.0, 8.5
_MOST_LABELS = 92.0
_BAR = 110.0, 7.0
_JPEG_QUALITY = 90
_NOT_RECORDED = "source not recorded: these may be of different runs"
# What the two ends of the colour bar mean.
_ENDS = {
    "own": ("its own minimum", "its own maximum: compare within an overlay, not between two"),
    "auto": ("0", "largest weight outside the query's own patch, white above it"),
    "linear": ("0", "largest weight"),
    "log": ("six decades below or the smallest", "largest weight, logarithmic"),
    "percentile": ("0", "99th percentile of the weights, white above it"),
}
_CLIPPED = ("auto", "percentile")


def plot_attention_for_reconstruction(
    output_path: str | os.PathLike[str] | OverlayOutputPath,
    dpi: int = 300,
    *,
    page: str = "A4",
    progress: bool = True,
) -> list[str]:
    """Gather overlays into one PDF for each query and key frame: layers are rows, heads columns.

    Parameters
    ----------
    output_path
        The folder that `run_overlay_for_reconstruction` wrote; from stored layers or from a run.
    dpi
        Pictures with more pixels than that on the page are made smaller; none is made larger.
    page
        "A4" or "letter", upright or across as fits best, and as many as the table needs at a size
        that can be read; or "single", one page as large as the table.

    Returns
    -------
    Paths of the PDFs, `<output_path>/attention_query_<q>_frame_<k>.pdf`; without `_frame_<k>` for
    overlays that earlier versions wrote without a key frame.

    A PDF shows overlays of one attention, query and colour scale, as the folder's `overlays.json`
    has it; where a query and key frame have several such sets, the names of their files end in that
    of the run. What is not recorded there is shown as «source not recorded».

    Raises
    ------
    InputError
        If there are no overlays, `dpi` is not positive, or there is no such page.
    StoreError
        If an overlay can't be read or the PDF not written.

    An overlay that is not there leaves a marked gap. Photographs are stored as JPEG, with the PNG
    files beside them for every detail. Cost: reads every overlay twice; 10 ms for each.
    """
    if not dpi > 0:
        raise InputError(f"dpi is positive, got {dpi}")
    output = output_path
    if not isinstance(output, OverlayOutputPath):
        output = OverlayOutputPath(os.fspath(output))
    tables = _tables(output)
    if not tables:
        raise InputError(
            f"no overlays under {output.output_path}; 'vistvis overlay' or "
            "run_overlay_for_reconstruction(…, output_path=…) makes them"
        )
    layouts = [_layout(table, page) for table in tables.values()]
    work = zip(tables, tables.values(), layouts, strict=True)
    shown = progress and len(tables) > 1
    return [
        str(_write(Path(output.output_path, f"{stem}.pdf"), table, layout, dpi))
        for stem, table, layout in progress_bar(
            work, "pages", shown=shown, unit="query", total=len(tables)
        )
    ]


@dataclass(frozen=True)
class _Table:
    """What one PDF shows: overlays of one set, by layer and head; None: of which none is known."""

    drawing: Drawing | None
    query: int
    frame: int | None
    files: Mapping[tuple[Layer, Head], Path]
    query_picture: Path | None
    when: str

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(dict.fromkeys(layer for layer, _ in self.files))

    @property
    def heads(self) -> tuple[Head, ...]:
        return tuple(sorted({head for _, head in self.files}, key=natural_order))

    @property
    def grid(self) -> list[list[tuple[Layer, Head]]]:
        """Rows of panels: a row for each layer; of a single head one row of all layers."""
        if len(self.heads) == 1:
            return [[(layer, self.heads[0]) for layer in self.layers]]
        return [[(layer, head) for head in self.heads] for layer in self.layers]

    @property
    def title(self) -> str:
        if self.drawing is None:
            frame = "" if self.frame is None else f", key frame {self.frame}"
            return f"Attention of query token {self.query}{frame}"
        one = self.drawing
        where = f"frame {one.query_frame}, token {one.token} ({harmless(one.place)})"
        return f"Attention of {where} to frame {one.key_frame}"

    @property
    def source(self) -> str:
        if self.drawing is None:
            return _NOT_RECORDED
        return f"{self.drawing.origin.words}, batch entry {self.drawing.batch}"

    @property
    def counts(self) -> str:
        layers, heads = self.layers, self.heads
        numbered = [head for head in heads if isinstance(head, int)]
        words = ["the mean of heads" if h == "mean" else str(h) for h in heads if h not in numbered]
        if len(numbered) == 1:
            words.insert(0, f"head {numbered[0]}")
        elif numbered:
            words.insert(0, f"{len(numbered)} heads")
        rows = layer_label(layers[0]) if len(layers) == 1 else f"{len(layers)} layers"
        drawn = f"; drawn {harmless(self.when)}" if self.when else ""
        return f"{rows} × {' and '.join(words)}{drawn}"


def _tables(output: OverlayOutputPath) -> dict[str, _Table]:
    """What every PDF shows, by the name of its file without ending."""
    records = read_records(output.output_path)
    recorded = {name: record for record in records for name in record.files}
    pictures: dict[Drawing | None, set[str | None]] = {}
    when: dict[Drawing | None, str] = {}
    for one in records:
        pictures.setdefault(one.drawing, set()).add(one.query_picture)
        when[one.drawing] = one.when
    sets: dict[tuple[int, int | None, Drawing | None], dict[tuple[Layer, Head], Path]] = {}
    for layer in output.list_layers():
        for head in output.list_heads(layer):
            for query, frame in output.list_queries(layer, head):
                file = Path(output.overlay_file(layer, head, query, frame))
                name = file.relative_to(output.output_path).as_posix()
                record = recorded.get(name)
                known = record is not None and _sum(file) == record.files[name][2]
                drawing = record.drawing if record is not None and known else None
                sets.setdefault((query, frame, drawing), {})[layer, head] = file
    tables: dict[str, _Table] = {}
    several = [(query, frame) for query, frame, _ in sets]
    for query, frame, drawing in sorted(sets, key=lambda one: query_order(one[:2])):
        files = sets[query, frame, drawing]
        picture = Path(output.query_file(query))
        # That of this set; of a set that is not recorded, one that is of no other.
        mine = picture.exists() and (
            _sum(picture) in pictures[drawing]
            if drawing
            else not any(_sum(picture) in others for others in pictures.values())
        )
        stem = f"attention_query_{query}" + ("" if frame is None else f"_frame_{frame}")
        if several.count((query, frame)) > 1:
            stem += f"_{_slug(drawing)}"
        number = next(n for n in range(1, len(sets) + 1) if _numbered(stem, n) not in tables)
        tables[_numbered(stem, number)] = _Table(
            drawing, query, frame, files, picture if mine else None, when.get(drawing, "")
        )
    return tables


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def _slug(drawing: Drawing | None) -> str:
    """What tells apart the files of several sets: the run's last name."""
    if drawing is None:
        return "not-recorded"
    path = drawing.origin.path
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name)[:60] if path else "memory"


def _sum(file: Path) -> str:
    try:
        return checksum(file.read_bytes())
    except OSError as error:
        raise StoreError(f"can't read {file}: {error.strerror or error}") from error


# -- drawing -------------------------------------------------------------------------------------


def _layout(table: _Table, page: str) -> Layout:
    grid = table.grid
    labels = 0.0
    if len(grid) > 1:
        widest = max(text_width(layer_label(layer), LABEL) for layer in table.layers)
        labels = min(widest, _MOST_LABELS) + 0.6 * LABEL
    return lay_out(len(grid), len(grid[0]), aspect=_aspect(table), labels=labels, page=page)


def _write(target: Path, table: _Table, layout: Layout, dpi: int) -> Path:
    grid = table.grid
    picture = functools.partial(_jpeg, dpi=dpi * layout.unit)
    try:
        with atomic_file(target, sync=False) as file, ThreadPoolExecutor(THREADS) as pool:
            pdf = PdfFile(file, title=f"{table.title}; {table.source}", unit=layout.unit)
            for number in range(layout.pages):
                pdf.page(layout.width, layout.height)
                _head(pdf, table, layout, dpi)
                _foot(pdf, table, layout, number)
                for block in layout.blocks:
                    if block.page != number:
                        continue
                    _labels(pdf, table, layout, block)
                    for row in block.rows:
                        files = [table.files.get(grid[row][column]) for column in block.columns]
                        boxes = [layout.box(block, row, column) for column in block.columns]
                        jpegs = pool.map(picture, files, boxes)
                        for box, jpeg in zip(boxes, jpegs, strict=True):
                            if jpeg is None:
                                pdf.gap(*box, "missing")
                            else:
                                pdf.jpeg(*jpeg)
            pdf.close()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"can't write {target}: {error.strerror or error}") from error
    return target


def _head(pdf: PdfFile, table: _Table, layout: Layout, dpi: int) -> None:
    x, high = MARGIN, HEAD - 16
    if table.query_picture is not None:
        box = x, MARGIN, min(high / _aspect(table), layout.width / 4), high
        jpeg = _jpeg(table.query_picture, box, dpi * layout.unit)
        if jpeg is not None:
            pdf.jpeg(*jpeg)
            x += box[2] + LABEL
    room = layout.width - MARGIN - x
    pdf.text(table.title, x, MARGIN + _TITLE, size=_TITLE, room=room, bold=True)
    lines = (table.source, table.counts)
    for number, line in enumerate(lines):
        y = MARGIN + _TITLE + (1.7 + 1.4 * number) * _LINE
        pdf.text(line, x, y, size=_LINE, room=room, colour=QUIET)


def _foot(pdf: PdfFile, table: _Table, layout: Layout, number: int) -> None:
    """The colour bar with what its ends mean, and which page this is."""
    y = layout.height - MARGIN
    right = layout.width - MARGIN
    if layout.pages > 1:
        words = f"{number + 1} of {layout.pages}"
        pdf.text(words, right, y, size=LABEL, colour=QUIET, anchor=1)
        right -= text_width(words, LABEL) + 2 * LABEL
    if table.drawing is None:
        pdf.text("colour scale not recorded", MARGIN, y, size=LABEL, colour=QUIET)
        return
    look, frames = table.drawing.look, table.drawing.scale_frames
    low, high = _ENDS[look.norm]
    if frames:
        which = ", ".join(map(str, frames)) if len(frames) < 8 else f"{frames[0]} … {frames[-1]}"
        several = f"frames {which}" if len(frames) > 1 else f"frame {which}"
        high += f"; for each layer and head, of key {several}"
    x = MARGIN
    pdf.text(low, x, y, size=LABEL, colour=QUIET)
    x += text_width(low, LABEL) + 0.6 * LABEL
    try:
        cmap = colour_map(look.cmap)
    except InputError:  # a name that this matplotlib does not know
        pdf.text(f"colours {harmless(look.cmap)}", x, y, size=LABEL, room=_BAR[0], colour=QUIET)
    else:
        # Where something may lie above the scale, the bar ends in its colour.
        steps = np.append(np.linspace(0, 1, 60), np.full(4 * (look.norm in _CLIPPED), 2.0))
        colours = np.rint(255 * np.asarray(cmap(steps))[:, :3]).astype(int)
        pdf.bar((x, y - 0.8 * _BAR[1], *_BAR), [(r, g, b) for r, g, b in colours.tolist()])
    x += _BAR[0] + 0.6 * LABEL
    pdf.text(high, x, y, size=LABEL, room=right - x, colour=QUIET)


def _labels(pdf: PdfFile, table: _Table, layout: Layout, block: Block) -> None:
    grid = table.grid
    single = len(table.heads) == 1
    for column in block.columns:
        x, y, wide, _ = layout.box(block, block.rows.start, column)
        layer, head = grid[0][column]
        label = layer_label(layer) if single else _head_label(head)
        pdf.text(label, x + wide / 2, y - 0.4 * LABEL, size=LABEL, room=wide, anchor=0.5)
    if len(grid) == 1:
        return
    for row in block.rows:
        x, y, _, high = layout.box(block, row, block.columns.start)
        room = layout.labels - 0.6 * LABEL
        lines = _lines(layer_label(grid[row][0][0]), room)
        for number, words in enumerate(lines):
            line = y + high / 2 + (number - len(lines) / 2 + 0.85) * LABEL
            pdf.text(words, x - 0.6 * LABEL, line, size=LABEL, room=room, anchor=1)


def _lines(label: str, room: float) -> list[str]:
    """A label in one line or, where that is too wide, in two, parted near its middle."""
    parts = [match.end() for match in re.finditer(r"[._/ ]", label[:-1])]
    if text_width(label, LABEL) <= room or not parts:
        return [label]
    middle = min(parts, key=lambda part: abs(2 * part - len(label)))
    return [label[:middle], label[middle:]]


def _head_label(head: Head) -> str:
    return f"head {head}" if isinstance(head, int) else head


# -- pictures ------------------------------------------------------------------------------------


def _aspect(table: _Table) -> float:
    """Height by width of the first overlay."""
    picture = _picture(next(iter(table.files.values())))
    return float(picture.height / picture.width)


def _picture(path: Path) -> Any:
    """A picture as Pillow has it."""
    try:
        with open_photo(path) as picture:
            return picture.convert("RGB")
    except (InputError, OSError, SyntaxError) as error:
        raise StoreError(f"can't read {path}: {error}; make the overlay again") from error


def _jpeg(path: Path | None, box: Box, dpi: float) -> tuple[bytes, Box] | None:
    """A picture as JPEG and the largest box of its shape in the middle of `box`; or None."""
    from PIL import Image

    if path is None:
        return None
    rgb = _picture(path)
    x, y, width, height = box
    most = max(1, round(width / 72 * dpi)), max(1, round(height / 72 * dpi))
    if rgb.width > most[0] or rgb.height > most[1]:
        rgb.thumbnail(most, Image.Resampling.LANCZOS)
    scale = min(width / rgb.width, height / rgb.height)
    wide, high = rgb.width * scale, rgb.height * scale
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), (x + (width - wide) / 2, y + (height - high) / 2, wide, high)
