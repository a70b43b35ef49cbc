"""`vistvis overlay`: queries in the one grammar, and what is refused before anything is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.cli import main

# Two frames of 2×3 patches of 8 pixels, after one special token each.
LAYOUT = TokenLayout(2, (2, 3), ("camera",), 8)
P = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    weights = torch.rand(1, 2, 2 * P, 2 * P).softmax(-1)
    site = SiteInfo("global_0", kind="global", query_layout=LAYOUT, key_layout=LAYOUT)
    images = torch.rand(1, 2, 3, 16, 24)
    folder = tmp_path_factory.mktemp("runs") / "run"
    captured = {"global_0": Attention.from_weights(weights, site=site)}
    vistvis.save_run(captured, folder, images=images, layout=LAYOUT).close()
    return str(folder)


@pytest.mark.parametrize(
    ("query", "tokens"),
    [
        (["r1,c2"], {6}),
        (["0:middle", "camera"], {0, LAYOUT.center()}),
        (["5", "2", "--query-frame", "1"], {2, 5}),
        (["1:5", "camera@1"], {0, 5}),
        ([f"token{P + 3}", "r0,c0"], {1, 3}),
    ],
)
def test_tokens(
    run: str, query: list[str], tokens: set[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["overlay", run, "-q", *query, "-k", "all", "--out", str(out)]) == 0
    names = {f"overlay_{token}_frame_{frame}.png" for token in tokens for frame in (0, 1)}
    assert {file.name for file in out.rglob("overlay_*.png")} == names
    said = capsys.readouterr().out
    assert f"{len(names)} overlays under {out}" in said
    assert f"next: vistvis pdf {out}" in said


def test_heads(run: str, tmp_path: Path) -> None:
    argv = ["overlay", run, "-q", "3", "--head", "1", "mean", "--sites", "global_*"]
    assert main([*argv, "-o", str(tmp_path)]) == 0
    found = {file.parts[-3] for file in tmp_path.rglob("overlay_*.png")}
    assert found == {"head=1", "head=mean"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["-q", "3", "--head", "2"], "--head 2: the model has heads 0…1"),
        (["-q", "2:middle"], "query '2:middle': there is no frame 2, only 0…1"),
        (["-q", "7"], "query '7': "),
        (["-q", "r2,c0"], "query 'r2,c0': "),
        (["-q", "cls"], "query 'cls': "),
        (["-q", "0:3,3px"], "name its grid cell, as in 0:r13,c15"),
        (["-q", "3", "-k", "2"], "--key-frame 2: the pictures are frames 0…1"),
        (["-q", "3", "--query-frame", "2"], "--query-frame 2: the pictures are frames 0…1"),
        (["-q", "3", "--batch", "1"], "--batch 1 is outside 0…0"),
        (["-q", "3", "--sites", "nothing_*"], "--sites: no layer 'nothing_*'"),
        ([], "name a token, as in --query 0:r13,c15"),
    ],
)
def test_what_is_refused(
    run: str,
    more: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out"
    assert main(["overlay", run, "-o", str(out), *more]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert not out.exists()
