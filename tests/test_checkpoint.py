"""Weights from files: strict, economical, and wary of what a file may hold."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from golden import published_1b_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from vggt_adapter import VGGT, VGGTConfig, ViTConfig, load_checkpoint, save_checkpoint
from vggt_adapter.checkpoint import infer_config
from vggt_adapter.model import load_tiny
from vistvis.errors import CheckpointError, InputError

ROOT = Path(__file__).parents[1]
CONV = VGGTConfig(embed_dim=32, depth=2, num_heads=2, patch_embed="conv")
VIT = VGGTConfig(
    img_size=56,
    embed_dim=384,  # as wide as a DINOv2: its heads are then known without being told
    depth=1,
    num_heads=4,
    mlp_ratio=2.0,
    num_register_tokens=2,
    patch_embed=ViTConfig(depth=2, num_heads=6, mlp_ratio=3.0, num_register_tokens=1),
)


@pytest.fixture
def model() -> VGGT:
    return VGGT(CONV).eval()


def same(one: VGGT, other: VGGT) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def published(model: VGGT) -> dict[str, Tensor]:
    """As the hub has it: the aggregator beside heads."""
    heads = {"camera_head.trunk.weight": torch.rand(8, 8), "depth_head.scale": torch.rand(3)}
    return {**model.state_dict(), **heads}


# -- what loads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONV, VIT], ids=["conv", "vit"])
@pytest.mark.parametrize("form", ["safetensors", "pt", "nested", "wrapped", "bare", "folder"])
def test_round_trip(tmp_path: Path, config: VGGTConfig, form: str) -> None:
    model = VGGT(config).eval()
    weights, source = published(model), tmp_path / "model.safetensors"
    if form in ("pt", "nested"):
        source = tmp_path / "model.pt"
        torch.save({"model": weights, "epoch": 3} if form == "nested" else weights, source)
    elif form == "wrapped":
        save_file({f"module.{name}": value for name, value in weights.items()}, source)
    elif form == "bare":
        save_file(model.aggregator.state_dict(), source)
    else:
        save_file(weights, source)
    loaded = VGGT.from_pretrained(tmp_path if form == "folder" else source)
    assert loaded.trained
    assert not loaded.training
    assert same(loaded, model)
    # A convolution does not tell the size of the pictures it was trained on.
    assert loaded.config == config
    images = torch.rand(2, 3, 28, 42)
    assert torch.equal(loaded(images)[0][-1], model(images)[0][-1])
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert loaded.aggregator.image_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_no_registers_at_all(tmp_path: Path) -> None:
    config = VGGTConfig(
        embed_dim=32, depth=1, num_heads=2, num_register_tokens=0, patch_embed="conv"
    )
    model = VGGT(config).eval()
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "model.safetensors"))
    assert same(loaded, model)
    tokens, start = loaded(torch.rand(1, 3, 28, 28))
    assert (start, tokens[0].shape[2]) == (1, 5)


def test_the_1b_sizes_follow_from_its_shapes() -> None:
    shapes = {
        name.removeprefix("aggregator."): shape for name, shape in published_1b_shapes().items()
    }
    assert infer_config(shapes) == VGGTConfig()


@pytest.mark.parametrize("width", [32, 128, 512])
def test_heads_that_shapes_cannot_tell_are_not_guessed(width: int) -> None:
    config = VGGTConfig(
        img_size=28, embed_dim=width, depth=1, num_heads=2, patch_embed=ViTConfig(1, 4)
    )
    shapes = {name: tuple(t.shape) for name, t in VGGT(config).aggregator.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{width} wide, and DINOv2 has 384, 768, 1024"):
        infer_config(shapes)


def test_a_saved_header_tells_what_shapes_cannot(tmp_path: Path) -> None:
    config = VGGTConfig(
        img_size=28, embed_dim=32, depth=1, num_heads=2, patch_embed=ViTConfig(1, 4)
    )
    model = VGGT(config).eval()
    file = save_checkpoint(model, tmp_path / "mine.safetensors")
    loaded = load_checkpoint(file)
    assert loaded.config == config
    assert same(loaded, model)
    save_file(model.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"heads of the patch embedding.*32 wide.*config="):
        load_checkpoint(file)
    assert load_checkpoint(file, config=config).config == config


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, None])
def test_types(tmp_path: Path, model: VGGT, form: str, dtype: torch.dtype | None) -> None:
    file = tmp_path / f"model.{form}"
    (save_file if form == "safetensors" else torch.save)(published(model), file)
    loaded = load_checkpoint(file, dtype=dtype, device="cpu")
    expected = VGGT(CONV)
    expected.load_state_dict(model.state_dict())
    expected = expected.to(dtype) if dtype else expected
    assert same(loaded, expected)
    assert torch.equal(loaded.aggregator.image_std, expected.aggregator.image_std)


def test_the_file_may_change_after_loading(tmp_path: Path, model: VGGT) -> None:
    file = save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(file)
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(b"\0" * size)
    assert same(loaded, model)


def test_heads_are_never_read(tmp_path: Path, model: VGGT, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(published(model), tmp_path / "model.safetensors")
    read: list[str] = []
    original = safetensors.safe_open

    class Listening:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.opened = original(*args, **kwargs)

        def __enter__(self) -> Listening:
            self.opened.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.opened.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Listening)
    assert same(load_checkpoint(tmp_path), model)
    assert set(read) == set(model.state_dict())


def test_saving_can_shrink_and_leaves_no_half_file(
    tmp_path: Path, model: VGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_checkpoint(model, tmp_path / "small.safetensors", dtype=torch.float16)
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(model, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(InputError, match=r"written as \.safetensors"):
        save_checkpoint(model, tmp_path / "model.pt")


# -- memory ----------------------------------------------------------------------------------------

HARNESS = """
import os, sys, threading, time, torch
from vggt_adapter import VGGT, VGGTConfig
torch.set_num_threads(1)
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
def naive(source, dtype):
    from safetensors.torch import load_file
    model = VGGT(VGGTConfig(embed_dim=384, depth=8, num_heads=6, patch_embed="conv"))
    model.load_state_dict(load_file(source), strict=False)
    return model.to(dtype)
how, source, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
import safetensors.torch, tqdm
VGGT.from_pretrained(sys.argv[4], dtype=dtype)   # whatever is loaded or started once
sys.setswitchinterval(1e-4)
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = naive(source, dtype) if how == "naive" else VGGT.from_pretrained(source, dtype=dtype)
done = True; thread.join()
size = sum(p.nbytes for p in model.parameters())
assert size > 20e6 and {p.dtype for p in model.parameters()} == {dtype}
print((max(peak, anonymous()) - before) / size)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """114 MB of aggregator beside 120 MB of heads, in both forms."""
    folder = tmp_path_factory.mktemp("large")
    weights = VGGT(VGGTConfig(embed_dim=384, depth=8, num_heads=6, patch_embed="conv")).state_dict()
    heads = {f"depth_head.{i}": torch.ones(5_000_000) for i in range(6)}
    save_file({**heads, **weights}, folder / "large.safetensors")
    torch.save({**heads, **weights}, folder / "large.pt")
    small = VGGT(CONV)
    save_file(small.state_dict(), folder / "small.safetensors")
    torch.save(small.state_dict(), folder / "small.pt")
    return folder


def private_memory(folder: Path, form: str, dtype: str, how: str = "ours") -> float:
    """Largest private memory while loading, over the bytes of the loaded weights."""
    large, small = str(folder / f"large.{form}"), str(folder / f"small.{form}")
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, how, large, dtype, small],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "bfloat16"), ("pt", "float32")])
def test_loading_needs_no_second_copy(large: Path, form: str, dtype: str) -> None:
    assert 0.9 <= private_memory(large, form, dtype) <= 1.15


@linux
def test_the_memory_test_sees_a_second_copy(large: Path) -> None:
    assert private_memory(large, "safetensors", "bfloat16", how="naive") > 1.5


# -- what does not load ----------------------------------------------------------------------------


def test_all_that_does_not_fit_in_one_error(tmp_path: Path, model: VGGT) -> None:
    weights = published(model)
    del weights["aggregator.frame_blocks.1.norm1.weight"]
    del weights["aggregator.patch_embed.proj.bias"]
    weights["aggregator.extra"] = torch.zeros(1)
    weights["aggregator.global_blocks.0.mlp.fc2.bias"] = torch.zeros(7)
    for file in (tmp_path / "model.safetensors", tmp_path / "model.pt"):
        (save_file if file.suffix == ".safetensors" else torch.save)(weights, file)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(file)
        text = str(caught.value)
        assert str(file) in text
        assert "2 missing: patch_embed.proj.bias; frame_blocks.1.norm1.weight" in text
        assert "1 unexpected: extra" in text
        assert "1 of another shape: global_blocks.0.mlp.fc2.bias is (7,), must be (32,)" in text
        assert "camera_head" not in text


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"encoder.weight": torch.rand(2), "encoder.bias": torch.rand(2)}, file)
    with pytest.raises(CheckpointError, match=r"one VGGT aggregator.*2 tensors: encoder"):
        load_checkpoint(file)
    save_file({"aggregator.camera_token": torch.rand(1, 2, 1, 8)}, file)
    with pytest.raises(CheckpointError, match=r"must have a tensor like.*q_norm"):
        load_checkpoint(file)


def test_shapes_that_contradict_each_other(model: VGGT) -> None:
    shapes = {n: tuple(v.shape) for n, v in model.aggregator.state_dict().items()}
    shapes["camera_token"] = (1, 2, 1, 33)
    with pytest.raises(CheckpointError, match=r"contradict.*embed_dim must be a multiple"):
        infer_config(shapes)


def test_a_wrong_config_is_seen(tmp_path: Path, model: VGGT) -> None:
    file = save_checkpoint(model, tmp_path / "model.safetensors")
    deeper = VGGTConfig(embed_dim=32, depth=3, num_heads=2, patch_embed="conv")
    with pytest.raises(CheckpointError, match=r"36 missing"):
        load_checkpoint(file, config=deeper)
    save_file(model.state_dict(), file, metadata={"vistvis.config": '{"deep": 3}'})
    with pytest.raises(CheckpointError, match=r"header of .*no 'deep'"):
        load_checkpoint(file)


def test_damaged_safetensors(tmp_path: Path, model: VGGT) -> None:
    file = save_checkpoint(model, tmp_path / "model.safetensors")
    whole = file.read_bytes()
    header = bytearray(whole)
    header[20] ^= 0xFF
    for damaged in (b"", whole[:4], whole[:500], whole[:-10], bytes(header), b"x" * 1000):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*fetch the file again"):
            load_checkpoint(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, model: VGGT, value: float) -> None:
    weights = model.state_dict()
    weights["aggregator.frame_blocks.0.norm1.weight"][3] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"frame_blocks\.0\.norm1\.weight.*damaged"):
        load_checkpoint(tmp_path)


def test_weights_that_do_not_fit_the_type(tmp_path: Path, model: VGGT) -> None:
    weights = model.state_dict()
    weights["aggregator.frame_blocks.0.norm1.weight"][3] = 1e6
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm1\.weight.*do not fit torch\.float16"):
        load_checkpoint(tmp_path, dtype=torch.float16)
    weights["aggregator.frame_blocks.0.norm1.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm1\.weight is torch\.int8"):
        load_checkpoint(tmp_path)


def test_damaged_torch_files(tmp_path: Path, model: VGGT) -> None:
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    inside = bytearray(whole)  # one bit of one weight: only the checksum can tell
    inside[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    for damaged in (b"", whole[: len(whole) // 2], bytes(inside), b"x" * 1000):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.pt.*cannot be read"):
            load_checkpoint(file)
    for content in ([1, 2], {"model": 3}):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match="must hold"):
            load_checkpoint(file)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_never_run(tmp_path: Path, model: VGGT, legacy: bool) -> None:
    file, target = tmp_path / "model.pt", tmp_path / "run"
    content = {**model.state_dict(), "evil": Malicious(target)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"model\.pt.*cannot be read"):
        load_checkpoint(file)
    file.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(CheckpointError, match=r"model\.pt.*cannot be read"):
        load_checkpoint(file)
    assert not target.exists()
    torch.load(_saved(tmp_path / "witness.pt", Malicious(target)), weights_only=False)
    assert target.exists()  # so the file above would have done harm


def _saved(file: Path, content: object) -> Path:
    torch.save(content, file)
    return file


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors.*does not exist"):
        load_checkpoint(str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="none of them here"):
        load_checkpoint("some/where/else")
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors or model\.pt"):
        load_checkpoint(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"several weights files \(a\.pt, b\.pt\)"):
        load_checkpoint(tmp_path)


# -- the hub ---------------------------------------------------------------------------------------


def test_the_hub_is_asked_and_pt_is_second_choice(
    tmp_path: Path, model: VGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    torch.save(published(model), tmp_path / "model.pt")
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str) -> str:
        asked.append((repo, name))
        if name == "model.safetensors":
            raise errors.EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(VGGT.from_pretrained("facebook/VGGT-1B"), model)
    assert asked == [
        ("facebook/VGGT-1B", "model.safetensors"),
        ("facebook/VGGT-1B", "model.pt"),
    ]
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("cable cut"))
    )
    with pytest.raises(CheckpointError, match=r"cable cut.*from_pretrained\('path/to/model"):
        VGGT.from_pretrained("facebook/VGGT-1B")


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from vggt_adapter import VGGT\n"
        "try: VGGT.from_pretrained('facebook/VGGT-1B')\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("CheckpointError cannot get 'facebook/VGGT-1B'"), done.stderr
    assert "VGGT.from_pretrained('path/to/model.safetensors')" in done.stdout


# -- devices and types -----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_that_is_not_there(tmp_path: Path, model: VGGT) -> None:
    file = save_checkpoint(model, tmp_path / "model.safetensors")
    for make in (lambda: load_checkpoint(file, device="cuda"), lambda: VGGT.tiny(device="cuda:1")):
        with pytest.raises(InputError, match=r"'cuda.*this machine has no CUDA device; use cpu"):
            make()


def test_devices_and_types_that_are_none(tmp_path: Path, model: VGGT) -> None:
    file = save_checkpoint(model, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="device must be like"):
        load_checkpoint(file, device="toaster")
    for wrong in (torch.int8, "bfloat16"):
        with pytest.raises(InputError, match="floating torch type"):
            load_checkpoint(file, dtype=wrong)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_straight_to_cuda(tmp_path: Path, model: VGGT) -> None:
    file = save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(file, device="cuda", dtype=torch.bfloat16)
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    assert loaded.aggregator.image_mean.is_cuda
    images = torch.rand(2, 3, 28, 28, device="cuda")
    assert loaded(images)[0][-1].isfinite().all()


# -- the bundled small model -----------------------------------------------------------------------


def test_tiny_runs() -> None:
    model = VGGT.tiny()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.rand(2, 3, 28, 42))[0][-1].isfinite().all()
    assert {p.dtype for p in VGGT.tiny(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_tiny_without_weights_is_random_and_says_so(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    one, other = load_tiny(folder=tmp_path), load_tiny(folder=tmp_path)
    assert same(one, other)
    assert not one.trained
    assert one.default == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_tiny_with_weights(tmp_path: Path, model: VGGT) -> None:
    file = save_checkpoint(model, tmp_path / "vggt_tiny.safetensors", dtype=torch.float16)
    told = {
        "config": CONV.to_dict(),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "default": {"block": 1},
    }
    description = tmp_path / "vggt_tiny.json"
    description.write_text(json.dumps(told))
    loaded = load_tiny(folder=tmp_path)
    assert loaded.trained
    assert loaded.default == {"block": 1}
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}

    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"vggt_tiny\.safetensors.*SHA-256.*install"):
        load_tiny(folder=tmp_path)
    for text in ("", "{}", "[]", '{"config": {"deep": 1}, "sha256": ""}'):
        description.write_text(text)
        with pytest.raises(CheckpointError, match=r"vggt_tiny\.json must stand beside"):
            load_tiny(folder=tmp_path)
    description.unlink()
    with pytest.raises(CheckpointError, match=r"vggt_tiny\.json must stand beside"):
        load_tiny(folder=tmp_path)
