"""Writers that are killed at random moments, each a fork of this process.

Afterwards: every site that was reported finished is there and right; an earlier complete run is
whole, or replaced whole; files of others are as they were; little is left over; the next writer
works.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import torch

from vistvis import RunWriter, open_run, save_run
from vistvis.files import atomic_file
from vistvis.store import formats

from .case import Case, Setting
from .runs import contents, pictures, sound

SITES = 5


def kills(setting: Setting) -> Iterator[Case]:
    os_fsync, os.fsync = os.fsync, lambda _: None  # a kill is no power cut, and disks are slow
    try:
        yield from run_kills(setting)
        yield from file_kills(setting)
    finally:
        os.fsync = os_fsync


def forked(work: Callable[[Callable[[object], None]], None], after: float | None) -> list[str]:
    """Lines that a fork told before it was killed, `after` seconds from its first one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            work(lambda what: (os.write(writing, f"{what}\n".encode()), None)[1])
            status = 0
        except BaseException:
            os.write(writing, f"failed {traceback.format_exc()[-800:]!r}\n".encode())
        finally:
            os._exit(status)
    os.close(writing)
    told = os.read(reading, 1 << 16)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    while piece := os.read(reading, 1 << 16):
        told += piece
    os.close(reading)
    os.waitpid(child, 0)
    lines = told.decode().splitlines()
    failures = [line for line in lines if line.startswith("failed")]
    assert not failures, failures[0]
    return lines


# -- runs ------------------------------------------------------------------------------------------


def write_run(folder: Path, seed: int, how: str, tell: Callable[[object], None]) -> None:
    """A pass of SITES sites; each is told when the writer says that it is finished."""
    given, pass_id = contents(seed, SITES, tokens=60), {}
    if how == "pass" and "pass_id" in RunWriter.__init__.__kwdefaults__:  # type: ignore[operator]
        pass_id = {"pass_id": f"pass {seed}"}
    tell("begin")
    if how == "save_run":
        save_run(given, folder, images=pictures(seed))
        tell("end")
        return
    with RunWriter(folder, expected=given, images=pictures(seed), **pass_id) as writer:
        known: set[str] = set()
        for name, attention in given.items():
            writer.write(name, attention)
            while name not in writer.finished:
                time.sleep(0)
            for new in set(writer.finished) - known:
                tell(f"site {new}")
            known |= set(writer.finished)
    tell("end")


def run_kills(setting: Setting) -> Iterator[Case]:
    """Chains of kills over one folder: begun, resumed, replaced; then a new folder."""
    usual = []
    for number in range(3):
        start = time.perf_counter()
        forked(partial(write_run, setting.folder / f"measured{number}", 1, "writer"), None)
        usual.append(time.perf_counter() - start)
    for chain in range(setting.count(90)):
        random = setting.random(f"kills/{chain}")
        folder = setting.folder / f"chain{chain}"
        yield Case(f"chain {chain}", partial(one_chain, random, folder, min(usual)), count=5)


def one_chain(random: Random, folder: Path, usual: float) -> None:
    folder.mkdir()
    if random.random() < 0.5:
        save_run(contents(9, SITES, tokens=60), folder, images=pictures(9))
    seed, foreign = 1, {}
    for step in range(5):
        if step == 1 and (folder / "manifest.json").exists():
            foreign = others(folder)
        whole = complete(folder)
        seed += random.random() < 0.4
        how = random.choice(("writer", "save_run", "pass"))
        lines = forked(partial(write_run, folder, seed, how), random.uniform(0, 1.15 * usual))
        after_a_kill(folder, seed, whole, lines, how)
        assert all((folder / name).read_bytes() == data for name, data in foreign.items()), (
            "a file of someone else was touched"
        )
    given = contents(7, SITES, tokens=60)
    save_run(given, folder, images=pictures(7))
    with open_run(folder) as run:
        assert run.complete
        assert (sound(run), len(run)) == (7, SITES)
    left = [
        p for p in folder.rglob("*") if p.is_file() and str(p.relative_to(folder)) not in foreign
    ]
    # The manifest, images, sites and the lock; a kill may leave what --clean takes away later.
    bound = 3 + SITES + 5 * (2 * SITES + 4)
    assert len(left) <= bound, f"{len(left)} files are left"
    shutil.rmtree(folder)


def complete(folder: Path) -> int | None:
    """The seed of the complete run in a folder."""
    if not (folder / "manifest.json").exists():
        return None
    with open_run(folder) as run:
        return sound(run) if run.complete else None


def others(folder: Path) -> dict[str, bytes]:
    """Files of someone else in the folder of a run, put there."""
    files = {
        "notes.txt": b"mine",
        "ubuntu.iso.part": b"mine",
        "sites/my_lora.safetensors": b"mine",
        "images-7.safetensors": b"mine",
        ".notes.txt.0123abcd.part": b"mine",
    }
    (folder / "sites").mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def after_a_kill(folder: Path, seed: int, whole: int | None, lines: list[str], how: str) -> None:
    if not (folder / "manifest.json").exists():
        assert whole is None, "the earlier run is gone"
        assert not [line for line in lines if line.startswith("site")], "told sites are gone"
        return
    with open_run(folder) as run:
        found = sound(run)
        if "end" in lines:
            assert run.complete, "what was closed is not complete"
            assert found == seed, f"pass {found}, told {seed}"
        if whole is not None and found != seed:
            assert run.complete, f"the earlier run is not whole: {run!r}"
            assert found == whole
        elif whole is not None and whole != seed:
            assert run.complete, "an earlier run is replaced by a part"
        else:
            told = {line.removeprefix("site ") for line in lines if line.startswith("site")}
            # A pass beside an unfinished one of another shows once it is whole.
            if found == seed:
                assert told <= set(run), f"told {sorted(told)}, there {sorted(run)}"


# -- single files ----------------------------------------------------------------------------------


def write_files(folder: Path, seed: int, tell: Callable[[object], None]) -> None:
    tell("begin")
    tensor = torch.full((1, 2, 60, 60), float(seed))
    for ending in (".pt", ".npy", ".npz", ".safetensors"):
        formats.write(tensor, folder / f"x{ending}")
    formats.write(contents(seed, 1, tokens=60)["site_0"], folder / "site.safetensors")
    with atomic_file(folder / "plain.png") as file:
        for _ in range(50):
            file.write(b"%d" % (seed % 10) * 1000)
    tell("end")


def file_kills(setting: Setting) -> Iterator[Case]:
    folder = setting.folder / "files"
    folder.mkdir()
    write_files(folder, 1, lambda _: None)
    start = time.perf_counter()
    forked(partial(write_files, folder, 1), None)
    usual = time.perf_counter() - start
    for number in range(setting.count(120)):
        random = setting.random(f"files/{number}")
        yield Case(f"file {number}", partial(one_file_kill, random, folder, number + 2, usual))


def one_file_kill(random: Random, folder: Path, seed: int, usual: float) -> None:
    forked(partial(write_files, folder, seed), random.uniform(0, 1.1 * usual))
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix == ".png":
            data = path.read_bytes()
            assert (len(data), len(set(data))) == (50_000, 1), "half a file"
            continue
        one = path.stem == "x"
        first = formats.read(path).one() if one else formats.read_attention(path).query
        assert len(set(first.flatten().tolist())) == 1, f"{path.name} is torn"
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert len(left) <= 6, f"temporary files pile up: {left}"
