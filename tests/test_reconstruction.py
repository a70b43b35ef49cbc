"""Overlays from stored layers and from runs, against a plain reference; the quick start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout, state
from vistvis.decorators.overlays import (
    overlay_query_to_frame_attention,
    run_overlay_for_reconstruction,
)
from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.errors import IndexOutOfRange, InputError, LayoutError, StoreError, VistvisWarning
from vistvis.images import to_rgb
from vistvis.store.formats import read_attention, write
from vistvis.views.painting import lay_over, normalizer, resize

# Grid of 3 × 4 patches of 8 pixels, 2 special tokens, 3 frames: P = 14, N = 42.
PATCH, SPECIAL, FRAMES, ROWS, COLS = 8, 2, 3, 3, 4
P = SPECIAL + ROWS * COLS
N = FRAMES * P
LAYOUT = TokenLayout(FRAMES, (ROWS, COLS), ("camera", "register"), PATCH)
METADATA = StaticMetadata(PATCH, SPECIAL)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 2, frames: int = FRAMES) -> torch.Tensor:
    return torch.rand(batch, frames, 3, ROWS * PATCH, COLS * PATCH, generator=generator(9))


def sharp(
    batch: int = 2, heads: int = 3, queries: int = N, keys: int = N, seed: int = 0
) -> Attention:
    g = generator(seed)
    query = torch.randn(batch, heads, queries, 8, generator=g) * 3
    return Attention(query=query, key=torch.randn(batch, heads, keys, 8, generator=g))


def stored(
    base: Path, *, ending: str = ".pt", layers: tuple[int, ...] = (0, 2, 10)
) -> AttentionPath:
    paths = AttentionPath(str(base), "demo", f"attn{ending}")
    for layer in layers:
        write(sharp(seed=layer), paths.attn_layer_file(layer))
    write(pictures(), paths.input_layer_file(0))
    return paths


def reference(
    weights: np.ndarray, picture: torch.Tensor, *, alpha: float = 0.55, cmap: str = "inferno"
) -> np.ndarray:
    """One overlay the long way: Pillow resizes in float, matplotlib colours, numpy screens."""
    import matplotlib

    grid = weights.reshape(ROWS, COLS).astype(np.float64)
    grid = (grid - grid.min()) / (grid.max() - grid.min() + 1e-8)
    size = (COLS * PATCH, ROWS * PATCH)
    large = Image.fromarray(grid.astype(np.float32), mode="F").resize(
        size, Image.Resampling.BILINEAR
    )
    heat = matplotlib.colormaps[cmap](np.asarray(large))[..., :3]
    grey = picture.permute(1, 2, 0).numpy() @ np.array((0.299, 0.587, 0.114))
    return 255 * (heat + (1 - heat) * (1 - alpha) * grey[..., None])


def opened(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.float64)


def draw(paths: Any, output: Path, **options: Any) -> dict[Any, list[str]]:
    given: dict[str, Any] = {
        "query_frame_idx": 1,
        "query_idx": 5,
        "key_frame_idx": 2,
        "head": "mean",
        "output_path": output,
        "progress": False,
    }
    if isinstance(paths, AttentionPath):
        given["metadata"] = METADATA
    return run_overlay_for_reconstruction(paths, **(given | options))


# -- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ".npy", ".npz", ".safetensors"])
def test_overlays_show_the_weights_that_were_stored(tmp_path: Path, ending: str) -> None:
    paths = stored(tmp_path, ending=ending)
    found = draw(paths, tmp_path / "o", query_idx=[5, 0], head="all", batch_idx=1)
    assert list(found) == [(i, h) for i in (0, 2, 10) for h in (0, 1, 2, "mean")]
    for (layer, head), files in found.items():
        assert [os.path.relpath(f, tmp_path / "o") for f in files] == [
            f"layer=layer_{layer}/head={head}/overlays/overlay_{q}_frame_2.png" for q in (5, 0)
        ]
        dense = sharp(seed=layer).dense()[1]
        weights = dense.mean(0) if head == "mean" else dense[head]
        for query, file in zip((5, 0), files, strict=True):
            row = weights[P + query, 2 * P + SPECIAL : 3 * P].numpy()
            # The colour table has steps: a value beside a step may fall on its other side.
            off = np.abs(opened(file) - reference(row, pictures()[1, 2]))
            assert np.quantile(off, 0.9) <= 0.8
            assert off.max() <= 4


def test_the_reference_can_tell_tokens_heads_and_frames_apart(tmp_path: Path) -> None:
    (file,) = draw(stored(tmp_path), tmp_path / "o", head=1, layers=[2])[2, 1]
    dense = sharp(seed=2).dense()

    def off(batch: int, head: int, query: int, keys: int) -> float:
        row = dense[batch, head, query, keys : keys + ROWS * COLS].numpy()
        return float(np.abs(opened(file) - reference(row, pictures()[0, 2])).max())

    right = (0, 1, P + 5, 2 * P + SPECIAL)
    assert off(*right) <= 3
    for wrong in (
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, -1),
        (0, 0, P, 0),
        (0, 0, 0, -P),
    ):
        assert off(*(a + b for a, b in zip(right, wrong, strict=True))) > 20


def test_key_frames_as_a_list_and_all_of_them(tmp_path: Path) -> None:
    paths = stored(tmp_path, layers=(0,))
    single = draw(paths, tmp_path / "a", key_frame_idx=2)[0, "mean"]
    listed = draw(paths, tmp_path / "b", key_frame_idx=[2, 0])[0, "mean"]
    every = draw(paths, tmp_path / "c", key_frame_idx="all")[0, "mean"]
    assert [Path(f).name for f in single] == ["overlay_5_frame_2.png"]
    assert [Path(f).name for f in listed] == ["overlay_5_frame_2.png", "overlay_5_frame_0.png"]
    assert [Path(f).name for f in every] == [f"overlay_5_frame_{k}.png" for k in range(3)]
    assert (
        Path(single[0]).read_bytes() == Path(listed[0]).read_bytes() == Path(every[2]).read_bytes()
    )
    assert Path(every[0]).read_bytes() != Path(every[2]).read_bytes()


def test_query_frames_show_the_query(tmp_path: Path) -> None:
    paths = stored(tmp_path, layers=(0,))
    draw(paths, tmp_path / "o", query_idx=[SPECIAL + 6, 1])
    plain = to_rgb(pictures()[0, 1])
    patch = opened(tmp_path / "o/query_frames" / f"query_image_{SPECIAL + 6}.png") != plain
    rows, cols = np.nonzero(patch.any(-1))
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (6, 17, 14, 25)
    whole = opened(tmp_path / "o/query_frames/query_image_1.png") != plain
    rows, cols = np.nonzero(whole.any(-1))
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (0, 23, 0, 31)
    assert not whole[8:16, 8:24].any()


@pytest.mark.parametrize("kind", ["bytes", "levels", "half", "grey"])
def test_pictures_of_every_kind(tmp_path: Path, kind: str) -> None:
    paths = stored(tmp_path, layers=(0,))
    images = (pictures() * 255).round()
    expected = images[0, 2]
    converted = {
        "bytes": images.to(torch.uint8),
        "levels": images,
        "half": (images / 255).half(),
        "grey": images[:, :, :1].to(torch.uint8),
    }[kind]
    write(converted, paths.input_layer_file(0))
    (file,) = draw(paths, tmp_path / "o")[0, "mean"]
    row = sharp().dense()[0].mean(0)[P + 5, 2 * P + SPECIAL : 3 * P].numpy()
    shown = expected[:1].expand(3, -1, -1) if kind == "grey" else expected
    off = np.abs(opened(file) - reference(row, shown / 255))
    assert np.quantile(off, 0.9) <= 1.1


def test_cross_attention_of_two_frames(tmp_path: Path) -> None:
    paths = AttentionPath(str(tmp_path), "demo")
    cross = sharp(queries=P, keys=P)
    write(cross, paths.attn_layer_file(0))
    write(pictures(), paths.input_layer_file(0))
    (file,) = draw(paths, tmp_path / "o", is_cross_attention=True)[0, "mean"]
    row = cross.dense()[0].mean(0)[5, SPECIAL:].numpy()
    assert np.abs(opened(file) - reference(row, pictures()[0, 2])).max() <= 3
    with pytest.raises(LayoutError, match="is_cross_attention=True"):
        draw(paths, tmp_path / "o")
    with pytest.raises(InputError, match="one key_frame_idx"):
        draw(paths, tmp_path / "o", is_cross_attention=True, key_frame_idx="all")


def test_one_file_by_itself(tmp_path: Path) -> None:
    paths = stored(tmp_path, layers=(0,))
    files = overlay_query_to_frame_attention(
        paths.attn_layer_file(0),
        paths.input_layer_file(0),
        METADATA,
        1,
        [5, 6],
        2,
        1,
        tmp_path / "one",
    )
    assert files == [str(tmp_path / f"one/overlays/overlay_{q}_frame_2.png") for q in (5, 6)]
    whole = draw(paths, tmp_path / "o", head=1)[0, 1]
    assert Path(files[0]).read_bytes() == Path(whole[0]).read_bytes()
    assert (tmp_path / "one/query_frames/query_image_6.png").exists()
    with pytest.raises(InputError, match="head"):
        overlay_query_to_frame_attention(
            paths.attn_layer_file(0), paths.input_layer_file(0), METADATA, 1, 5, 2, "all", tmp_path
        )


def test_constant_attention_is_dark_not_noise(tmp_path: Path) -> None:
    paths = AttentionPath(str(tmp_path), "demo")
    write(torch.full((1, 1, N, N), 1 / N), paths.attn_layer_file(0))
    write(torch.zeros(1, FRAMES, 3, ROWS * PATCH, COLS * PATCH), paths.input_layer_file(0))
    (file,) = draw(paths, tmp_path / "o")[0, "mean"]
    assert len(np.unique(opened(file).reshape(-1, 3), axis=0)) == 1


# -- runs ----------------------------------------------------------------------------------------


class Sites(dict[str, Attention]):
    """What a run looks like from here."""

    images: torch.Tensor | None
    layout: TokenLayout | None


def a_run(**changes: Any) -> Sites:
    one = LAYOUT.frame_layout()
    frame = SiteInfo("f", kind="frame", query_layout=one, key_layout=one, frames_in_batch=True)
    whole = SiteInfo("g", kind="global", query_layout=LAYOUT, key_layout=LAYOUT)
    run = Sites(
        frame_block_0=sharp(batch=2 * FRAMES, queries=P, keys=P).with_site(frame),
        global_block_0=sharp(seed=1).with_site(whole),
        global_block_10=sharp(seed=2).with_site(whole),
        global_block_9=sharp(seed=3),
    )
    run.images, run.layout = pictures(), LAYOUT
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def test_a_run_is_drawn_like_stored_layers(tmp_path: Path) -> None:
    found = draw(a_run(), tmp_path / "o", layers="global_*", batch_idx=1)
    assert list(found) == [(f"global_block_{n}", "mean") for n in (0, 10, 9)]
    for seed, ((name, _), (file,)) in enumerate(found.items(), 1):
        assert file == str(tmp_path / f"o/layer={name}/head=mean/overlays/overlay_5_frame_2.png")
        row = sharp(seed=seed).dense()[1].mean(0)[P + 5, 2 * P + SPECIAL :].numpy()
        assert np.abs(opened(file) - reference(row, pictures()[1, 2])).max() <= 3


def test_frame_blocks_show_their_own_frame(tmp_path: Path) -> None:
    options = {"layers": ["frame_*"], "head": 2, "batch_idx": 1, "query_frame_idx": 2}
    (file,) = draw(a_run(), tmp_path / "o", key_frame_idx=2, **options)["frame_block_0", 2]
    row = sharp(batch=2 * FRAMES, queries=P, keys=P).dense()[FRAMES + 2, 2, 5, SPECIAL:].numpy()
    assert np.abs(opened(file) - reference(row, pictures()[1, 2])).max() <= 3
    with pytest.raises(InputError, match="within one frame"):
        draw(a_run(), tmp_path / "o", key_frame_idx=1, **options)
    with pytest.warns(VistvisWarning, match="'frame_block_0': attention within one frame.*frame 2"):
        (again,) = draw(a_run(), tmp_path / "p", key_frame_idx="all", **options)["frame_block_0", 2]
    assert Path(again).read_bytes() == Path(file).read_bytes()


def test_every_site_draws_what_it_has_and_the_rest_is_told(tmp_path: Path) -> None:
    run = a_run()
    run["other"] = sharp(queries=N - 1, keys=N - 1)
    with pytest.warns(VistvisWarning) as told:
        found = draw(run, tmp_path / "o", key_frame_idx="all")
    assert {name: len(files) for (name, _), files in found.items()} == {
        "frame_block_0": 1,
        "global_block_0": 3,
        "global_block_10": 3,
        "global_block_9": 3,
    }
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 2
    assert "'frame_block_0': attention within one frame" in texts[0]
    assert "left out 'other'" in texts[1]
    assert "41 queries" in texts[1]
    assert all(warning.filename == __file__ for warning in told)
    with pytest.warns(VistvisWarning, match="left out 'frame_block_0'"):
        found = draw(a_run(), tmp_path / "p", key_frame_idx=2)
    assert [name for name, _ in found] == ["global_block_0", "global_block_10", "global_block_9"]


@pytest.mark.parametrize("heads", [[2, 0], [2, "mean", 0], np.array([1, 2])])
def test_heads_as_a_list(tmp_path: Path, heads: Any) -> None:
    paths = stored(tmp_path, layers=(0,))
    every = draw(paths, tmp_path / "a", head="all")
    some = draw(paths, tmp_path / "b", head=[*heads, heads[0]])
    assert list(some) == [(0, head) for head in heads]
    for panel, (file,) in some.items():
        assert Path(file).read_bytes() == Path(every[panel][0]).read_bytes()


@pytest.mark.parametrize("norm", ["auto", "linear", "log", "percentile"])
def test_one_scale_over_the_key_frames(tmp_path: Path, norm: str) -> None:
    paths = stored(tmp_path, layers=(0,))
    files = draw(
        paths, tmp_path / "o", head=1, query_idx=SPECIAL + 6, key_frame_idx="all", norm=norm
    )
    row = sharp().dense()[0, 1, P + SPECIAL + 6].numpy().reshape(FRAMES, P)[:, SPECIAL:]
    maps = row.reshape(FRAMES, ROWS, COLS)
    scale = normalizer(maps, norm=norm, own=(1, 1, 2))
    for frame, file in enumerate(files[0, 1]):
        picture = pictures()[0, frame].permute(1, 2, 0).numpy()
        heat = resize(maps[frame], (ROWS * PATCH, COLS * PATCH))
        assert np.abs(opened(file) - lay_over(picture, heat, normalizer=scale)).max() <= 3
        above = (heat > scale.vmax).any()
        assert (opened(file) == 255).all(-1).any() == above
        assert norm != "auto" or above == (frame == 1)


def test_a_stored_run_and_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vistvis.cli import main

    run = a_run()
    vistvis.save_run(run, tmp_path / "run", images=run.images, layout=LAYOUT)
    look: dict[str, Any] = {"cmap_name": "viridis", "alpha": 0.4}
    live = draw(run, tmp_path / "a", layers="global_*", head="all", **look)
    with vistvis.open_run(tmp_path / "run") as opened_run:
        again = draw(opened_run, tmp_path / "b", layers="global_*", head="all", **look)
    assert {k: [Path(f).read_bytes() for f in v] for k, v in live.items()} == {
        k: [Path(f).read_bytes() for f in v] for k, v in again.items()
    }
    command = ["overlay", str(tmp_path / "run"), "-o", str(tmp_path / "c"), "-q", "5"]
    command += ["--query-frame", "1", "-k", "2", "--head", "all", "-l", "global_*", "--pdf"]
    command += ["--cmap", "viridis", "--alpha", "0.4"]
    assert main(command) == 0
    assert "12 overlays under" in capsys.readouterr().out
    for files in live.values():
        other = Path(str(files[0]).replace(str(tmp_path / "a"), str(tmp_path / "c")))
        assert other.read_bytes() == Path(files[0]).read_bytes()
    assert (tmp_path / "c/attention_query_5_frame_2.pdf").exists()
    assert main(["pdf", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a/attention_query_5_frame_2.pdf")


def test_the_command_line_on_stored_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vistvis.cli import main

    stored(tmp_path)
    command = ["overlay", str(tmp_path / "demo"), "-o", str(tmp_path / "o"), "-q", "5", "6"]
    command += ["-k", "all", "--patch-size", "8", "--special-tokens", "2", "-l", "2", "10"]
    assert main(command) == 0
    assert "12 overlays" in capsys.readouterr().out
    assert main([*command[:-3], "-l", "7"]) == 2
    assert "no layer 7; there are 0, 2, 10" in capsys.readouterr().err
    assert main([*command[:9], "--patch-size", "8"]) == 2
    assert "--special-tokens" in capsys.readouterr().err
    assert main(["overlay", str(tmp_path), "-o", str(tmp_path / "o"), "-q", "x"]) == 2


def test_a_model_of_single_pictures(tmp_path: Path) -> None:
    layout = TokenLayout(1, (ROWS, COLS), ("cls", "reg"), PATCH)
    run = Sites({"blocks.0.attn": sharp(queries=P, keys=P)})
    run.images, run.layout = pictures(frames=1)[:, 0], layout
    options = {"query_frame_idx": 0, "key_frame_idx": 0, "batch_idx": 1}
    (file,) = draw(run, tmp_path / "o", **options)["blocks.0.attn", "mean"]
    row = sharp(queries=P, keys=P).dense()[1].mean(0)[5, SPECIAL:].numpy()
    assert np.abs(opened(file) - reference(row, run.images[1])).max() <= 3
    assert draw(run, tmp_path / "p", metadata=METADATA, **options)


def test_runs_that_can_not_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="images=images"):
        draw(a_run(images=None), tmp_path)
    with pytest.raises(InputError, match="layout=layout"):
        draw(a_run(layout=None), tmp_path)
    with pytest.raises(LayoutError, match="pictures of shape"):
        draw(a_run(images=pictures(frames=2)), tmp_path)
    run = a_run()
    run["global_block_9"] = sharp(queries=N - 1, keys=N - 1)
    with pytest.raises(LayoutError, match="global_block_9 has 41 queries"):
        draw(run, tmp_path, layers="global_block_9")
    run["global_block_9"] = sharp().with_site(SiteInfo("w", kind="window"))
    with pytest.raises(InputError, match="within windows"):
        draw(run, tmp_path, layers="global_block_9")
    with pytest.raises(InputError, match="no layer 'x'"):
        draw(run, tmp_path, layers="x")
    with pytest.raises(InputError, match="open_run"):
        draw("runs/fern", tmp_path)
    assert not list(tmp_path.glob("**/*.png"))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"query_idx": P}, IndexOutOfRange, "query_idx"),
        ({"query_idx": -1}, IndexOutOfRange, "query_idx"),
        ({"query_idx": []}, InputError, "empty"),
        ({"query_idx": 1.5}, InputError, "whole number"),
        ({"query_idx": [1.5]}, InputError, "whole number"),
        ({"query_idx": "all"}, InputError, "interactive"),
        ({"query_frame_idx": FRAMES}, IndexOutOfRange, "query_frame_idx 3 is outside 0…2"),
        ({"key_frame_idx": FRAMES}, IndexOutOfRange, "key_frame_idx"),
        ({"key_frame_idx": "each"}, InputError, '"all"'),
        ({"key_frame_idx": True}, IndexOutOfRange, "key_frame_idx"),
        ({"batch_idx": 2}, IndexOutOfRange, "batch_idx"),
        ({"head": 3}, IndexOutOfRange, "head"),
        ({"head": "max"}, InputError, '"mean" or "all"'),
        ({"head": [0, 3]}, IndexOutOfRange, "head 3 is outside 0…2"),
        ({"head": []}, InputError, "head: the list is empty"),
        ({"head": ["all"]}, InputError, "head is a whole number"),
        ({"head": 1.5}, InputError, "head is a whole number or a list"),
        ({"norm": "sqrt"}, InputError, "norm is one of 'own', 'auto'"),
        ({"alpha": 2}, InputError, "alpha"),
        ({"cmap_name": "yet"}, InputError, "no colour map"),
        ({"metadata": StaticMetadata(8, 1)}, LayoutError, "42 queries"),
        ({"metadata": StaticMetadata(7, 2)}, InputError, "don't divide"),
        ({"layers": [5]}, InputError, "there are 0"),
    ],
)
def test_arguments_that_can_not_be(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        draw(stored(tmp_path, layers=(0,)), tmp_path / "o", **options)


def test_metadata_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = stored(tmp_path, layers=(0,))
    with pytest.raises(InputError, match="VIS_TVIS_METADATA_PATH"):
        draw(paths, tmp_path / "o", metadata=None)
    (tmp_path / "m.yaml").write_text(f"patch_size: {PATCH}\nnum_special_tokens: {SPECIAL}\n")
    monkeypatch.setenv("VIS_TVIS_METADATA_PATH", str(tmp_path / "m.yaml"))
    assert draw(paths, tmp_path / "o", metadata=None)


def test_rows_that_are_no_attention(tmp_path: Path) -> None:
    paths = stored(tmp_path, layers=(0,))
    dense = sharp().dense()
    for wrong, words in (
        (dense * 1.1, "sums to 1.1"),
        (dense.log(), "sum"),
        (dense * np.nan, "NaN"),
    ):
        write(wrong, paths.attn_layer_file(0))
        with pytest.raises(InputError, match=words):
            draw(paths, tmp_path / "o")
    for dtype in (torch.float16, torch.bfloat16):  # rows of these do not sum to 1 exactly
        write(dense.to(dtype), paths.attn_layer_file(0))
        assert draw(paths, tmp_path / "o")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no layers under"):
        draw(AttentionPath(str(tmp_path), "none"), tmp_path)
    paths = stored(tmp_path, layers=(0,))
    os.remove(paths.attn_layer_file(0))
    with pytest.raises(StoreError, match=r"no file .*attn\.pt"):
        draw(paths, tmp_path / "o")
    os.remove(paths.input_layer_file(0))
    with pytest.raises(StoreError, match=r"no file .*input\.pt"):
        draw(paths, tmp_path / "o")


def test_errors_of_writing_come_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = stored(tmp_path, layers=(0,))
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="can't make"):
        draw(paths, tmp_path / "file" / "o")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space"):
        draw(paths, tmp_path / "o")


def test_only_needed_rows_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = Attention.rows

    def watched(self: Attention, queries: Any, **options: Any) -> torch.Tensor:
        asked.append((queries, options))
        return rows(self, queries, **options)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the dense matrix was asked for")

    monkeypatch.setattr(Attention, "rows", watched)
    monkeypatch.setattr(Attention, "dense", never)
    draw(a_run(), tmp_path / "o", layers="global_*", head=1, query_idx=[5, 6])
    assert asked == [([P + 5, P + 6], {"batch": 0, "heads": [1]})] * 3


# -- the quick start -----------------------------------------------------------------------------


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    state.reset("demo")
    yield tmp_path
    state.reset("demo")


def quick_start() -> Mapping[str, Any]:
    """The quick start word for word."""
    # fmt: off
    from vistvis import visTvis_store


    @visTvis_store(base_folder_path="./runs", identifier="demo", file_name="attn.pt", folder_name="attn")  # noqa: E501
    def attn_func(attn_weight):  # type: ignore[no-untyped-def]
        # ... compute attn_weight ...
        return attn_weight

    from vistvis import visTvis_layer_counter


    @visTvis_layer_counter(identifier="demo", var_name="layer_idx")
    def run_blocks(blocks, inputs, layer_idx=0):  # type: ignore[no-untyped-def]
        for block in blocks:
            attn_weight = block(inputs)
            attn_func(attn_weight)  # stored under runs/demo/attn/layer_<idx>/attn.pt
            layer_idx += 1  # updates the visTvis layer state
        return int(layer_idx)
    # fmt: on
    return {"run_blocks": run_blocks}


def test_the_quick_start_word_for_word(in_tmp: Path) -> None:
    blocks = [torch.nn.Softmax(-1), torch.nn.Softmax(-1)]
    inputs = torch.randn(1, 4, 24, 24, generator=generator()) * 3  # 4 × 6 patches of 16 pixels
    assert quick_start()["run_blocks"](blocks, inputs) == 2
    for layer in (0, 1):
        file = in_tmp / f"runs/demo/attn/layer_{layer}/attn.pt"
        assert torch.equal(torch.load(file, weights_only=True), inputs.softmax(-1))
    store_input = vistvis.visTvis_store(
        base_folder_path="./runs", identifier="demo", file_name="input.pt", folder_name="input"
    )
    state.reset("demo")
    store_input(lambda: torch.rand(1, 1, 3, 64, 96, generator=generator()))()

    # fmt: off
    from vistvis import (
        AttentionPath,
        StaticMetadata,
        plot_attention_for_reconstruction,
        run_overlay_for_reconstruction,
    )

    paths = AttentionPath(base_dir="./runs", experiment_name="demo")
    metadata = StaticMetadata(patch_size=16, num_special_tokens=0)  # or set env VIS_TVIS_METADATA_PATH to a YAML file  # noqa: E501

    run_overlay_for_reconstruction(
        paths,
        query_frame_idx=0,
        query_idx=0,  # or "interactive" to select via GUI
        key_frame_idx=0,
        head="mean",  # or int / "all"
        output_path="./overlays_demo",
        metadata=metadata,
    )

    plot_attention_for_reconstruction("./overlays_demo")
    # fmt: on
    for layer in (0, 1):
        overlay_file = f"overlays_demo/layer=layer_{layer}/head=mean/overlays/overlay_0_frame_0.png"
        assert opened(in_tmp / overlay_file).shape == (64, 96, 3)
    assert (in_tmp / "overlays_demo/query_frames/query_image_0.png").exists()
    assert (in_tmp / "overlays_demo/attention_query_0_frame_0.pdf").read_bytes().startswith(b"%PDF")


def test_a_second_forward_goes_on_at_the_next_layer(in_tmp: Path) -> None:
    run_blocks = quick_start()["run_blocks"]
    inputs = torch.zeros(1, 1, 2, 2)
    assert run_blocks([torch.nn.Softmax(-1)] * 2, inputs) == 2
    assert run_blocks([torch.nn.Softmax(-1)] * 2, inputs) == 4
    state.reset("demo")
    assert run_blocks([torch.nn.Softmax(-1)], inputs) == 1
    assert AttentionPath("./runs", "demo").list_layers() == [0, 1, 2, 3]


def test_layers_of_the_published_package_are_read(tmp_path: Path) -> None:
    paths = AttentionPath(str(tmp_path), "demo")
    for name, value in (("attn", sharp().dense()), ("input", pictures())):
        folder = tmp_path / "demo" / name / "layer_0"
        folder.mkdir(parents=True)
        torch.save(value, folder / f"{name}.pt.pt")
    assert draw(paths, tmp_path / "o").keys() == {(0, "mean")}
    assert read_attention(paths.attn_layer_file(0)).shape == (2, 3, N, N)
