"""What a run keeps of the photos that a model saw, and the way back from a run that was read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vistvis.errors import InputError
from vistvis.photos.geometry import ImageGeometry
from vistvis.photos.photo import SeenPhoto

KEY = "photos"
_PAIRS = ("size", "resized", "input")
# No picture is wider; larger numbers of a forged run would only overflow later.
_LARGEST = 2**31


def photos_metadata(photos: Sequence[SeenPhoto]) -> dict[str, Any]:
    """`{"photos": […]}` for a run's metadata, plain data for JSON: one entry for each picture.

    Its keys: `name`; `time` in seconds, for a video's frame; and where the geometry is known
    `size`, `resized` and `input`, (width, height) of the upright photo, of it resized, and of the
    model's picture, `offset` (x, y) of the resized photo in that, and `box`, the part (x0, y0, x1,
    y1) of the photo that the model saw, in edges: (0, 0, width, height) is all of it.
    """
    return {KEY: [_entry(photo) for photo in photos]}


def photos_of(metadata: Mapping[str, Any]) -> tuple[SeenPhoto, ...]:
    """What `photos_metadata` put there; () for a run without, InputError for what it never writes.

    One for each picture, B·S in a run.
    """
    entries = metadata.get(KEY, [])
    try:
        return tuple(_photo(entry) for entry in entries)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"what the run says of its photos is not understood ({type(error).__name__}: {error}); "
            "store it again"
        ) from error


def _entry(photo: SeenPhoto) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": photo.name}
    if photo.time is not None:
        entry["time"] = photo.time
    if (geometry := photo.geometry) is not None:
        sizes = (geometry.original_size, geometry.resized_size, geometry.image_size)
        entry |= {key: list(size[::-1]) for key, size in zip(_PAIRS, sizes, strict=True)}
        entry |= {"offset": list(geometry.offset[::-1]), "box": list(geometry.visible_box)}
    return entry


def _photo(entry: Any) -> SeenPhoto:
    name, time = entry["name"], entry.get("time")
    timed = isinstance(time, (int, float)) and not isinstance(time, bool) and math.isfinite(time)
    if not isinstance(name, str) or not (time is None or timed):
        raise ValueError(f"a photo has a name and perhaps a time, got {name!r} and {time!r}")
    if _PAIRS[0] not in entry:
        return SeenPhoto(name, time, None)
    size, resized, shown = (_pair(entry[key], least=1) for key in _PAIRS)
    offset = _pair(entry["offset"], least=-_LARGEST)
    return SeenPhoto(name, time, ImageGeometry(size, resized, shown, offset))


def _pair(value: Any, *, least: int) -> tuple[int, int]:
    """(x, y) as (y, x)."""
    x, y = value
    if any(type(side) is not int or not least <= side <= _LARGEST for side in (x, y)):
        raise ValueError(f"two whole numbers are meant, got {value!r}")
    return y, x
