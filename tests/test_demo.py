"""From photographs to pictures and numbers: the function, the command, their files and words."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import visualize_attention
from vggt_adapter import demo
from vggt_adapter.config import ViTConfig
from vggt_adapter.demo import demo_visualize_token_attention
from vggt_adapter.model import VGGT
from vggt_adapter.preprocess import load_images
from vggt_adapter.sample_scene import sample_views
from vggt_adapter.steps import blocks_progress, load_model
from vggt_adapter.values import get_attention_values
from vistvis import VistvisWarning, cli
from vistvis.errors import CheckpointError, IndexOutOfRange, InputError
from vistvis.photos import reading

# Photographs of 100×75 pixels come to the model as 70×56: 4×5 patches.
SIZE, ROWS, COLS = 70, 4, 5
P = 5 + ROWS * COLS


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(3):
        small = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        path = folder / f"photo {number}.png"
        Image.fromarray(small).resize((100, 75), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def model() -> VGGT:
    torch.manual_seed(1)
    vit = ViTConfig(depth=1, num_heads=2)
    made = VGGT.from_config(
        img_size=SIZE, embed_dim=32, depth=2, num_heads=2, patch_embed=vit, init_values=1.0
    )
    with torch.no_grad():
        for block in made.aggregator.global_blocks:
            block.attn.q_norm.weight.mul_(4)
    return made.eval()


@pytest.fixture
def bundled(model: VGGT, monkeypatch: pytest.MonkeyPatch) -> VGGT:
    """The small model in place of the one that comes with the package, which takes longer."""
    monkeypatch.setattr(VGGT, "tiny", classmethod(lambda cls, **_: model))
    return model


def command(*argv: object) -> int:
    arguments = [str(part) for part in argv]
    return cli.guarded("vistvis demo", lambda: cli.run("vistvis demo", demo, arguments))


def look(photos: list[Path], model: VGGT, token: int, **named: Any) -> Any:
    return demo_visualize_token_attention(photos, 1, token, model=model, **named)


def test_the_names_of_the_earlier_tool() -> None:
    import vggt_adapter

    for name in (
        *("VGGT", "load_and_preprocess_images", "AttentionExtractor", "extract_both_attentions"),
        *("visualize_attention_on_image", "get_attention_values"),
        "demo_visualize_token_attention",
    ):
        assert getattr(visualize_attention, name) is getattr(vggt_adapter, name)


def test_one_token_is_one_place(photos: list[Path], model: VGGT, tmp_path: Path) -> None:
    token = P + 12
    figures, result = look(photos, model, token, head_idx=1, output_dir=tmp_path)
    assert [kind for kind, _ in figures] == ["frame", "global"]
    assert figures["global"] is figures[1][1]
    assert set(result) == {"frame_attention", "global_attention", "block_idx", "patch_start_idx"}
    for _, figure in figures:
        words = [text.get_text() for text in figure.texts]
        assert words[1] == f"query: token 12 of frame 1 (absolute {token}), row 1, col 2"
        assert "block 1 · head 1" in words[0]

    images = load_images(photos, size=SIZE).images
    expected = {
        "frame": get_attention_values(
            result["frame_attention"]["attn_weights"], images, 12, 1, frame_idx=1
        ),
        "global": get_attention_values(
            result["global_attention"]["attn_weights"], images, token, 1
        ),
    }
    values = tmp_path / "values.npz"
    with np.load(values, allow_pickle=False) as found:
        metadata = json.loads(str(found["metadata"]))
        for kind, values in expected.items():
            for name in ("attention_maps", "attention_maps_resized"):
                np.testing.assert_array_equal(found[f"{kind}_{name}"], values[name])
            assert metadata[kind]["frame_idx"] == 1
            assert metadata[kind]["token_in_frame"] == 12
            assert metadata[kind]["requested_token_idx"] == token
        assert metadata["frame"]["token_idx"] == 12
        assert metadata["global"]["token_idx"] == token
        assert found["images"].dtype == np.uint8
        np.testing.assert_allclose(found["images"] / 255, values["images"], atol=0.5 / 255 + 1e-6)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        f"frame_block_1_head_1_token_{token}.png",
        f"global_block_1_head_1_token_{token}.png",
        "values.npz",
    ]


def test_one_kind_only(photos: list[Path], model: VGGT) -> None:
    assert list(dict(look(photos, model, 12, attention_types="global")[0])) == ["global"]
    assert list(dict(look(photos, model, 12, attention_types=["frame"])[0])) == ["frame"]
    both = look(photos, model, 12, attention_types=["global", "frame"])[0]
    assert list(dict(both)) == ["global", "frame"]
    for wrong in ("cross", [], ["global", "cross"]):
        with pytest.raises(InputError, match="'frame' and 'global'"):
            look(photos, model, 12, attention_types=wrong)


def test_a_token_that_is_no_patch_is_moved_once(photos: list[Path], model: VGGT) -> None:
    with pytest.warns(VistvisWarning, match=rf"token_idx {P}.*token {P + 5} ") as caught:
        figures, _ = look(photos, model, P)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for _, figure in figures:
        assert f"(absolute {P + 5})" in figure.texts[1].get_text()
    figures, _ = look(photos, model, P, allow_special=True)
    for _, figure in figures:
        assert "a camera token" in figure.texts[1].get_text()


def test_the_model_is_left_as_it_was(photos: list[Path], model: VGGT) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    look(photos, model, 12)
    assert hooks() == 0
    with contextlib.suppress(ZeroDivisionError), blocks_progress(model):
        assert hooks() == 1 + 2 + 2
        raise ZeroDivisionError
    assert hooks() == 0


def test_where_and_in_what_it_runs(model: VGGT, photos: list[Path]) -> None:
    half = load_model(VGGT(model.config), dtype="bfloat16", device="cpu")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert not half.training
    _, result = look(photos, half, 12)
    assert result["global_attention"]["attn_weights"].query.dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype is one of"):
        load_model(half, dtype="int3")
    with pytest.raises(InputError, match="no device"):
        load_model(half, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device; use cpu"):
            load_model(half, device="cuda")


def test_out_of_range(photos: list[Path], model: VGGT) -> None:
    with pytest.raises(InputError, match="blocks 0…1"):
        demo_visualize_token_attention(photos, 23, 12, model=model)
    with pytest.raises(IndexOutOfRange, match="head_idx 2"):
        look(photos, model, 12, head_idx=2)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(75, 100), (150, 100), (61, 97)])
def test_small_pictures_are_shown_sharp(mode: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """With more pixels, but of the very same view: each block of pixels has the mean of one."""
    y, x = np.mgrid[: shape[0], : shape[1]] / 100
    picture = np.stack([x, y, np.sin(6 * (x + y)) ** 2], -1).clip(0, 1)
    path = tmp_path / "smooth.png"
    Image.fromarray((picture * 255).astype(np.uint8)).save(path)
    loaded = load_images([path], size=SIZE, mode=mode)
    sharp = loaded.sharp()
    assert sharp is not None
    _, _, height, width = loaded.images.shape
    times = sharp.shape[2] // width
    assert sharp.shape == (1, times * height, times * width, 3)
    assert sharp.shape[2] >= 500
    means = sharp[0].reshape(height, times, width, times, 3).mean((1, 3))
    small = loaded.images[0].permute(1, 2, 0).numpy()
    difference = np.abs(means - small)
    assert np.median(difference) < 0.01
    assert np.abs(np.roll(means, 1, 1) - small).mean() > 2 * difference.mean()
    assert load_images([path], size=518, mode=mode).sharp() is None


@pytest.mark.parametrize(("size", "patch_size"), [(64, 16), (84, 7), (63, 9)])
def test_figures_are_sharp_at_any_patch_size(
    size: int, patch_size: int, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = VGGT.from_config(
        img_size=size,
        patch_size=patch_size,
        embed_dim=32,
        depth=2,
        num_heads=2,
        patch_embed="conv",
    )
    decoded = []
    read = reading._still
    monkeypatch.setattr(reading, "_still", lambda *a, **k: decoded.append(a) or read(*a, **k))
    figures, _ = look(photos, model.eval(), 12)
    assert len(decoded) == len(photos)  # once each: the model's pictures and the sharp ones
    for _, figure in figures:
        shown = [image.get_array() for axes in figure.axes for image in axes.images]
        assert min(picture.shape[1] for picture in shown if picture.ndim == 3) >= 500


# -- the command ---------------------------------------------------------------------------------


def test_the_command(
    bundled: VGGT, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Pixel 75, 30 of the photo: 75.5 · 0.7 − 0.5 = 52.35 → col 3; 30.5 · 56 / 75 − 0.5 → row 1.
    assert command(*photos, "--query", "2:75,30px", "--head", "mean", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    token = 2 * P + 5 + 1 * COLS + 3
    assert f"token {token} (frame 2, token 13, patch 8, grid row 1, col 3), in photo 2.png" in out
    assert "untrained" in out
    assert f"3 of {SIZE}×56 pixels: {ROWS}×{COLS} patches + 5 special tokens each" in out
    assert "global attention, block 1, mean of 2 heads" in out
    for path in tmp_path.iterdir():
        assert f"  {path.name}\n" in out
    assert len(list(tmp_path.iterdir())) == 3

    # The printed matches are those of the numbers in the file.
    with np.load(tmp_path / "values.npz") as found:
        maps = found["global_attention_maps"]
    printed = [line.split() for line in out.split("global attention")[1].splitlines()[2:5]]
    for frame, (words, weights) in enumerate(zip(printed, maps, strict=True)):
        row, col = np.unravel_index(weights.argmax(), weights.shape)
        assert words[:5] == [str(frame), "row", f"{row},", "col", f"{col},"]
        x, y = (float(part) for part in words[7].split(","))
        assert x == pytest.approx((col + 0.5) * 14 / 0.7 - 0.5, abs=0.51)
        assert y == pytest.approx((row + 0.5) * 14 * 75 / 56 - 0.5, abs=0.51)
        assert float(words[8]) == pytest.approx(weights.max(), rel=5e-3)
        assert float(words[9]) == pytest.approx(100 * weights.sum(), abs=0.051)


def test_the_earlier_names_of_a_query(bundled: VGGT, photos: list[Path], tmp_path: Path) -> None:
    token = 2 * P + 5 + 1 * COLS + 3
    queries: list[list[Any]] = [["--pixel", "2:75,30"], ["--token", token]]
    queries += [["--query", text] for text in (f"token{token}", "2:r1,c3", f"2:{5 + COLS + 3}")]
    for number, query in enumerate(queries):
        out = tmp_path / str(number)
        assert command(*photos, *query, "--types", "global", "--out", out) == 0
        assert (out / f"global_block_1_head_0_token_{token}.png").is_file()
        assert (out / "values.npz").is_file()


def test_another_query_replaces_nothing(
    bundled: VGGT, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for query in ("middle", "r0,c0", "register2"):
        argv = (photos[0], "--query", query, "--format", "png,pdf", "--types", "global")
        assert command(*argv, "--out", tmp_path) == 0
    assert (tmp_path / "values.npz").is_file()
    assert len(list(tmp_path.glob("values_*.npz"))) == 2
    assert len(list(tmp_path.glob("*.pdf"))) == 3
    assert "next: vistvis demo " in capsys.readouterr().out


def test_a_trained_model_is_not_called_untrained(
    bundled: VGGT,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundled, "trained", True)
    assert command(photos[0], "--types", "global", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "untrained" not in out
    assert "frame attention" not in out


def test_the_bundled_model_says_what_to_look_at(
    bundled: VGGT,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundled, "default", {"size": 56, "block": 0, "head": 1})
    chosen = (photos[0], "--types", "frame", "--out", tmp_path)
    assert command(*chosen) == 0
    out = capsys.readouterr().out
    assert "1 of 56×42 pixels" in out
    assert "frame attention, block 0, head 1" in out
    assert command(*chosen, "--size", SIZE, "--block", 1, "--head", 0) == 0
    out = capsys.readouterr().out
    assert f"1 of {SIZE}×56 pixels" in out
    assert "frame attention, block 1, head 0" in out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nothing.jpg"], "nothing.jpg"),
        (["{broken}"], "broken.jpg"),
        (["{photo}", "--block", "2"], "blocks 0…1"),
        (["{photo}", "--head", "9"], "--head 9: the model has heads 0…1"),
        (["{photo}", "--pixel", "1:3,3"], "no frame 1, only 0…0"),
        (["{photo}", "--pixel", "0:100,3"], "outside the 100×75 photo"),
        (["{photo}", "--query", "r4,c0"], "query 'r4,c0'"),
        (["{photo}", "--query", "register4"], "query 'register4'"),
        (
            ["{photo}", "--size", "225"],
            "--size 225: the model's patches are 14 pixels wide",
        ),
        (["{folder}"], "broken.jpg"),
        (["https://a.b/c.jpg"], "download it first"),
        (["{photo}", "--model", "timm:x"], "takes vggt:NAME"),
        (["{photo}", "--model", "vitt"], "no such file"),
        (["{photo}", "--model", "{photo}"], "photo"),
        (["{photo}", "--model", "./no/such/folder"], "no/such/folder"),
        (["{photo}", "--size", "13"], "13"),
    ],
)
def test_wrong_input_is_one_line(
    argv: list[str],
    line: str,
    bundled: VGGT,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    out = tmp_path / "out"
    filled = [part.format(photo=photos[0], broken=broken, folder=tmp_path) for part in argv]
    assert command(*filled, "--out", out) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("vistvis demo: error: ")
    assert printed.err.count("\n") == 1
    assert line in printed.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--pixel", "12,13"], "FRAME:X,Y is meant, or --query FRAME:X,Ypx; got '12,13'"),
        (["--pixel", "0:1,2", "--token", "3"], "not allowed with"),
        (["--head", "median"], "'mean' or 'max'"),
        (["--types", "frame,cross"], "frame, global or frame,global"),
        (["--types", ","], "frame, global or frame,global"),
        (["--dtype", "int8"], "invalid choice"),
        (["--device", "cuda:31"], "CUDA"),
        (["--device", "meta"], "argument --device: 'meta' can't be computed on here; use cpu"),
    ],
)
def test_wrong_arguments_are_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(*argv)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_a_moved_token_is_one_plain_line(
    bundled: VGGT, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = photos[0]
    assert command(photo, "--token", 10**6, "--types", "frame", "--out", tmp_path) == 0
    err = capsys.readouterr().err
    assert err.startswith("vistvis demo: warning: token_idx 1000000 is outside")
    assert err.count("\n") == 1
    special = ("--token", 1, "--allow-special", "--types", "frame")
    assert command(photo, *special, "--out", tmp_path) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "token 1 (frame 0, token 1, register)" in printed.out


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "vistvis demo a.jpg b.jpg c.jpg --query 0:120,80px --out DIR" in out


def test_the_sample_views_need_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model and views, as the README's first command runs them."""
    assert len(sample_views()) == 3
    assert command("--out", tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 3
    assert "strongest patch" in capsys.readouterr().out


def test_a_missing_model_file_says_so(tmp_path: Path, photos: list[Path]) -> None:
    with pytest.raises((CheckpointError, InputError), match="gone"):
        demo_visualize_token_attention(photos, model=tmp_path / "gone")


def test_sites_choose_blocks_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--sites", "global_block_[12]", "--out", str(tmp_path)]) == 2
    assert "global_block_1" in capsys.readouterr().err
    words = ["demo", "--query", "0:middle", "--out", str(tmp_path)]
    assert cli.main([*words, "--sites", "global_block_1", "*_block_3"]) == 0
    drawn = sorted(path.name.partition("_head")[0] for path in tmp_path.glob("*.png"))
    assert drawn == ["frame_block_3", "global_block_1", "global_block_3"]
    assert "replaced" not in capsys.readouterr().out
    assert cli.main([*words, "--sites", "global_block_1"]) == 0
    assert "replaced what was there" in capsys.readouterr().out
    assert cli.main([*words, "--sites", "global_block_1", "--types", "frame"]) == 2
    assert "none of --sites is of these" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--sites", "global_block_1", "--block", "0"])
    assert "not allowed with" in capsys.readouterr().err
