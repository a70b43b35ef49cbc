"""`vistvis info`: what a stored run holds, what it lacks, and whether it is sound."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vistvis.errors import InputError
from vistvis.names import few, harmless

if TYPE_CHECKING:
    from vistvis.store import Run

HELP = "what a stored run holds: model, pictures, sites, what is missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder or fsspec URL")
    parser.add_argument(
        "--check", action="store_true", help="compare every checksum (reads the whole run)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="instead, remove files of writers to which no manifest points, and temporary ones",
    )
    parser.add_argument(
        "--older-than",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="with --clean: only what was written longer ago (default: 24)",
    )


def run(arguments: argparse.Namespace) -> int:
    """The exit code is 1 for a run that is not whole."""
    from vistvis.store import clean_run, open_run

    if arguments.clean:
        removed = clean_run(arguments.run, older_than=arguments.older_than)
        print(json.dumps(removed, indent=1) if arguments.json else _removed_text(removed))
        return 0
    stored = open_run(arguments.run, strict=False)
    if arguments.check:
        stored.check(strict=False, progress=not arguments.json)
    if arguments.json:
        print(json.dumps(summary(stored), indent=1))
    else:
        print("\n".join(lines(stored, checked=arguments.check)))
    return 0 if stored.complete and not stored.damaged_files else 1


def summary(stored: Run) -> dict[str, Any]:
    """What is printed, as plain data."""
    records = {name: stored.record(name) for name in stored}
    return {
        "path": stored.path,
        "model": stored.model,
        "pass_id": stored.pass_id,
        "layout": stored.layout.to_dict() if stored.layout else None,
        "images": stored.image_shape,
        "metadata": stored.metadata,
        "bytes": stored.nbytes,
        "complete": stored.complete,
        "sites": {
            name: {
                "kind": record.holds,
                "shape": record.shape,
                "dtype": record.dtype,
                "bytes": record.file.nbytes,
            }
            for name, record in records.items()
        },
        "missing": stored.missing,
        "damaged": dict(stored.damaged),
        "damaged_files": dict(stored.damaged_files),
    }


def lines(stored: Run, *, checked: bool) -> list[str]:
    """What is printed, for people; nothing that a file says reaches a terminal as it is."""
    from vistvis.attention.checks import bytes_text

    records = {name: stored.record(name) for name in stored}
    dense = sum(2 * math.prod(record.shape) for record in records.values())
    rows = [
        (
            harmless(name),
            " × ".join(map(str, record.shape)),
            f"{'Q and K' if record.holds == 'qk' else 'weights'} {record.dtype}"
            + "".join(
                f" + {more}"
                for more in ("value", "mask", "segments")
                if more in record.file.tensors
            ),
            bytes_text(record.file.nbytes),
        )
        for name, record in records.items()
    ]
    images = stored.image_shape
    head = [
        ("run", stored.path),
        ("model", stored.model or "not said"),
        ("layout", str(stored.layout) if stored.layout else "not said"),
        ("images", " × ".join(map(str, images)) if images else "none"),
        ("size", f"{bytes_text(stored.nbytes)} (dense float16 would take {bytes_text(dense)})"),
        *((key, _told(key, value)) for key, value in stored.metadata.items() if value is not None),
        ("state", _state(stored, checked=checked)),
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    damaged = stored.damaged
    others = [one for one in stored.damaged_files.values() if one not in damaged.values()]
    return [
        *(f"{harmless(key):<10}{harmless(value)}" for key, value in head),
        "",
        *("  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows),
        *(f"{harmless(name)}  MISSING" for name in stored.missing if name not in damaged),
        *(f"{harmless(name)}  DAMAGED: {harmless(text)}" for name, text in damaged.items()),
        *(f"DAMAGED: {harmless(text)}" for text in others),
    ]


def _told(key: str, value: Any) -> str:
    """An entry of the metadata; of photos their names."""
    from vistvis.photos.records import KEY, photos_of

    with contextlib.suppress(InputError):  # what is no list of photos is shown as it is
        if key == KEY:
            return few([photo.name for photo in photos_of({key: value})])
    return str(value)


def _state(stored: Run, *, checked: bool) -> str:
    count = len(stored.expected)
    if stored.missing:
        return f"{len(stored)} of {count} sites; store it again to go on with it"
    if stored.damaged_files:
        return f"{count} sites, and {len(stored.damaged_files)} damaged files; store it again"
    if not stored.complete:
        return f"{count} sites, but its writer was cut short: there may have been more to come"
    return f"complete, {count} sites" + (", every checksum agrees" if checked else "")


def _removed_text(removed: Mapping[str, int]) -> str:
    from vistvis.attention.checks import bytes_text

    if not removed:
        return "nothing to remove"
    each = [f"removed {harmless(name)} ({bytes_text(size)})" for name, size in removed.items()]
    return "\n".join([*each, f"{len(removed)} files, {bytes_text(sum(removed.values()))}"])
