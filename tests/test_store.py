"""Runs on disk: what is read is what was written, and what is on disk is sound at every moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from laws import AttentionLaws, reference_weights
from torch import Tensor, nn

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout, WindowInfo
from vistvis.errors import CaptureError, InputError, SiteError, StoreError
from vistvis.images import image_tensor
from vistvis.store import Run, RunWriter, clean_run, open_run, save_run
from vistvis.store import records as records_module
from vistvis.store.folders import LocalFolder, RemoteFolder
from vistvis.store.tensors import Encoded

LAYOUT = TokenLayout(2, (3, 4), ("camera", "register"), patch_size=(14, 16))
N = LAYOUT.num_tokens


def site(name: str, **changes: Any) -> SiteInfo:
    return replace(SiteInfo(name, query_layout=LAYOUT, key_layout=LAYOUT), **changes)


def attention(name: str = "global_block_0", *, seed: int = 0, **changes: Any) -> Attention:
    made = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, N, 8, generator=made)
    key = torch.randn(1, 2, N, 8, generator=made)
    return Attention(**{"query": query, "key": key, "site": site(name), **changes})


def captured(count: int = 4, *, seed: int = 0) -> dict[str, Attention]:
    names = [f"global_block_{number}" for number in range(count)]
    return {name: attention(name, seed=100 * seed + i) for i, name in enumerate(names)}


def cut_short(path: Any, given: dict[str, Attention], count: int, *, expect: bool = True) -> None:
    """Write some sites of a run, and have the model fail then."""
    with (
        contextlib.suppress(ZeroDivisionError),
        RunWriter(path, expected=given if expect else None) as writer,
    ):
        for name in list(given)[:count]:
            writer.write(name, given[name])
        _ = 1 / 0


def file_of(run: Path, name: str) -> Path:
    """The file of a stored site."""
    return run / open_run(run, strict=False)._manifest.sites[name].file.file


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def same(stored: Attention, given: Attention) -> None:
    """Equal bit for bit, in everything that decides a weight."""
    for part in ("query", "key", "mask", "weights"):
        left, right = getattr(stored, part), getattr(given, part)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            assert torch.equal(left.expand_as(right), right)
    assert torch.equal(torch.as_tensor(stored.scale), torch.as_tensor(given.scale))
    assert type(stored.scale) is type(given.scale)
    assert stored.causal == given.causal
    assert stored.shape == given.shape


def all_same(run: Run, given: dict[str, Attention]) -> None:
    assert list(run) == list(given)
    for name, wanted in given.items():
        same(run[name], wanted)


# -- the laws of attention hold for what is stored ------------------------------------------------


class StoredLaws(AttentionLaws):
    """Attention that went through a run, against a reference computed from what went in."""

    def given(self) -> dict[str, Any]:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        self.arguments = self.given()
        self.path = tmp_path / "run"
        save_run({"site": Attention(**self.arguments)}, self.path)

    def make(self) -> Attention:
        return open_run(self.path)["site"]

    def dense(self) -> Tensor:
        return reference_weights(**self.arguments)


def pair(heads: int = 3, queries: int = 7, keys: int = 7, **changes: Any) -> dict[str, Any]:
    query = 2 * torch.randn(2, heads, queries, 4)
    return {"query": query, "key": 2 * torch.randn(2, heads, keys, 4), **changes}


class TestStoredPlain(StoredLaws):
    def given(self) -> dict[str, Any]:
        return pair()


class TestStoredCrossWithGroups(StoredLaws):
    def given(self) -> dict[str, Any]:
        return pair(heads=4, keys=9, key=torch.randn(2, 2, 9, 4), scale=torch.rand(4) + 0.5)


class TestStoredMasked(StoredLaws):
    def given(self) -> dict[str, Any]:
        mask = torch.rand(2, 1, 7, 7) > 0.4
        mask[0, 0, 2] = False
        return pair(mask=mask, scale=0.3)


class TestStoredBiased(StoredLaws):
    def given(self) -> dict[str, Any]:
        return pair(mask=torch.randn(3, 7, 7), causal=True)


class TestStoredDouble(StoredLaws):
    def given(self) -> dict[str, Any]:
        return {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in pair().items()
        }


# -- what is read is what was written -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_bits_and_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    given = attention().to(dtype)
    same(save_run({"a": given}, tmp_path / "run")["a"], given)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 1 / 3},
        {"scale": torch.tensor([0.5, 0.25])},
        {"scale": torch.tensor([0.5, 0.25], dtype=torch.float64)},
        {"mask": torch.rand(1, 1, N, N) > 0.5},
        {"mask": torch.randn(2, N, N, dtype=torch.float16)},
        {"mask": torch.randn(1, 1, 1, N).expand(1, 2, N, N)},
        {"causal": True},
        {"key": torch.randn(1, 1, N, 8)},
        {"key": torch.randn(1, 2, 3, 8), "site": None},
        {"query": torch.randn(1, N, 3, 2, 8)[:, :, 0].transpose(1, 2)},
        {"query": torch.randn(1, 2, 8, N).transpose(2, 3)},
        {"query": torch.randn(0, 2, N, 8), "key": torch.randn(0, 2, N, 8)},
    ],
)
def test_everything_that_decides_a_weight_survives(tmp_path: Path, changes: dict[str, Any]) -> None:
    given = attention(**changes)
    same(save_run({"a": given}, tmp_path / "run")["a"], given)


def test_large_views_are_written_in_parts(tmp_path: Path) -> None:
    # As timm makes them: views into one projection, each larger than what is copied at once.
    projection = torch.randn(1, 3000, 3, 8, 64)
    query, key, _ = projection.permute(2, 0, 3, 1, 4).unbind(0)
    encoded = Encoded({"query": query, "key": key})
    assert max(len(memoryview(piece).cast("B")) for piece in encoded.pieces()) < query.nbytes / 4
    given = Attention(query=query, key=key)
    same(save_run({"a": given}, tmp_path / "run")["a"], given)


def test_weights_alone_survive_and_the_manifest_says_so(tmp_path: Path) -> None:
    given = Attention.from_weights(torch.rand(1, 2, N, N).half(), site=site("w"))
    run = save_run({"w": given}, tmp_path / "run")
    same(run["w"], given)
    assert run.record("w").holds == "weights"
    assert json.loads((tmp_path / "run/manifest.json").read_text())["sites"]["w"]["kind"] == (
        "weights"
    )


def test_the_description_of_a_site_survives(tmp_path: Path) -> None:
    info = SiteInfo(
        "layers.0.blocks.1.attn",
        kind="window",
        block=3,
        module="layers.0.blocks.1.attn",
        query_layout=LAYOUT,
        key_layout=LAYOUT.frame_layout(),
        frames_in_batch=True,
        rope=False,
        source="projection",
        window=WindowInfo((7, 7), (4, 4), (2, 2), strided=True),
    )
    run = save_run({"a": attention(site=info)}, tmp_path / "run")
    assert run["a"].site == info
    assert run.record("a").site == info


def test_attention_without_a_description_gets_the_layout_of_the_run(tmp_path: Path) -> None:
    frame = Attention(query=torch.randn(2, 1, N // 2, 4), key=torch.randn(2, 1, N // 2, 4))
    given = {"global": attention(site=None), "frame": frame}
    run = save_run(given, tmp_path / "run", layout=LAYOUT)
    assert run["global"].site == SiteInfo("global", query_layout=LAYOUT, key_layout=LAYOUT)
    one = LAYOUT.frame_layout()
    assert run["frame"].site == SiteInfo("frame", query_layout=one, key_layout=one)


def test_a_repeated_mask_is_stored_once(tmp_path: Path) -> None:
    mask = (torch.rand(N) > 0.3).expand(1, 2, N, N)
    run = save_run({"a": attention(mask=mask)}, tmp_path / "run")
    assert run.record("a").file.tensors["mask"].shape == (1, 1, 1, N)


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 3, 4, 5),
        torch.rand(1, 2, 3, 4, 5).half(),
        torch.randint(0, 255, (2, 1, 4, 5), dtype=torch.uint8),
        np.random.default_rng(0).random((2, 3, 4, 5)),
    ],
)
def test_images_survive(tmp_path: Path, images: Any) -> None:
    stored = save_run(captured(1), tmp_path / "run", images=images).images
    assert stored is not None
    assert stored.dtype == torch.as_tensor(images).dtype
    assert torch.equal(stored, torch.as_tensor(images))


def test_pictures_become_images() -> None:
    from PIL import Image

    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    for given in ([picture, picture], [Image.fromarray(picture)] * 2):
        tensor = image_tensor(given)
        assert tensor.shape == (2, 3, 4, 5)
        assert torch.equal(tensor[1], torch.as_tensor(picture).permute(2, 0, 1))
    assert image_tensor(picture).shape == (1, 3, 4, 5)
    assert image_tensor(torch.rand(3, 4, 5)).shape == (1, 3, 4, 5)
    for wrong in ([], torch.rand(2, 4, 4, 5), [picture, picture[:2]], torch.rand(5)):
        with pytest.raises(InputError):
            image_tensor(wrong)


def test_the_run_says_what_it_is(tmp_path: Path) -> None:
    given = captured(3)
    run = save_run(
        given,
        tmp_path / "run",
        images=torch.zeros(2, 3, 42, 64),
        model="toy",
        metadata={"commit": "abc", "n": [1, 2]},
    )
    assert run.sites == run.expected == tuple(given)
    assert run.missing == ()
    assert run.complete
    assert run.layout == LAYOUT  # taken from the sites
    assert run.model == "toy"
    assert run.metadata == {"commit": "abc", "n": [1, 2]}
    assert len(run) == 3
    assert "global_block_1" in run
    assert "nothing" not in run
    assert run.get("nothing") is None
    assert dict(run).keys() == given.keys()
    text = repr(run)
    for part in ("3 sites", "'toy'", "2 frames of 3×4 patches", "(2, 3, 42, 64)"):
        assert part in text
    files = list((tmp_path / "run").rglob("*.safetensors"))
    assert run.nbytes == sum(path.stat().st_size for path in files)


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    given = attention(mask=torch.ones(N, N, dtype=torch.bool))
    save_run({"global_block_7": given}, tmp_path / "run")
    found = safetensors.torch.load_file(file_of(tmp_path / "run", "global_block_7"))
    assert set(found) == {"query", "key", "mask"}
    assert torch.equal(found["query"], given.query)  # type: ignore[arg-type]


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    # Up to the padding of the header, which the format leaves free.
    tensors = {"b": torch.randn(3, 5), "a": torch.ones(2, dtype=torch.bool), "c": torch.ones(7)}
    ours = b"".join(bytes(piece) for piece in Encoded(tensors).pieces())
    theirs = safetensors.torch.save(tensors)
    cut, size = (int.from_bytes(data[:8], "little") for data in (ours, theirs))
    assert json.loads(ours[8 : 8 + cut]) == json.loads(theirs[8 : 8 + size])
    assert ours[8 + cut :] == theirs[8 + size :]
    assert (8 + cut) % 64 == 0


def test_names_that_files_cannot_bear(tmp_path: Path) -> None:
    names = [
        "Block",
        "block",
        "block*1",
        "block?1",
        "blöck",
        ".hidden",
        "x" * 240,
        "a b",
        "-",
        "…",
    ]
    given = {name: attention(seed=i) for i, name in enumerate(names)}
    all_same(save_run(given, tmp_path / "run"), given)
    files = {path.name.casefold() for path in (tmp_path / "run/sites").iterdir()}
    assert len(files) == len(names)  # also where case does not tell files apart


# -- reading is lazy ------------------------------------------------------------------------------


def test_opening_reads_no_data_and_the_first_touch_checks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = captured(3)
    save_run(given, tmp_path / "run", images=torch.zeros(2, 3, 4, 4))
    checked: list[str] = []
    real = records_module.checksum

    def counted(path: Path) -> tuple[int, int]:
        checked.append(path.name)
        return real(path)

    monkeypatch.setattr(records_module, "checksum", counted)
    run = open_run(tmp_path / "run")
    assert checked == []
    run["global_block_1"].rows(3)
    run["global_block_1"].columns(3)
    assert checked == [file_of(tmp_path / "run", "global_block_1").name]
    assert run["global_block_1"] is run["global_block_1"]  # with its log-sum-exp


def test_tensors_are_mapped_and_writing_into_them_stays_here(tmp_path: Path) -> None:
    run = save_run({"a": attention()}, tmp_path / "run")
    query = run["a"].query
    assert query is not None
    with open("/proc/self/maps") as maps:
        assert str(file_of(tmp_path / "run", "a")) in maps.read()
    query.zero_()
    open_run(tmp_path / "run").check()
    with pytest.raises(CaptureError):
        run["a"].rows(0)


def test_a_closed_run(tmp_path: Path) -> None:
    with save_run(captured(2), tmp_path / "run") as run:
        taken = run["global_block_0"]
    taken.rows(0)
    with pytest.raises(StoreError, match="closed"):
        run["global_block_1"]


def test_missing_and_unknown_sites_are_told_apart(tmp_path: Path) -> None:
    given = captured(2)
    with RunWriter(tmp_path / "run", expected=[*given, "global_block_2"]) as writer:
        for name, value in given.items():
            writer.write(name, value)
    run = open_run(tmp_path / "run")
    assert run.missing == ("global_block_2",)
    assert not run.complete
    assert "1 missing" in repr(run)
    with pytest.raises(SiteError, match="not finished"):
        run["global_block_2"]
    with pytest.raises(SiteError, match="did you mean 'global_block_1'"):
        run["global_block1"]
    with pytest.raises(StoreError, match=r"no run in .*manifest\.json is not there"):
        open_run(tmp_path / "nothing")


# -- writing in the background --------------------------------------------------------------------


class Gate:
    """Holds the writing of site files until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached, self.written = threading.Event(), threading.Event(), list[str]()
        real = LocalFolder.write

        def write(folder: LocalFolder, name: str, pieces: Any) -> tuple[int, int]:
            if name.endswith(".safetensors"):
                self.reached.set()
                assert self.open.wait(20)
                self.written.append(name)
            return real(folder, name, pieces)

        monkeypatch.setattr(LocalFolder, "write", write)


def test_writing_is_in_the_background_bounded_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    given = captured(6)
    writer = RunWriter(tmp_path / "run", queue_size=2)
    names = list(given)
    # One is being written and two wait: these calls return although nothing can be written.
    for name in names[:3]:
        writer.write(name, given[name])
    assert gate.written == []
    rest = threading.Thread(target=lambda: [writer.write(n, given[n]) for n in names[3:]])
    rest.start()
    rest.join(0.2)
    assert rest.is_alive()  # the queue is full
    gate.open.set()
    rest.join(20)
    writer.close()
    all_same(open_run(tmp_path / "run"), given)
    records = [open_run(tmp_path / "run").record(name) for name in names]
    assert gate.written == [record.file.file for record in records]


def test_an_interrupt_while_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    given = captured(3)
    writer = RunWriter(tmp_path / "run", expected=given, queue_size=2)
    for name, value in given.items():
        writer.write(name, value)
    until(lambda: writer._background._tasks.qsize() == 2)  # the first is at the disk

    def interrupt() -> None:
        until(lambda: writer._background.closed)
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: writer._background.abandoned)
        gate.open.set()

    # A shell's background job is started with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    signal.signal(signal.SIGINT, before)
    run = open_run(tmp_path / "run")
    run.check()
    assert "global_block_0" in run
    assert not run.complete
    save_run(given, tmp_path / "run")  # the lock is free


def test_each_site_is_listed_as_soon_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    real = LocalFolder.write

    def write(folder: LocalFolder, name: str, pieces: Any) -> tuple[int, int]:
        result = real(folder, name, pieces)
        if name.endswith(".json"):
            run = open_run(tmp_path / "run")
            run.check()
            seen.append(run.sites)
        return result

    monkeypatch.setattr(LocalFolder, "write", write)
    given = captured(3)
    save_run(given, tmp_path / "run", images=torch.zeros(2, 3, 4, 4))
    names = tuple(given)
    # Announced, then the images, then site by site, then closed.
    assert seen == [(), (), names[:1], names[:2], names, names]


def test_errors_surface_at_the_next_write_and_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalFolder.write

    def write(folder: LocalFolder, name: str, pieces: Any) -> tuple[int, int]:
        if "block_1" in name:
            raise OSError(28, "No space left on device", name)
        return real(folder, name, pieces)

    monkeypatch.setattr(LocalFolder, "write", write)
    given = captured(4)
    writer = RunWriter(tmp_path / "run", expected=given)
    for name in ("global_block_0", "global_block_1"):
        writer.write(name, given[name])
    until(lambda: writer._background.error is not None)
    with pytest.raises(StoreError, match=r"global_block_1.*No space left"):
        writer.write("global_block_2", given["global_block_2"])
    with pytest.raises(StoreError, match=r"global_block_1.*No space left"):
        writer.close()
    writer.close()  # a second time is nothing
    run = open_run(tmp_path / "run")
    assert run.sites == ("global_block_0",)
    assert run.missing == tuple(list(given)[1:])
    with pytest.raises(StoreError, match="closed"):
        writer.write("x", given["global_block_0"])


def test_an_exception_keeps_what_was_handed_over(tmp_path: Path) -> None:
    given = captured(4)
    cut_short(tmp_path / "run", given, 2)
    run = open_run(tmp_path / "run")
    assert run.sites == ("global_block_0", "global_block_1")
    assert run.missing == ("global_block_2", "global_block_3")
    run.check()


def test_a_run_whose_writer_said_nothing_of_what_is_to_come(tmp_path: Path) -> None:
    given = captured(2)
    cut_short(tmp_path / "run", given, 1, expect=False)
    run = open_run(tmp_path / "run")
    assert run.missing == ()
    assert not run.complete
    assert "not closed" in repr(run)


def test_expect_announces(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        writer.expect(["b", "a"])
        writer.write("a", attention())
        writer.write("c", attention())
    run = open_run(tmp_path / "run")
    assert run.expected == ("b", "a", "c")
    assert run.sites == ("a", "c")
    assert run.missing == ("b",)
    assert writer.finished == ("a", "c")
    assert writer.missing == ("b",)


def test_a_site_is_written_once(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        writer.write("a", attention())
        with pytest.raises(InputError, match="already"):
            writer.write("a", attention())
        with pytest.raises(InputError, match="from_weights"):
            writer.write("b", torch.rand(1, 1, 2, 2))  # type: ignore[arg-type]
    assert list(open_run(tmp_path / "run")) == ["a"]


@pytest.mark.parametrize("when", ["before", "during"])
def test_tensors_that_are_written_into_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    gate = Gate(monkeypatch)
    given = attention()
    assert given.query is not None
    writer = RunWriter(tmp_path / "run", expected=["first", "a"])
    if when == "before":
        writer.write("first", attention(seed=1))
    writer.write("a", given)
    assert gate.reached.wait(20)
    given.query.mul_(2)
    gate.open.set()
    with pytest.raises(CaptureError, match="written into"):
        writer.close()
    run = open_run(tmp_path / "run")
    assert run.missing == ("first", "a")[-1 if when == "before" else 0 :]
    assert not list((tmp_path / "run/sites").glob("a-*"))


def test_storing_while_a_model_runs(tmp_path: Path) -> None:
    from timm import create_model

    model = create_model(
        "vit_tiny_patch16_224", img_size=48, depth=3, embed_dim=32, num_heads=2
    ).eval()
    images = torch.rand(2, 3, 48, 48)
    with vistvis.capture(model) as live:
        model(images)
    layout = TokenLayout.from_model(model, images)
    with (
        RunWriter(tmp_path / "run", images=images, layout=layout, model="tiny") as writer,
        vistvis.capture(model, sink=writer),
        torch.inference_mode(),
    ):
        model(images)
    run = open_run(tmp_path / "run")
    assert list(run) == list(live)
    for name in live:
        same(run[name], live[name])
        assert run[name].site == live[name].site


def test_gradients_are_left_behind(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    query = layer(torch.randn(1, 2, N, 8))
    scale = nn.Parameter(torch.ones(2))
    given = Attention(query=query, key=query, scale=scale)
    stored = save_run({"a": given}, tmp_path / "run")["a"]
    assert stored.query is not None
    assert torch.equal(stored.query, query.detach())


# -- again ----------------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*.safetensors")}


def part_of_run(path: Path, given: dict[str, Attention], count: int, **arguments: Any) -> None:
    with RunWriter(path, expected=given, **arguments) as writer:
        for name in list(given)[:count]:
            writer.write(name, given[name])


def test_calling_again_resumes(tmp_path: Path) -> None:
    given, images = captured(4), torch.rand(2, 3, 4, 4)
    part_of_run(tmp_path / "run", given, 2, images=images)
    before = state_of(tmp_path / "run")
    run = save_run(given, tmp_path / "run", images=images)
    all_same(run, given)
    assert run.complete
    after = state_of(tmp_path / "run")
    assert before.items() <= after.items()  # what was there was not written again
    assert len(after) == 5


def test_resuming_with_only_what_is_missing(tmp_path: Path) -> None:
    given = captured(4)
    part_of_run(tmp_path / "run", given, 2, pass_id="one")
    with RunWriter(tmp_path / "run", pass_id="one") as writer:
        assert writer.finished == ("global_block_0", "global_block_1")
        for name in writer.missing:
            writer.write(name, given[name])
    all_same(open_run(tmp_path / "run"), given)


def test_passes_never_mix(tmp_path: Path) -> None:
    first, second = captured(4), captured(4, seed=1)
    # The second pass agrees in one site only; nothing tells beforehand that it is another.
    second["global_block_0"] = first["global_block_0"]
    part_of_run(tmp_path / "run", first, 3)
    run = save_run(second, tmp_path / "run")
    all_same(run, second)
    assert run.complete
    assert len(state_of(tmp_path / "run")) == 4


def test_a_pass_that_differs_leaves_the_first_until_it_is_whole(tmp_path: Path) -> None:
    first, second = captured(4), captured(4, seed=1)
    part_of_run(tmp_path / "run", first, 3)
    with pytest.raises(StoreError, match="left as it was"):
        part_of_run(tmp_path / "run", second, 3)
    run = open_run(tmp_path / "run")
    assert run.missing == ("global_block_3",)
    for name in run:
        same(run[name], first[name])


@pytest.mark.parametrize(
    "changes",
    [{"images": torch.ones(2, 3, 4, 4)}, {"model": "b"}, {"metadata": {"n": 2}}, {"resume": False}],
)
def test_another_run_is_not_resumed(tmp_path: Path, changes: dict[str, Any]) -> None:
    given = captured(3)
    said = {"images": torch.zeros(2, 3, 4, 4), "model": "a", "metadata": {"n": 1}}
    part_of_run(tmp_path / "run", given, 2, **said)
    with pytest.raises(StoreError, match="left as it was"):
        part_of_run(tmp_path / "run", given, 1, **{**said, **changes})
    assert len(open_run(tmp_path / "run")) == 2
    run = save_run(given, tmp_path / "run", **{**said, **changes})
    assert run.complete
    assert run.model == {**said, **changes}["model"]


def test_damaged_sites_are_written_again(tmp_path: Path) -> None:
    given = captured(4)
    part_of_run(tmp_path / "run", given, 3, pass_id="one")
    sites = [file_of(tmp_path / "run", name) for name in list(given)[:3]]
    sites[0].unlink()
    os.truncate(sites[1], 100)
    with open(sites[2], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    run = save_run(given, tmp_path / "run", pass_id="one")
    all_same(run, given)
    run.check()


def test_writing_over_a_run_replaces_it_whole(tmp_path: Path) -> None:
    first, second = captured(3), captured(5, seed=1)
    old = save_run(first, tmp_path / "run", images=torch.zeros(2, 3, 4, 4))
    touched = old["global_block_0"]
    with RunWriter(tmp_path / "run", expected=second, model="new") as writer:
        for name, value in second.items():
            writer.write(name, value)
            all_same(open_run(tmp_path / "run"), first)
    run = open_run(tmp_path / "run")
    all_same(run, second)
    assert run.images is None
    assert run.model == "new"
    # Nothing of the first is left behind; a reader of it keeps what it has touched.
    assert len(state_of(tmp_path / "run")) == 5
    assert {p.name for p in (tmp_path / "run").iterdir()} - {".lock"} == {"manifest.json", "sites"}
    same(touched, first["global_block_0"])
    with pytest.raises(StoreError, match="was replaced"):
        old["global_block_1"]


def test_a_run_that_is_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = captured(2), captured(2, seed=1)
    save_run(first, tmp_path / "run")
    real = LocalFolder.sizes

    def sizes(folder: LocalFolder) -> dict[str, int]:
        monkeypatch.setattr(LocalFolder, "sizes", real)
        save_run(second, tmp_path / "run")
        return real(folder)

    monkeypatch.setattr(LocalFolder, "sizes", sizes)
    all_same(open_run(tmp_path / "run"), second)


@pytest.mark.parametrize("count", [0, 2])
def test_a_replacement_that_fails_changes_nothing_and_resumes(tmp_path: Path, count: int) -> None:
    first, second = captured(3), captured(3, seed=1)
    save_run(first, tmp_path / "run")
    cut_short(tmp_path / "run", second, count)
    all_same(open_run(tmp_path / "run"), first)
    files = state_of(tmp_path / "run")
    all_same(save_run(second, tmp_path / "run"), second)
    after = state_of(tmp_path / "run")
    assert len([name for name in after if after[name] == files.get(name)]) == count


def test_a_run_can_be_written_over_itself(tmp_path: Path) -> None:
    given = captured(3)
    run = save_run(given, tmp_path / "run")
    all_same(save_run(run, tmp_path / "run"), given)


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    save_run(captured(2), tmp_path)
    for name in ("notes.txt", "other.safetensors", "sites/notes.txt"):
        (tmp_path / name).write_text("mine")
    save_run(captured(2, seed=1), tmp_path)
    for name in ("notes.txt", "other.safetensors", "sites/notes.txt"):
        assert (tmp_path / name).read_text() == "mine"


# -- behind a URL ---------------------------------------------------------------------------------


@pytest.fixture
def url() -> Any:
    system = fsspec.filesystem("memory")
    yield "memory://bucket/runs/fern"
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)


def test_a_run_behind_a_url(url: str) -> None:
    first, second = captured(6), captured(3, seed=1)
    all_same(save_run(first, url, images=torch.zeros(2, 3, 4, 4)), first)
    run = open_run(url)
    run.check()
    assert run.images is not None
    assert len(run._cache) <= 4  # whole objects: only the latest stay in memory
    all_same(save_run(second, url), second)
    # Nothing of the first goes, since someone may be reading it: six sites and the images.
    left = fsspec.filesystem("memory").find("/bucket/runs/fern")
    assert len(left) == 1 + 3 + 7
    assert clean_run(url) == {}
    assert len(clean_run(url, older_than=0)) == 7
    all_same(open_run(url), second)


def test_behind_a_url_the_manifest_comes_last(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    puts: list[str] = []
    real = RemoteFolder.write

    def write(folder: RemoteFolder, name: str, pieces: Any) -> tuple[int, int]:
        puts.append(name)
        return real(folder, name, pieces)

    monkeypatch.setattr(RemoteFolder, "write", write)
    save_run(captured(2), url, images=torch.zeros(2, 3, 4, 4))
    token = open_run(url)._manifest.token
    assert [name.replace(f"-{token}", "") for name in puts] == [
        *("manifest.json", "images.safetensors", "manifest.json"),
        *("sites/global_block_0.safetensors", "sites/global_block_0.json"),
        *("sites/global_block_1.safetensors", "sites/global_block_1.json"),
        "manifest.json",
    ]


def test_behind_a_url_a_run_resumes_and_replaces(url: str) -> None:
    first, second = captured(3), captured(3, seed=1)
    cut_short(url, first, 1)
    assert open_run(url).missing == ("global_block_1", "global_block_2")
    all_same(save_run(first, url), first)
    cut_short(url, second, 1)
    all_same(open_run(url), first)


def test_behind_a_url_two_writers_are_noticed(url: str) -> None:
    given = captured(2)
    one = RunWriter(url, expected=given)
    two = RunWriter(url, expected=given)
    one.write("global_block_0", given["global_block_0"])
    with pytest.raises(StoreError, match="someone else"):
        one.close()
    two.write("global_block_1", given["global_block_1"])
    two.close()


def test_behind_a_url_damage_is_noticed(url: str) -> None:
    save_run(captured(2), url)
    system = fsspec.filesystem("memory")
    path = f"/bucket/runs/fern/{open_run(url).record('global_block_1').file.file}"
    data = bytearray(system.cat_file(path))
    data[-1] ^= 1
    system.pipe_file(path, bytes(data))
    run = open_run(url)
    run["global_block_0"].rows(0)
    with pytest.raises(StoreError, match=r"global_block_1-\w{8}\.safetensors is damaged"):
        run["global_block_1"]
    system.pipe_file(path, bytes(data[:-1]))
    with pytest.raises(StoreError, match=r"global_block_1-\w{8}\.safetensors is damaged"):
        open_run(url)


def test_a_url_of_files_is_a_folder(tmp_path: Path) -> None:
    given = captured(1)
    run = save_run(given, f"file://{tmp_path}/run")
    all_same(run, given)
    all_same(open_run(tmp_path / "run"), given)


def test_a_url_that_nobody_knows() -> None:
    with pytest.raises(StoreError, match="nosuch"):
        open_run("nosuch://bucket/run")


def test_a_service_that_fails(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class ServiceError(Exception):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise ServiceError("throttled")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", fail)
    with pytest.raises(StoreError, match=r"memory://bucket/runs/fern.*throttled"):
        save_run(captured(1), url)


def test_errors_while_a_model_runs_are_those_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the capture, to which the sink belongs; and the model's output is untouched."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = nn.Sequential(layer, nn.Identity())
    tokens = torch.randn(1, 5, 16, requires_grad=True)
    with (
        pytest.raises(InputError, match="already"),
        RunWriter(tmp_path / "twice") as writer,
        vistvis.capture(model, sink=writer),
    ):
        first, second = model(tokens), model(tokens)
    assert torch.equal(first, second)
    assert len(open_run(tmp_path / "twice")) == 1

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = RunWriter(tmp_path / "full")
    monkeypatch.setattr(LocalFolder, "write", full)
    with vistvis.capture(model, sink=writer):
        model(tokens)
    with pytest.raises(StoreError, match="No space left"):
        writer.close()


@pytest.mark.gpu
def test_queries_and_keys_of_a_device_are_copied_beside_the_model(tmp_path: Path) -> None:
    given = {f"block_{number}": attention(seed=number).to("cuda") for number in range(12)}
    with (
        RunWriter(tmp_path / "run", expected=given) as writer,
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        for name, value in given.items():
            # Not there yet when `write` returns: the copy has to wait for it.
            torch.cuda._sleep(20_000_000)
            assert value.query is not None
            late = Attention(query=value.query * 2, key=value.key, site=value.site)
            writer.write(name, late)
    run = open_run(tmp_path / "run")
    for name, value in given.items():
        assert value.query is not None
        assert run[name].query.equal(2 * value.query.cpu())  # type: ignore[union-attr]
