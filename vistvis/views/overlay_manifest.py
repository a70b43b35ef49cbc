"""What an overlay folder says about itself: of which attention, query and colours a picture is.

The file `overlays.json` has a record for each call, query and key frame, with the checksums of the
pictures that were written. A picture counts as recorded only while its bytes are those, so that
nothing is said of one that was replaced, and two writers at once can at worst leave one unrecorded.
Folders come from strangers: names in the file are looked up, never opened.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

from vistvis.errors import StoreError, VistvisWarning
from vistvis.files import atomic_file
from vistvis.names import harmless
from vistvis.views.overlay_folder import Head, Layer
from vistvis.views.overlay_painter import Look

FORMAT, SCHEMA = "vistvis-overlays", 1
NAME = "overlays.json"
# Some 200,000 overlays; a larger file is none of ours.
_LARGEST = 32 * 2**20
_LONGEST_TEXT = 4096
# How the name of a model ends that `vistvis store` ran without weights.
_UNTRAINED = "@random"
_LARGEST_NUMBER = 2**53
# What data of other types and values than ours make Python raise.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)

Checksum: TypeAlias = str
"""CRC-32 of a file, 8 hexadecimal digits."""


@dataclass(frozen=True)
class Origin:
    """Whose attention was drawn: `fingerprint` tells apart what `path` (None: memory) does not."""

    path: str | None
    fingerprint: str
    model: str | None = None

    @property
    def words(self) -> str:
        """For titles: the last two parts of the path, and the model."""
        parts = Path(self.path).parts[-2:] if self.path else ()
        place = "/".join(part for part in parts if part != os.sep) or "attention in memory"
        if self.model:
            place += f", model {self.model}"
            place += " (untrained weights)" if self.model.endswith(_UNTRAINED) else ""
        return harmless(place)


@dataclass(frozen=True)
class Drawing:
    """What overlays of all layers and heads have in common that may stand on one page.

    `place` says in words where the query token lies; `scale_frames` are the key frames over which
    a scale of `look` goes that is not each map's own.
    """

    origin: Origin
    query_frame: int
    token: int
    place: str
    key_frame: int
    batch: int
    look: Look
    scale_frames: tuple[int, ...] = ()

    @property
    def subject(self) -> tuple[str | None, int, int, int]:
        """What somebody who draws it again means by the same, whatever colours and model run."""
        return self.origin.path, self.batch, self.query_frame, self.token


@dataclass(frozen=True)
class OverlayRecord:
    """The files of one drawing, by their names under the folder, and the query's picture."""

    drawing: Drawing
    files: Mapping[str, tuple[Layer, Head, Checksum]]
    query_picture: Checksum | None = None
    when: str = field(default_factory=lambda: f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.drawing),
            "when": self.when,
            "query_picture": self.query_picture,
            "files": {
                name: {"layer": layer, "head": head, "crc32": crc}
                for name, (layer, head, crc) in self.files.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OverlayRecord:
        origin, look = data["origin"], data["look"]
        path, model, picture = origin["path"], origin["model"], data["query_picture"]
        drawing = Drawing(
            Origin(
                None if path is None else _text(path),
                _text(origin["fingerprint"]),
                None if model is None else _text(model),
            ),
            _whole(data["query_frame"]),
            _whole(data["token"]),
            _text(data["place"]),
            _whole(data["key_frame"]),
            _whole(data["batch"]),
            Look(
                norm=_text(look["norm"]),
                cmap=_text(look["cmap"]),
                alpha=_real(look["alpha"]),
                eps=_real(look["eps"]),
            ),
            tuple(_whole(frame) for frame in data["scale_frames"]),
        )
        files = {
            _text(name): (_label(entry["layer"]), _label(entry["head"]), _crc(entry["crc32"]))
            for name, entry in data["files"].items()
        }
        return cls(drawing, files, None if picture is None else _crc(picture), _text(data["when"]))


def read_records(folder: str) -> list[OverlayRecord]:
    """What the folder's manifest says, oldest first; nothing where there is none.

    A damaged one is told in a VistvisWarning and says nothing; StoreError for one of a newer
    version. Cost: reads at most 32 MiB.
    """
    path = Path(folder, NAME)
    try:
        text = _bytes_of(path)
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError("it is no manifest of overlays")
        schema = _whole(data["schema"])
        if schema <= SCHEMA:
            return [OverlayRecord.from_dict(record) for record in data["records"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"can't read {path}: {error.strerror or error}") from error
    except _MALFORMED as error:
        warnings.warn(
            f"{path} is damaged ({harmless(error)[:200]}): earlier overlays count as not recorded",
            VistvisWarning,
            stacklevel=2,
        )
        return []
    raise StoreError(
        f"{path} has schema {schema}, and this version of vistvis knows up to {SCHEMA}; "
        "update vistvis, or choose another folder"
    )


def add_records(folder: str, records: Sequence[OverlayRecord]) -> int:
    """Add to the folder's manifest; what it said of files that are written again goes.

    Returns how many of those were of another query or other attention. StoreError where the file
    can't be written.
    """
    written = {name: record.drawing for record in records for name in record.files}
    path = Path(folder, NAME)
    with _alone(folder):
        kept, replaced = [], 0
        for old in read_records(folder):
            again = written.keys() & old.files.keys()
            replaced += sum(written[name].subject != old.drawing.subject for name in again)
            files = {name: entry for name, entry in old.files.items() if name not in again}
            if files:
                kept.append(replace(old, files=files))
        data = {
            "format": FORMAT,
            "schema": SCHEMA,
            "records": [record.to_dict() for record in (*kept, *records)],
        }
        try:
            with atomic_file(path, sync=False) as file:
                file.write(json.dumps(data, indent=1, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise StoreError(f"can't write {path}: {error.strerror or error}") from error
    return replaced


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Wait until no other process merges into the folder's manifest, where the system can."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _bytes_of(path: Path) -> bytes:
    """The bytes of a regular file of sensible size; ValueError for anything else."""
    # Not waiting: a pipe of that name would never open.
    waiting = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | waiting)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST:,} bytes")
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise ValueError(f"{str(value)[:60]!r} is no text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST_NUMBER:
        raise ValueError(f"{str(value)[:60]!r} is no number of a frame or token")
    return value


def _real(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:60]!r} is no number")
    return float(value)


def _label(value: Any) -> Layer:
    return value if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _crc(value: Any) -> Checksum:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{8}", value):
        raise ValueError(f"{str(value)[:60]!r} is no checksum")
    return value
