"""Ctrl-C at every line of the store that a writer runs, and real signals at random moments.

Afterwards the lock is free, an earlier run is whole, the next writer works; and where a model is
watched too, it gives what it gave before, bit for bit, with torch's stacks as they were.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from interrupts import tries
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import vistvis
from vistvis import RunWriter, open_run, save_run
from vistvis.errors import StoreError

from .case import Case, Setting
from .runs import contents, pictures, sound

SITES = 3
STORE = str(Path(vistvis.__file__).parent / "store")


def interrupts(setting: Setting) -> Iterator[Case]:
    """KeyboardInterrupt in the k-th line of vistvis/store that the caller's thread runs."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        for name, (prepare, work) in WAYS.items():
            folder = setting.folder / name
            for number in setting.thinned(chosen_lines(folder, prepare, work)):
                case = partial(interrupted, folder / str(number), prepare, work, number)
                yield Case(f"{name} {number}", case)
    finally:
        os.fsync = fsync


def captures(setting: Setting) -> Iterator[Case]:
    """KeyboardInterrupt in the k-th line of vistvis/hooks that a capture runs."""

    def run(attempt: Callable[[], str]) -> None:
        failure = attempt()
        assert not failure, failure

    for name, attempt in tries(step=round(1 / setting.share)):
        yield Case(name, partial(run, attempt))


# -- a writer, line by line ------------------------------------------------------------------------


def with_writer(folder: Path, *, resume: bool = True) -> None:
    given = contents(2, SITES)
    with RunWriter(folder, images=pictures(2), resume=resume) as writer:
        writer.expect(given)
        for name, attention in given.items():
            writer.write(name, attention)


def with_save_run(folder: Path) -> None:
    save_run(contents(2, SITES), folder, images=pictures(2))


def with_close(folder: Path) -> None:
    """As in a notebook: no `with` that would close it."""
    writer = RunWriter(folder, expected=contents(2, SITES), images=pictures(2))
    try:
        for name, attention in contents(2, SITES).items():
            writer(name, attention)
    finally:
        writer.close()


def nothing(folder: Path) -> None:
    pass


def whole(folder: Path) -> None:
    save_run(contents(1, SITES), folder, images=pictures(1))


def part(folder: Path) -> None:
    writer = RunWriter(folder, expected=contents(2, SITES), images=pictures(2))
    with contextlib.suppress(ZeroDivisionError), writer:
        writer.write("site_0", contents(2)["site_0"])
        while not writer.finished:
            time.sleep(0.0005)
        raise ZeroDivisionError


WAYS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "begin": (nothing, with_writer),
    "save_run": (nothing, with_save_run),
    "replace": (whole, with_writer),
    "resume": (part, with_writer),
    "anew": (part, partial(with_writer, resume=False)),
    "close": (whole, with_close),
}


class Lines:
    """A tracer that notes lines of the store in this thread, and raises at one of them."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.seen: list[tuple[str, int]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(STORE):
            return None
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def chosen_lines(
    folder: Path, prepare: Callable[[Path], None], work: Callable[[Path], None]
) -> list[int]:
    """Which executed lines are tried: of each place in the code the first and last time."""
    prepare(folder)
    lines = Lines()
    with lines.on():
        work(folder)
    shutil.rmtree(folder)
    times: dict[tuple[str, int], list[int]] = {}
    for number, place in enumerate(lines.seen, 1):
        times.setdefault(place, []).append(number)
    return sorted({number for of in times.values() for number in (of[0], of[-1])})


def interrupted(
    folder: Path,
    prepare: Callable[[Path], None],
    work: Callable[[Path], None],
    number: int,
) -> None:
    prepare(folder)
    threads = set(threading.enumerate())
    lines = Lines(number)
    try:
        with lines.on():
            work(folder)
    except (KeyboardInterrupt, StoreError):
        pass  # where it ends an orderly close, that says what is not there
    # No collection of garbage in between: a lock must not depend on it.
    try:
        after(folder, whole_before=prepare is whole)
    except (AssertionError, StoreError) as error:
        file, line = lines.seen[-1]
        raise AssertionError(f"at {Path(file).name}:{line}: {error}") from error
    end = time.perf_counter() + 1
    while left := set(threading.enumerate()) - threads:
        assert time.perf_counter() < end, f"left running: {left}"
        time.sleep(0.001)


def after(folder: Path, *, whole_before: bool) -> None:
    if (folder / "manifest.json").exists():
        with open_run(folder) as run:
            found = sound(run)
            assert not whole_before or (run.complete and found in (1, 2)), "the run is not whole"
    else:
        assert not whole_before, "the earlier run is gone"
    try:
        save_run(contents(3, SITES), folder, images=pictures(3))
    except StoreError as error:
        gc.collect()
        raise AssertionError(f"the next writer is refused: {error}") from error
    with open_run(folder) as run:
        assert run.complete
        assert sound(run) == 3
    shutil.rmtree(folder)


# -- real signals ----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        made: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + made


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4))).eval()


def signals(setting: Setting) -> Iterator[Case]:
    """SIGINT at a random moment of a capture that stores, in forks that look at what is left."""
    model, x = model_of(), torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(x)
    folder = setting.folder / "signals"
    start = time.perf_counter()
    for _ in range(3):
        capture_and_store(model, x, folder)
    usual = (time.perf_counter() - start) / 3
    for number in range(setting.count(520)):
        after_seconds = setting.random(f"signals/{number}").uniform(0, 1.1 * usual)
        case = partial(signalled, model, x, plain, folder, after_seconds)
        yield Case(str(number), case)


def capture_and_store(model: nn.Module, x: Tensor, folder: Path) -> None:
    with (
        RunWriter(folder, resume=False) as writer,
        vistvis.capture(model, sink=writer) as captured,
        torch.no_grad(),
    ):
        writer.expect(captured.sites.names)
        model(x)


def signalled(
    model: nn.Module, x: Tensor, plain: Tensor, folder: Path, after_seconds: float
) -> None:
    """In a fork, whose exit code says what was not as before."""
    shutil.rmtree(folder, ignore_errors=True)
    capture_and_store(model, x, folder)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        message = b"the child failed"
        try:
            os.close(reading)
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.dump_traceback_later(15, exit=True, file=writing)
            message = in_the_child(model, x, plain, folder, writing).encode()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".encode()[:900]
        finally:
            os.write(writing, message)
            os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    time.sleep(after_seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGINT)
    said = b"".join(iter(partial(os.read, reading, 1 << 12), b"")).decode()
    os.close(reading)
    os.waitpid(child, 0)
    assert not said, said


def in_the_child(model: nn.Module, x: Tensor, plain: Tensor, folder: Path, ready: int) -> str:
    """What is wrong after an interrupt; nothing, if all is well."""
    stacks = (_get_current_function_mode_stack, _get_current_dispatch_mode_stack)
    before = [len(stack()) for stack in stacks], torch.is_grad_enabled()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        os.write(ready, b"x")
        capture_and_store(model, x, folder)
        time.sleep(1)  # the signal is on its way
    except KeyboardInterrupt:
        pass
    now = [len(stack()) for stack in stacks], torch.is_grad_enabled()
    if now != before:
        return f"torch's stacks and grad mode were {before}, are {now}"
    with torch.no_grad():
        for _ in range(2):
            if not torch.equal(model(x), plain):
                return "the model gives something else"
    left = [name for name, one in model.named_modules() if "forward" in vars(one)]
    if left:
        return f"wrappers are left after two passes: {left}"
    with open_run(folder) as run:
        run.check()
        if not run.complete:
            return "the earlier run is not whole"
    capture_and_store(model, x, folder)
    with open_run(folder) as run:
        run.check()
        return "" if run.complete and len(run) == 4 else "the next capture stored less"
