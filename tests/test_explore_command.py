"""`vistvis explore`: photographs or a run in, a page out."""

from __future__ import annotations

import threading
import urllib.request
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from test_explorer import manifest_of
from zoo import store_scene

import vistvis
from vistvis import cli
from vistvis.commands import explore
from vistvis.views.explorer import contents, serving

SAMPLES = sorted((Path(__file__).parents[1] / "vggt_adapter" / "samples").glob("view_*.jpg"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_scene(tmp_path_factory.mktemp("runs") / "scene", ("a.jpg", "b.jpg"))


def test_photographs_to_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explore", *map(str, SAMPLES)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("wrote explorer.html   (2 sites, ")
    assert lines[-2] == f"open it in a browser: {(tmp_path / 'explorer.html').as_uri()}"
    assert lines[-1].startswith("next: vistvis explore ")
    manifest = manifest_of(tmp_path / "explorer.html")
    # The block that the model suggests, of both kinds.
    names = [site["name"] for site in manifest["sites"]]
    assert names == ["frame_block_3", "global_block_3"]
    assert manifest["frames"] == [{"name": photo.name} for photo in SAMPLES]
    assert manifest["title"] == "vggt:tiny"
    assert manifest["start"] == {"head": 0}
    assert "positions" in manifest["points"]  # the samples know where they were taken


def test_photographs_through_a_timm_model(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ["--model", "vit_tiny_patch16_224@random", "--out", str(page)]
    assert cli.main(["explore", *map(str, SAMPLES[:2]), *words]) == 0
    manifest = manifest_of(page)
    assert [site["name"] for site in manifest["sites"]] == ["blocks.11.attn"]
    assert manifest["images"] == [[0, 0], [1, 0]]
    assert [frame["name"] for frame in manifest["frames"]] == [p.name for p in SAMPLES[:2]]


def test_a_run_to_a_folder(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    assert cli.main(["explore", str(stored), "--folder", str(site)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {site}/index.html   (4 sites, " in out
    assert f"next: python -m http.server -d {site}" in out
    first = {file.name for file in site.iterdir()}
    assert len(first) == 5
    # The next page takes the place of this one, with its sites.
    (site / "notes.txt").write_text("mine")
    assert cli.main(["explore", str(stored), "--folder", str(site), "--sites", "*.1"]) == 2
    assert {file.name for file in site.iterdir()} == first | {"notes.txt"}
    last = list(vistvis.open_run(stored))[-1]
    assert cli.main(["explore", str(stored), "--folder", str(site), "--sites", last]) == 0
    assert len(list(site.iterdir())) == 3


def test_the_size_is_told_before(
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(contents, "MOST_BYTES", 100)
    words = [str(stored), "--out", str(tmp_path / "page.html"), "--sites", "**"]
    assert cli.main(["explore", *words]) == 0
    told, wrote, *_ = capsys.readouterr().out.splitlines()
    assert told.startswith("about ")
    assert "for 4 sites; fewer make it smaller: --sites " in told
    assert wrote.startswith("wrote ")


def test_serving(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is there until Ctrl-C, and then the port is free."""
    answers: list[bytes] = []

    def serve(server: Any) -> None:
        thread = threading.Thread(target=super(serving.PageServer, server).serve_forever)
        thread.start()
        with urllib.request.urlopen(server.url) as answer:
            answers.append(answer.read())
        server.shutdown()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(serving.PageServer, "serve_forever", serve)
    assert cli.main(["explore", str(stored), "--serve"]) == 0
    assert capsys.readouterr().out.startswith("serving at http://127.0.0.1:")
    assert b"vistvis-manifest" in answers[0]


def test_the_browser_opens_where_somebody_watches(
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: not opened.append(url))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("DISPLAY", ":7")
    page = tmp_path / "page.html"
    assert cli.main(["explore", str(stored), "-o", str(page), "--no-open"]) == 0
    assert opened == []
    assert cli.main(["explore", str(stored), "-o", str(page)]) == 0
    assert opened == [page.as_uri()]
    assert "open it in a browser" not in capsys.readouterr().out.split("wrote")[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "PHOTO"], "one run or photographs are shown"),
        (["RUN", "--model", "vggt:tiny"], "--model goes with photographs"),
        (["RUN", "--sites", "blok*"], "no site 'blok*'"),
        (["RUN", "--out", "PHOTO"], "a page's file ends in .html"),
        (["RUN", "--out", "OTHER"], "is not a page of the explorer; choose another name"),
        (["RUN", "--folder", "PHOTO"], "is a file, and a folder is meant"),
        (["RUN", "--folder", "x", "--serve"], "not allowed with argument"),
        (["nowhere.jpg"], "no file 'nowhere.jpg'"),
        (["PHOTO", "--model", "vggt:tiny", "--sites", "no*"], "no site 'no*'"),
        (["PHOTO", "--size", "0"], "--size: pixels from 1"),
    ],
)
def test_wrong_words_are_told_in_one_line(
    words: list[str],
    told: str,
    stored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.html"
    other.write_text("<p>mine")
    meant = {"RUN": str(stored), "PHOTO": str(SAMPLES[0]), "OTHER": str(other)}
    try:
        code = cli.main(["explore", *(meant.get(word, word) for word in words)])
    except SystemExit as end:
        code = int(str(end.code))
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert told in err
    assert other.read_text() == "<p>mine"


def test_help_fits_a_screen() -> None:
    parser = cli.parser_of("vistvis explore", explore)
    assert len(parser.format_help().splitlines()) <= 40
