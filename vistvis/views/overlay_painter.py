"""Overlays by the hundred: maps laid over pictures that are weighted once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vistvis.errors import InputError
from vistvis.views.painting import colour_indices, colour_table, resize, stretch

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray


def weigh(colours: NDArray[np.uint8], weight: float) -> NDArray[np.uint16]:
    """Colours times a weight, in 256ths of a level, with half of the rounding of `mix`."""
    weighted: NDArray[np.uint16] = np.rint(colours * np.float32(weight * 256)).astype(np.uint16)
    return weighted


def mix(under: NDArray[np.uint16], over: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """The sum of two weighted colours, rounded to levels."""
    # 255 · 256 + 2 · 0.5 + 128 stays below 2¹⁶: nothing overflows.
    total = np.add(under, over, order="C")
    total += np.uint16(128)
    # The high byte of every number is the level.
    high = 1 if sys.byteorder == "little" else 0
    return np.ascontiguousarray(total.view(np.uint8)[..., high::2])


class OverlayPainter:
    """Lays maps over the pictures `(H, W, 3)` of frames, which are weighted once for all overlays.

    Every map runs from its own minimum to its own maximum, as `stretch` with `eps` has it; `alpha`
    is the opacity of its colours, and an InputError where it is none.
    """

    def __init__(
        self,
        pictures: Mapping[int, NDArray[np.uint8]],
        *,
        cmap: str | Colormap = "jet",
        alpha: float = 0.45,
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is an opacity from 0 to 1, got {alpha}")
        self._under = {frame: weigh(picture, 1 - alpha) for frame, picture in pictures.items()}
        self._over = weigh(colour_table(cmap), alpha)
        self._eps = eps

    def paint(self, weights: NDArray[np.float32], frame: int) -> NDArray[np.uint8]:
        """One overlay `(H, W, 3)` of one map `(rows, cols)`."""
        under = self._under[frame]
        heat = resize(stretch(weights, eps=self._eps), under.shape[:2])
        return mix(under, self._over.take(colour_indices(heat), axis=0))
