"""Locks, forks and interrupts of writers; what is printed, said and removed."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import fsspec
import pytest
import safetensors
import torch

from vistvis import Attention, RunWriter, open_run, save_run
from vistvis.cli import main
from vistvis.errors import InputError, StoreError
from vistvis.store import check_target, clean_run
from vistvis.store import folders as folders_module
from vistvis.store.folders import LocalFolder
from vistvis.store.records import sealed

ROOT = Path(__file__).parents[1]


def captured(count: int = 3, *, seed: int = 0) -> dict[str, Attention]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> Attention:
        query, key = torch.randn(2, 1, 2, 6, 4, generator=generator)
        return Attention(query=query, key=key)

    return {f"block_{number}": one() for number in range(count)}


# -- locks ----------------------------------------------------------------------------------------


def interrupted_at(step: int, call: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt at the `step`-th line of the store that `call` executes."""
    count, folder = 0, str(ROOT / "vistvis/store")

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            count += 1
            if count == step:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupt_on_any_line_of_the_constructor_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    step, interrupted, given = 0, True, list[RunWriter]()
    images = torch.zeros(1, 3, 4, 4)
    while interrupted:
        step += 5  # some of all lines: the attack suite has the time for each
        path = tmp_path / str(step)
        interrupted = interrupted_at(
            step, lambda path=path: given.append(RunWriter(path, images=images))
        )
        if not interrupted:
            given[0].close()
        lock = LocalFolder(path).lock()
        lock.acquire()
        lock.release()
    assert step > 150
    save_run(captured(), path).check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_not_use_its_parents_writer(tmp_path: Path) -> None:
    code = """
    import os, sys
    from test_store_life import captured
    from vistvis.errors import StoreError
    from vistvis.store import RunWriter
    writer, given = RunWriter(sys.argv[1], expected=captured()), captured()
    writer.write("block_0", given["block_0"])
    if (child := os.fork()) == 0:
        refused = 0
        for call in (writer.write, writer):
            try:
                call("block_1", given["block_1"])
            except StoreError as error:
                refused += "forked" in str(error)
        try:
            writer.close()
        except StoreError:
            refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    try:
        RunWriter(sys.argv[1])
    except StoreError as error:
        assert "someone else" in str(error)
    else:
        raise AssertionError("the child let go of the lock")
    if (child := os.fork()) == 0:  # lives on with the file of the lock
        sys.stdin.read()
        os._exit(0)
    for name in ("block_1", "block_2"):
        writer.write(name, given[name])
    writer.close()
    RunWriter(sys.argv[1]).close()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")],
        input="",
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )
    assert (tmp_path / "run/manifest.json").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folders_module, "_lock", refuse)
    with pytest.raises(StoreError, match=r"without locks \(.*local folder and copy the run"):
        save_run(captured(), tmp_path / "run")


# -- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "memory://cost/run"])
def test_a_site_costs_two_files_and_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    put, looked = list[str](), list[str]()
    kind = folders_module.RemoteFolder if url else LocalFolder
    real, read = kind.write, kind.read

    def write(folder: Any, name: str, pieces: Any) -> tuple[int, int]:
        put.append(name)
        return real(folder, name, pieces)

    monkeypatch.setattr(kind, "write", write)
    monkeypatch.setattr(kind, "read", lambda f, name: (looked.append(name), read(f, name))[1])
    with RunWriter(url or tmp_path, expected=captured(40)) as writer:
        for name, value in captured(40).items():
            writer.write(name, value)
    assert len(put) == 2 + 2 * 40
    assert open_run(url or tmp_path)._manifest.leftover == ()
    assert len(looked) < 12
    if url:
        fsspec.filesystem("memory").rm("/cost", recursive=True)


# -- cleaning -------------------------------------------------------------------------------------


def litter(run: Path) -> dict[str, bytes]:
    """What writers may leave: a lost site, its record, a picture, temporary files; and others'."""
    ours = {
        "sites/block_9-0123abcd.safetensors": b"a",
        "sites/block_9-0123abcd.json": b"bb",
        "images-0123abcd.safetensors": b"c",
        ".manifest.json.part": b"d",
        "sites/.block_9-0123abcd.safetensors.0123abcd.part": b"e",
    }
    others = {"notes.txt": b"", "sites/my_lora.safetensors": b"", "images-2.safetensors": b""}
    for name, data in {**ours, **others, ".my.iso.part": b""}.items():
        (run / name).write_bytes(data)
    return ours


def test_cleaning_removes_what_writers_left_when_it_is_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(captured(), tmp_path, images=torch.zeros(1, 3, 4, 4))
    with pytest.raises(StoreError, match="lacks"):
        RunWriter(tmp_path, expected=["other"]).close()  # an unfinished replacement stays
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    ours = litter(tmp_path)
    assert clean_run(tmp_path) == {}
    for name in list(ours)[:4]:
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    assert main(["info", str(tmp_path), "--clean"]) == 0
    text = capsys.readouterr().out
    assert "removed sites/block_9-0123abcd.json (2 B)" in text
    assert "4 files, 5 B" in text
    assert list(clean_run(tmp_path, older_than=0)) == list(ours)[4:]
    assert main(["info", str(tmp_path), "--clean", "--older-than", "0"]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert before <= after
    assert len(after - before) == 4  # those of others
    open_run(tmp_path).check()


def test_cleaning_leaves_an_unfinished_run_whole(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, expected=captured())
    writer.write("block_0", captured()["block_0"])
    writer.__exit__(ValueError, ValueError(), None)
    assert len(list((tmp_path / "sites").iterdir())) == 2
    assert clean_run(tmp_path, older_than=0) == {}
    assert open_run(tmp_path).sites == ("block_0",)


def test_what_cleaning_refuses(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run in"):
        clean_run(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    save_run(captured(), tmp_path)
    ours = litter(tmp_path)
    with pytest.raises(InputError, match="0 or more"):
        clean_run(tmp_path, older_than=-1)
    with RunWriter(tmp_path), pytest.raises(StoreError, match="someone else"):
        clean_run(tmp_path, older_than=0)
    (tmp_path / "manifest.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="is damaged"):
        clean_run(tmp_path, older_than=0)
    assert all((tmp_path / name).exists() for name in ours if not name.endswith(".part"))


def test_cleaning_behind_a_url_leaves_what_has_no_age(monkeypatch: pytest.MonkeyPatch) -> None:
    system, url = fsspec.filesystem("memory"), "memory://clean/run"
    try:
        save_run(captured(), url)
        save_run(captured(seed=1), url)
        monkeypatch.setattr(type(system), "modified", lambda *_: 1 / 0)
        assert clean_run(url, older_than=0) == {}
        monkeypatch.undo()
        assert len(clean_run(url, older_than=0)) == 3
        open_run(url).check()
    finally:
        system.rm("/clean", recursive=True)


# -- what is printed and said ---------------------------------------------------------------------


def test_nothing_of_a_file_reaches_the_terminal_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    run = tmp_path / "run"
    evil = "\x1b]52;c;ZXZpbA==\x07\u202e\nstate     complete, 3 sites, every checksum agrees\ud800"
    save_run(captured(), run, model=evil[:-1], metadata={"a\x1b[2J": "\r\x9b31m"})
    data = json.loads((run / "manifest.json").read_text())
    del data["crc32"]
    data["sites"][evil] = data["sites"].pop("block_0")
    data["expected"] = [evil, "\x1bmissing", "block_1", "block_2"]
    data["layout"] = {"frames": 1, "grid": [1, 1], "special": ["\x1b[5m"], "patch_size": [1, 1]}
    (run / "manifest.json").write_bytes(sealed(data))
    for file in ("block_1", "block_2"):
        path = run / data["sites"][file]["file"]
        path.write_bytes(path.read_bytes()[:50] if file == "block_1" else path.read_bytes()[:-1])
    plain = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as a terminal: no surrogates
    monkeypatch.setattr(sys, "stdout", plain)
    for flags in ([], ["--check"], ["--json"]):
        assert main(["info", str(run), *flags]) == 1
    plain.flush()
    text = plain.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert all(sign.isprintable() or sign == "\n" for sign in text)
    assert not [line for line in text.splitlines() if line.startswith("state     complete")]


def test_a_file_that_can_not_be_opened_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(captured(), tmp_path)
    file = str(tmp_path / run.record("block_1").file.file)
    real, real_open = safetensors.safe_open, open

    def safe_open(path: Any, *more: Any, **options: Any) -> Any:
        if str(path) == file:
            raise FileNotFoundError(f"No such file or directory: {path}")
        return real(path, *more, **options)

    def opened(path: Any, *more: Any, **options: Any) -> Any:
        if str(path) == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
        return real_open(path, *more, **options)

    monkeypatch.setattr(safetensors, "safe_open", safe_open)
    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(StoreError, match=r"block_1-\w{8}\.safetensors can't be read: Permission"):
        open_run(tmp_path)
    with pytest.raises(StoreError, match=r"can't read .*block_1.*: Permission denied"):
        run["block_1"]


@pytest.mark.parametrize("what", ["manifest.json", "sites/block_0-01234567.json"])
def test_a_pipe_in_the_place_of_a_file_makes_nobody_wait(tmp_path: Path, what: str) -> None:
    with RunWriter(tmp_path, expected=["block_0"]) as writer:
        pass
    writer = RunWriter(tmp_path, resume=False)
    writer.__exit__(ValueError, ValueError(), None)
    name = what.replace("01234567", open_run(tmp_path)._manifest.token)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    if what == "manifest.json":
        for call in (open_run, RunWriter, check_target, clean_run):
            with pytest.raises(StoreError, match="no regular file"):
                call(tmp_path)
    else:
        assert open_run(tmp_path).sites == ()


@pytest.mark.parametrize(
    "path",
    [
        "nosuch://a/b",
        "http+x://",
        "memory://\ud800",
        "a\ud800b",
        "zip://a::nosuch://b",
        "zip://::x",
    ],
)
def test_paths_and_urls_that_lead_nowhere(path: str) -> None:
    for call in (open_run, RunWriter, check_target, clean_run):
        with pytest.raises(StoreError):
            call(path)


def test_a_target_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vistvis.models.loading.load", lambda *_, **__: 1 / 0)
    command = ["store", "a.jpg", "--model", "x", "--out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert main([*command, str(tmp_path / "full")]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    with RunWriter(tmp_path / "busy"):
        assert main([*command, str(tmp_path / "busy")]) == 2
    assert "someone else" in capsys.readouterr().err
    (tmp_path / "busy/manifest.json").write_text("{")
    assert main([*command, str(tmp_path / "busy")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    check_target(tmp_path / "new")
    assert not (tmp_path / "new").exists()
