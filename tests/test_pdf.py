"""PDF pages: what is on them, read back from the file; other programs read them where installed."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pypdf import PdfReader

from vistvis.errors import InputError, StoreError
from vistvis.views.overlay_folder import OverlayOutputPath
from vistvis.views.overlay_manifest import Drawing, Origin, OverlayRecord, add_records
from vistvis.views.overlay_painter import Look
from vistvis.views.pdf import plot_attention_for_reconstruction
from vistvis.views.pdf_layout import FOOT, HEAD, MARGIN, PAPER, lay_out
from vistvis.views.pdffile import PdfFile, fitted, text_width
from vistvis.views.png import checksum, encode_png


def overlays(
    folder: Path,
    *,
    layers: tuple[int | str, ...] = (0, 2, 10),
    heads: tuple[int | str, ...] = (0, 1, "mean"),
    queries: tuple[int, ...] = (7,),
    frames: tuple[int | None, ...] = (None,),
    size: tuple[int, int] = (24, 32),
) -> OverlayOutputPath:
    output = OverlayOutputPath(str(folder))
    shade = 10
    for layer in layers:
        for head in heads:
            for query in queries:
                for frame in frames:
                    path = Path(output.overlay_file(layer, head, query, frame))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(encode_png(np.full((*size, 3), shade, np.uint8)))
                    shade = (shade + 20) % 240
    return output


def record(output: OverlayOutputPath, drawing: Drawing, *heads: int | str) -> None:
    """Say of a folder's overlays of these heads what they show."""
    query, frame = drawing.token, drawing.key_frame
    files = {
        Path(output.overlay_file(layer, head, query, frame)): (layer, head)
        for layer in output.list_layers()
        for head in heads
    }
    picture = Path(output.query_file(query))
    entries = {
        file.relative_to(output.output_path).as_posix(): (*panel, checksum(file.read_bytes()))
        for file, panel in files.items()
    }
    seen = checksum(picture.read_bytes()) if picture.exists() else None
    add_records(output.output_path, [OverlayRecord(drawing, entries, seen, "2026-01-02 03:04 UTC")])


def a_drawing(path: str | None = "/data/runs/fern", **changes: Any) -> Drawing:
    given: dict[str, Any] = {
        "origin": Origin(path, "00c0ffee", "vggt:tiny"),
        "query_frame": 3,
        "token": 7,
        "place": "grid row 0, col 2",
        "key_frame": 2,
        "batch": 0,
        "look": Look(),
    }
    return Drawing(**(given | changes))


def marks(path: str | Path, number: int = 0) -> str:
    """The drawing operators of a page."""
    contents = PdfReader(path).pages[number].get_contents()
    assert contents is not None
    return contents.get_data().decode("latin-1")


def words(path: str | Path, number: int = 0) -> list[str]:
    found: list[str] = []
    page = PdfReader(path).pages[number]
    page.extract_text(visitor_text=lambda text, *_: found.append(text.strip()))
    return [text for text in found if text]


def photographs(path: str | Path, number: int = 0) -> list[Image.Image]:
    """The pictures of a page in the order in which they are drawn."""
    files = PdfReader(path).pages[number]["/Resources"]["/XObject"]
    drawn = [files[name] for name in re.findall(r"(/I\d+) Do", marks(path, number))]
    assert all(file["/Filter"] == "/DCTDecode" for file in drawn)
    return [Image.open(io.BytesIO(file._data)) for file in drawn]


def test_one_page_for_each_query_layers_by_heads(tmp_path: Path) -> None:
    output = overlays(tmp_path, queries=(7, 500))
    found = plot_attention_for_reconstruction(tmp_path)
    assert found == [str(tmp_path / f"attention_query_{q}.pdf") for q in (7, 500)]
    assert plot_attention_for_reconstruction(output, 72) == found
    assert plot_attention_for_reconstruction(str(tmp_path), dpi=72) == found
    labels = ["head 0", "head 1", "mean", "layer 0", "layer 2", "layer 10"]
    for path, query in zip(found, (7, 500), strict=True):
        shown = words(path)
        assert shown[0] == f"Attention of query token {query}"
        assert shown[1:4] == [
            "source not recorded: these may be of different runs",
            "3 layers × 2 heads and the mean of heads",
            "colour scale not recorded",
        ]
        assert shown[4:] == labels
        assert len(photographs(path)) == 9


def test_pictures_stand_where_their_layer_and_head_say(tmp_path: Path) -> None:
    overlays(tmp_path)
    (path,) = plot_attention_for_reconstruction(tmp_path)
    placed = re.findall(r"q \S+ 0 0 \S+ (\S+) (\S+) cm /I\d+ Do Q", marks(path))
    positions = [(float(x), float(y)) for x, y in placed]
    shades = [int(np.asarray(picture).mean().round()) for picture in photographs(path)]
    # Written layer by layer and head by head; shades grew in that order.
    assert shades == pytest.approx([10 + 20 * n for n in range(9)], abs=2)
    assert positions == sorted(positions, key=lambda p: (-p[1], p[0]))
    assert len({y for _, y in positions}) == len({x for x, _ in positions}) == 3
    heads = re.findall(r"BT (\S+) (\S+) Td \((?:head \d|mean)\)", marks(path))
    assert [float(x) for x, _ in heads] == sorted(float(x) for x, _ in heads)


def test_a_missing_overlay_leaves_a_marked_gap(tmp_path: Path) -> None:
    output = overlays(tmp_path)
    Path(output.overlay_file(2, 1, 7)).unlink()
    (path,) = plot_attention_for_reconstruction(tmp_path)
    assert words(path).count("missing") == 1
    assert len(photographs(path)) == 8
    # A whole head that a layer does not have is a gap as well.
    Path(output.overlay_file(10, 3, 7)).parent.mkdir(parents=True)
    shutil.copy(output.overlay_file(0, 0, 7), output.overlay_file(10, 3, 7))
    (path,) = plot_attention_for_reconstruction(tmp_path)
    assert "head 3" in words(path)
    assert words(path).count("missing") == 3


def test_the_query_is_shown_where_it_was_drawn(tmp_path: Path) -> None:
    output = overlays(tmp_path)
    query = Path(output.query_file(7))
    query.parent.mkdir()
    query.write_bytes(encode_png(np.full((24, 32, 3), 255, np.uint8)))
    (path,) = plot_attention_for_reconstruction(tmp_path)
    assert len(photographs(path)) == 10


def test_key_frames_have_files_of_their_own(tmp_path: Path) -> None:
    overlays(tmp_path, layers=("global_block_9", "global_block_10"), frames=(0, 11, 2))
    found = plot_attention_for_reconstruction(tmp_path)
    assert [Path(p).name for p in found] == [f"attention_query_7_frame_{k}.pdf" for k in (0, 2, 11)]
    shown = words(found[2])
    assert shown[0] == "Attention of query token 7, key frame 11"
    assert shown[-2:] == ["global_block_9", "global_block_10"]


def test_resolution(tmp_path: Path) -> None:
    overlays(tmp_path, layers=(0,), heads=(0,), size=(600, 800))
    (path,) = plot_attention_for_reconstruction(tmp_path, dpi=72, page="single")
    assert photographs(path)[0].size == (300, 225)
    plot_attention_for_reconstruction(tmp_path, dpi=36)
    layout = lay_out(1, 1, aspect=0.75, labels=0, page="A4")
    assert photographs(path)[0].width == pytest.approx(layout.cell[0] / 2, abs=1)
    plot_attention_for_reconstruction(tmp_path, dpi=1200)
    assert photographs(path)[0].size == (800, 600)
    with pytest.raises(InputError, match="dpi"):
        plot_attention_for_reconstruction(tmp_path, dpi=0)
    with pytest.raises(InputError, match="page is one of 'A4', 'letter', 'single', got 'A3'"):
        plot_attention_for_reconstruction(tmp_path, page="A3")


# -- what is recorded ----------------------------------------------------------------------------


def test_a_page_says_whose_attention_it_is_and_what_colours_mean(tmp_path: Path) -> None:
    output = overlays(tmp_path, frames=(2,))
    query = Path(output.query_file(7))
    query.parent.mkdir()
    query.write_bytes(encode_png(np.full((24, 32, 3), 255, np.uint8)))
    look = Look(norm="auto", cmap="viridis")
    record(output, a_drawing(look=look, scale_frames=(2, 0)), 0, 1, "mean")
    (path,) = plot_attention_for_reconstruction(tmp_path)
    assert Path(path).name == "attention_query_7_frame_2.pdf"
    assert words(path)[:5] == [
        "Attention of frame 3, token 7 (grid row 0, col 2) to frame 2",
        "runs/fern, model vggt:tiny, batch entry 0",
        "3 layers × 2 heads and the mean of heads; drawn 2026-01-02 03:04 UTC",
        "0",
        "largest weight outside the query's own patch, white above it; for each layer and head, "
        "of key frames 2, 0",
    ]
    assert len(photographs(path)) == 10
    assert PdfReader(path).metadata["/Title"].endswith("runs/fern, model vggt:tiny, batch entry 0")
    # The bar runs through the map's colours: viridis begins in violet.
    assert "0.2667 0.0039 0.3294 rg" in marks(path)


def test_two_runs_are_two_files_and_never_mix(tmp_path: Path) -> None:
    output = overlays(tmp_path, frames=(2,))
    query = Path(output.query_file(7))
    query.parent.mkdir()
    for shade, path, heads in ((250, "/r/fern", (0,)), (5, "/r/a (b)/../flower", (1,))):
        query.write_bytes(encode_png(np.full((24, 32, 3), shade, np.uint8)))
        record(output, a_drawing(path), *heads)
    found = plot_attention_for_reconstruction(tmp_path)
    names = [f"attention_query_7_frame_2_{n}.pdf" for n in ("fern", "flower", "not-recorded")]
    assert sorted(Path(p).name for p in found) == names
    told = {Path(p).name: (words(p), photographs(p)) for p in found}
    shown, pictures = told[names[0]]
    assert shown[1].startswith("r/fern")
    assert "3 layers × head 0; drawn 2026-01-02 03:04 UTC" in shown
    assert len(pictures) == 3  # the query's picture was replaced by the flower's
    shown, pictures = told[names[1]]
    assert len(pictures) == 4
    assert np.asarray(pictures[0]).max() < 20
    shown, pictures = told[names[2]]
    assert shown[1].startswith("source not recorded")
    assert len(pictures) == 3
    # The same run in other colours, or its folder overwritten by another pass: not one table.
    record(output, a_drawing(look=Look(norm="log")), "mean")
    record(output, a_drawing(origin=Origin("/data/runs/fern", "0badcafe")), 0)
    found = plot_attention_for_reconstruction(tmp_path)
    assert [Path(p).name[26:-4] for p in found] == ["fern", "flower", "fern-2"]


def test_a_picture_that_was_changed_is_not_what_was_recorded(tmp_path: Path) -> None:
    output = overlays(tmp_path, frames=(2,))
    record(output, a_drawing(), 0, 1, "mean")
    Path(output.overlay_file(2, 1, 7, 2)).write_bytes(encode_png(np.zeros((24, 32, 3), np.uint8)))
    one, other = plot_attention_for_reconstruction(tmp_path)
    assert words(one).count("missing") == 1
    assert words(other)[1].startswith("source not recorded")
    assert len(photographs(other)) == 1


def test_hostile_words_are_shown_and_do_nothing(tmp_path: Path) -> None:
    output = overlays(tmp_path, layers=("a/../b", "x." * 69 + "x"), heads=(0, 1), frames=(2,))
    drawing = a_drawing("/x/\x1b[2J\u202e) Tj" + "y" * 900, place="p" * 2000, look=Look(cmap="nö"))
    record(output, drawing, 0, 1)
    (path,) = plot_attention_for_reconstruction(tmp_path)
    shown = words(path)
    assert len(shown[0]) < 200
    assert shown[1].startswith(r"x/\x1b[2J\u202e) Tj")
    assert "colours nö" in shown
    assert all(ord(sign) >= 32 for text in shown for sign in text)


# -- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAPER)
@pytest.mark.parametrize("aspect", [0.4, 1.0, 1.5])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 3), (1, 17), (1, 24), (3, 3), (24, 2), (24, 17), (48, 17)]
)
def test_tables_fill_pages_of_a_standard_size(
    rows: int, columns: int, aspect: float, page: str
) -> None:
    layout = lay_out(rows, columns, aspect=aspect, labels=50 if rows > 1 else 0, page=page)
    assert tuple(sorted((layout.width, layout.height))) == PAPER[page]
    boxes: list[list[tuple[float, float, float, float]]] = [[] for _ in range(layout.pages)]
    shown = []
    for block in layout.blocks:
        for row in block.rows:
            for column in block.columns:
                shown.append((row, column))
                boxes[block.page].append(layout.box(block, row, column))
    assert sorted(shown) == [(r, c) for r in range(rows) for c in range(columns)]
    wide, high = layout.cell
    assert high == pytest.approx(aspect * wide)
    assert wide * high >= 57**2 * 0.999
    for number, placed in enumerate(boxes):
        assert placed
        for x, y, w, h in placed:
            assert x >= MARGIN - 0.01
            assert x + w <= layout.width - MARGIN + 0.01
            assert y >= MARGIN + HEAD
            assert y + h <= layout.height - MARGIN - FOOT + 0.01
        for one, other in itertools.pairwise(sorted(placed, key=lambda box: (box[1], box[0]))):
            assert other[1] >= one[1] + high or other[0] >= one[0] + wide
        # No page is half empty beside the others.
        assert len(placed) >= 0.4 * max(map(len, boxes)), number


def test_a_large_table_takes_several_pages_or_a_single_large_one(tmp_path: Path) -> None:
    overlays(tmp_path, layers=tuple(range(24)), heads=(*range(16), "mean"), size=(6, 8))
    (path,) = plot_attention_for_reconstruction(tmp_path)
    pages = PdfReader(path).pages
    assert len(pages) == 6
    assert sum(len(photographs(path, n)) for n in range(6)) == 24 * 17
    assert {f"layer {n}" for n in range(24)} <= {w for n in range(6) for w in words(path, n)}
    assert [f"{n + 1} of 6" in words(path, n) for n in range(6)] == [True] * 6
    for size in pages[0].mediabox.upper_right:
        assert any(float(size) == pytest.approx(side, abs=0.01) for side in PAPER["A4"])
    (path,) = plot_attention_for_reconstruction(tmp_path, page="single")
    assert len(PdfReader(path).pages) == 1
    assert len(photographs(path)) == 24 * 17
    with pytest.raises(InputError, match="page='A4'"):
        lay_out(200, 17, aspect=1.0, labels=50, page="single")


def test_fonts_are_embedded_as_truetype(tmp_path: Path) -> None:
    overlays(tmp_path)
    (path,) = plot_attention_for_reconstruction(tmp_path)
    fonts = PdfReader(path).pages[0]["/Resources"]["/Font"].values()
    below = [font.get_object()["/DescendantFonts"][0].get_object() for font in fonts]
    assert below
    assert {font["/Subtype"] for font in below} == {"/CIDFontType2"}
    assert all("/FontFile2" in font["/FontDescriptor"].get_object() for font in below)
    # Subsets of a font of 750 KB.
    assert Path(path).stat().st_size < 400_000


def test_words_fit_their_room() -> None:
    assert fitted("short", 8, 100) == ("short", 8)
    text, size = fitted("a little too wide for it", 8, 70)
    assert text == "a little too wide for it"
    assert text_width(text, size) == pytest.approx(70)
    text, size = fitted("aggregator." * 40 + "attn", 8, 70)
    assert text_width(text, size) <= 70
    assert size == pytest.approx(0.6 * 8)
    assert re.fullmatch(r"aggr.*….*\.attn", text)


def test_brackets_and_foreign_words(tmp_path: Path) -> None:
    with open(tmp_path / "a.pdf", "wb") as file:
        pdf = PdfFile(file, title="層 (7)")
        pdf.page(100, 100)
        pdf.text("a(b)c\\ 層 ×", 1, 1, size=5)
        pdf.close()
    (shown,) = words(tmp_path / "a.pdf")
    assert re.fullmatch(r"a\(b\)c\\ .* ×", shown)  # the font has no 層, and shows a box


@pytest.mark.skipif(shutil.which("pdftoppm") is None, reason="poppler-utils are not installed")
def test_other_programs_draw_it(tmp_path: Path) -> None:
    output = overlays(tmp_path, layers=tuple(range(24)), heads=(*range(16), "mean"))
    Path(output.overlay_file(3, 3, 7)).unlink()
    (path,) = plot_attention_for_reconstruction(tmp_path, progress=False)
    drawn = subprocess.run(
        ["pdftoppm", "-r", "36", "-png", path, str(tmp_path / "page")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert drawn.stderr == ""
    assert len(list(tmp_path.glob("page*.png"))) > 1
    text = subprocess.run(
        ["pdftotext", path, "-"], check=True, capture_output=True, text=True
    ).stdout
    for label in (*(f"layer {n}" for n in range(24)), *(f"head {n}" for n in range(16)), "missing"):
        assert label in text
    with Image.open(min(tmp_path.glob("page*.png"))) as picture:
        assert sorted(picture.size) == [298, 421]


def test_folders_without_overlays(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no overlays under"):
        plot_attention_for_reconstruction(tmp_path / "nowhere")


def test_a_damaged_overlay_is_named_and_nothing_half_written(tmp_path: Path) -> None:
    output = overlays(tmp_path)
    damaged = Path(output.overlay_file(2, "mean", 7))
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(StoreError, match=r"layer_2/head=mean.*overlay_7\.png"):
        plot_attention_for_reconstruction(tmp_path)
    assert not list(tmp_path.glob("*.pdf*"))
    assert not list(tmp_path.glob(".*"))
