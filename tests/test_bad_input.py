"""Input that is none: bounded time and memory, and an error of ours."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_adapter import VGGTConfig, load_checkpoint, load_images
from vistvis import Attention, TokenLayout
from vistvis.decorators.decorate import visTvis_store
from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.errors import (
    CheckpointError,
    DenseLimitError,
    InputError,
    LayoutError,
    StoreError,
    VistvisError,
)
from vistvis.images import open_photo
from vistvis.models.loading import load_timm
from vistvis.store.formats import read, read_attention, write
from vistvis.views.overlay_folder import OverlayOutputPath


def within(megabytes: int, work: Callable[[], None]) -> None:
    """Run `work` in a forked process that may take so much more memory, and 20 seconds."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with open("/proc/self/statm") as file:
                taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limit = taken + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, "see stderr"


def test_the_limit_of_memory_is_one() -> None:
    within(100, lambda: None)
    with pytest.raises(AssertionError):
        within(100, lambda: [np.ones(2**25), None][1])  # 256 MB


# -- photos --------------------------------------------------------------------------------------


def test_a_very_long_photo(tmp_path: Path) -> None:
    Image.new("RGB", (1, 60_000)).save(tmp_path / "high.png")
    Image.new("RGB", (60_000, 1)).save(tmp_path / "wide.png")

    def work() -> None:
        with pytest.raises(InputError, match=r"high\.png.*1×60000.*mode='pad'"):
            load_images([tmp_path / "high.png"])
        assert load_images([tmp_path / "high.png"], mode="pad").images.shape == (1, 3, 518, 518)
        assert load_images([tmp_path / "wide.png"]).images.shape == (1, 3, 14, 518)

    within(300, work)


def test_a_photo_with_more_pixels_than_are_taken(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")

    def work() -> None:
        with pytest.raises(InputError, match=r"large\.png.*MAX_IMAGE_PIXELS"):
            load_images([tmp_path / "large.png"])

    within(200, work)


@pytest.mark.parametrize("ending", ["eps", "pdf", "ppm", "ico"])
def test_only_formats_of_photos(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (32, 32)).save(path)
    path = path.rename(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg.*JPEG, PNG"):
        load_images([path])


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_the_formats_that_are_meant(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (32, 32), (255, 0, 0)).save(path)
    assert load_images([path], size=56).images[0, 0].min() > 0.9


def test_only_regular_files_are_photos(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")

    def work() -> None:
        for path in (tmp_path / "pipe.jpg", "/dev/zero"):
            with pytest.raises(InputError, match="a pipe"), open_photo(path):
                pass
        for path in ("a\0b.jpg", "\ud800.jpg", tmp_path / "nothing.jpg", tmp_path):
            with pytest.raises(InputError):
                load_images([path])

    within(100, work)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of tags that are damaged
def test_damaged_photos_are_input_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for ending in ("jpg", "png", "webp", "tif", "bmp", "gif"):
        path = tmp_path / f"a.{ending}"
        picture.save(path)
        whole = path.read_bytes()
        for number in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 200), 3):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged if number % 3 else whole[: int(rng.integers(len(whole)))])
            with contextlib.suppress(InputError):
                load_images([path], size=28)


# -- what is said about tokens -------------------------------------------------------------------


LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LAUGHS, id="laughs"),
        pytest.param("patch_size: [" * 300, id="deep"),
        pytest.param("[" * 1_500, id="deeper"),
        pytest.param("patch_size: 14\n# " + " " * 5_000, id="long"),
        "patch_size: 2024-99-99\nnum_special_tokens: 1",
        "? {a: b}\n: c",
        "{patch_size: 14, num_special_tokens: 1" + "0" * 5_000 + "}",
        "patch_size: \0",
        "patch_size: !!python/object/apply:os.system [ls]",
        "patch_size: \U0001f600",
        "1",
    ],
)
def test_metadata_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)

    def work() -> None:
        with pytest.raises(InputError) as caught:
            StaticMetadata.from_yaml_file(tmp_path / "a.yaml")
        assert len(str(caught.value)) < 1000

    within(100, work)


def test_metadata_comes_from_regular_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")

    def work() -> None:
        for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path), "nowhere.yaml"):
            monkeypatch.setenv("VIS_TVIS_METADATA_PATH", path)
            with pytest.raises(StoreError):
                StaticMetadata.from_environment()
        for path in ("a\0b", "\ud800"):
            with pytest.raises(InputError, match="NUL"):
                StaticMetadata.from_yaml_file(path)

    within(100, work)


def test_more_special_tokens_than_fit() -> None:
    def work() -> None:
        with pytest.raises(LayoutError, match="special has at most"):
            StaticMetadata(14, 10**9).layout(1, (14, 14))
        with pytest.raises(LayoutError, match="behind has at most"):
            TokenLayout(1, (1, 1), behind=10**9)  # type: ignore[arg-type]

    within(100, work)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "", "{}", "[]", None, b"\xff"])
def test_json_of_metadata_that_is_none(text: Any) -> None:
    with pytest.raises(InputError):
        StaticMetadata.from_json(text)


LAYOUT = {"frames": 1, "grid": [1, 1], "special": [], "patch_size": [1, 1]}


@pytest.mark.parametrize(
    "data",
    [
        *(None, 3, "abc", [], [1, 2], {}, {"frames": 1}),
        *({**LAYOUT, name: value} for name in LAYOUT for value in (None, "a", 1.5, [[]], {"a": 1})),
        {**LAYOUT, "special": 10**12},
        {**LAYOUT, "before": 5},
        {**LAYOUT, "behind": [1]},
    ],
)
def test_layouts_that_are_none(data: Any) -> None:
    fine = isinstance(data, dict) and data.get("special") in ("a", {"a": 1})
    with contextlib.nullcontext() if fine else pytest.raises(LayoutError):
        TokenLayout.from_dict(data)


# -- single files --------------------------------------------------------------------------------


def test_arrays_that_unpack_to_much_more(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, data=np.zeros(2**27, np.uint8))
    assert path.stat().st_size < 10**6

    def work() -> None:
        for reading in (read, read_attention):
            with pytest.raises(DenseLimitError, match="max_bytes"):
                reading(path, max_bytes=2**26)

    within(100, work)
    assert read(path).one().shape == (2**27,)
    write(torch.ones(1000), path)  # not packed: no larger than the file itself
    assert len(read(path, max_bytes=0).one()) == 1000


def test_packed_torch_files_are_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"aggregator.camera_token": torch.zeros(2**25)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert packed.stat().st_size < 10**6

    def work() -> None:
        with pytest.raises(StoreError, match="compressed"):
            read(packed)
        with pytest.raises(CheckpointError, match="compressed"):
            load_checkpoint(packed)

    within(100, work)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_only_plain_tensors_are_read_and_written(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    for strange in (nested, torch.eye(3).to_sparse(), torch.ones(3, device="meta")):
        with pytest.raises(InputError, match="plain dense"):
            write(strange, tmp_path / "b.pt")
        torch.save(strange, tmp_path / "a.pt")
        with pytest.raises(StoreError):
            read(tmp_path / "a.pt")


@pytest.mark.parametrize("ending", [".pt", ".npy", ".npz", ".safetensors"])
def test_only_regular_files_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    os.mkfifo(path)

    def work() -> None:
        with pytest.raises(StoreError, match="a pipe"):
            read(path)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)

    within(100, work)
    for bad in (f"a\0b{ending}", f"\ud800{ending}"):
        with pytest.raises(InputError):
            read(bad)
        with pytest.raises(InputError):
            write(torch.ones(2), tmp_path / "a" / bad)


@pytest.mark.parametrize("ending", [".pt", ".npy", ".npz", ".safetensors"])
def test_a_full_disk_is_said_as_one(tmp_path: Path, ending: str) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # "File too large"
        with pytest.raises(StoreError, match="File too large"):
            write(torch.ones(2**17), tmp_path / f"a{ending}")
        assert not list(tmp_path.iterdir())

    within(200, work)


def _damaged(whole: bytes, number: int, rng: np.random.Generator) -> bytes:
    """Bytes flipped, most of them in front, where headers are; or cut short."""
    if number % 4 == 0:
        return whole[: int(rng.integers(len(whole)))]
    damaged = bytearray(whole)
    front = len(whole) if number % 4 == 1 else min(len(whole), 400)
    for place in rng.integers(0, front, 3):
        damaged[place] = rng.integers(256)
    return bytes(damaged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", [".pt", ".npy", ".npz", ".safetensors"])
def test_damaged_files_give_errors_of_ours(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / f"a{ending}"
    mask = torch.zeros(1, 1, 3, 3)
    write(Attention(query=torch.ones(1, 2, 3, 4), key=torch.ones(1, 2, 3, 4), mask=mask), path)
    whole = path.read_bytes()
    for number in range(300):
        path.write_bytes(_damaged(whole, number, rng))
        with contextlib.suppress(VistvisError):
            read_attention(path)


# -- checkpoints ---------------------------------------------------------------------------------


def _with_header(path: Path, config: str) -> None:
    """A safetensors file of one tensor that says it is a VGGT of these sizes."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    words = {"__metadata__": {"vistvis.config": config}, "aggregator.camera_token": entry}
    text = json.dumps(words).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))


@pytest.mark.parametrize(
    "config",
    [
        *('{"depth": 100000}', '{"num_register_tokens": 1000000000}', '{"embed_dim": 4e9}'),
        *('{"mlp_ratio": 1e300}', '{"mlp_ratio": NaN}', '{"mlp_ratio": "a"}', '{"depth": true}'),
        *('{"rope_frequency": []}', '{"init_values": null}', '{"patch_embed": {}}', "[[]]", "3"),
        '{"patch_embed": {"depth": 1000000, "num_heads": 16}}',
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"depth": ' + "9" * 5_000 + "}", id="digits"),
        '{"\\ud800": 1}',
        '{"embed_dim": 999936, "num_heads": 16, "patch_embed": "conv", "depth": 1}',
    ],
)
def test_junk_in_the_header_of_a_checkpoint(tmp_path: Path, config: str) -> None:
    path = tmp_path / "model.safetensors"
    _with_header(path, config)

    def work() -> None:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert "vistvis.config" in str(caught.value) or "does not fit" in str(caught.value)

    within(300, work)


@pytest.mark.parametrize("values", [None, [], {"patch_embed": {"depth": 2}}, {"mlp_ratio": -1.0}])
def test_sizes_that_are_none(values: Any) -> None:
    with pytest.raises(InputError):
        VGGTConfig.from_dict(values)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_damaged_checkpoints_give_errors_of_ours(tmp_path: Path, ending: str) -> None:
    from safetensors.torch import save

    rng = np.random.default_rng(0)
    tensors = {"aggregator.camera_token": torch.ones(1, 2, 1, 8), "aggregator.b": torch.ones(3)}
    stream = io.BytesIO()
    torch.save(tensors, stream)
    whole = save(tensors) if ending == "safetensors" else stream.getvalue()
    path = tmp_path / f"a.{ending}"
    for number in range(200):
        path.write_bytes(_damaged(whole, number, rng))
        with pytest.raises(VistvisError):
            load_checkpoint(path)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "txt"])
def test_junk_as_a_checkpoint(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    for junk in (b"junk" * 100, b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", b""):
        path.write_bytes(junk)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    model = f"vit_tiny_patch16_224@{path}"
    with pytest.raises(CheckpointError, match="the weights of vit_tiny_patch16_224"):
        load_timm(model, device=None, dtype=None, images=[], size=None)


# -- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "~\ud800"])
def test_paths_that_no_file_system_takes(path: str) -> None:
    for use in (
        lambda: AttentionPath(path, "a"),
        lambda: OverlayOutputPath(path),
        lambda: visTvis_store(path, "a", "b.pt", "c"),
        lambda: load_images(path),
        lambda: load_checkpoint(path),
    ):
        with pytest.raises(InputError):
            use()
