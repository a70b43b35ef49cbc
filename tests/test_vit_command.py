"""`vistvis vit`, with untrained weights of a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("timm")
from vistvis.cli import main

MODEL = ["--model", "test_vit", "--weights", "random"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (120, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_cls_token_and_a_patch(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["vit", str(photo), *MODEL, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "untrained" in said
    assert "blocks.5.attn: 2 heads, 1 frame of 10×10 patches with 1 × cls" in said
    assert main(["vit", str(photo), *MODEL, "--block", "-2", "-q", "3,5", "-o", str(out)]) == 0
    assert main(["vit", str(photo), *MODEL, "-b", "0", "-q", "pixel:20,40", "-o", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        f"photo_blocks.{block}.attn_{query}.{ending}"
        for block, query in ((5, "cls"), (4, "3-5"), (0, "pixel-20-40"))
        for ending in ("png", "npz")
    }
    with np.load(out / "photo_blocks.4.attn_3-5.npz") as stored:
        assert stored["token"] == 1 + 3 * 10 + 5
        assert stored["maps"].shape == (2, 10, 10)
        assert np.allclose(stored["rows"].sum(-1), 1, atol=1e-5)


def test_sites(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vit", str(photo), *MODEL, "--sites"]) == 0
    assert "blocks.5.attn  Attention  self  2      kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--block", "9"], "no block 9: the model has blocks 0…5"),
        (["--site", "blocks.9.attn"], "no site 'blocks.9.attn': nearest"),
        (["--query", "camera"], "no special token of kind 'camera'"),
        (["--query", "99,0"], "row 99 is outside"),
        (["--query", "a,b"], "a query is ROW,COL"),
        (["--model", "test_vitt"], "no model 'test_vitt'"),
        (["--weights", "missing.pt"], "no checkpoint missing.pt"),
    ],
)
def test_wrong_input(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], text: str
) -> None:
    assert main(["vit", str(photo), *MODEL, "-o", str(tmp_path / "out"), *more]) == 2
    assert text in capsys.readouterr().err
