"""Writers that are interrupted, dropped or slow: the lock is free after them, the thread gone.

Every line of all of the store is `nox -s attack`'s; here are those of the writer itself.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack.interrupts import WAYS, Lines, interrupted
from attack.runs import contents

from vistvis.errors import StoreError
from vistvis.store import RunWriter, background, open_run, save_run
from vistvis.store.background import Background
from vistvis.store.folders import LocalFolder


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def writing() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "vistvis writer"]


def lock_is_free(folder: Path) -> bool:
    lock = LocalFolder(folder).lock()
    try:
        lock.acquire()
    except StoreError:
        return False
    finally:
        lock.release()
    return True


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, sites wait for the disk."""
    gate, write = threading.Event(), LocalFolder.write

    def waiting(folder: LocalFolder, name: str, pieces: Any) -> tuple[int, int]:
        assert "site" not in name or gate.wait(20)
        return write(folder, name, pieces)

    monkeypatch.setattr(LocalFolder, "write", waiting)
    return gate


def test_an_interrupt_at_any_line_at_which_a_writer_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    prepare, work = WAYS["begin"]
    with (lines := Lines()).on():
        work(tmp_path / "counted")
    numbers = {place: number for number, place in enumerate(lines.seen, 1)}
    code = [RunWriter.__exit__, RunWriter._close, Background.join, Background.end]
    places = {
        (one.__code__.co_filename, line) for one in code for *_, line in one.__code__.co_lines()
    }
    tried = sorted(numbers[place] for place in places & set(numbers))
    assert len(tried) > 15
    for number in tried:
        interrupted(tmp_path / str(number), prepare, work, number)


def test_a_writer_that_nobody_closes_goes_with_its_lock(
    tmp_path: Path, gate: threading.Event
) -> None:
    writer = RunWriter(tmp_path, expected=contents(1))
    for name, attention in contents(1).items():
        writer.write(name, attention)
    tasks = writer._background._tasks
    until(lambda: tasks.qsize() == 2)
    threading.Timer(0.1, gate.set).start()
    del writer  # waits for the site at hand
    assert lock_is_free(tmp_path)
    until(lambda: not writing())
    with open_run(tmp_path) as run:
        assert run.sites == ("site_0",)
    save_run(contents(1), tmp_path).check()


def test_a_disk_slower_than_patience_keeps_the_lock_until_its_site_is_there(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_PATIENCE", 0.05)
    writer = RunWriter(tmp_path)
    writer.write("site_0", contents(1)["site_0"])
    tasks = writer._background._tasks
    until(lambda: not tasks.qsize())
    del writer
    assert not lock_is_free(tmp_path)
    with pytest.raises(StoreError, match="being written by someone else"):
        RunWriter(tmp_path)
    gate.set()
    until(lambda: not writing())
    assert lock_is_free(tmp_path)
    assert open_run(tmp_path).sites == ("site_0",)


def test_a_writer_whose_error_was_raised_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: LocalFolder, name: str, pieces: Any) -> tuple[int, int]:
        raise OSError(28, "No space left on device")

    writer = RunWriter(tmp_path)
    monkeypatch.setattr(LocalFolder, "write", full)
    writer.write("site_0", contents(1)["site_0"])
    until(lambda seen=writer._background: seen.error is not None)
    with pytest.raises(StoreError, match="No space left"):
        writer.write("site_1", contents(1)["site_1"])
    with pytest.raises(StoreError, match="No space left"):
        writer.close()
    gone = weakref.ref(writer)
    del writer
    gc.collect()
    assert gone() is None
    assert lock_is_free(tmp_path)


def test_a_site_that_waits_for_room_when_the_writer_closes_is_refused(
    tmp_path: Path, gate: threading.Event
) -> None:
    writer, refused = RunWriter(tmp_path, queue_size=1), list[StoreError]()

    def late() -> None:
        try:
            writer.write("site_2", contents(1)["site_2"])
        except StoreError as error:
            refused.append(error)

    for name in ("site_0", "site_1"):  # one at hand, one that waits
        writer.write(name, contents(1)[name])
    other = threading.Thread(target=late)
    other.start()
    other.join(0.1)
    assert other.is_alive()
    threading.Timer(0.1, gate.set).start()
    writer.close()
    other.join(20)
    assert "closed" in str(refused[0])
    assert open_run(tmp_path).sites == ("site_0", "site_1")
