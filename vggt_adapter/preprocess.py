"""Photographs as VGGT wants them, and the way back from its pixels to theirs.

The rules are those of the published `load_and_preprocess_images`, with three differences that only
show on files it gets wrong: a photo that its camera stored sideways (EXIF orientation) is turned
upright first, 16-bit greyscale keeps its greys instead of being clipped to white, and transparency
goes to white in every format that has it, not in RGBA alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vistvis.errors import InputError, VistvisWarning
from vistvis.tokens import TokenLayout

if TYPE_CHECKING:
    from PIL import Image

MODES = ("crop", "pad")
EXIF_ORIENTATION = 0x0112

PathLikes: TypeAlias = "str | PathLike[str] | Iterable[str | PathLike[str]]"
Coordinate = TypeVar("Coordinate", float, NDArray[np.float64], Tensor)


@dataclass(frozen=True)
class ImageGeometry:
    """How one photo became one model input: resized, then cropped or padded.

    A pixel's coordinate names its centre: pixel (0, 0) is centred at (0, 0) and spans −0.5…0.5.
    Resizing keeps corners on corners, so centres move by half a pixel times the change of scale.
    x counts to the right, y down.

    Attributes
    ----------
    original_size, resized_size, image_size
        (H, W) of the photo (upright), of it after resizing, and of the model input.
    offset
        (y, x) of the resized photo's first pixel in the model input; negative where it was
        cropped, positive where white was added before it.
    """

    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    image_size: tuple[int, int]
    offset: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Model pixels per original pixel, (y, x)."""
        (height, width), (new_height, new_width) = self.original_size, self.resized_size
        return new_height / height, new_width / width

    def to_model(self, x: Coordinate, y: Coordinate) -> tuple[Coordinate, Coordinate]:
        """Original pixel coordinates → those of the model input; numbers, arrays or tensors.

        What was cropped away comes out below 0 or past the picture's end.
        """
        scale_y, scale_x = self.scale
        return (
            (x + 0.5) * scale_x - 0.5 + self.offset[1],
            (y + 0.5) * scale_y - 0.5 + self.offset[0],
        )

    def to_original(self, x: Coordinate, y: Coordinate) -> tuple[Coordinate, Coordinate]:
        """Model-input pixel coordinates → those of the original; inverse of `to_model`.

        White padding comes out below 0 or past the photo's end.
        """
        scale_y, scale_x = self.scale
        return (
            (x - self.offset[1] + 0.5) / scale_x - 0.5,
            (y - self.offset[0] + 0.5) / scale_y - 0.5,
        )

    def model_pixel(self, x: float, y: float) -> tuple[int, int]:
        """The model-input pixel (x, y) that shows a pixel of the original.

        For `TokenLayout.token_at(frame, *geometry.model_pixel(x, y))`.

        Raises
        ------
        InputError
            If the original has no such pixel, or it was cropped away.
        """
        height, width = self.original_size
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise InputError(
                f"pixel ({x:g}, {y:g}) lies outside the {width}×{height} photo; x goes from 0 to "
                f"{width - 1}, y from 0 to {height - 1}"
            )
        in_x, in_y = self.to_model(float(x), float(y))
        # The pixel whose span holds the point; the far edge itself belongs to the last pixel.
        column = min(floor(in_x + 0.5), self.offset[1] + self.resized_size[1] - 1)
        row = min(floor(in_y + 0.5), self.offset[0] + self.resized_size[0] - 1)
        if not (0 <= column < self.image_size[1] and 0 <= row < self.image_size[0]):
            x0, y0, x1, y1 = self.visible_box
            raise InputError(
                f"pixel ({x:g}, {y:g}) of the {width}×{height} photo was cropped away; the model "
                f"sees x {ceil(x0 - 0.5)}…{floor(x1 - 0.5)}, y {ceil(y0 - 0.5)}…{floor(y1 - 0.5)}: "
                'choose one there, or load with mode="pad"'
            )
        return column, row

    def box_to_original(
        self, box: tuple[float, float, float, float]
    ) -> tuple[float, float, float, float]:
        """A box (x0, y0, x1, y1) of edges, as `TokenPlace.box`, in the original's pixels.

        Edges, not centres: (0, 0, W, H) is the whole picture. A box on padding reaches outside.
        """
        x0, y0 = self.to_original(float(box[0]) - 0.5, float(box[1]) - 0.5)
        x1, y1 = self.to_original(float(box[2]) - 0.5, float(box[3]) - 0.5)
        return x0 + 0.5, y0 + 0.5, x1 + 0.5, y1 + 0.5

    @property
    def visible_box(self) -> tuple[float, float, float, float]:
        """The part (x0, y0, x1, y1) of the original that the model sees, as edges."""
        x0, y0, x1, y1 = self.box_to_original((0, 0, self.image_size[1], self.image_size[0]))
        height, width = self.original_size
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


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
    """

    images: Tensor
    geometries: tuple[ImageGeometry, ...]
    paths: tuple[Path, ...]

    def token_at(self, layout: TokenLayout, frame: int, x: float, y: float) -> int:
        """The absolute index of the patch under pixel (x, y) of the original photo of a frame.

        Raises
        ------
        InputError
            If the photo has no such pixel, or it was cropped away.
        """
        return layout.token_at(frame, *self.geometries[frame].model_pixel(x, y))

    def original_box(
        self, layout: TokenLayout, token: int
    ) -> tuple[float, float, float, float] | None:
        """Where a patch lies in its original photo, edges x0, y0, x1, y1; None for the others."""
        place = layout.locate(token)
        return (
            None if place.box is None else self.geometries[place.frame].box_to_original(place.box)
        )


def load_and_preprocess_images(
    paths: PathLikes,
    mode: str = "crop",
    size: int = 518,
    *,
    patch_size: int = 14,
    exif: bool = True,
) -> Tensor:
    """Load photos of one scene for the model: `load_images`, and only the pixels of it.

    Returns
    -------
    (S, 3, H, W), float32 in [0, 1].
    """
    return load_images(paths, mode=mode, size=size, patch_size=patch_size, exif=exif).images


def load_images(
    paths: PathLikes,
    *,
    mode: str = "crop",
    size: int = 518,
    patch_size: int = 14,
    exif: bool = True,
) -> LoadedImages:
    """Load photos of one scene for the model, with the geometry that leads back to them.

    Parameters
    ----------
    paths
        The files (or one).
    mode
        "crop": `size` wide, the height follows; what is higher than `size` is cut off at top and
        bottom, equally. "pad": the longest side `size`, and white around it, to a square.
    size
        Pixels; a multiple of `patch_size`.
    patch_size
        The other side is rounded to a multiple of it.
    exif
        Turn photos upright that were stored sideways. False: as stored, which is what the
        published loader does.

    Transparent pixels are blended onto white. Photos that end in different sizes are padded with
    white to the largest, with a `VistvisWarning`.

    Raises
    ------
    InputError
        If there is no path, the mode or size is none, or a file cannot be read as a picture.
    """
    files = _files(paths)
    _check(mode, size, patch_size)
    for file in files:  # a missing file at the end fails before the others cost time
        _opened(file).close()
    sizes, pictures = [], []
    for file in files:
        photo_size, pixels = _read(file, mode, size, patch_size, exif=exif)
        sizes.append(photo_size)
        pictures.append(pixels)
    geometries = preprocess_geometry(sizes, mode=mode, size=size, patch_size=patch_size)

    height, width = geometries[0].image_size
    images = torch.ones(len(files), 3, height, width)
    for target, pixels, geometry in zip(images, pictures, geometries, strict=True):
        _paste(target, pixels, geometry.offset)
    return LoadedImages(images, geometries, files)


def preprocess_geometry(
    sizes: Sequence[tuple[int, int]], *, mode: str = "crop", size: int = 518, patch_size: int = 14
) -> tuple[ImageGeometry, ...]:
    """Where `load_images` would put photos of these sizes; reads no file.

    Parameters
    ----------
    sizes
        (width, height) of each photo, upright, in pixels.
    mode, size, patch_size
        As in `load_images`.

    Raises
    ------
    InputError
        As `load_images`, and if a size is not positive.
    """
    _check(mode, size, patch_size)
    if not sizes:
        raise InputError("at least one photo is needed, got none; give its (width, height)")
    alone = [_geometry(width, height, mode, size, patch_size) for width, height in sizes]
    shapes = sorted({one.image_size for one in alone})
    largest = (max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))
    if len(shapes) > 1:
        listed = ", ".join(f"{w}×{h}" for h, w in shapes)
        warnings.warn(
            f"the photos end in different sizes ({listed}); all are padded with white to "
            f"{largest[1]}×{largest[0]}",
            VistvisWarning,
            stacklevel=2,
        )
    return tuple(_padded(one, largest) for one in alone)


def _geometry(width: int, height: int, mode: str, size: int, patch: int) -> ImageGeometry:
    if width < 1 or height < 1:
        raise InputError(f"a photo must have at least one pixel, got {width}×{height}")

    def rounded(side: int, other: int) -> int:
        # A very long photo would round to nothing: one patch is the least.
        return max(round(side * (size / other) / patch) * patch, patch)

    if mode == "crop" or width >= height:
        new_width, new_height = size, rounded(height, width)
    else:
        new_width, new_height = rounded(width, height), size
    resized = (new_height, new_width)
    if mode == "crop":
        cut = max(new_height - size, 0)
        return ImageGeometry(
            (height, width), resized, (new_height - cut, size), offset=(-(cut // 2), 0)
        )
    return _padded(ImageGeometry((height, width), resized, resized, (0, 0)), (size, size))


def _padded(geometry: ImageGeometry, shape: tuple[int, int]) -> ImageGeometry:
    """The same picture in the middle of a larger one; an odd pixel more goes below and right."""
    top, left = ((new - old) // 2 for new, old in zip(shape, geometry.image_size, strict=True))
    offset = (geometry.offset[0] + top, geometry.offset[1] + left)
    return replace(geometry, image_size=shape, offset=offset)


def _paste(target: Tensor, pixels: NDArray[np.uint8], offset: tuple[int, int]) -> None:
    """Put (h, w, 3) bytes into a white (3, H, W) picture, as far as they lie inside it."""
    _, height, width = target.shape
    top, left = offset
    seen = pixels[max(-top, 0) : height - top, max(-left, 0) : width - left]
    top, left = max(top, 0), max(left, 0)
    # A copy: what PIL hands out is read-only, which torch warns about.
    values = torch.from_numpy(np.array(seen)).permute(2, 0, 1).float() / 255
    target[:, top : top + seen.shape[0], left : left + seen.shape[1]] = values


# -- files -----------------------------------------------------------------------------------------


def _files(paths: PathLikes) -> tuple[Path, ...]:
    if isinstance(paths, (str, PathLike)):
        paths = [paths]
    try:
        files = tuple(Path(fspath(path)) for path in paths)
    except TypeError as error:
        raise InputError(
            f"paths must be file names, got {paths!r}; for pictures in memory stack them to "
            "(S, 3, H, W) in [0, 1] and resize both sides to multiples of 14"
        ) from error
    if not files:
        raise InputError("at least one image is needed, got an empty list; give its path")
    return files


def _check(mode: str, size: int, patch_size: int) -> None:
    if mode not in MODES:
        raise InputError(f"mode must be 'crop' or 'pad', got {mode!r}; use mode='crop'")
    if patch_size < 1:
        raise InputError(f"patch_size must be positive, got {patch_size}; VGGT's is 14")
    if size < patch_size or size % patch_size:
        near = max(patch_size, round(size / patch_size) * patch_size)
        raise InputError(
            f"size must be a positive multiple of the patch size {patch_size}, got {size}; "
            f"use {near}"
        )


def _opened(file: Path) -> Image.Image:
    from PIL import Image

    if not file.exists():
        raise InputError(f"no image {str(file)!r}: the file does not exist; check its path")
    if file.is_dir():
        raise InputError(f"{str(file)!r} is a folder, not an image; list the files in it")
    try:
        return Image.open(file)
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from error


def _read(
    file: Path, mode: str, size: int, patch_size: int, *, exif: bool
) -> tuple[tuple[int, int], NDArray[np.uint8]]:
    """The upright photo's (width, height), and it resized and on white: (h, w, 3) bytes."""
    from PIL import Image, ImageOps

    try:
        with _opened(file) as picture:
            picture.verify()  # PNG has checksums, which decoding the pixels would pass over
        with _opened(file) as picture:
            picture.load()
            upright: Image.Image = picture
            if exif and _orientation(picture) != 1:
                upright = ImageOps.exif_transpose(picture)
            geometry = _geometry(*upright.size, mode, size, patch_size)
            height, width = geometry.resized_size
            resized = _on_white(upright).resize((width, height), Image.Resampling.BICUBIC)
            return upright.size, np.asarray(resized)
    except (MemoryError, InputError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib.error, …
        raise _unreadable(file, error) from error


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


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(
        f"{str(file)!r} cannot be read as an image ({type(error).__name__}: {error}); it may be "
        "damaged or cut short: open it in a viewer, or save it again"
    )
