"""Overlays by the hundred: maps laid over pictures by one table of all colours over all greys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vistvis.errors import InputError
from vistvis.views.painting import (
    ALPHA,
    CMAP,
    NORMS,
    colour_indices,
    lay_over,
    normalizer,
    resize,
    stretch,
)

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from numpy.typing import NDArray

OWN = "own"
_GREYS = 256
_STEPS = 256


@dataclass(frozen=True)
class Look:
    """How overlays turn weights into colours; the fields are as in `lay_over` and `normalizer`.

    `norm` may also be "own": every map from its own minimum to its own maximum, as `stretch` with
    `eps` has it. InputError for other norms.
    """

    norm: str = OWN
    cmap: str = CMAP
    alpha: float = ALPHA
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.norm not in (OWN, *NORMS):
            names = ", ".join(map(repr, (OWN, *NORMS)))
            raise InputError(f"norm is one of {names}, got {self.norm!r}")

    def scale(
        self, maps: NDArray[np.float32], own: tuple[int, int, int] | None
    ) -> Normalize | None:
        """The one scale of maps `(K, rows, cols)`, `own` as in `normalizer`; None: each its own."""
        return None if self.norm == OWN else normalizer(maps, norm=self.norm, own=own)


class OverlayPainter:
    """Lays maps over pictures uint8 `(H, W, 3)`, by frame, as `lay_over` does: to one level of 255.

    A picture is grey and a colour map has 256 steps, so that every result is one entry of a table.
    """

    def __init__(self, pictures: Mapping[int, NDArray[np.uint8]], look: Look) -> None:
        from matplotlib.colors import Normalize
        from PIL import Image

        self._eps = look.eps
        # The middle of every step, and one value above the scale.
        steps = np.append((np.arange(_STEPS, dtype=np.float32) + 0.5) / _STEPS, np.float32(2))
        greys = np.linspace(0, 1, _GREYS, dtype=np.float32)
        ramp = np.broadcast_to(greys[None, :, None], (len(steps), _GREYS, 3))
        heat = np.broadcast_to(steps[:, None], (len(steps), _GREYS))
        table = lay_over(ramp, heat, normalizer=Normalize(0, 1), cmap=look.cmap, alpha=look.alpha)
        self._table = table.reshape(-1, 3)
        # Pillow's "L" has the weights of red, green and blue that `lay_over` has.
        self._greys = {
            frame: np.asarray(Image.fromarray(picture).convert("L"))
            for frame, picture in pictures.items()
        }

    def paint(
        self, weights: NDArray[np.float32], frame: int, scale: Normalize | None = None
    ) -> NDArray[np.uint8]:
        """One overlay `(H, W, 3)` of one map `(rows, cols)`; without a scale on its own."""
        grey = self._greys[frame]
        if scale is None:
            heat = resize(stretch(weights, eps=self._eps), grey.shape)
            entries = colour_indices(heat).astype(np.intp)
        else:
            heat = np.asarray(np.ma.filled(scale(resize(weights, grey.shape)), 0), np.float32)
            entries = colour_indices(heat).astype(np.intp)
            entries[heat > 1] = _STEPS
        entries *= _GREYS
        entries += grey
        return self._table.take(entries, axis=0)
