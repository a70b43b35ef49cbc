"""The photo around what a model saw of it: what was cut off is faint, borders are hatched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.patches import Rectangle

from vistvis.views.figures import HAIRLINE, INK, outline_box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

Edges: TypeAlias = tuple[float, float, float, float]
"""`(x0, y0, x1, y1)` in the model's pixels; (0, 0, W, H) is all of its picture."""

# How much of a cut-off part is paper, and what stands where there is no photo.
_FAINT = 0.62
_BORDER = "#ececf0"
_HATCH = "////"
# Less than this many of the model's pixels is rounding.
_HAIR = 1e-3


@dataclass(frozen=True, eq=False)
class WholePhoto:
    """A photo by where it lies in the model's picture of it.

    Attributes
    ----------
    box
        Its edges: outside of the model's picture where it was cut, within where borders were added.
    pixels
        The upright photo, uint8 `(h, w, 3)` of any size; None where nothing of it was cut off.
    """

    box: Edges
    pixels: NDArray[np.uint8] | None = None

    def is_cut(self, size: tuple[int, int]) -> bool:
        """Whether the model's picture of that `(H, W)` lacks a part of the photo."""
        return bool(_beyond(self.box, (0, 0, *size[::-1])))

    def has_borders(self, size: tuple[int, int]) -> bool:
        """Whether the model's picture of that `(H, W)` is not all photo."""
        return bool(_beyond((0, 0, *size[::-1]), self.box))

    def without_borders(self, picture: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
        """The model's picture of that `(H, W)`, at any resolution, black where it has a border."""
        rows, cols = picture.shape[:2]
        down, across = rows / size[0], cols / size[1]
        x0, y0, x1, y1 = self.box
        # A pixel that is partly photo counts as photo.
        top, bottom = max(int(y0 * down + _HAIR), 0), min(int(np.ceil(y1 * down - _HAIR)), rows)
        left, right = max(int(x0 * across + _HAIR), 0), min(int(np.ceil(x1 * across - _HAIR)), cols)
        shown = np.zeros_like(picture)
        shown[top:bottom, left:right] = picture[top:bottom, left:right]
        return shown

    def draw(self, axes: Axes, size: tuple[int, int], *, heat: bool = False) -> None:
        """Draw what surrounds the model's picture of that `(H, W)`, and hatch its borders.

        `axes` count in the model's pixels. Over heat, which borders have too, the hatching is thin.
        """
        seen: Edges = (0, 0, *size[::-1])
        x0, y0, x1, y1 = self.box
        if self.is_cut(size) and self.pixels is not None:
            faint = 255 - (1 - _FAINT) * (255 - self.pixels.astype(np.float32))
            axes.imshow(
                np.rint(faint).astype(np.uint8),
                interpolation="antialiased",
                extent=(x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5),
                zorder=-1,
            )
            part = max(x0, 0), max(y0, 0), min(x1, seen[2]), min(y1, seen[3])
            outline_box(axes, part, strokes=(("white", 2.0), (INK, 0.9)), zorder=3)
        style: dict[str, Any] = {"hatch": _HATCH, "linewidth": 0, "zorder": 2}
        style |= {"edgecolor": HAIRLINE, "facecolor": "none" if heat else _BORDER}
        style |= {"alpha": 0.25} if heat else {}
        for left, top, right, bottom in _beyond(seen, self.box):
            corner, sides = (left - 0.5, top - 0.5), (right - left, bottom - top)
            axes.add_patch(Rectangle(corner, *sides, **style))


def view_of(size: tuple[int, int], wholes: Sequence[WholePhoto]) -> Edges:
    """What shows the model's picture of that `(H, W)` and all of the photos."""
    boxes = [(0.0, 0.0, float(size[1]), float(size[0])), *(one.box for one in wholes)]
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def show_view(axes: Axes, view: Edges) -> None:
    """Let axes show these edges, however far what is drawn on them reaches."""
    x0, y0, x1, y1 = view
    axes.set(xlim=(x0 - 0.5, x1 - 0.5), ylim=(y1 - 0.5, y0 - 0.5))


def words_of(size: tuple[int, int], wholes: Sequence[WholePhoto]) -> list[str]:
    """For legends: what the surroundings mean, where there are such."""
    cut = any(one.is_cut(size) for one in wholes)
    borders = any(one.has_borders(size) for one in wholes)
    said = ["faint: cut off, not seen by the model"] * cut
    return said + ["hatched: border without photo"] * borders


def _beyond(outer: Edges, inner: Edges) -> list[Edges]:
    """What of a box lies outside of another, in at most four boxes that don't overlap."""
    x0, y0, x1, y1 = outer
    left, right = max(x0, inner[0]), min(x1, inner[2])
    strips = (
        (x0, y0, left, y1),
        (right, y0, x1, y1),
        (left, y0, right, inner[1]),
        (left, inner[3], right, y1),
    )
    return [one for one in strips if min(one[2] - one[0], one[3] - one[1]) > _HAIR]
