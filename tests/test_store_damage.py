"""What is damaged in a run is said and not lost; no file makes anybody wait or fill the memory."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
import torch
from attack.runs import contents

from vistvis.cli import main
from vistvis.errors import StoreError
from vistvis.store import RunWriter, clean_run, manifest, open_run, save_run

SITES = ("site_0", "site_1", "site_2")


def unfinished(folder: Path, pass_id: str | None = None) -> Path:
    """A run whose writer stopped after two of three sites; the record of its first."""
    writer = RunWriter(folder, expected=SITES, pass_id=pass_id)
    for name in SITES[:2]:
        writer.write(name, contents(1)[name])
    writer.__exit__(ValueError, ValueError(), None)
    return next(folder.glob("sites/site_0-*.json"))


def flip(path: Path, at: int = 100) -> bytes:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return bytes(data)


# -- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("break_it", ["flip", "cut", "hole", "pipe", "folder"])
def test_a_damaged_record_is_damage(tmp_path: Path, break_it: str) -> None:
    record = unfinished(tmp_path)
    if break_it == "flip":
        flip(record)
    elif break_it == "cut":
        os.truncate(record, 50)
    elif break_it == "hole":
        os.truncate(record, 2**40)
    else:
        record.unlink()
        (os.mkfifo if break_it == "pipe" else os.mkdir)(record)
    with pytest.raises(StoreError, match=record.name):
        open_run(tmp_path)
    with open_run(tmp_path, strict=False) as run:
        assert run.sites == ("site_1",)
        assert list(run.damaged) == ["site_0"]
        assert list(run.damaged_files) == [f"sites/{record.name}"]
        with pytest.raises(StoreError, match=record.name):
            run["site_0"]
        with pytest.raises(StoreError, match=record.name):
            run.check()
        run.check(strict=False)
        assert run.damaged


def test_a_damaged_record_of_a_site_that_nobody_announced(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write("site_0", contents(1)["site_0"])
    writer.__exit__(ValueError, ValueError(), None)
    record = next(tmp_path.glob("sites/*.json"))
    flip(record)
    assert list(open_run(tmp_path, strict=False).damaged) == [f"sites/{record.name}"]


def test_info_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(unfinished(tmp_path))
    assert main(["info", str(tmp_path)]) == 1
    assert "site_0  DAMAGED: " in capsys.readouterr().out


@pytest.mark.parametrize("pass_id", ["a", "b"])
def test_nothing_of_it_is_lost_before_the_run_is_whole_again(tmp_path: Path, pass_id: str) -> None:
    record = unfinished(tmp_path, pass_id="a")
    data, site = flip(record), record.with_suffix(".safetensors")
    stored = site.read_bytes()
    with pytest.raises(StoreError, match="store the run again"):
        clean_run(tmp_path, older_than=0)
    with pytest.raises(ZeroDivisionError), RunWriter(tmp_path, pass_id=pass_id):
        _ = 1 / 0
    assert (record.read_bytes(), site.read_bytes()) == (data, stored)
    run = save_run(contents(1), tmp_path, pass_id=pass_id)
    run.check()
    assert run.complete
    assert site.read_bytes() == stored  # the same content: not written again
    assert not record.exists()


def test_a_run_of_damaged_records_alone_is_kept_beside_another(tmp_path: Path) -> None:
    record = unfinished(tmp_path)
    for one in tmp_path.glob("sites/*.json"):
        flip(one)
    with pytest.raises(ZeroDivisionError), RunWriter(tmp_path):
        _ = 1 / 0
    assert record.exists()
    assert set(open_run(tmp_path, strict=False).damaged) == set(SITES[:2])


# -- files of other kinds and sizes ---------------------------------------------------------------


@pytest.mark.parametrize("what", ["site", "images"])
@pytest.mark.parametrize("break_it", ["pipe", "hole", "cut", "device"])
def test_files_that_are_no_longer_what_they_were(tmp_path: Path, what: str, break_it: str) -> None:
    save_run(contents(1), tmp_path, images=torch.zeros(2, 3, 4, 4))
    file = next(tmp_path.rglob(f"{what}*.safetensors"))
    run = open_run(tmp_path)
    if break_it in ("hole", "cut"):
        os.truncate(file, 2**40 if break_it == "hole" else 100)
        said = "it has 1,099,511,627,776 bytes" if break_it == "hole" else "it has 100 bytes"
    else:
        file.unlink()
        os.mkfifo(file) if break_it == "pipe" else file.symlink_to("/dev/zero")
        said = "pipe" if break_it == "pipe" else "leads out of"
    with pytest.raises(StoreError, match=said):
        run.check()
    again = open_run(tmp_path, strict=False)
    for one in (run, again):
        one.check(strict=False)
        assert [name.split("/")[-1] for name in one.damaged_files] == [file.name]
        with pytest.raises(StoreError):
            _ = one[file.name.rsplit("-", 1)[0]] if what == "site" else one.images
    save_run(contents(1), tmp_path, images=torch.zeros(2, 3, 4, 4)).check()


def test_a_manifest_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    save_run(contents(1), tmp_path)
    os.truncate(tmp_path / "manifest.json", 2**40)
    for call in (open_run, RunWriter):
        with pytest.raises(StoreError, match="it has more than the 1,073,741,824 bytes"):
            call(tmp_path)


def test_behind_a_url_no_more_is_read_than_may_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    system, url = fsspec.filesystem("memory"), "memory://damage/run"
    try:
        run = save_run(contents(1), url)
        file = f"/damage/run/{run.record('site_0').file.file}"
        system.pipe_file(file, system.cat_file(file) + b"more")
        with pytest.raises(StoreError, match="it has more than the"):
            run.check()
        monkeypatch.setattr(manifest, "MOST", 100)
        with pytest.raises(StoreError, match="it has more than the 100 bytes"):
            open_run(url)
    finally:
        system.rm("/damage", recursive=True)


def test_a_pipe_in_the_place_of_the_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(StoreError, match="no regular file"):
        RunWriter(tmp_path)
