"""PDF pages: what is on them, read back from the file; other programs read them where installed."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pypdf import PdfReader

from vistvis.errors import InputError, StoreError
from vistvis.views.overlay_folder import OverlayOutputPath
from vistvis.views.pdf import plot_attention_for_reconstruction
from vistvis.views.pdffile import PdfPage
from vistvis.views.png import encode_png


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


def marks(path: str | Path) -> str:
    """The page's drawing operators."""
    (page,) = PdfReader(path).pages
    contents = page.get_contents()
    assert contents is not None
    return contents.get_data().decode("latin-1")


def words(path: str | Path) -> list[str]:
    return re.findall(r"\((.*?)\) Tj", marks(path))


def photographs(path: str | Path) -> list[Image.Image]:
    """The pictures of the page in the order in which they are drawn."""
    (page,) = PdfReader(path).pages
    files = page["/Resources"]["/XObject"]
    drawn = [files[name] for name in re.findall(r"(/I\d+) Do", marks(path))]
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
        assert shown[1].startswith("3 layers × 2 heads and the mean")
        assert shown[2:] == labels
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


def test_key_frames_have_pages_of_their_own(tmp_path: Path) -> None:
    overlays(tmp_path, layers=("global_block_9", "global_block_10"), frames=(0, 11, 2))
    found = plot_attention_for_reconstruction(tmp_path)
    assert [Path(p).name for p in found] == [f"attention_query_7_frame_{k}.pdf" for k in (0, 2, 11)]
    shown = words(found[2])
    assert shown[0] == "Attention of query token 7, key frame 11"
    assert shown[-2:] == ["global_block_9", "global_block_10"]


def test_resolution(tmp_path: Path) -> None:
    overlays(tmp_path, layers=(0,), heads=(0,), size=(600, 800))
    (path,) = plot_attention_for_reconstruction(tmp_path, dpi=72)
    assert photographs(path)[0].size == (300, 225)
    plot_attention_for_reconstruction(tmp_path, dpi=1200)
    assert photographs(path)[0].size == (800, 600)
    with pytest.raises(InputError, match="dpi"):
        plot_attention_for_reconstruction(tmp_path, dpi=0)


def test_brackets_and_foreign_words(tmp_path: Path) -> None:
    with open(tmp_path / "a.pdf", "wb") as file:
        page = PdfPage(file, 100, 100, title="層 (7)")
        page.text("a(b)c\\ 層 ×", 1, 1, size=5)
        page.close()
    assert r"(a\(b\)c\\ ? ×) Tj" in marks(tmp_path / "a.pdf")


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
    text = subprocess.run(
        ["pdftotext", path, "-"], check=True, capture_output=True, text=True
    ).stdout
    for label in (*(f"layer {n}" for n in range(24)), *(f"head {n}" for n in range(16)), "missing"):
        assert label in text
    (page,) = tmp_path.glob("page*.png")
    with Image.open(page) as picture:
        assert min(picture.size) > 900


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
