"""`vistvis vit`, with untrained weights of a tiny model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("timm")
from vistvis import progress
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
        f"photo_test_vit-random_blocks.{block}.attn_{query}.{ending}"
        for block, query in ((5, "cls"), (4, "r3-c5"), (0, "20-40px"))
        for ending in ("png", "npz")
    }
    with np.load(out / "photo_test_vit-random_blocks.4.attn_r3-c5.npz") as stored:
        assert stored["token"] == 1 + 3 * 10 + 5
        assert stored["maps"].shape == (2, 10, 10)
        assert np.allclose(stored["rows"].sum(-1), 1, atol=1e-5)


def test_sites(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vit", str(photo), *MODEL, "--sites"]) == 0
    assert "blocks.5.attn  Attention  self  2      kernel" in capsys.readouterr().out


def test_a_pixel_counts_in_the_photo(photo: Path, tmp_path: Path) -> None:
    """Each patch's middle in the photo is where an independent resize and crop puts it."""
    out = tmp_path / "out"
    # 150×120 becomes 210×168, of which the middle 160×160 is taken: 25 and 4 pixels are cut away.
    for row, col in ((0, 0), (3, 5), (9, 9)):
        x, y = ((25 + 16 * col + 8) / 1.4 - 0.5, (4 + 16 * row + 8) / 1.4 - 0.5)
        query = f"{x:.1f},{y:.1f}px"
        assert main(["vit", str(photo), *MODEL, "-q", query, "-o", str(out)]) == 0
        (stored,) = out.glob("*.npz")
        with np.load(stored) as values:
            assert values["token"] == 1 + 10 * row + col
        for file in out.iterdir():
            file.unlink()


def test_a_folder_with_one_picture(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shots"
    folder.mkdir()
    photo = photo.rename(folder / photo.name)
    argv = ["vit", str(folder), *MODEL, "-o", str(tmp_path / "out")]
    assert main(argv) == 0
    assert f"pixels ({photo.name!r})" in capsys.readouterr().out.splitlines()[0]
    (folder / "more.png").write_bytes(photo.read_bytes())
    assert main(argv) == 2
    assert "has 2 pictures, and this command shows one" in capsys.readouterr().err


def test_sites_and_heads_and_formats(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["vit", str(photo), *MODEL, "--sites", "blocks.4.*", "blocks.5.attn"]
    argv += ["--head", "1", "mean"]
    assert main([*argv, "--format", "png,svg", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("mean of heads: strongest") == 2
    assert "head 0" not in said
    stems = {f"photo_test_vit-random_blocks.{block}.attn_cls" for block in (4, 5)}
    names = {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg", "npz")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with np.load(tmp_path / "out/photo_test_vit-random_blocks.5.attn_cls.npz") as stored:
        assert stored["maps"].shape == (2, 10, 10)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--block", "9"], "--block 9: the model has blocks 0…5"),
        (["--site", "blocks.9.attn"], "no site 'blocks.9.attn': nearest"),
        (["--query", "camera"], "no special token of kind 'camera'"),
        (["--query", "99,0"], "row 99 is outside"),
        (["--query", "10,3px"], "pixel (10, 3) of the 150×120 photo was cropped away"),
        (["--head", "2"], "--head 2: the model has heads 0…1"),
        (["--size", "225"], "--size 225: the model's patches are 16 pixels wide; use 224"),
        (["--model", "test_vitt"], "no model 'test_vitt'"),
        (["--weights", "missing.pt"], "no checkpoint missing.pt"),
    ],
)
def test_wrong_input(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], text: str
) -> None:
    assert main(["vit", str(photo), *MODEL, "-o", str(tmp_path / "out"), *more]) == 2
    assert text in capsys.readouterr().err


def test_a_movie_of_a_video_and_one_of_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, out = tmp_path / "clip.gif", tmp_path / "seen.gif"
    greys = [Image.new("RGB", (64, 48), (60 * n, 90, 120)) for n in range(3)]
    greys[0].save(clip, save_all=True, append_images=greys[1:], duration=200)
    words = ["vit", str(clip), *MODEL, "--head", "0"]
    assert main([*words, "--every", "1f", "--movie", str(out)]) == 0
    assert f"wrote {out} (" in capsys.readouterr().out
    with Image.open(out) as movie:
        assert movie.n_frames == 3
        assert movie.width > 300
    folder = tmp_path / "out"
    assert main([*words, "--every", "1f", "--batch", "2", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "replaced" not in said
    assert "--every 1f --batch 2" in said.splitlines()[-1]
    assert main([*words, "--every", "1f", "--batch", "2", "--out", str(folder)]) == 0
    assert "replaced what was there" in capsys.readouterr().out
    assert main([*words, "--every", "1f", "--batch", "3"]) == 2
    assert "--batch 3 is outside 0…2" in capsys.readouterr().err
    assert main([*words, "--every", "1f"]) == 2
    assert "choose with --batch 0…2" in capsys.readouterr().err


def test_a_bar_that_is_drawn_leaves_the_model_as_it_is(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    class Drawn(nullcontext[Any]):
        def __enter__(self) -> Drawn:
            return self

        def update(self, count: int = 1) -> bool:
            steps.append(count)
            return True  # as tqdm's, when it has drawn

    rows, real = [], progress.progress
    for shown in (False, True):
        if shown:

            def bar(steps: Any, label: str, **options: Any) -> Any:
                return Drawn() if steps is None else real(steps, label, **options)

            monkeypatch.setattr(progress, "progress", bar)
        out = tmp_path / str(shown)
        assert main(["vit", str(photo), *MODEL, "--head", "0", "--out", str(out)]) == 0
        with np.load(next(out.glob("*.npz"))) as stored:
            rows.append(stored["rows"])
    assert len(steps) == 6
    assert np.array_equal(*rows)
