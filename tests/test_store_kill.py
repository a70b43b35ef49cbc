"""A writer that is killed, at random moments and at every single step, leaves a sound run.

Importing torch takes seconds, so the killed processes are forks of one server that has it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vistvis import Attention
from vistvis.errors import StoreError
from vistvis.store import Run, RunWriter, open_run, save_run

ROOT = Path(__file__).parents[1]
SITES = [f"block_{number}" for number in range(4)]


def contents(seed: int) -> dict[str, Attention]:
    """A run in which every number tells the seed and the site."""

    def one(number: int) -> Attention:
        query = torch.full((1, 2, 50, 4), float(1000 * seed + number))
        return Attention(query=query, key=query / 7)

    return {name: one(number) for number, name in enumerate(SITES)}


def sound(run: Run) -> int | None:
    """Check all of a run; the seed of its sites, which must be one (None where there is none)."""
    run.check()
    assert (*run.sites, *run.missing) == tuple(sorted((*run.sites, *run.missing)))
    seeds = set()
    for name in run:
        query = run[name].query
        assert query is not None
        seed, number = divmod(int(query[0, 0, 0, 0]), 1000)
        assert bool((query == query[0, 0, 0, 0]).all())
        assert name == f"block_{number}"
        seeds.add(seed)
    assert len(seeds) <= 1, f"sites of passes {seeds} are mixed"
    return seeds.pop() if seeds else None


# -- the server: this file run as a program -------------------------------------------------------


def serve() -> None:
    """For every line `seed step path` fork a writer, say its process id, and how it ended.

    With a step, the writer kills itself at that one of the calls by which it changes the disk.
    """
    torch.set_num_threads(1)
    save_run(contents(0), sys.argv[1])  # imports what is imported late
    for line in sys.stdin:
        seed, step, path = line.rstrip("\n").split(" ", 2)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if int(step):
                    kill_at(int(step))
                save_run(contents(int(seed)), path, pass_id=seed)
                status = 0
            finally:
                os._exit(status)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def kill_at(step: int) -> None:
    count = 0

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    # Flushing lies between the data and the rename, and raises no audit event. It is counted, and
    # left out: what a killed process wrote is safe with the system, and disks are slow.
    os.fsync = lambda _: audit("os.rename", ())  # type: ignore[assignment]


class Server:
    def __init__(self, warm: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(warm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def _line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, path: Path, *, seed: int, step: int = 0) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed} {step} {path}\n")
        self.process.stdin.flush()
        return self._line()

    def wait(self) -> int:
        """The status of the writer: 0, or 9 for one that was killed."""
        return self._line()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "warm")
    with server.process:
        yield server
        server.process.kill()


def after_a_kill(path: Path, before: int | None) -> Run | None:
    """What may be found: nothing yet, the run before (whole), or a part of the new one."""
    if not (path / "manifest.json").exists():
        assert before is None
        return None
    run = open_run(path)
    seed = sound(run)
    if before is not None and seed == before:
        assert run.complete
    return run


def test_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    """54 kills: of runs in new folders, and over what the last one left, resumed or replaced."""
    number = random.Random(time.time_ns())
    for seed in (1, 2):  # the first waits for the server itself
        start = time.perf_counter()
        server.start(tmp_path / "measure", seed=seed)
        assert server.wait() == 0
    usual = time.perf_counter() - start
    path, before, killed, sizes = tmp_path / "run0", None, 0, []
    attempt = seed = 0
    while killed < 54:
        attempt += 1
        assert attempt < 400
        if attempt % 3 == 0:
            path, before = tmp_path / f"run{attempt}", None
            if attempt % 2:
                save_run(contents(0), path)
                before = 0
        # Another pass, or the same again.
        seed += number.random() < 0.5
        child = server.start(path, seed=seed + 1)
        time.sleep(number.uniform(0, 1.1 * usual))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        killed += server.wait() == signal.SIGKILL
        run = after_a_kill(path, before)
        sizes.append(None if run is None else len(run))
        before = sound(run) if run is not None and run.complete else None
    # The moments were spread: some runs had hardly begun, some were well under way.
    assert len({size for size in sizes if size is not None}) > 2, sizes


@pytest.mark.parametrize("before", ["nothing", "whole", "part", "another part"])
def test_killed_at_every_step(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    step, found = 0, set()
    while True:
        step += 1
        path, least = tmp_path / f"run{step}", 0
        if before == "whole":
            save_run(contents(1), path)
        elif before == "part":
            server.start(path, seed=2, step=26)
            assert server.wait() == signal.SIGKILL
            least = len(open_run(path))
            assert 0 < least < len(SITES)
        elif before == "another part":  # of a pass that nobody knows to be the same
            with RunWriter(path, expected=SITES) as writer:
                for name in SITES[:2]:
                    writer.write(name, contents(2)[name])
        server.start(path, seed=2, step=step)
        status = server.wait()
        run = after_a_kill(path, 1 if before == "whole" else None)
        if run is not None:
            found.add((sound(run), len(run)))
            assert len(run) >= least
        if status == 0:
            break
        assert status == signal.SIGKILL
        # Calling again goes on from there.
        if step % 3 == 0:
            again = save_run(contents(2), path, pass_id="2")
            assert again.complete
            assert sound(again) == 2
            left = {p.name for p in path.rglob("*") if p.is_file()} - {".lock"}
            assert len(left) == len(SITES) + 1, left
    assert step > 25
    counts = {(2, count) for count in range(max(1, least), len(SITES) + 1)}
    wanted = {
        "nothing": {(None, 0), *counts},
        "whole": {(1, len(SITES)), (2, len(SITES))},  # whole or not at all
        "part": counts,
        "another part": {(2, 2), (2, len(SITES))},
    }
    assert found == wanted[before]


def test_the_check_of_these_tests_can_fail(tmp_path: Path) -> None:
    run = save_run(contents(1), tmp_path / "run")
    assert sound(run) == 1
    mixed = {**contents(1), SITES[3]: contents(2)[SITES[3]]}
    with pytest.raises(AssertionError, match="mixed"):
        sound(save_run(mixed, tmp_path / "run"))
    os.truncate(tmp_path / "run" / open_run(tmp_path / "run").record(SITES[0]).file.file, 100)
    with pytest.raises(StoreError, match="damaged"):
        after_a_kill(tmp_path / "run", None)


if __name__ == "__main__":
    serve()
