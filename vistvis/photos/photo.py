"""One photograph, or one frame of a video: what it is called and where its pixels are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
