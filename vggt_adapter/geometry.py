"""How VGGT has photographs fitted to it: which `ImageGeometry` each gets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vggt_adapter.config import IMAGE_SIZE, PATCH_SIZE
from vistvis.errors import InputError, VistvisWarning
from vistvis.photos.geometry import ImageGeometry as ImageGeometry

MODES = ("crop", "pad")


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
