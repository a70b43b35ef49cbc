"""One photograph, or one frame of a video: what it is called and where its pixels are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vistvis.errors import InputError
from vistvis.names import few
from vistvis.photos.geometry import ImageGeometry

# How files end whose pictures are meant where a folder or a glob is named.
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class Photo:
    """A picture that is meant, before its pixels are read.

    Attributes
    ----------
    path
        The file.
    name
        What figures call it: "view_1.jpg", "clip.mp4 @ 0:02.4".
    time
        Of a video's frame, in seconds from its first; None for a photograph.
    stamp
        Of a video's frame, its time stamp in the file's own units (of a GIF: its number).
    """

    path: Path
    name: str
    time: float | None = None
    stamp: int | None = None


@dataclass(frozen=True)
class SeenPhoto:
    """A picture that a model saw: its name, its time if it is of a video, and where pixels went.

    `geometry` is None where how the model's input was cut is not known.
    """

    name: str
    time: float | None
    geometry: ImageGeometry | None


def model_pixels(
    frames: Sequence[SeenPhoto],
) -> Callable[[int, float, float], tuple[float, float]]:
    """For `TokenQuery.index`: from a frame's pixel in the photo to that in the model's picture.

    What it gives raises InputError for a pixel that the photo does not have, or that was cut off,
    and where the way is not known (a timm model with a transform of its own).
    """

    def model_pixel(frame: int, x: float, y: float) -> tuple[float, float]:
        geometry = frames[frame].geometry if frame < len(frames) else None
        if geometry is None:
            raise InputError("how the photo was cut is not known; name a grid cell, as in r3,c5")
        return geometry.model_pixel(x, y)

    return model_pixel


def crop_lines(photos: Sequence[SeenPhoto]) -> list[str]:
    """For people: what the model sees of each photo that is cut, photos of one cut together."""
    cuts: dict[str, list[str]] = {}
    for photo in photos:
        if photo.geometry and (text := photo.geometry.crop_text()):
            cuts.setdefault(text, []).append(photo.name)
    return [f"{text} ({few(names, count=3)})" for text, names in cuts.items()]
