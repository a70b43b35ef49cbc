"""Where the pixels of a photograph go when it is made to fit a model, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vggt_adapter.config import IMAGE_SIZE, PATCH_SIZE
from vistvis.errors import InputError, VistvisWarning

MODES = ("crop", "pad")

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
        (scale_y, scale_x), (top, left) = self.scale, self.offset
        return (x + 0.5) * scale_x - 0.5 + left, (y + 0.5) * scale_y - 0.5 + top

    def to_original(self, x: Coordinate, y: Coordinate) -> tuple[Coordinate, Coordinate]:
        """Model-input pixel coordinates → those of the original; inverse of `to_model`.

        White padding comes out below 0 or past the photo's end.
        """
        (scale_y, scale_x), (top, left) = self.scale, self.offset
        return (x - left + 0.5) / scale_x - 0.5, (y - top + 0.5) / scale_y - 0.5

    def model_pixel(self, x: float, y: float) -> tuple[int, int]:
        """The model-input pixel (x, y) that shows a pixel of the original, as `token_at` takes it.

        InputError if the original has no such pixel, or it was cropped away.
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
        left, top, right, bottom = (float(edge) - 0.5 for edge in box)
        (x0, y0), (x1, y1) = self.to_original(left, top), self.to_original(right, bottom)
        return x0 + 0.5, y0 + 0.5, x1 + 0.5, y1 + 0.5

    @property
    def visible_box(self) -> tuple[float, float, float, float]:
        """The part (x0, y0, x1, y1) of the original that the model sees, as edges."""
        x0, y0, x1, y1 = self.box_to_original((0, 0, self.image_size[1], self.image_size[0]))
        height, width = self.original_size
        return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


@dataclass(frozen=True)
class Fit:
    """How photographs are made to fit a model, as in `load_images`."""

    mode: str
    size: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode must be 'crop' or 'pad', got {self.mode!r}; use mode='crop'")
        size, patch = self.size, self.patch_size
        if patch < 1:
            raise InputError(f"patch_size must be positive, got {patch}; VGGT's is {PATCH_SIZE}")
        if size < patch or size % patch:
            raise InputError(
                f"size must be a positive multiple of the patch size {patch}, got {size}; "
                f"use {max(patch, round(size / patch) * patch)}"
            )

    def alone(self, width: int, height: int) -> ImageGeometry:
        """Where a photo of this size goes if it is the only one."""
        if width < 1 or height < 1:
            raise InputError(f"a photo must have at least one pixel, got {width}×{height}")
        size, patch = self.size, self.patch_size

        def rounded(side: int, other: int) -> int:
            # A very long photo would round to nothing: one patch is the least.
            return max(round(side * (size / other) / patch) * patch, patch)

        if self.mode == "crop" or width >= height:
            resized = (rounded(height, width), size)
        else:
            resized = (size, rounded(width, height))
        if self.mode == "pad":
            return _padded(ImageGeometry((height, width), resized, resized, (0, 0)), (size, size))
        cut = max(resized[0] - size, 0)
        return ImageGeometry((height, width), resized, (resized[0] - cut, size), (-(cut // 2), 0))

    def together(self, sizes: Sequence[tuple[int, int]]) -> tuple[ImageGeometry, ...]:
        """Where photos of these sizes (width, height) go: all end as large as the largest."""
        alone = [self.alone(width, height) for width, height in sizes]
        shapes = sorted({one.image_size for one in alone})
        heights, widths = zip(*shapes, strict=True)
        largest = (max(heights), max(widths))
        if len(shapes) > 1:
            listed = ", ".join(f"{w}×{h}" for h, w in shapes)
            warnings.warn(
                f"the photos end in different sizes ({listed}); all are padded with white to "
                f"{largest[1]}×{largest[0]}",
                VistvisWarning,
                stacklevel=3,
            )
        return tuple(_padded(one, largest) for one in alone)


def preprocess_geometry(
    sizes: Sequence[tuple[int, int]],
    *,
    mode: str = "crop",
    size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
) -> tuple[ImageGeometry, ...]:
    """Where `load_images` would put photos of these (width, height), upright; reads no file.

    InputError as `load_images`, and if a size is not positive.
    """
    fit = Fit(mode, size, patch_size)
    if not sizes:
        raise InputError("at least one photo is needed, got none; give its (width, height)")
    return fit.together(sizes)


def _padded(geometry: ImageGeometry, shape: tuple[int, int]) -> ImageGeometry:
    """The same picture in the middle of a larger one; an odd pixel more goes below and right."""
    top, left = ((new - old) // 2 for new, old in zip(shape, geometry.image_size, strict=True))
    offset = (geometry.offset[0] + top, geometry.offset[1] + left)
    return replace(geometry, image_size=shape, offset=offset)
