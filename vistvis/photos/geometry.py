"""Where the pixels of a photograph go when it is made to fit a model, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vistvis.errors import InputError

Coordinate = TypeVar("Coordinate", float, NDArray[np.float64], Tensor)

_HAIR = 1e-6


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
            (x0, x1), (y0, y1) = self._visible_centres()
            raise InputError(
                f"pixel ({x:g}, {y:g}) of the {width}×{height} photo was cropped away; the model "
                f"sees x {x0}…{x1}, y {y0}…{y1}: choose one there, or have the whole photo seen "
                'where that can be chosen (VGGT: mode="pad")'
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

    def crop_text(self) -> str | None:
        """What the model sees of the photo, for people; None where that is all of it."""
        height, width = self.original_size
        said = [
            f"{axis} {low}…{high} of {side}"
            for axis, side, (low, high) in zip(
                "xy", (width, height), self._visible_centres(), strict=True
            )
            if (low, high) != (0, side - 1)
        ]
        return f"the model sees {', '.join(said)} pixels" if said else None

    def _visible_centres(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The first and the last pixel whose centre the model sees, in x and in y."""
        x0, y0, x1, y1 = self.visible_box
        # A hair's breadth: the way through the model's pixels and back rounds.
        ends = [
            (ceil(low - 0.5 - _HAIR), floor(high - 0.5 + _HAIR))
            for low, high in ((x0, x1), (y0, y1))
        ]
        return ends[0], ends[1]
