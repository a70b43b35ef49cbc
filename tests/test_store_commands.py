"""`vistvis store` and `vistvis info`, from the command line's own entry."""

from __future__ import annotations

import importlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vistvis
from vggt_adapter import VGGT, AttentionExtractor, VGGTConfig, save_checkpoint
from vistvis.cli import main
from vistvis.models import loading as _models
from vistvis.photos.finding import find_photos
from vistvis.photos.records import photos_of
from vistvis.store import RunWriter, open_run

TIMM = "vit_tiny_patch16_224@random"


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(2):
        path = tmp_path / f"photo{number}.png"
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGGT's entry point, as an installed package has it (a checkout has none)."""
    found = metadata.EntryPoint("vggt", "vggt_adapter.loader:load", _models.GROUP)
    points = metadata.EntryPoints([found])
    monkeypatch.setattr(_models.metadata, "entry_points", points.select)


@pytest.fixture
def vggt(tmp_path: Path) -> str:
    torch.manual_seed(3)
    config = VGGTConfig(
        img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=2, patch_embed="conv"
    )
    path = tmp_path / "small.safetensors"
    save_checkpoint(VGGT(config), path)
    return f"vggt:{path}"


def test_pyproject_names_the_loader() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    section = text.split(f'[project.entry-points."{_models.GROUP}"]')[1]
    module, name = section.split('vggt = "')[1].split('"')[0].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_store_a_timm_model(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    command = [
        "store",
        *photos,
        "--model",
        TIMM,
        "--sites",
        "blocks.0.attn",
        "blocks.1.*",
        "--out",
        out,
    ]
    assert main(command) == 0
    assert "2 sites" in capsys.readouterr().out
    run = open_run(out)
    assert list(run) == ["blocks.0.attn", "blocks.1.attn"]
    assert run["blocks.1.attn"].shape == (2, 3, 197, 197)
    assert run.images is not None
    assert run.images.shape == (2, 1, 3, 224, 224)
    assert 0 <= float(run.images.min()) < float(run.images.max()) <= 1
    assert run.layout is not None
    assert run.layout.grid == (14, 14)
    # The same again, straight from the model.
    loaded = _models.load(TIMM, images=photos)
    with vistvis.capture(loaded.model, "blocks.1.attn") as live, torch.no_grad():
        loaded.model(loaded.images)
    assert torch.equal(live["blocks.1.attn"].query, run["blocks.1.attn"].query)  # type: ignore[arg-type]


def test_store_takes_folders_and_keeps_what_was_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder and a moving GIF: names, times, and where the pixels of a turned photo went."""
    folder, clip, out = tmp_path / "shots", tmp_path / "clip.gif", tmp_path / "run"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for name in ("a10.png", "a2.png"):
        Image.fromarray(pixels).save(folder / name, exif=exif)
    frames = [Image.fromarray(np.roll(pixels, n, 0)) for n in range(12)]
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500)
    words = ["--model", TIMM, "--sites", "blocks.0.attn", "--out", str(out)]
    assert main(["store", str(folder), str(clip), "--every", "3s", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("the model sees ")
    assert "('a2.png', 'a10.png')" in said[0]
    run = open_run(out)
    seen = photos_of(run.metadata)
    names = ["a2.png", "a10.png", "clip.gif @ 0:00.0", "clip.gif @ 0:03.0"]
    assert [photo.name for photo in seen] == names
    assert [photo.time for photo in seen] == [None, None, 0.0, 3.0]
    assert seen == _models.load(TIMM, images=[folder, *find_photos(clip, every=3)[0]]).photos
    assert seen[0].geometry is not None
    assert seen[0].geometry.original_size == (80, 60)
    assert main(["info", str(out)]) == 0
    assert "photos    'a2.png', 'a10.png'" in capsys.readouterr().out
    # Without a word of how often, what was chosen of a clip is told.
    assert main(["store", str(clip), *words]) == 0
    assert capsys.readouterr().out.startswith("clip.gif: 8 of its 12 frames, spread evenly")


@pytest.mark.usefixtures("front_end")
def test_store_vggt(photos: list[str], vggt: str, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert main(["store", *photos, "--model", vggt, "--out", out, "--device", "cpu"]) == 0
    run = open_run(out)
    names = ["frame_block_0", "global_block_0", "frame_block_1", "global_block_1"]
    assert list(run) == names
    assert run.complete
    assert run.images is not None
    loaded = _models.load(vggt, images=photos, device="cpu")
    assert torch.equal(run.images, loaded.pictures)
    extractor = AttentionExtractor(loaded.model)
    extractor.register_hooks()
    with torch.no_grad():
        loaded.model(loaded.images)
    for name in names:
        live = extractor.captured[name]
        assert torch.equal(run[name].query, live.query)  # type: ignore[arg-type]
        assert torch.equal(run[name].key, live.key)  # type: ignore[arg-type]
        assert run[name].site == live.site
    site = run["global_block_1"].site
    assert site is not None
    assert run.layout == site.key_layout
    assert main(["store", *photos, "--model", vggt, "--sites", "global*", "--out", out]) == 0
    assert list(open_run(out)) == ["global_block_0", "global_block_1"]


@pytest.mark.usefixtures("front_end")
def test_store_goes_on_with_what_was_cut_short(
    photos: list[str], vggt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "run")
    command = ["store", *photos, "--model", vggt, "--out", out, "--device", "cpu"]
    real = RunWriter.write

    def interrupted(writer: RunWriter, name: str, attention: Any) -> None:
        if name == "frame_block_1":
            raise KeyboardInterrupt
        real(writer, name, attention)

    monkeypatch.setattr(RunWriter, "write", interrupted)
    assert main(command) == 130
    assert open_run(out).missing == ("frame_block_1", "global_block_1")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/sites").glob("*.safetensors")}
    monkeypatch.setattr(RunWriter, "write", real)
    assert main(command) == 0
    assert open_run(out).complete
    assert (
        before.items()
        <= {p: p.stat().st_mtime_ns for p in (tmp_path / "run/sites").glob("*.safetensors")}.items()
    )


@pytest.mark.usefixtures("front_end")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--model": "vit_tinyy_patch16_224"}, "did you mean vit_tiny_patch16_224"),
        ({"--model": "nosuch:x"}, "timm:NAME, vggt:NAME"),
        ({"--model": "vggt:"}, "timm:NAME, vggt:NAME"),
        ({"--model": "vggt:/nothing/here.safetensors"}, "/nothing/here.safetensors"),
        ({"--model": "vit_tiny_patch16_224@/nothing"}, "no checkpoint /nothing"),
        ({"--sites": "nothing*"}, "nothing*"),
        ({"PHOTO": "nothing.jpg"}, "no file 'nothing.jpg'"),
        ({"PHOTO": __file__}, "can't be read as a picture"),
        ({"--out": "/dev/null"}, "/dev/null"),
    ],
)
def test_what_store_refuses(
    photos: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    text: str,
) -> None:
    given = {"--model": TIMM, "--out": str(tmp_path / "run"), "PHOTO": photos[0], **changes}
    command = ["store", given.pop("PHOTO"), *(part for pair in given.items() for part in pair)]
    try:
        code = main(command)
    except SystemExit as left:  # judged while the line was parsed
        code = int(left.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("vistvis store: error: ")
    assert text in error
    assert not (tmp_path / "run").exists()


def test_info(photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    main(
        [
            "store",
            *photos,
            "--model",
            TIMM,
            "--sites",
            "blocks.0.attn",
            "blocks.1.*",
            "--out",
            str(out),
        ]
    )
    capsys.readouterr()
    assert main(["info", str(out), "--check"]) == 0
    text = capsys.readouterr().out
    for part in (TIMM, "14×14", "blocks.1.attn", "2 × 3 × 197 × 197", "Q and K F32", "complete"):
        assert part in text
    assert main(["info", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["complete"]
    assert data["sites"]["blocks.0.attn"]["shape"] == [2, 3, 197, 197]
    assert data["bytes"] == sum(p.stat().st_size for p in out.rglob("*.safetensors"))

    file0 = out / open_run(out).record("blocks.0.attn").file.file
    sound = file0.read_bytes()
    file0.write_bytes(sound[:50])
    assert main(["info", str(out)]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 sites" in text
    assert "blocks.0.attn  DAMAGED" in text
    file0.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert main(["info", str(out)]) == 0
    capsys.readouterr()
    assert main(["info", str(out), "--check"]) == 1
    text = capsys.readouterr().out
    assert f"blocks.0.attn  DAMAGED: {file0} is damaged" in text
    assert "Q and K F32" in text  # the table, of what is sound
    assert "every checksum" not in text
    images = next(out.glob("images-*"))
    images.write_bytes(images.read_bytes()[:-1] + b"\1")
    assert main(["info", str(out), "--check"]) == 1
    text = capsys.readouterr().out
    assert f"blocks.0.attn  DAMAGED: {file0} is damaged" in text
    assert f"\nDAMAGED: {images} is damaged" in text
    assert main(["info", str(tmp_path / "nothing")]) == 2
    assert "no run in" in capsys.readouterr().err
    RunWriter(tmp_path / "part", expected=["a"]).close()
    assert main(["info", str(tmp_path / "part")]) == 1
    assert "a  MISSING" in capsys.readouterr().out
