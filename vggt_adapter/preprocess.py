"""Photographs as VGGT wants them, and the way back from its pixels to theirs.

The rules are those of the published `load_and_preprocess_images`, with three differences that only
show on files it gets wrong: a photo that its camera stored sideways (EXIF orientation) is turned
upright first, 16-bit greyscale keeps its greys instead of being clipped to white, and transparency
goes to white in every format that has it, not in RGBA alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from vggt_adapter.config import IMAGE_SIZE, PATCH_SIZE
from vggt_adapter.geometry import Fit
from vistvis.errors import InputError
from vistvis.files import PathLike
from vistvis.images import open_photo
from vistvis.photos.geometry import ImageGeometry
from vistvis.photos.photo import Photo, SeenPhoto
from vistvis.photos.reading import read_photos, sharp_scale
from vistvis.tokens import TokenLayout

if TYPE_CHECKING:
    from PIL import Image

PathLikes: TypeAlias = "PathLike | Photo | Iterable[PathLike | Photo]"
Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class LoadedImages:
    """Photos ready for the model, and how each came there.

    Attributes
    ----------
    images
        (S, 3, H, W), float32 in [0, 1].
    geometries
        One `ImageGeometry` for each.
    photos
        What each was read from: its file, its name, its time in a video.
    sharp_pixels
        What `sharp` gives, as bytes. At most 3 MB a photo.
    """

    images: Tensor
    geometries: tuple[ImageGeometry, ...]
    photos: tuple[Photo, ...]
    sharp_pixels: Bytes | None = field(default=None, repr=False)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the same order."""
        return tuple(photo.path for photo in self.photos)

    @property
    def seen(self) -> tuple[SeenPhoto, ...]:
        """Name, time and geometry of each photo, as runs keep them."""
        return tuple(
            SeenPhoto(photo.name, photo.time, geometry)
            for photo, geometry in zip(self.photos, self.geometries, strict=True)
        )

    def sharp(self) -> NDArray[np.float32] | None:
        """The same views with more pixels, `(S, k·H, k·W, 3)` in [0, 1], for figures.

        None where the model's own pictures are at least 500 wide.
        """
        if self.sharp_pixels is None:
            return None
        return self.sharp_pixels.astype(np.float32) / np.float32(255)

    def token_at(self, layout: TokenLayout, frame: int, x: float, y: float) -> int:
        """The absolute index of the patch under pixel (x, y) of a frame's original photo."""
        return layout.token_at(frame, *self.geometries[frame].model_pixel(x, y))

    def original_box(
        self, layout: TokenLayout, token: int
    ) -> tuple[float, float, float, float] | None:
        """Where a patch lies in its original photo, edges x0, y0, x1, y1; None for the others."""
        place = layout.locate(token)
        geometry = self.geometries[place.frame_idx]
        return None if place.box is None else geometry.box_to_original(place.box)


def load_and_preprocess_images(
    paths: PathLikes,
    mode: str = "crop",
    size: int = IMAGE_SIZE,
    *,
    patch_size: int = PATCH_SIZE,
    exif: bool = True,
) -> Tensor:
    """Load photos of one scene: the pixels of `load_images`, (S, 3, H, W), float32 in [0, 1]."""
    return load_images(paths, mode=mode, size=size, patch_size=patch_size, exif=exif).images


def load_images(
    paths: PathLikes,
    *,
    mode: str = "crop",
    size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
    exif: bool = True,
) -> LoadedImages:
    """Load photos of one scene for the model, with the geometry that leads back to them.

    Parameters
    ----------
    paths
        Files, or what `vistvis.photos.finding.find_photos` gives of folders, globs and videos.
    mode
        "crop": `size` wide, the height follows; what is higher than `size` is cut off at top and
        bottom, equally. "pad": the longest side `size`, and white around it, to a square.
    size, patch_size
        In pixels; `size` is a multiple of `patch_size`, and the other side is rounded to one.
    exif
        Turn photos upright that were stored sideways. False: as stored, which is what the
        published loader does.

    Transparent pixels are blended onto white. Photos that end in different sizes are padded with
    white to the largest, with a `VistvisWarning`. InputError if there is no path, the mode or size
    is none, or a file cannot be read as a picture.
    """
    photos, fit = _photos(paths), Fit(mode, size, patch_size)
    for photo in photos:  # a missing file at the end fails before the others cost time
        if photo.stamp is None:
            with open_photo(photo.path):
                pass
    # Twice the size of the model's pictures, three times, …: the same view, pixel in pixel.
    scales = tuple(sorted({1, sharp_scale(size)}))
    read = [
        _resized(photo, picture, fit, scales)
        for photo, picture in zip(photos, read_photos(photos, exif=exif), strict=True)
    ]
    geometries = fit.together([photo_size for photo_size, _ in read])
    small, *sharp = (
        _on_canvas([resized[number] for _, resized in read], geometries, scale)
        for number, scale in enumerate(scales)
    )
    images = rearrange(torch.from_numpy(small), "s h w c -> s c h w").contiguous().float() / 255
    return LoadedImages(images, geometries, photos, *sharp)


def _on_canvas(photos: Sequence[Bytes], geometries: Sequence[ImageGeometry], scale: int) -> Bytes:
    """Resized photos (h, w, 3) where they belong on white: (S, scale · H, scale · W, 3)."""
    height, width = (scale * side for side in geometries[0].image_size)
    canvas = np.full((len(photos), height, width, 3), 255, np.uint8)
    for target, pixels, geometry in zip(canvas, photos, geometries, strict=True):
        top, left = (scale * side for side in geometry.offset)
        seen = pixels[max(-top, 0) : height - top, max(-left, 0) : width - left]
        top, left = max(top, 0), max(left, 0)
        target[top : top + seen.shape[0], left : left + seen.shape[1]] = seen
    return canvas


# -- files -----------------------------------------------------------------------------------------


def _photos(paths: PathLikes) -> tuple[Photo, ...]:
    if isinstance(paths, (str, os.PathLike, Photo)):
        paths = [paths]
    try:
        photos = tuple(
            path if isinstance(path, Photo) else Photo(Path(path), Path(path).name)
            for path in paths
        )
    except TypeError as error:
        raise InputError(
            f"paths must be file names, got {paths!r}; for pictures in memory stack them to "
            "(S, 3, H, W) in [0, 1] and resize both sides to multiples of 14"
        ) from error
    if not photos:
        raise InputError("at least one image is needed, got an empty list; give its path")
    return photos


def _resized(
    photo: Photo, picture: Image.Image, fit: Fit, scales: Sequence[int]
) -> tuple[tuple[int, int], list[Bytes]]:
    """The upright photo's (width, height), and it, (h, w, 3), at each scale."""
    from PIL import Image

    height, width = fit.alone(*picture.size).resized_size
    limit = Image.MAX_IMAGE_PIXELS
    if limit and height * width * max(scales) ** 2 > limit:
        # A photo is resized before it is cut: a very long one would need gigabytes for that.
        raise InputError(
            f"{str(photo.path)!r} is too long to be resized to a width of {width}: "
            f"{picture.width}×{picture.height} pixels; cut it first, or use mode='pad'"
        )
    return picture.size, [
        np.asarray(picture.resize((k * width, k * height), Image.Resampling.BICUBIC))
        for k in scales
    ]
