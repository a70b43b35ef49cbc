"""Every byte of a manifest, and of other files, changed, cut or put in: an error, or no change."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vistvis import RunWriter
from vistvis.errors import VistvisError

from .case import Case, Setting
from .runs import contents, pictures, reading, stored

INSERTED = b'\0 \n"0,{}]-e\xff'


def flips(setting: Setting) -> Iterator[Case]:
    whole = stored(setting.folder / "whole")
    unfinished = setting.folder / "unfinished"
    writer = RunWriter(unfinished, images=pictures(1), model="a model", expected=contents(1, 4))
    for name, attention in contents(1).items():
        writer.write(name, attention)
    while len(writer.finished) < 3:
        time.sleep(0.001)
    copied = setting.folder / "cut"
    shutil.copytree(unfinished, copied)
    writer.close()
    shutil.rmtree(unfinished)
    yield from of_file(setting, whole, whole / "manifest.json")
    for path in (copied / "manifest.json", next((copied / "sites").glob("*.json"))):
        yield from of_file(setting, copied, path, bits=(1, 64))
    site = next((whole / "sites").glob("site_1*.safetensors"))
    yield from of_file(setting, whole, site, bits=(1, 128), inserted=b"\0", at_most=2000)
    yield from of_file(setting, whole, next(whole.glob("images*")), bits=(16,), inserted=b" ")


def of_file(
    setting: Setting,
    run: Path,
    path: Path,
    *,
    bits: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128),
    inserted: bytes = INSERTED,
    at_most: int = 1 << 20,
) -> Iterator[Case]:
    """Flips at every place, cuts at every length, bytes put in at every place."""
    sound, truth = path.read_bytes(), reading(run)
    places = range(min(len(sound), at_most))
    changes: list[tuple[str, int, int]] = [("flip", place, bit) for place in places for bit in bits]
    changes += [("cut", place, 0) for place in places]
    changes += [
        ("insert", place, byte)
        for place in places
        for byte in inserted[place % len(inserted) :: len(inserted)]
    ]
    make = {
        "flip": lambda p, bit: sound[:p] + bytes([sound[p] ^ bit]) + sound[p + 1 :],
        "cut": lambda p, _: sound[:p],
        "insert": lambda p, byte: sound[:p] + bytes([byte]) + sound[p:],
    }
    for kind, place, value in setting.thinned(changes):
        data = make[kind](place, value)
        name = f"{run.name}/{path.relative_to(run)} {kind} {place} {value}"
        yield Case(name, partial(damaged, path, data, sound, partial(reading, run), truth))


def damaged(
    path: Path, data: bytes, sound: bytes, read: Callable[[], dict[str, Any]], truth: Any
) -> None:
    path.write_bytes(data)
    try:
        found = read()
    except VistvisError:
        return
    finally:
        path.write_bytes(sound)
    for part, value in truth.items():
        assert found[part] == value, f"silently other {part}: {found[part]}, not {value}"
