"""A writer removes what writers of the run made, and nothing else; one damaged file hides none."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch

from vistvis import Attention, RunWriter, open_run, save_run
from vistvis.errors import StoreError


def captured(count: int = 3, *, seed: int = 0) -> dict[str, Attention]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> Attention:
        query, key = torch.randn(2, 1, 2, 6, 4, generator=generator)
        return Attention(query=query, key=key)

    return {f"block_{number}": one() for number in range(count)}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- files of others ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("ubuntu.iso.part", "images.safetensors", "images-2.safetensors", "notes.txt"),
        *("sites/my_lora.safetensors", "sites/notes.txt", "manifest.next.json", "photos/a.jpg"),
        *(".notes.txt.0123abcd.part", "sites/.video.mp4.0123abcd.part", ".cache/a"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for resume in (True, False):
        with pytest.raises(StoreError, match=r"has no manifest\.json") as error:
            save_run(captured(), tmp_path, resume=resume)
        shown = name if name.startswith("sites/") else name.split("/")[0]
        assert shown in str(error.value)
        assert contents(tmp_path) == before  # not even a lock is added


def test_an_empty_subfolder_is_not_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(StoreError, match="holds 'photos'"):
        save_run(captured(), tmp_path)


def test_sites_whose_manifest_is_lost_stay_and_are_named(tmp_path: Path) -> None:
    save_run(captured(), tmp_path, images=torch.zeros(2, 3, 4, 4))
    (tmp_path / "manifest.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"manifest is lost: .*sites/block_0-\w{8}\.safetensors"):
        RunWriter(tmp_path)
    assert contents(tmp_path) == before


def test_what_a_killed_writer_left_before_its_manifest_is_empty(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    for name in (
        ".lock",
        ".manifest.json.0123abcd.part",
        "sites/.block_0.safetensors.00000000.part",
    ):
        (tmp_path / name).write_text("")
    save_run(captured(), tmp_path).check()
    assert not list(tmp_path.rglob("*.part"))


def test_files_beside_a_run_stay_and_those_of_the_run_before_go(tmp_path: Path) -> None:
    save_run(captured(3), tmp_path, images=torch.zeros(2, 3, 4, 4))
    others = {
        "ubuntu.iso.part": b"mine",
        "images-7.safetensors": b"mine",
        "sites/my_lora.safetensors": b"mine",
        "sites/.my.part": b"mine",
    }
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    for seed in (1, 2):
        run = save_run({**captured(2, seed=seed), "my_lora": captured(1)["block_0"]}, tmp_path)
        run.check()
    assert {name: contents(tmp_path)[name] for name in others} == others
    assert len(contents(tmp_path)) == len(others) + 3 + 2  # sites, the manifest and the lock


def test_behind_a_url_as_well() -> None:
    system, url = fsspec.filesystem("memory"), "memory://trust/run"
    try:
        system.pipe_file("/trust/run/sites/my_lora.safetensors", b"mine")
        with pytest.raises(StoreError, match="my_lora"):
            save_run(captured(), url)
        assert system.find("/trust") == ["/trust/run/sites/my_lora.safetensors"]
    finally:
        system.rm("/trust", recursive=True)


def test_what_a_writer_finished_before_it_was_killed_is_taken_up(tmp_path: Path) -> None:
    with RunWriter(tmp_path, expected=captured()) as writer:
        writer.write("block_0", captured()["block_0"])
    text = (tmp_path / "manifest.json").read_bytes()
    save_run(captured(), tmp_path)
    (tmp_path / "manifest.json").write_bytes(text)  # as if the manifest had not come to it
    assert open_run(tmp_path).missing == ("block_1", "block_2")
    save_run(captured(), tmp_path).check()
    assert len(list((tmp_path / "sites").iterdir())) == 3


# -- manifests beside that of the run -------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["manifest.next.json", "manifest.old.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": "vistvis-run", "schema": 0}'])
def test_a_damaged_manifest_beside_a_sound_run_blocks_no_writer(
    tmp_path: Path, name: str, text: bytes, resume: bool
) -> None:
    save_run(captured(), tmp_path)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(StoreError, match="lacks"):
        RunWriter(tmp_path, expected=["other"], resume=resume).close()
    open_run(tmp_path).check()
    run = save_run(captured(seed=1), tmp_path, resume=resume)
    run.check()
    assert torch.equal(run["block_0"].dense(), captured(seed=1)["block_0"].dense())
    assert set(contents(tmp_path)) == {
        *(".lock", "manifest.json"),
        *(record.file for record in run._manifest.files),
    }


def test_a_replacement_of_a_newer_version_is_kept(tmp_path: Path) -> None:
    save_run(captured(), tmp_path)
    (tmp_path / "manifest.next.json").write_text('{"format": "vistvis-run", "schema": 99}')
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"schema version 99.*Nothing was written"):
        save_run(captured(seed=1), tmp_path)
    assert contents(tmp_path) == before
