"""Wrong command lines: one line that names the option and one fix, before any model runs."""

from __future__ import annotations

import importlib
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vistvis import cli
from vistvis.commands import _options, _sources
from vistvis.errors import CheckpointError

LONG = "9" * 5000
DEMO = [
    ("demo --head 7000000", "--head: a head's number from 0, 'mean' or 'max' is meant"),
    (f"demo --head {LONG}", "--head: a head's number from 0"),
    ("demo --head -1", "--head: a head's number from 0"),
    ("demo --head median", "got 'median'"),
    ("demo --head ٣", "--head: a head's number from 0"),
    ("demo --size 0", "--size: pixels from 1 to 99999 are meant, for example 518; got '0'"),
    ("demo --size -14", "--size: pixels from 1"),
    ("demo --size 518px", "--size: pixels from 1"),
    (f"demo --size {LONG}", "--size: pixels from 1"),
    ("demo --device meta", "--device: 'meta' can't be computed on here; use cpu"),
    ("demo --device toaster", "--device: no device 'toaster'"),
    ("demo --device cuda:99", "--device: device 'cuda:99' was asked for"),
    ("demo --device 512", "--device: "),
    ("demo --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("demo --norm sqrt", "--norm: invalid choice: 'sqrt'"),
    ("demo --cmap infernal", "--cmap: matplotlib has no colour map 'infernal': did you mean"),
    ("demo --alpha 2", "--alpha: a number from 0 to 1 is meant"),
    ("demo --alpha nan", "--alpha: a number from 0 to 1 is meant"),
    ("demo --format gif", "--format: some of png,svg,pdf are meant, got 'gif'"),
    ("demo --format ,", "--format: some of png,svg,pdf are meant"),
    ("demo --out {photo}", "--out: {photo} is a file, and a folder is meant"),
    ("demo --out {photo}/below", "--out: {photo} is a file"),
    ("demo --out " + "x" * 300, "can't be a folder's name; choose another"),
    ("demo --block last", "--block: a block's number is meant, -1 for the last; got 'last'"),
    ("demo --mode stretch", "--mode: invalid choice"),
    ("demo --types frame,cross", "--types: frame, global or frame,global is meant"),
    ("demo --query 120,80", "write r120,c80 for a grid cell or 120,80px"),
    ("demo --query 0:0:1", "--query: query '0:0:1' names no token"),
    ("demo --query 1@2@3", "--query: query '1@2@3' names no token"),
    (f"demo --query token{LONG}", "--query: query 'token999"),
    ("demo --query cls --pixel 0:1,1", "not allowed with argument"),
    ("demo --pixel 12,13", "--pixel: FRAME:X,Y is meant, or --query FRAME:X,Ypx"),
    ("demo --token 1e3", "--token: a whole number from 0 is meant"),
    ("demo --colour x", "unrecognized arguments"),
    ("demo {missing}", "no file '{missing}'"),
    ("demo {empty}", "'{empty}' holds no picture, nothing"),
    ("demo {run}", "{run} is a stored run, and photographs are meant"),
    ("demo https://a.b/c.jpg", "is a URL; download it first: curl -LO"),
    ("demo {photo} --model timm:deit", "--model timm:deit: this command shows VGGT"),
    ("demo {photo} --model vggt:", "--model vggt:: this command shows VGGT"),
    ("demo {photo} --model deit", "--model deit: no such file"),
]
VIT = [
    ("vit", "arguments are required: PHOTO"),
    ("vit {missing}", "no file '{missing}'"),
    ("vit {empty}", "'{empty}' holds no picture"),
    ("vit {run}", "{run} is a stored run"),
    ("vit {photo} {photo}", "unrecognized arguments"),
    ("vit {photo} --device 512", "--device: "),
    ("vit {photo} --size 0", "--size: pixels from 1"),
    ("vit {photo} --head first", "--head: a head's number from 0, 'mean' or 'all' is meant"),
    ("vit {photo} --query a,b", "--query: query 'a,b' names no token"),
    ("vit {photo} --query pixel:1", "--query: query"),
    ("vit {photo} --model vggt:tiny", "--model vggt:tiny: this command shows models of timm"),
    ("vit {photo} --model a@random --weights f", "says its weights already; leave --weights out"),
    ("vit {photo} --out {photo}", "--out: {photo} is a file"),
]
OTHERS = [
    ("overlay {missing} --query 0 --special-tokens 1e20", "--special-tokens: a whole number"),
    ("overlay {missing} --query 0 --special-tokens 5", "--patch-size and --special-tokens togeth"),
    ("overlay {missing} --query 0 --patch-size 0 --special-tokens 5", "--patch-size: pixels"),
    ("overlay {missing} --query 0 --key-frame some", "--key-frame: a frame's number or 'all'"),
    ("overlay {missing} --query 0 --head max", "--head: a head's number from 0, 'mean' or 'all'"),
    ("overlay {missing} --query interactive 3", "--query takes tokens or 'interactive', not both"),
    ("overlay {missing} --query 0 --norm own,log", "--norm: invalid choice"),
    ("overlay {missing} --query 0 --batch -1", "--batch: a whole number from 0"),
    ("overlay {missing} --query 0", "missing"),
    ("overlay", "arguments are required: RUN"),
    ("dmeo", "no command 'dmeo': did you mean 'demo'?"),
    ("help querys", "did you mean 'queries'?"),
    ("help nothing-like-it", "there are demo, "),
    ("pdf", "arguments are required"),
    ("info", "arguments are required"),
    ("store", "arguments are required"),
    ("store {photo} -m vggt:tiny --out {photo}", "--out: {photo} is a file"),
    ("store {photo} -m vggt:tiny --out o --size 0", "--size: pixels from 1"),
    ("store {photo} -m vggt:tiny --out o --device meta", "--device: 'meta' can't be computed on"),
    ("store {photo} -m vggt:tiny --out o --every x", "--every: every is a number of seconds"),
    ("store {run} -m vggt:tiny --out o", "{run} is a stored run, and photographs are meant"),
    ("store https://a.b/c.jpg -m vggt:tiny --out o", "is a URL; download it first"),
    ("grid {missing} -m vggt:tiny", "no file '{missing}'"),
    ("pdf {folder} --dpi 0", "--dpi: "),
    ("info {run} --older-than never", "--older-than: "),
    ("stats", "arguments are required: PHOTO"),
    ("stats {missing}", "no file '{missing}'"),
    ("stats {run} {photo}", "one run or photographs are summarized, got {run} among 2"),
    ("stats {run} --model vggt:tiny", "--model goes with photographs"),
    ("stats {photo} --against {folder}", "no run in {folder}"),
    ("stats {photo} --table xlsx", "--table: one of csv, parquet, npz is meant, got 'xlsx'"),
    ("stats {photo} --out {photo}", "--out: {photo} is a file"),
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wrong")
    Image.new("RGB", (30, 20)).save(folder / "photo.png")
    run = folder / "run"
    run.mkdir()
    (run / "manifest.json").write_text("{}")
    (folder / "empty").mkdir()
    given = {
        "empty": "empty",
        "photo": "photo.png",
        "missing": "missing.jpg",
        "run": "run",
        "folder": ".",
    }
    return {name: str(folder / file) for name, file in given.items()}


@pytest.mark.parametrize(
    ("line", "text"), [pytest.param(*case, id=case[0][:60]) for case in (*DEMO, *VIT, *OTHERS)]
)
def test_wrong_lines(
    line: str,
    text: str,
    names: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(names["folder"])

    def run(*_: object) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr(torch.nn.Module, "__call__", run)
    argv = [part.format(**names) for part in line.split()]
    try:
        code = cli.main(argv)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"vistvis {argv[0]}: error: ")
    assert text.format(**names) in err
    assert len(err) < 600
    assert not re.search(r"\b[a-z]+_idx\b|Traceback", err)


def test_there_are_sixty_of_them() -> None:
    lines = [line for line, _ in (*DEMO, *VIT, *OTHERS)]
    assert len(set(lines)) == len(lines) >= 60


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        cli.main(["demo", "--out", str(tmp_path / "out")])
    assert f"--out: nothing can be written in {tmp_path}" in capsys.readouterr().err


def test_judging_a_folder_makes_none(tmp_path: Path) -> None:
    assert _options.folder(str(tmp_path / "a/b")) == tmp_path / "a/b"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("model", ["facebook/VGGT-1B", "vggt:facebook/VGGT-1B"])
def test_a_hub_that_cannot_be_reached(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(_sources, "hub_answers", lambda endpoint: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    before = time.perf_counter()
    assert cli.main(["demo", "--model", model, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "can't be reached, and the cache on this disk has no such weights" in err
    assert "--model vggt:FILE; vggt:tiny is bundled" in err
    assert time.perf_counter() - before < 60  # its client alone would ask again and again
    assert not constants.HF_HUB_OFFLINE


def test_other_faults_of_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "hub_answers", lambda endpoint: False)
    with pytest.raises(CheckpointError, match="damaged"), _sources.from_hub("a/b"):
        raise CheckpointError("damaged")


def test_whether_a_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert _sources.hub_answers(address)
    assert not _sources.hub_answers(address)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: time.sleep(60))
    assert not _sources.hub_answers(address, seconds=0.05)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert _sources.hub_answers(address)


def test_words_are_those_of_the_parts_that_use_them() -> None:
    from vistvis import devices
    from vistvis.views import figures, painting

    assert _options.NORMS == painting.NORMS
    assert _options.DTYPES == devices.DTYPES
    assert _options.FORMATS == figures.FORMATS
