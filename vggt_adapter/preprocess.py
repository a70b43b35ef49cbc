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
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from vggt_adapter.config import IMAGE_SIZE, PATCH_SIZE
from vggt_adapter.geometry import Fit, ImageGeometry
from vistvis.errors import InputError
from vistvis.files import PathLike
from vistvis.images import open_photo
from vistvis.tokens import TokenLayout

if TYPE_CHECKING:
    from PIL import Image

EXIF_ORIENTATION = 0x0112
# Figures show pictures at least this wide.
SHARP_WIDTH = 500

PathLikes: TypeAlias = "PathLike | Iterable[PathLike]"
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
    paths
        The files, in the same order.
    sharp_pixels
        What `sharp` gives, as bytes. At most 3 MB a photo.
    """

    images: Tensor
    geometries: tuple[ImageGeometry, ...]
    paths: tuple[Path, ...]
    sharp_pixels: Bytes | None = field(default=None, repr=False)

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
    files, fit = _files(paths), Fit(mode, size, patch_size)
    for file in files:  # a missing file at the end fails before the others cost time
        with open_photo(file):
            pass
    # Twice the size of the model's pictures, three times, …: the same view, pixel in pixel.
    scales = (1, -(-SHARP_WIDTH // size)) if size < SHARP_WIDTH else (1,)
    read = [_read(file, fit, scales, exif=exif) for file in files]
    geometries = fit.together([photo_size for photo_size, _ in read])
    small, *sharp = (
        _on_canvas([resized[number] for _, resized in read], geometries, scale)
        for number, scale in enumerate(scales)
    )
    images = rearrange(torch.from_numpy(small), "s h w c -> s c h w").contiguous().float() / 255
    return LoadedImages(images, geometries, files, *sharp)


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


def _files(paths: PathLikes) -> tuple[Path, ...]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    try:
        files = tuple(Path(os.fspath(path)) for path in paths)
    except TypeError as error:
        raise InputError(
            f"paths must be file names, got {paths!r}; for pictures in memory stack them to "
            "(S, 3, H, W) in [0, 1] and resize both sides to multiples of 14"
        ) from error
    if not files:
        raise InputError("at least one image is needed, got an empty list; give its path")
    return files


def _read(
    file: Path, fit: Fit, scales: Sequence[int], *, exif: bool
) -> tuple[tuple[int, int], list[Bytes]]:
    """The upright photo's (width, height), and it on white, (h, w, 3), at each scale."""
    from PIL import Image, ImageOps

    with open_photo(file) as picture:
        picture.verify()  # PNG has checksums, which decoding the pixels would pass over
    with open_photo(file) as picture:
        picture.load()
        upright: Image.Image = picture
        if exif and _orientation(picture) != 1:
            upright = ImageOps.exif_transpose(picture)
        height, width = fit.alone(*upright.size).resized_size
        limit = Image.MAX_IMAGE_PIXELS
        if limit and height * width * max(scales) ** 2 > limit:
            # A photo is resized before it is cut: a very long one would need gigabytes for that.
            raise InputError(
                f"{str(file)!r} is too long to be resized to a width of {width}: "
                f"{upright.width}×{upright.height} pixels; cut it first, or use mode='pad'"
            )
        photo = _on_white(upright)
        return upright.size, [
            np.asarray(photo.resize((k * width, k * height), Image.Resampling.BICUBIC))
            for k in scales
        ]


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
        return picture.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # a damaged tag says nothing about the pixels
        return 1
