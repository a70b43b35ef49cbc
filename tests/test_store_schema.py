"""The manifest of schema 2: every byte of it counts, and runs of schema 1 still open."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vistvis import Attention, RunWriter, SiteInfo, TokenLayout, open_run, save_run
from vistvis.errors import InputError, StoreError
from vistvis.store.codec import attention_of, tensors_of
from vistvis.store.folders import LocalFolder
from vistvis.store.manifest import Manifest, read_manifest
from vistvis.store.records import sealed

OLD = Path(__file__).parent / "data/run_schema1"


def captured(count: int = 2, *, seed: int = 0) -> dict[str, Attention]:
    generator = torch.Generator().manual_seed(seed)

    def one(name: str) -> Attention:
        query, key = torch.randn(2, 1, 2, 6, 4, generator=generator)
        layout = TokenLayout(2, (1, 3))
        site = SiteInfo(name, query_layout=layout, key_layout=layout)
        return Attention(query=query, key=key, scale=0.37, site=site)

    return {f"block_{number}": one(f"block_{number}") for number in range(count)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    images = torch.zeros(2, 3, 4, 6)
    save_run(captured(), tmp_path / "run", images=images, metadata={"n": 1}, pass_id="a")
    return tmp_path / "run"


# -- damage ---------------------------------------------------------------------------------------


def test_every_flip_of_every_byte_of_a_manifest_is_noticed(run: Path) -> None:
    text = (run / "manifest.json").read_bytes()
    Manifest.from_json(text, "here")
    for place in range(len(text)):
        for bit in (place % 8, 5):  # the fifth: another case of a letter
            flipped = bytearray(text)
            flipped[place] ^= 1 << bit
            with pytest.raises(StoreError, match=r"here (is|has)"):
                Manifest.from_json(bytes(flipped), "here")
    for cut in (*range(0, len(text), 97), len(text) - 1):
        with pytest.raises(StoreError):
            Manifest.from_json(text[:cut], "here")
    for more in (text + b"\n", text + b" ", b" " + text, text.replace(b"\n", b"\r\n")):
        with pytest.raises(StoreError):
            Manifest.from_json(more, "here")


def test_a_flip_in_a_record_leaves_its_site_out(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, expected=captured())
    writer.write("block_0", captured()["block_0"])
    writer.__exit__(ValueError, ValueError(), None)
    (record,) = (tmp_path / "sites").glob("*.json")
    text = record.read_bytes()
    assert open_run(tmp_path).sites == ("block_0",)
    for place in range(0, len(text), 5):
        flipped = bytearray(text)
        flipped[place] ^= 1 << place % 8
        record.write_bytes(flipped)
        assert read_manifest(LocalFolder(tmp_path)).sites == {}
    assert open_run(tmp_path).missing == ("block_0", "block_1")
    save_run(captured(), tmp_path).check()


@pytest.mark.parametrize("where", ["", "layout", "images", "sites.a", "sites.a.site", "deep"])
def test_unknown_keys_are_refused_by_name(run: Path, where: str) -> None:
    data = json.loads((run / "manifest.json").read_text())
    del data["crc32"]
    data["layout"] = TokenLayout(2, (1, 3)).to_dict()
    site = data["sites"]["block_0"]
    holder = {
        "": data,
        "layout": data["layout"],
        "images": data["images"],
        "sites.a": site,
        "sites.a.site": site["site"],
        "deep": site["tensors"]["query"],
    }[where]
    holder["query_order" if where == "sites.a.site" else "added"] = 1
    (run / "manifest.json").write_bytes(sealed(data))
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: .*(added|query_order)"):
        open_run(run)


# -- schema 1 -------------------------------------------------------------------------------------


def check_old(run: Any) -> None:
    sums = {
        "block.0": [1.3402383476495743, 2.4833166003227234, 1.1803394816815853],
        "block.1": [5.676756307482719, 2.4693522974848747, 1.4978709295392036],
        "block.2": [5.8714599609375, 6.4361724853515625, 4.55291748046875],
    }
    assert run.missing == ("block.3",)
    assert run.model == "toy"
    assert run.metadata == {"n": [1]}
    assert run.pass_id is None
    for name, wanted in sums.items():
        found = run[name].dense().double().sum((0, 1, 2))[:3]
        assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-6)
    assert torch.equal(run.images, torch.arange(48, dtype=torch.uint8).view(2, 1, 4, 6))
    site = run["block.0"].site
    assert (site.kind, site.rope, site.key_layout) == ("global", False, run.layout)
    run.check()


def test_a_run_of_schema_1_opens_and_is_replaced(tmp_path: Path) -> None:
    check_old(open_run(OLD))
    shutil.copytree(OLD, tmp_path / "run")
    with pytest.raises(StoreError, match="left as it was"):
        RunWriter(tmp_path / "run", expected=["block.3"]).close()
    check_old(open_run(tmp_path / "run"))
    given = {"block.1": open_run(OLD)["block.1"], **captured(1)}
    again = save_run(given, tmp_path / "run")
    again.check()
    files = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert files == {record.file.file.partition("/")[2] for record in map(again.record, again)}
    assert "block.1.safetensors" in files  # the same bytes, so the same file


def test_schema_2_is_not_taken_for_1_nor_1_for_2(run: Path) -> None:
    old, new = ((path / "manifest.json").read_bytes() for path in (OLD, run))
    for text in (
        new.replace(b'"schema": 2', b'"schema": 1'),
        old.replace(b'"schema": 1', b'"schema": 2'),
        new[:-25] + b"\n}\n",
        new[:-25].replace(b'"schema": 2', b'"schema": 1') + b"\n}\n",
    ):
        with pytest.raises(StoreError, match="here is damaged"):
            Manifest.from_json(text, "here")


# -- what a site and a run may hold ----------------------------------------------------------------


def test_row_sums_are_used_where_they_are_and_values_accepted() -> None:
    given = captured(1)["block_0"]
    tensors, facts = tensors_of(given)
    maximum, total = given._maximum_and_sum().unbind()
    more = {"row_max": maximum, "row_sum": total, "value": torch.zeros(1, 2, 6, 4)}
    stored = attention_of({**tensors, **more}, facts, given.site)
    assert stored._kept is not None
    assert torch.equal(stored.columns(2), given.columns(2))
    for wrong in ({"row_max": maximum}, {"row_max": maximum, "row_sum": total[..., 1:]}):
        with pytest.raises(InputError, match="row_max and row_sum"):
            attention_of({**tensors, **wrong}, facts, given.site)
    with pytest.raises(InputError, match="go with"):
        attention_of({**tensors, "key_members": torch.arange(6)}, facts, given.site)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (1, 3)])
def test_a_scene_comes_back(tmp_path: Path, batched: bool, size: tuple[int, int]) -> None:
    scene = {
        "points": torch.randn(2, *size, 3),
        "confidence": torch.rand(2, *size).half(),
        "cameras": torch.randn(2, 3, 4, dtype=torch.float64),
    }
    given: dict[str, Any] = {n: t[None] if batched else t for n, t in scene.items()}
    given["points"] = np.asarray(given["points"])
    layout, images = TokenLayout(2, (1, 3)), torch.zeros(1, 2, 3, 4, 6)
    run = save_run(captured(), tmp_path, images=images, layout=layout, **given)
    run.check()
    for name, tensor in scene.items():
        assert torch.equal(getattr(run, name), tensor)
        assert getattr(run, name).dtype == tensor.dtype
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert save_run(captured(seed=1), tmp_path).points is None
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"points": torch.zeros(2, 4, 6)}, r"points are floating"),
        ({"points": torch.zeros(2, 2, 4, 6, 3)}, r"points are floating"),
        ({"points": "far"}, "points are a tensor"),
        ({"cameras": torch.zeros(2, 4, 4)}, r"cameras are floating \(S, 3, 4\)"),
        ({"cameras": torch.zeros(3, 3, 4)}, "as many frames"),
        ({"points": torch.zeros(2, 4, 6, 3), "confidence": torch.zeros(2, 4, 5)}, "have one size"),
        ({"points": torch.zeros(2, 2, 6, 3), "layout": TokenLayout(2, (1, 3))}, "pixels"),
        ({"points": torch.zeros(1, 4, 6, 3), "images": torch.zeros(2, 1, 3, 4, 6)}, "one scene"),
    ],
)
def test_a_scene_that_does_not_fit(tmp_path: Path, given: dict[str, Any], text: str) -> None:
    images = torch.zeros(2, 3, 4, 6)
    with pytest.raises(InputError, match=text):
        save_run(captured(), tmp_path / "run", **{"images": images, **given})
    assert not (tmp_path / "run").exists()


# -- refresh --------------------------------------------------------------------------------------


def test_a_reader_sees_what_a_writer_finishes(tmp_path: Path) -> None:
    given = captured(3)
    with RunWriter(tmp_path, pass_id="a") as writer:
        writer.expect(given)
        writer.write("block_0", given["block_0"])
    run = open_run(tmp_path)
    taken = run["block_0"]
    with RunWriter(tmp_path, pass_id="a") as writer:
        for name in ("block_1", "block_2"):
            writer.write(name, given[name])
        assert run.sites == ("block_0",)
        while "block_1" not in run:
            run.refresh()
    run.refresh()
    assert run.complete
    assert run["block_0"] is taken  # not read again
    assert torch.equal(run["block_2"].dense(), given["block_2"].dense())


def test_a_refreshed_run_is_the_one_that_replaced_it(tmp_path: Path) -> None:
    run = save_run(captured(), tmp_path, images=torch.zeros(2, 3, 4, 6))
    taken, _ = run["block_0"], run.images
    save_run(captured(3, seed=1), tmp_path)
    with pytest.raises(StoreError, match="was replaced"):
        run["block_1"]
    run.refresh()
    assert run.images is None
    assert torch.equal(run["block_0"].dense(), captured(3, seed=1)["block_0"].dense())
    assert torch.equal(taken.dense(), captured()["block_0"].dense())
    (tmp_path / "manifest.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="not JSON"):
        run.refresh()
    assert len(run) == 3
    run.close()
    with pytest.raises(StoreError, match="closed"):
        run.refresh()


def test_a_file_written_into_after_the_first_touch_is_noticed_at_the_next(tmp_path: Path) -> None:
    run = save_run(captured(), tmp_path)
    run["block_0"].rows(0)
    path = tmp_path / run.record("block_0").file.file
    path.touch()
    run["block_0"].rows(0)  # its checksum agrees still
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    os.utime(path, ns=(1, 1))
    with pytest.raises(StoreError, match="is damaged"):
        run["block_0"]


def test_check_can_go_on_to_the_end(run: Path) -> None:
    opened = open_run(run)
    opened["block_0"].rows(0)
    for path in run.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(StoreError, match="is damaged"):
        opened.check()
    opened.check(strict=False)
    assert set(opened.damaged) == {"block_0", "block_1"}
    assert len(opened.damaged_files) == 3
    assert list(opened) == []
    with pytest.raises(StoreError, match="is damaged"):
        _ = opened.images
