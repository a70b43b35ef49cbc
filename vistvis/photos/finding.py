"""What people type for pictures, as the photos that are meant: files, folders, globs, videos."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vistvis.errors import InputError, StoreError
from vistvis.files import PathLike, checked_path, regular_file
from vistvis.images import is_heic, open_photo
from vistvis.names import few
from vistvis.photos.photo import PICTURES, VIDEOS, Photo
from vistvis.photos.video import Every, video_photos

# More pictures than a model takes, and than anybody looks at.
MOST = 1000

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAGIC = re.compile(r"[*?[]")


def find_photos(
    what: PathLike | Iterable[PathLike], *, every: str | float | Every | None = None
) -> tuple[list[Photo], list[str]]:
    """The photos that are meant, in order, and what is to be told of them, a line each.

    Parameters
    ----------
    what
        One or several of: a picture; a folder (its pictures, in natural order: a2 before a10); a
        glob such as "shots/*.jpg" (`**` crosses folders); a video (mp4, mov, mkv, webm, avi) or a
        GIF with more than one frame.
    every
        How often a frame of a video is taken: seconds (0.5, "0.5s") or frames ("10f"); frames also
        thin out photographs of folders and globs. None: about 8 frames of a video, spread evenly.

    Videos need the extra `video` and are read through once, without decoding. InputError for a URL,
    for what is not there or no picture, and for more than 1,000 pictures.
    """
    how = every if every is None or isinstance(every, Every) else Every.read(every)
    photos: list[Photo] = []
    lines: list[str] = []
    for text in [what] if isinstance(what, (str, os.PathLike)) else what:
        for path in _files(text, how):
            if _moves(path):
                frames, count = video_photos(path, how)
                photos += frames
                if how is None and len(frames) < count:
                    lines.append(
                        f"{path.name}: {len(frames)} of its {count} frames, spread evenly; choose "
                        "with --every, as in --every 0.5s or --every 10f"
                    )
            else:
                with open_photo(path):  # the last is judged before the first is decoded
                    photos.append(Photo(path, path.name))
            _check_count(len(photos))
    if not photos:
        raise InputError("at least one picture is needed, got none; give its path")
    if how and how.seconds and not any(photo.time is not None for photo in photos):
        raise InputError(
            "--every in seconds is for videos, and these are photographs; leave it out"
        )
    return photos, lines


def _check_count(count: int) -> None:
    if count > MOST:
        raise InputError(
            f"{count:,} pictures or more are meant, and at most {MOST:,} are taken; name fewer, or "
            "take each tenth with --every 10f"
        )


def _files(text: PathLike, every: Every | None) -> Sequence[Path]:
    """The files that one text means, in natural order."""
    path = checked_path(text)
    if match := _URL.match(str(text)):
        if match[0].lower() == "file://":
            raise InputError(f"{text} is a URL; give the path without {match[0]}")
        raise InputError(f"{text} is a URL; download it first: curl -LO '{text}'")
    if path.is_dir():
        return _pictures_of(path, [path / name for name in os.listdir(path)], every)
    if not os.path.lexists(path) and _MAGIC.search(str(text)):
        names = glob.glob(os.path.expanduser(str(text)), recursive=True)
        return _pictures_of(path, [Path(name) for name in names], every)
    return [path]


def _pictures_of(path: Path, files: Sequence[Path], every: Every | None) -> Sequence[Path]:
    """Of what a folder or a glob names, what is meant: its pictures, and videos of a glob."""
    shown = [file for file in files if not file.name.startswith(".") and file.is_file()]
    folder = path.is_dir()
    endings = PICTURES if folder else PICTURES + VIDEOS
    chosen = sorted((file for file in shown if file.suffix.lower() in endings), key=_natural)
    if not chosen:
        others = sorted(file.name for file in shown) or [file.name for file in files]
        seen = f"only {few(sorted(others), count=3)}" if others else "nothing"
        hint = "name a video by itself" if folder else "check its path"
        where = f"{str(path)!r} holds" if folder else f"{str(path)!r} matches"
        raise InputError(f"{where} no picture, {seen}; {hint}")
    if every and every.frames:
        stills = set([file for file in chosen if file.suffix.lower() in PICTURES][:: every.frames])
        chosen = [file for file in chosen if file in stills or file.suffix.lower() in VIDEOS]
    _check_count(len(chosen))
    return chosen


def _natural(path: Path) -> list[tuple[int, str]]:
    """a2 before a10, capitals among the others."""
    parts = re.split(r"(\d+)", str(path).casefold())
    return [(int(part) if part.isdecimal() else 0, part) for part in parts]


def _moves(path: Path) -> bool:
    """Whether a file is a video, or a picture of many frames; told by how it begins."""
    try:
        with regular_file(path) as file:
            start = file.read(12)
    except StoreError as error:
        raise InputError(f"no picture: {error}") from error
    if start.startswith(b"GIF8"):
        with open_photo(path) as picture:
            return getattr(picture, "n_frames", 1) > 1
    box = start[4:8]
    return (
        (box == b"ftyp" and not is_heic(start) and start[8:11] != b"avi")
        or box in (b"moov", b"mdat", b"wide", b"free", b"skip")
        or start.startswith(b"\x1a\x45\xdf\xa3")
        or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")
    )
