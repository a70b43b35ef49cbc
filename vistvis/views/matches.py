"""Where attention points from one picture to another, as lines between the two. Draws only."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

from vistvis.errors import IndexOutOfRange, InputError
from vistvis.images import to_unit
from vistvis.views.figures import (
    INK,
    QUIET,
    NotebookFigure,
    colour_bar,
    frame_axes,
    inches_of,
    shorten,
    text_height,
    wrap,
)
from vistvis.views.painting import CMAP, LUMA

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from vistvis.analysis.matching import Correspondence
    from vistvis.images import Values
    from vistvis.tokens import TokenLayout

# Inches: edge, between the pictures, the bar and the space it takes; a picture's width by default.
_EDGE, _BETWEEN, _BAR, _BAR_SPACE, _PICTURE = 0.12, 0.12, 0.13, 0.78, 4.2
# The second picture lies lower by so much of its height: between pictures side by side, matches of
# one grid row would all lie on one line.
_LOWER = 0.3
# Pictures are grey and so dark, so that lines stand out.
_DIMMED, _GROUND = 0.62, "#0b0b0f"


def match_lines(
    first: Values,
    second: Values,
    found: Correspondence,
    layout: TokenLayout,
    *,
    frame: SupportsIndex = 0,
    key_frame: SupportsIndex = 1,
    head: SupportsIndex = 0,
    batch: SupportsIndex = 0,
    most: SupportsIndex = 50,
    cycle: float | None = None,
    key_layout: TokenLayout | None = None,
    names: Sequence[str] | None = None,
    cmap: str | Colormap = CMAP,
    width: str | float | None = None,
    title: str | None = None,
) -> NotebookFigure:
    """Draw the most confident correspondences of a head as lines between two pictures.

    Parameters
    ----------
    first, second
        The pictures of queries and of keys, `(3, H, W)`, of any number of pixels.
    found
        What `analysis.correspondence` gave for these two frames.
    layout, key_layout
        Where patches lie; of the keys where that is another grid.
    frame, key_frame
        The frames' numbers, for the words above them; `names` says others.
    head, batch
        Which of those in `found`.
    most
        How many lines at most, the most confident first.
    cycle
        Only what points back to within so many patches.
    cmap, width, title
        As in `numbers.site_head_map`; colour is confidence, from 0.

    InputError where no correspondence is left, or the pictures are none; IndexOutOfRange for a head
    or batch item that `found` has not.
    """
    where = {"batch": operator.index(batch), "head": operator.index(head)}
    for (name, number), size in zip(where.items(), found.confidence.shape, strict=False):
        if not 0 <= number < size:
            raise IndexOutOfRange(f"{name} {number} is outside 0…{size - 1}")
    places, confidence, back = (
        part[where["batch"], where["head"]].cpu().numpy()
        for part in (found.places, found.confidence, found.cycle)
    )
    if len(confidence) != layout.num_patches:
        raise InputError(
            f"the correspondence has {len(confidence)} patches, the layout {layout.num_patches} in "
            "a frame; pass the layout that the site has"
        )
    kept = np.isfinite(confidence)
    every = len(kept)
    if cycle is not None:
        kept &= back <= cycle  # NaN is no way back
    chosen = np.flatnonzero(kept)
    chosen = chosen[np.argsort(-confidence[chosen], kind="stable")][: operator.index(most)]
    if not len(chosen):
        raise InputError(
            f"no correspondence is left to draw of {every}: head {where['head']} points to none "
            "there and back; leave cycle= out, or choose another head"
        )
    there = key_layout or layout
    starts = _centres(np.stack(np.divmod(chosen, layout.grid[1]), -1), layout)
    ends = _centres(places[chosen], there)
    return _draw(
        (_dimmed(first), _dimmed(second)),
        (layout.image_size, there.image_size),
        (starts, ends, confidence[chosen]),
        names=names or (f"frame {operator.index(frame)}", f"frame {operator.index(key_frame)}"),
        title=title or f"head {where['head']}: where patches point",
        note=f"{len(chosen)} of {every} patches, the most confident{_within(cycle)}",
        cmap=cmap,
        width=width,
    )


def _within(cycle: float | None) -> str:
    """How far what is drawn points back at most, in words."""
    return "" if cycle is None else f" that point back within {cycle:g} patch{'es' * (cycle != 1)}"


def _draw(
    pictures: tuple[NDArray[np.float32], NDArray[np.float32]],
    sizes: tuple[tuple[int, int], tuple[int, int]],
    lines: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    *,
    names: Sequence[str],
    title: str,
    note: str,
    cmap: str | Colormap,
    width: str | float | None,
) -> NotebookFigure:
    """Both pictures in one pair of axes, whose unit is a pixel of the first one's model picture."""
    large, small = (11.0, 8.5) if width is None else (9.0, 7.0)
    (high, wide), (other_high, other_wide) = sizes
    scale = high / other_high  # both as high
    gap = wide * _BETWEEN / _PICTURE
    whole, lower = wide + gap + other_wide * scale, _LOWER * high
    tall = high + lower
    given = 2 * _PICTURE + _BETWEEN + _BAR_SPACE + 2 * _EDGE if width is None else inches_of(width)
    across = given - 2 * _EDGE - _BAR_SPACE
    inch = across / whole
    heading = wrap(title, given - 2 * _EDGE, large, weight="bold")
    said = wrap(note, given - 2 * _EDGE, small)
    said_top = _EDGE + text_height(heading, large)
    top = said_top + text_height(said, small) + 0.06
    figure = NotebookFigure(figsize=(given, top + tall * inch + _EDGE), dpi=150)
    figure.write(_EDGE, _EDGE, heading, size=large, color=INK, fontweight="bold")
    figure.write(_EDGE, said_top, said, size=small, color=QUIET)
    axes = figure.add_box(_EDGE, top, across, tall * inch)
    frame_axes(axes)
    axes.set_facecolor(_GROUND)  # bright lines are lost on white
    starts, ends, confidence = lines
    shifted = ends * scale + (wide + gap, lower)
    for picture, (left, right, above), name, (at, va) in (
        (pictures[0], (0.0, wide, 0.0), names[0], (high + 0.05 / inch, "top")),
        (pictures[1], (wide + gap, whole, lower), names[1], (lower - 0.05 / inch, "bottom")),
    ):
        extent = left, right, above + high, above
        axes.imshow(picture, extent=extent, interpolation="antialiased")
        text = shorten(name, (right - left) * inch - 0.1, small)
        words: dict[str, Any] = {"fontsize": small, "color": "white", "va": va}
        axes.text(left + 0.05 / inch, at, text, parse_math=False, **words)
    axes.set(xlim=(0, whole), ylim=(tall, 0))
    normalizer = Normalize(0, float(confidence.max()))
    # The most confident lie above the others.
    order = np.argsort(confidence, kind="stable")
    segments = np.stack([starts, shifted], 1)[order]
    style: dict[str, Any] = {"norm": normalizer, "cmap": cmap, "zorder": 3}
    line = min(max(across / 8.5, 0.5), 1.0)
    drawn = LineCollection(list(segments), linewidths=line, alpha=0.9, **style)
    drawn.set_array(confidence[order])
    axes.add_collection(drawn)
    for points in (starts, shifted):
        x, y = points[order].T
        axes.scatter(x, y, c=confidence[order], s=9 * line**2, linewidths=0, **style)
    bar = figure.add_box(given - _EDGE - _BAR_SPACE + 0.12, top, _BAR, min(tall * inch, 3.0))
    label = {"label": "confidence", "short": "share"}
    colour_bar(bar, normalizer=normalizer, cmap=cmap, clipped=False, size=small, **label)
    return figure


def _centres(places: NDArray[Any], layout: TokenLayout) -> NDArray[np.float64]:
    """(row, col) in patches to (x, y) in pixels of the picture that the model saw."""
    centres: NDArray[np.float64] = (places[:, ::-1] + 0.5) * np.array(
        layout.patch_size[::-1], float
    )
    return centres


def _dimmed(picture: Values) -> NDArray[np.float32]:
    """Grey and dark, `(H, W, 3)`."""
    grey = to_unit(picture) @ np.array(LUMA, np.float32)
    if grey.ndim != 2:
        raise InputError(f"a picture is (3, H, W), got {tuple(np.shape(picture))}")
    dimmed: NDArray[np.float32] = grey[..., None].repeat(3, -1) * np.float32(_DIMMED)
    return dimmed
