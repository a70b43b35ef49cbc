"""Frames of videos and animated GIFs: which there are, and their pixels, one at a time."""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.errors import InputError
from vistvis.files import regular_file
from vistvis.images import extra, open_photo
from vistvis.photos.photo import Photo

if TYPE_CHECKING:
    from PIL import Image

# How many frames are taken of a video where nobody says how often.
USUAL = 8


@dataclass(frozen=True)
class Every:
    """How often a frame is taken: each `seconds`, or each of so many `frames`."""

    seconds: float | None = None
    frames: int | None = None

    @classmethod
    def read(cls, text: str | float) -> Every:
        """`0.5` or `"0.5s"` are seconds, `"10f"` are frames; InputError for anything else."""
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s*(s|f)?\s*", str(text))
        number = float(match[1]) if match else 0.0
        frames = match is not None and match[2] == "f"
        if number <= 0 or (frames and not number.is_integer()):
            shown = text if len(str(text)) < 40 else f"{str(text)[:40]}…"
            raise InputError(
                f"every is a number of seconds (0.5 or 0.5s) or of frames (10f), got {shown!r}"
            )
        return cls(frames=int(number)) if frames else cls(seconds=number)

    def chosen(self, times: Sequence[float]) -> list[int]:
        """Which of the frames at these times (in seconds, ascending) are taken."""
        if self.frames is not None:
            return list(range(0, len(times), self.frames))
        assert self.seconds is not None
        # A hair's breadth: 0.3 s is not a multiple of 0.1 s in binary.
        steps = [int((time - times[0]) / self.seconds + 1e-6) for time in times]
        return [n for n in range(len(steps)) if not n or steps[n] > steps[n - 1]]


def usual(times: Sequence[float]) -> list[int]:
    """At most `USUAL` frames, spread evenly, the first and the last among them."""
    if len(times) <= USUAL:
        return list(range(len(times)))
    return [round(k * (len(times) - 1) / (USUAL - 1)) for k in range(USUAL)]


def video_photos(path: Path, every: Every | None) -> tuple[list[Photo], int]:
    """The frames that are taken of a video or GIF, and how many it has; reads no pixels.

    InputError if it has no frames, is damaged, or is no GIF and PyAV is not installed.
    """
    stamps, times = _gif_times(path) if _is_gif(path) else _times(path)
    numbers = usual(times) if every is None else every.chosen(times)
    names = _clock([times[number] for number in numbers])
    photos = [
        Photo(path, f"{path.name} @ {name}", times[number], stamps[number])
        for number, name in zip(numbers, names, strict=True)
    ]
    return photos, len(times)


def video_frames(path: Path, stamps: Sequence[int]) -> Iterator[Image.Image]:
    """The frames with these stamps, ascending, upright, one at a time."""
    return _gif_frames(path, stamps) if _is_gif(path) else _frames(path, stamps)


def _is_gif(path: Path) -> bool:
    """Whether Pillow has the frames: then nothing more need be installed."""
    with regular_file(path) as file:
        return file.read(3) == b"GIF"


def _clock(times: Sequence[float]) -> list[str]:
    """Times as 0:02.4, with as many digits as tell them apart."""
    for digits in (1, 2, 3):
        width, names = digits + 3, []
        for time in times:
            units = round(time * 10**digits)
            minutes, rest = divmod(units, 60 * 10**digits)
            hours, minutes = divmod(minutes, 60)
            head = f"{hours}:{minutes:02}" if hours else str(minutes)
            names.append(f"{head}:{rest / 10**digits:0{width}.{digits}f}")
        if len(set(names)) == len(names):
            break
    return names


# -- PyAV ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream."""
    file = repr(str(path))
    av = extra("av", "video", f"{file}: a video")
    try:
        with regular_file(path) as stream, av.open(stream, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise InputError(f"{file} has no pictures, only sound; give a video")
            video = container.streams.video[0]
            # Damage is told and not painted over; threads by frames would swallow what is told.
            video.thread_type = "SLICE"
            video.codec_context.options = {"err_detect": "explode"}
            yield container, video
    except av.FFmpegError as error:
        raise InputError(
            f"{file} can't be read as a video ({error.strerror or error}); it may be damaged or "
            "cut short: open it in a player, or save it again"
        ) from error


def _times(path: Path) -> tuple[list[int], list[float]]:
    """Stamps of all frames, ascending, and their seconds from the first; nothing is decoded."""
    with _opened(path) as (container, video):
        stamps = sorted(
            {
                packet.dts if packet.pts is None else packet.pts
                for packet in container.demux(video)
                if packet.size and not packet.is_discard
            }
            - {None}
        )
        unit = video.time_base
    if not stamps:
        raise InputError(f"{str(path)!r} has no frames; it may be damaged or cut short")
    return stamps, [float((stamp - stamps[0]) * unit) for stamp in stamps]


def _frames(path: Path, stamps: Sequence[int]) -> Iterator[Image.Image]:
    with _opened(path) as (container, video):
        keys = sorted(
            packet.pts
            for packet in container.demux(video)
            if packet.is_keyframe and packet.pts is not None
        )
        container.seek(0)
        decoded, at = container.decode(video), None
        for stamp in stamps:
            # Over what nobody asked for, where a key frame lies between.
            near = bisect_right(keys, stamp) - 1
            if near >= 0 and at is not None and keys[near] > at:
                container.seek(keys[near], stream=video)
                decoded = container.decode(video)
            for frame in decoded:
                at = frame.pts if frame.pts is not None else frame.dts
                if at is not None and at >= stamp:
                    break
            if at != stamp:
                raise InputError(
                    f"{str(path)!r} has a frame that can't be decoded, at "
                    f"{float(stamp * video.time_base):.3f} s: it may be damaged or cut short; "
                    "choose others with --every, or save it again"
                )
            picture: Image.Image = frame.to_image()
            # Pixels of a file need not be square; those of photographs are.
            if (shape := video.sample_aspect_ratio) and shape != 1:
                picture = picture.resize((max(1, round(picture.width * shape)), picture.height))
            # How the camera was held; FFmpeg's angles turn against the clock, as Pillow's do.
            yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


# -- GIF -------------------------------------------------------------------------------------------


def _gif_times(path: Path) -> tuple[list[int], list[float]]:
    with open_photo(path) as picture:
        times = [0.0]
        for number in range(getattr(picture, "n_frames", 1) - 1):
            picture.seek(number)
            # Players take no time at all for a tenth of a second.
            times.append(times[-1] + (picture.info.get("duration", 0) or 100) / 1000)
    return list(range(len(times))), times


def _gif_frames(path: Path, stamps: Sequence[int]) -> Iterator[Image.Image]:
    with open_photo(path) as picture:
        for stamp in stamps:
            picture.seek(stamp)
            yield picture.copy()
