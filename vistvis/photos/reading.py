"""The one decoder of photographs: upright, RGB on white, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from vistvis.images import open_photo
from vistvis.photos.photo import Photo
from vistvis.photos.video import video_frames
from vistvis.progress import progress

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from vistvis.photos.geometry import ImageGeometry

# Figures show pictures at least this wide.
SHARP_WIDTH = 500
_EXIF_ORIENTATION = 0x0112


def read_photos(photos: Sequence[Photo], *, exif: bool = True) -> Iterator[Image.Image]:
    """The pixels of photos, RGB and upright, in their order; one is held at a time.

    Transparency is blended onto white, 16-bit greys keep their greys; `exif=False` leaves a
    photograph as its camera stored it. A video is decoded once for frames of it that follow each
    other. InputError for a file that can't be read as a picture. A bar is shown on a terminal after
    two seconds.
    """
    bar = progress(None, "reading photos", total=len(photos), unit="photo", shown=None, delay=2)
    with bar:
        for (_, moves), group in groupby(photos, lambda one: (one.path, one.stamp is not None)):
            files = list(group)
            pictures = _video(files) if moves else (_still(one, exif=exif) for one in files)
            with contextlib.closing(pictures):
                for picture in pictures:
                    yield picture
                    bar.update()


def sharp_scale(width: int) -> int:
    """How many times the size of the model's pictures figures want: 1 where that is enough."""
    return max(-(-SHARP_WIDTH // width), 1)


def seen_part(picture: Image.Image, geometry: ImageGeometry, scale: int) -> NDArray[np.uint8]:
    """What a model saw of an upright photo, `scale` times as large: `(scale·H, scale·W, 3)`.

    The same view as the model's, pixel in pixel, on white where it was padded.
    """
    from PIL import Image

    height, width = geometry.image_size
    (top, left), (rows, cols) = geometry.offset, geometry.resized_size
    top, left, bottom, right = (
        max(top, 0),
        max(left, 0),
        min(top + rows, height),
        min(left + cols, width),
    )
    canvas = np.full((scale * height, scale * width, 3), 255, np.uint8)
    size = scale * (right - left), scale * (bottom - top)
    part = picture.resize(size, Image.Resampling.BICUBIC, box=geometry.visible_box)
    canvas[scale * top : scale * bottom, scale * left : scale * right] = np.asarray(part)
    return canvas


def _still(photo: Photo, *, exif: bool) -> Image.Image:
    from PIL import ImageOps

    with open_photo(photo.path) as picture:
        picture.verify()  # PNG has checksums, which decoding the pixels would pass over
    with open_photo(photo.path) as picture:
        picture.load()
        upright: Image.Image = picture
        if exif and _orientation(picture) != 1:
            upright = ImageOps.exif_transpose(picture)
        return _on_white(upright)


def _video(photos: Sequence[Photo]) -> Generator[Image.Image, None, None]:
    """Frames of one video in the order that is asked for, each stretch that ascends in one go."""
    start = 0
    while start < len(photos):
        stamps = [photo.stamp or 0 for photo in photos[start:]]
        count = next((n for n in range(1, len(stamps)) if stamps[n] <= stamps[n - 1]), len(stamps))
        for picture in video_frames(photos[start].path, stamps[:count]):
            yield _on_white(picture)
        start += count


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB; transparency blended onto white."""
    from PIL import Image

    if picture.mode.startswith("I;16") or picture.mode == "I":
        # PIL would clip at 255 and make almost everything white.
        values = np.asarray(picture).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("32-bit integer pixels; save it with 8 or 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known white; save it with 8 or 16 bits")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged tag says nothing about the pixels
        return 1
