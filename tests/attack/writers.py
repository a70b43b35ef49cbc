"""Two writers at once, in threads and processes, on a disk, on memory:// and on a slow one of that.

What opens as complete is sound and of one pass, and stays so until someone writes again.
"""

# ruff: noqa: PT017 - these are no tests of pytest

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from vistvis import RunWriter, open_run, save_run
from vistvis.errors import StoreError

from .case import Case, Setting
from .runs import contents, pictures, sound

SITES = 4


class SlowFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Memory in which others run between any two operations."""

    protocol = "slowmemory"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in its base, shared by instances
    pseudo_dirs = [""]  # noqa: RUF012


def _waiting(name: str) -> Any:
    real = getattr(MemoryFileSystem, name)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        time.sleep(0.0005 * (hash((name, threading.get_ident(), time.perf_counter_ns())) % 4))
        return real(self, *arguments, **named)

    return call


for _name in ("cat_file", "pipe_file", "ls", "rm_file"):
    setattr(SlowFileSystem, _name, _waiting(_name))
fsspec.register_implementation("slowmemory", SlowFileSystem, clobber=True)


def writers(setting: Setting) -> Iterator[Case]:
    places = {
        "disk": lambda number: str(setting.folder / f"run{number}"),
        "memory": lambda number: f"memory://writers/{setting.seed}/{number}",
        "slow": lambda number: f"slowmemory://writers/{setting.seed}/{number}",
    }
    for kind, place in places.items():
        for number in range(setting.count(60)):
            random = setting.random(f"writers/{kind}/{number}")
            case = partial(threads, random, place(number), kind)
            yield Case(f"threads {kind} {number}", case)
    for number in range(setting.count(60)):
        random = setting.random(f"processes/{number}")
        yield Case(f"processes {number}", partial(processes, random, setting.folder / f"p{number}"))


def write(path: str, seed: int, random: Random, ended: Callable[[int], object]) -> None:
    """One pass, at a pace of its own; `ended` is told when it was closed without an error."""
    given = contents(seed, SITES)
    resume = random.random() < 0.8
    pause = random.choice((0, 0, 0.001, 0.003))
    time.sleep(random.uniform(0, 0.01))
    with contextlib.suppress(StoreError):
        if random.random() < 0.3:
            save_run(given, path, images=pictures(seed), resume=resume)
        else:
            writer = RunWriter(path, expected=given, images=pictures(seed), resume=resume)
            with writer:
                for name, attention in given.items():
                    writer.write(name, attention)
                    time.sleep(pause)
        ended(seed)


def one_pass(path: str, seeds: set[int], *, certain: bool) -> None:
    """What opens as complete is of one of the passes; `certain`: one there must be."""
    try:
        run = open_run(path)
    except StoreError as error:
        assert "no run in" in str(error), f"what lies there is damaged: {error}"
        assert not certain, "a pass that was closed without an error is not there"
        return
    found = sound(run, seeds)
    assert not run.complete or len(run) == SITES
    assert not run.complete or found is not None
    assert run.complete or not certain, f"a pass was closed without an error, there is {run!r}"


def looked_at(path: str, seeds: set[int], stop: threading.Event, wrong: list[str]) -> None:
    """A reader beside the writers."""
    while not stop.is_set():
        try:
            run = open_run(path, strict=False)
            if run.complete:
                sound(run, seeds)
        except StoreError:
            pass  # replaced between two looks
        except AssertionError as error:
            wrong.append(str(error))
        time.sleep(0.002)


def threads(random: Random, path: str, kind: str) -> None:
    before = random.random() < 0.5
    if before:
        save_run(contents(1, SITES), path, images=pictures(1))
    seeds = [2, random.choice((2, 3))] if random.random() < 0.3 else [2, 3]
    ended: list[int] = []
    wrong: list[str] = []
    stop = threading.Event()
    # Random numbers of threads come from before: which thread is first is nobody's choice.
    workers = [
        threading.Thread(target=write, args=(path, seed, Random(random.random()), ended.append))
        for seed in seeds
    ]
    reader = threading.Thread(target=looked_at, args=(path, {1, *seeds}, stop, wrong))
    for worker in (*workers, reader):
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    reader.join()
    assert not wrong, f"read meanwhile: {wrong[0]}"
    one_pass(path, {1, *seeds}, certain=bool(ended) or before)
    save_run(contents(4, SITES), path, images=pictures(4))
    one_pass(path, {4}, certain=True)


def processes(random: Random, folder: Path) -> None:
    before = random.random() < 0.5
    if before:
        save_run(contents(1, SITES), folder, images=pictures(1))
    children = []
    for seed in (2, 3, 2):
        own = Random(random.random())
        child = os.fork()
        if child == 0:
            status = 1
            ended: list[int] = []
            try:
                write(str(folder), seed, own, ended.append)
                status = 0 if ended else 7
            finally:
                os._exit(status)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 7}, f"a writer failed otherwise: {codes}"
    one_pass(str(folder), {1, 2, 3}, certain=before or 0 in codes)
    save_run(contents(4, SITES), folder, images=pictures(4))
    one_pass(str(folder), {4}, certain=True)
