"""Disks that are full, can only be read or fail at any call; too few descriptors; files too large.

Each must be a clear StoreError; what was whole before stays whole; and the next writer works.
"""

# ruff: noqa: PT017 - these are no tests of pytest

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vistvis import open_run, save_run
from vistvis.errors import StoreError

from .case import Case, Setting
from .runs import contents, pictures, sound, stored

REFUSALS = {
    "full": (errno.ENOSPC, "No space left"),
    "quota": (errno.EDQUOT, "quota"),
    "read-only": (errno.EROFS, "Read-only"),
    "forbidden": (errno.EACCES, "Permission"),
    "failing": (errno.EIO, "error"),
    "too many files": (errno.EMFILE, "Too many open files"),
}


def disks(setting: Setting) -> Iterator[Case]:
    fsync, os.fsync = os.fsync, lambda _: None  # counted all the same, and real disks are slow
    try:
        yield from every_way(setting)
    finally:
        os.fsync = fsync


def every_way(setting: Setting) -> Iterator[Case]:
    for before in ("nothing", "whole", "part"):
        for name in REFUSALS:
            steps = setting.thinned(range(1, count_of_calls(setting, before) + 2))
            for step in steps:
                for lasting in (False, True) if name in ("full", "read-only") else (False,):
                    case = partial(refusing, setting.folder / "run", before, name, step, lasting)
                    yield Case(f"{name} {before} {step} {'lasting' if lasting else 'once'}", case)
    for size in setting.thinned([0, 1, 100, *range(200, 9000, 200), *range(10_000, 90_000, 5000)]):
        yield Case(f"largest file {size}", partial(files_too_large, setting.folder / "size", size))
    for room in setting.thinned(range(24)):
        yield Case(f"descriptors {room}", partial(descriptors, setting.folder / "few", room))
    for size in setting.thinned(range(16, 160, 4)):
        yield Case(f"tmpfs of {size} KB", partial(really_full, setting.folder / "disk", size))
    yield Case("tmpfs read-only", partial(really_read_only, setting.folder / "disk"))


def write(folder: Path, seed: int, **more: Any) -> None:
    save_run(contents(seed, **more), folder, images=pictures(seed), model="a model")


def prepared(folder: Path, before: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if before == "whole":
        write(folder, 1)
    elif before == "part":
        with contextlib.suppress(OSError), failing(errno.ENOSPC, at=12, lasting=True):
            write(folder, 2)


def after(folder: Path, before: str, message: str) -> None:
    """What was whole is whole; what is new is a part of the new; the next writer finishes."""
    assert str(folder) in message, f"the message does not say where: {message}"
    if before == "whole":
        with open_run(folder) as run:
            assert run.complete, "the earlier run is not whole"
            assert sound(run) in (1, 2)
            assert len(run) == 3, "the earlier run lost sites"
    elif (folder / "manifest.json").exists():
        with open_run(folder) as run:
            sound(run, {2})
    write(folder, 3)
    with open_run(folder) as run:
        assert run.complete
        assert sound(run) == 3
    shutil.rmtree(folder)


# -- every call that changes the disk, refused -----------------------------------------------------

CALLS = ("fsync", "replace", "unlink", "remove", "mkdir", "rename", "link")


@contextlib.contextmanager
def failing(number: int, *, at: int, lasting: bool) -> Iterator[list[int]]:
    """The `at`-th call that changes the disk raises; with `lasting` all later ones too."""
    calls, real_open = [0], os.open
    real = {name: getattr(os, name) for name in CALLS}
    opened: Any = builtins.open

    def counted(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == at or (lasting and calls[0] > at):
            path = arguments[0] if isinstance(arguments[0], (str, os.PathLike)) else None
            raise OSError(number, os.strerror(number), path)
        return call(*arguments, **named)

    def open_low(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        made = partial(counted, real_open) if flags & os.O_CREAT else real_open
        return made(path, flags, *rest, **named)

    def open_high(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        writes = set(mode) & set("wax+") and not isinstance(path, int)
        return (partial(counted, opened) if writes else opened)(path, mode, *rest, **named)

    try:
        for name, call in real.items():
            setattr(os, name, partial(counted, call))
        os.open, builtins.open = open_low, open_high  # type: ignore[assignment]
        yield calls
    finally:
        os.open, builtins.open = real_open, opened
        for name, call in real.items():
            setattr(os, name, call)


def count_of_calls(setting: Setting, before: str) -> int:
    folder = setting.folder / "counted"
    prepared(folder, before)
    with failing(0, at=1 << 30, lasting=False) as calls:
        write(folder, 2)
    shutil.rmtree(folder)
    return calls[0]


def refusing(folder: Path, before: str, name: str, step: int, lasting: bool) -> None:
    number, words = REFUSALS[name]
    prepared(folder, before)
    try:
        with failing(number, at=step, lasting=lasting):
            write(folder, 2)
    except StoreError as error:
        message = str(error)
        assert words in message, f"the message does not say {words!r}: {message}"
    else:
        # What can't be removed, say, is tried again by the next writer.
        message = str(folder)
        with open_run(folder) as run:
            assert sound(run) == 2, "nothing was said, and the run is not there"
    after(folder, before, message)


def files_too_large(folder: Path, size: int) -> None:
    prepared(folder, "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        write(folder, 2, tokens=400)
    except StoreError as error:
        message = str(error)
        assert "too large" in message.lower(), f"not said: {message}"
    else:
        message = str(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after(folder, "whole", message)


def descriptors(folder: Path, room: int) -> None:
    """Few more files may be opened: writing and reading are refused clearly, or work."""
    prepared(folder, "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    message = str(folder)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + room, hard))
        for use in (partial(write, folder, 2), lambda: sound(open_run(folder))):
            try:
                use()
            except StoreError as error:
                assert "Too many open files" in str(error) or "os error 24" in str(error), error
                assert str(folder) in str(error), f"the message does not say where: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    after(folder, "whole", message)


# -- real ones -------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many KB; False where none may be mounted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    mounted = (
        sys.platform == "linux"
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def really_full(folder: Path, size: int) -> None:
    with small_disk(folder, size) as mounted:
        if not mounted:
            return
        run, before = folder / "run", False
        with contextlib.suppress(StoreError):
            write(run, 1)
            before = True
        try:
            write(run, 2, tokens=size * 2)
        except StoreError as error:
            assert "No space left" in str(error), f"not said: {error}"
        if before:
            with open_run(run) as opened:
                assert opened.complete, "the earlier run is not whole"
                sound(opened, {1, 2})
        for file in (*folder.glob("*/sites/*"), *folder.glob("*/.*"), *folder.glob("*/*")):
            if file.is_file():
                file.unlink()
        with contextlib.suppress(StoreError):  # where not even one file fits
            write(run, 3)
            sound(open_run(run), {3})


def really_read_only(folder: Path) -> None:
    with small_disk(folder, 4000) as mounted:
        if not mounted:
            return
        stored(folder / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for run in (folder / "run", folder / "new"):
            try:
                write(run, 2)
            except StoreError as error:
                assert "Read-only" in str(error)
            else:
                raise AssertionError("written where nothing can be")
        assert sound(open_run(folder / "run")) == 1
