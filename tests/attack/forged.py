"""Runs from strangers: errors of this package only, nothing outside, little memory, little time.

A forger signs what he writes: manifests here have right checksums, where manifests have any.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from vistvis import open_run, save_run
from vistvis.commands import info
from vistvis.errors import VistvisError

from .case import Case, Setting, time_limit
from .runs import contents, edited, reading, sound, stored

ROOM = 3 * 2**30  # bytes beside what the process has when it begins
SECONDS = 5.0
STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 10**18, 10**30, 10**400, -(2**63), 1.5, 1e308, float("nan")),
    *("", "x", "..", "../x", "/etc/passwd", "F64", "ff", "1" * 5000, "\0", "\x1b[2J\r", "\ud800"),
    *([], {}, [1], [[[[1]]]], {"a": 1}, [10**18] * 4, [-1, 2], ["site_0"] * 3, [None], "\u202e"),
]
FILES = [
    *("../outside.safetensors", "/etc/passwd", "sites/../../outside.safetensors", "sites/.hidden"),
    *("sites/..\\..\\outside.safetensors", "sites/a/b.safetensors", "manifest.json", "", ".lock"),
    *("sites/site_0.safetensors\0", "sites/CON", "sites/x:y.safetensors", "C:\\x.safetensors"),
    *(
        "//host/x.safetensors",
        "file:///etc/passwd",
        "sites/" + "x" * 5000 + ".safetensors",
        "sites",
    ),
]
NAMES = [
    *(
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0b",
        "\x1b]52;c;ZXZpbA==\x07",
        "a\nb",
    ),
    *("\ud800", "x" * 100_000, "\u202eabc", "CON", "nul.txt", "a:b", " ", "site_0 ", "\x9b31m"),
]


class Watch:
    """Notes every file that Python opens, or changes, outside a folder while it is on."""

    def __init__(self) -> None:
        self.inside, self.seen = "", []  # type: tuple[str, list[str]]
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink")
        if not self.inside or not (changes or event == "open"):
            return
        for path in arguments[: 2 if event == "os.rename" else 1]:
            if not isinstance(path, (str, bytes)):
                continue
            folder, name = os.path.split(os.path.realpath(os.fsdecode(path)))
            if changes:  # of the link itself
                folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
            where = os.path.join(os.path.realpath(folder), name)
            python = where.startswith(
                (sys.prefix, sys.base_prefix, *map(os.path.realpath, sys.path))
            )
            written = changes or (isinstance(arguments[2], int) and arguments[2] & 0o3)
            if not where.startswith(self.inside) and (written or not python):
                self.seen.append(f"{event} {where}")


def forged(setting: Setting) -> Iterator[Case]:
    watch = Watch()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        template = stored(setting.folder / "template")
        save_run({"site_0": contents(66)["site_0"]}, setting.folder / "outside")
        folder = setting.folder / "run"
        for name, forge in forgeries(setting):
            yield Case(name, partial(opened, watch, template, folder, forge))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def opened(watch: Watch, template: Path, folder: Path, forge: Callable[[Path], object]) -> None:
    """A forged run is read, described, checked, and written over."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    forge(folder)
    outside = folder.parent / "outside"
    before = {p: p.stat().st_mtime_ns for p in (outside, *outside.rglob("*"))}
    watch.inside, watch.seen = str(folder), []
    try:
        with time_limit(SECONDS):
            for use in (reading, described, checked, replaced):
                try:
                    found = use(folder)
                except VistvisError as error:
                    found = str(error)
                assert "66000.0" not in str(found), f"{use.__name__} read a file outside"
    finally:
        watch.inside = ""
    assert not watch.seen, f"outside the folder: {watch.seen[:3]}"
    after = {p: p.stat().st_mtime_ns for p in (outside, *outside.rglob("*"))}
    assert before == after, "a file outside was changed"


def described(folder: Path) -> str:
    """What `vistvis info` prints: nothing that moves a cursor or hides text."""
    with open_run(folder, strict=False) as run:
        text = "\n".join(info.lines(run, checked=False))
        json.dumps(info.summary(run))
        repr(run)
    bad = [sign for sign in text if not sign.isprintable() and sign != "\n"]
    assert not bad, f"printed raw: {bad[:5]}"
    return text


def checked(folder: Path) -> None:
    with open_run(folder, strict=False) as run:
        run.check()


def replaced(folder: Path) -> None:
    save_run(contents(2), folder)
    with open_run(folder) as run:
        assert sound(run) == 2, "what was written over it is not there"


# -- what is forged --------------------------------------------------------------------------------


def forgeries(setting: Setting) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Names and what each does to a sound run."""
    for number in range(setting.count(2400)):
        yield f"mutation {number}", partial(mutated, setting.random(f"forged/{number}"))
    for kind, make in (("file", FILES), ("name", NAMES)):
        for number, value in enumerate(make):
            for where in ("sites", "images") if kind == "file" else ("sites", "expected", "model"):
                yield f"{kind} {number} {where}", partial(renamed, kind, value, where)
    for name, place in PLACES.items():
        yield f"place {name}", place
    for name, text in TEXTS.items():
        yield f"text {name}", partial(as_text, text)
    for number in range(setting.count(300)):
        yield f"header {number}", partial(header, setting.random(f"header/{number}"))


def manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def spots(value: Any) -> list[tuple[Any, Any]]:
    found = []
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += spots(inner)
    return found


def mutated(random: Random, folder: Path) -> None:
    """One to three values, anywhere, are something else, gone, doubled or new."""

    def change(data: Any) -> None:
        for _ in range(random.choice((1, 1, 2, 3))):
            holder, key = random.choice(spots(data))
            roll = random.random()
            if isinstance(holder, dict) and roll < 0.2:
                del holder[key]
            elif isinstance(holder, dict) and roll < 0.3:
                holder[str(random.choice(STRANGE))[:200]] = random.choice(STRANGE)
            elif roll < 0.4:
                from_holder, from_key = random.choice(spots(data))
                holder[key] = copy.deepcopy(from_holder[from_key])
            else:
                holder[key] = random.choice(STRANGE)

    edited(manifest(folder), change)


def renamed(kind: str, value: str, where: str, folder: Path) -> None:
    def change(data: Any) -> None:
        if kind == "file":
            (data["sites"]["site_0"] if where == "sites" else data["images"])["file"] = value
        elif where == "sites":
            data["sites"] = {value: data["sites"]["site_0"], **data["sites"]}
        elif where == "expected":
            data["expected"] = [*data["expected"], value]
        else:
            data["model"], data["metadata"] = value, {value: value}

    edited(manifest(folder), change)


def as_text(text: bytes, folder: Path) -> None:
    manifest(folder).write_bytes(text)


DEEP = 200_000
TEXTS = {
    "empty": b"",
    "nul": b"\0" * 1000,
    "not utf-8": b"\xff\xfe{}",
    "deep lists": b"[" * DEEP,
    "deep objects": b'{"format":"vistvis-run","schema":2,"metadata":' * (DEEP // 20),
    "deep metadata": b'{"format":"vistvis-run","schema":1,"metadata":'
    + b"[" * DEEP
    + b"]" * DEEP
    + b"}",
    "doubled": b'{"format":"vistvis-run","format":"vistvis-run","schema":1,"schema":1}',
    "long number": b'{"format":"vistvis-run","schema":' + b"9" * 100_000 + b"}",
    "long string": b'{"format":"vistvis-run","schema":1,"made_by":"' + b"x" * 10**7 + b'"}',
    "newer": b'{"format":"vistvis-run","schema":99,"made_by":"\\u001b[2J\\ud800"}',
    "infinite": b'{"format":"vistvis-run","schema":1e999}',
    "bom": b'\xef\xbb\xbf{"format":"vistvis-run","schema":1}',
}


def _site(folder: Path) -> Path:
    return next((folder / "sites").glob("site_0*.safetensors"))


def linked(what: Callable[[Path], Path], target: str) -> Callable[[Path], None]:
    """A symbolic link in the place of something."""

    def place(folder: Path) -> None:
        path = what(folder)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        path.symlink_to(target.format(outside=folder.parent / "outside"))

    return place


def fifo(what: Callable[[Path], Path]) -> Callable[[Path], None]:
    def place(folder: Path) -> None:
        path = what(folder)
        path.unlink()
        os.mkfifo(path)

    return place


def as_folder(what: Callable[[Path], Path]) -> Callable[[Path], None]:
    def place(folder: Path) -> None:
        path = what(folder)
        path.unlink()
        path.mkdir()

    return place


def hole(what: Callable[[Path], Path], size: int) -> Callable[[Path], None]:
    """A file that claims terabytes and takes none."""
    return lambda folder: os.truncate(what(folder), size)


def other(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / name


_WHAT: dict[str, Callable[[Path], Path]] = {
    "manifest": manifest,
    "site": _site,
    "images": lambda folder: next(folder.glob("images*")),
}
PLACES: dict[str, Callable[[Path], None]] = {
    **{
        f"link {n} {t}": linked(w, t)
        for n, w in _WHAT.items()
        for t in (
            "/dev/zero",
            "/etc/passwd",
            "/dev/stdin",
            "{outside}/manifest.json",
            "{outside}/sites/site_0.safetensors",
            "nothing",
            ".",
        )
    },
    **{f"link sites {t}": linked(other("sites"), t) for t in ("{outside}/sites", "/", ".", "no")},
    **{f"fifo {n}": fifo(w) for n, w in _WHAT.items()},
    **{f"folder {n}": as_folder(w) for n, w in _WHAT.items()},
    **{f"hole {n} {s}": hole(w, s) for n, w in _WHAT.items() for s in (10**7, 10**12)},
}


def header(random: Random, folder: Path) -> None:
    """A site file with a forged header, under a manifest that agrees with its size and checksum."""
    tensors = {"query": torch.ones(1, 2, 5, 4), "key": torch.ones(1, 2, 5, 4)}
    data = safetensors.torch.save(tensors)
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    for _ in range(random.choice((0, 1, 1, 2))):
        holder, key = random.choice(spots(entries))
        holder[key] = random.choice(STRANGE)
    text = json.dumps(entries).encode()
    claimed = (
        len(text) if random.random() < 0.8 else random.choice((0, 2**63, 10**9, len(text) - 1))
    )
    made = claimed.to_bytes(8, "little") + text + data[8 + length :]
    path = _site(folder)
    path.write_bytes(made)

    def change(manifest: Any) -> None:
        entry = manifest["sites"]["site_0"]
        entry.update(bytes=len(made), crc32=f"{zlib.crc32(made):08x}")
        if random.random() < 0.5:
            shape = random.choice(([1, 2, 5, 4], [10**9, 10**9, 5, 4], [0, 0, 0, 0], [1, 3, 5, 4]))
            entry["tensors"]["query"]["shape"] = entry["shape"] = shape
        if random.random() < 0.3:
            entry["tensors"]["query"]["dtype"] = random.choice(("F16", "I64", "BOOL", "C64", "U8"))

    edited(manifest(folder), change)
