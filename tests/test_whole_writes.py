"""`atomic_file`: whole or not there, and nothing piles up, whoever is killed or writes beside."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vistvis import files
from vistvis.errors import InputError
from vistvis.files import atomic_file, checked_path, inside

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that are killed")


def killed(work: Callable[[], None]) -> None:
    """Run `work` in a forked process, which it must not outlive."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def die_while_writing(path: Path) -> None:
    with atomic_file(path, sync=False) as file:
        file.write(b"half " * 1000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["a.bin", "n" * 250, "名" * 80])
def test_killed_writers_leave_one_file_at_most_and_the_next_clears_it(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    for _ in range(100 if name == "a.bin" else 2):
        killed(lambda: die_while_writing(path))
        assert len(list(tmp_path.iterdir())) == 1
    assert not path.exists()
    with atomic_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_both_finish_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as first:
        first.write(b"1" * 1000)
        first.flush()
        with atomic_file(path) as second:
            second.write(b"2" * 10)
        assert path.read_bytes() == b"2" * 10
        with atomic_file(path) as third:  # in a row too
            third.write(b"3" * 10)
    assert path.read_bytes() == b"1" * 1000
    assert list(tmp_path.iterdir()) == [path]


def write_many(path: Path, mark: bytes, times: int) -> None:
    for _ in range(times):
        with atomic_file(path, sync=False) as file:
            for _ in range(4):
                file.write(mark * 5000)
                file.flush()


def test_threads_and_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    fork = multiprocessing.get_context("fork")
    workers: list[threading.Thread | multiprocessing.process.BaseProcess] = []
    for mark in (b"a", b"b", b"c"):
        workers.append(threading.Thread(target=write_many, args=(path, mark, 150)))
        workers.append(fork.Process(target=write_many, args=(path, mark.upper(), 150)))
    write_many(path, b"0", 1)
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        seen = path.read_bytes()
        assert len(seen) == 20_000
        assert len(set(seen)) == 1
    for worker in workers:
        worker.join()
    assert list(tmp_path.iterdir()) == [path]


def test_a_child_that_inherits_a_lock_blocks_nobody(tmp_path: Path) -> None:
    path, (done, wait) = tmp_path / "a.bin", os.pipe()
    with atomic_file(path) as file:
        file.write(b"first")
        child = os.fork()
        if not child:
            os.close(wait)
            os.read(done, 1)
            os._exit(0)
    for _ in range(2):
        with atomic_file(path) as file:
            file.write(b"second")
    os.close(wait)
    os.close(done)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "folder"])
def test_what_stands_under_the_temporary_name_is_not_harmed(tmp_path: Path, kind: str) -> None:
    path, precious = tmp_path / "a.bin", tmp_path / "precious"
    killed(lambda: die_while_writing(path))
    (temporary,) = tmp_path.iterdir()
    temporary.unlink()
    precious.write_bytes(b"precious")
    if kind == "link":
        temporary.symlink_to(precious)
    elif kind == "hard link":
        os.link(precious, temporary)
    elif kind == "fifo":
        os.mkfifo(temporary)
    else:
        temporary.mkdir()
    with atomic_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert precious.read_bytes() == b"precious"
    assert set(tmp_path.iterdir()) == {path, precious, temporary}


def test_without_locks_there_are_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "/tmp/\udfff/x"])
def test_paths_that_can_not_be(path: str) -> None:
    with pytest.raises(InputError, match="NUL"):
        checked_path(path)
    with pytest.raises(InputError, match="NUL"):
        inside(path, "a")
