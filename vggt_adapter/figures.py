"""Figures of one query token, drawn from `vggt_adapter.values`.

Positions are worked out in inches, so that pictures keep their shape and no label is clipped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Circle
from numpy.typing import NDArray

from vggt_adapter.inputs import FloatArray, Head, Images, Query, Weights
from vggt_adapter.values import Match, QueryValues, query_values
from vistvis.errors import InputError
from vistvis.views.figures import (
    INK,
    QUIET,
    NotebookFigure,
    colour_bar,
    frame_axes,
    inches_of,
    mark_query,
    points_of,
    shorten,
    text_height,
    wrap,
)
from vistvis.views.painting import (
    ALPHA,
    CMAP,
    is_clipped,
    lay_over,
    normalizer,
    resize,
    scale_text,
)
from vistvis.views.wholes import Edges, WholePhoto, show_view, view_of, words_of

DPI = 150

# Inches.
_SIDE, _GAP, _GROUP_GAP = 0.15, 0.1, 0.12
_BAR, _HIGHEST_BAR = 0.14, 5.0
_WIDEST, _HIGHEST, _TALLEST = 4.4, 3.6, 9.5
_MIN_WIDTH, _MIN_PANEL = 5.2, 1.05


def visualize_attention_on_image(
    attn_weights: Weights,
    images: Images,
    token_idx: SupportsIndex,
    head_idx: Head = 0,
    patch_start_idx: SupportsIndex | None = None,
    attention_type: str | None = None,
    *,
    frame_idx: SupportsIndex | None = None,
    batch_idx: SupportsIndex = 0,
    patch_size: int | tuple[int, int] | None = None,
    renormalize: bool = False,
    allow_special: bool = False,
    norm: str = "auto",
    cmap: str | Colormap = CMAP,
    alpha: float = ALPHA,
    width: str | float | None = None,
    names: Sequence[str] | None = None,
    untrained: bool = False,
    block_idx: int | None = None,
    save_path: str | os.PathLike[str] | None = None,
) -> NotebookFigure:
    """Draw what one query token attends to.

    Frame attention: the frame on the left with the query outlined, its heatmap on the right.
    Global attention: all frames above, their heatmaps below on one colour scale, the query
    outlined in its frame. Cross attention: the query's picture first, then those that it looks at.
    A ring marks the strongest patch of every frame, a dashed one where it is weak: where it gets at
    most 5 times the weight of each key if all got the same, or its frame under a 20th of what its
    patches would get then.

    Parameters
    ----------
    attn_weights, images, token_idx, head_idx, patch_start_idx, attention_type, frame_idx, \
batch_idx, patch_size, renormalize, allow_special
        As in `get_attention_values`.
    norm
        "auto": from 0 to the largest weight outside the query's patch (global: nor beside it);
        "linear": to the largest weight; "log"; "percentile": linear up to the 99th. What lies above
        the scale is white, and the colour bar has an arrow.
    cmap
        A matplotlib colour map.
    alpha
        How far the grey picture below the colours is dimmed, from 0 to 1.
    width
        For papers: "column" (3.35 in), "double" (6.9 in) or inches, with small letters. Default:
        what the pictures need.
    names
        One for each picture, for example of its file; they stand below it.
    untrained
        Say in the title that the weights are.
    block_idx
        For the title, where plain tensors don't say which block they come from.
    save_path
        Write the figure there too; the ending chooses the format.

    Returns a figure that pyplot does not know: nothing to close, and it shows in notebooks. Errors
    as in `get_attention_values`; InputError also for an unknown `norm`, `cmap` or `width`, for
    names that are not one a picture, and for register blocks, which hold no patches.
    """
    query = Query(
        token_idx,
        head_idx,
        patch_start_idx,
        attention_type,
        frame_idx,
        batch_idx,
        patch_size,
        renormalize,
        allow_special,
    )
    values = query_values(attn_weights, images, query)
    figure = draw_values(
        values,
        norm=norm,
        cmap=cmap,
        alpha=alpha,
        width=width,
        names=names,
        untrained=untrained,
        block_idx=block_idx,
    )
    if save_path is not None:
        figure.save(save_path)
    return figure


def draw_values(
    values: QueryValues,
    *,
    norm: str = "auto",
    cmap: str | Colormap = CMAP,
    alpha: float = ALPHA,
    width: str | float | None = None,
    names: Sequence[str] | None = None,
    untrained: bool = False,
    block_idx: int | None = None,
    pictures: FloatArray | None = None,
    wholes: Sequence[WholePhoto] = (),
) -> NotebookFigure:
    """The figure of values that are already computed; see `visualize_attention_on_image`.

    `pictures` are what is shown in place of `values.images`: the same view of every frame, with
    more pixels, `(S, k·H, k·W, 3)` in [0, 1]. `wholes` are the photos, one for each picture: then
    what was cut off is shown too, faint, and borders are hatched.
    """
    if values.attention_type == "register":
        raise InputError(
            "register blocks hold no patches, so no picture shows where they look; ask for a "
            f"camera or register token's row with attention.token_rows({values.query.token})"
        )
    if names is not None and len(names) != values.layout.frames:
        raise InputError(f"{values.layout.frames} pictures need as many names, got {len(names)}")
    if wholes and len(wholes) != values.layout.frames:
        raise InputError(
            f"{values.layout.frames} pictures are of as many photos, not {len(wholes)}"
        )
    # The scale comes from the maps, not from the resized ones: resizing softens the peaks.
    scale = normalizer(values.maps, norm=norm, own=values.own)
    lines = _title_lines(values, block_idx, untrained=untrained)
    lines[-1] += f"; {scale_text(values.maps, scale, norm=norm, own=values.own)}"
    lines.append(" · ".join([_legend(values), *words_of(values.layout.image_size, wholes)]))
    view = view_of(values.layout.image_size, wholes)
    inches = None if width is None else inches_of(width)
    plan = _Plan(values, lines, inches, view, named=bool(names))
    shown = pictures if pictures is not None else values.images
    drawing = _Drawing(values, shown, scale, view, wholes)
    matches = {match.place.frame_idx: match for match in values.matches}
    said = [values.query.frame] if len(values.pictures) > 1 else []
    for number, frame in enumerate(values.pictures):
        panels = [plan.axes(number)]
        drawing.picture(panels[0], frame)
        plan.title(panels[0], f"frame {frame}" + " · query" * (frame in said), strong=frame in said)
        if names is not None:
            plan.note(panels[0], names[frame])
        match = matches.get(frame)
        if match is not None:
            panels.append(plan.axes(number, heat=True))
            drawing.heatmap(panels[1], frame, cmap=cmap, alpha=alpha)
            if not plan.heat_below:
                plan.title(panels[1], "attention within the frame", "attention")
            plan.note(panels[1], *_shares(match, values))
        for axes in panels:
            if match is not None:
                _mark_match(axes, values, match)
            if frame == values.query.frame:
                # A special token has no place, so its whole frame is outlined, on the inside.
                box = values.query.box or (0, 0, *values.layout.image_size[::-1])
                mark_query(axes, box, clip_on=values.query.box is None)
    plan.colour_bar(scale, cmap, clipped=is_clipped(values.maps, scale))
    return plan.figure


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What the panels show."""

    values: QueryValues
    pictures: FloatArray
    scale: Normalize
    view: Edges
    wholes: Sequence[WholePhoto]

    def picture(self, axes: Axes, frame: int) -> None:
        # As bytes: matplotlib keeps what it is given and turns floats into more floats.
        self._show(axes, np.rint(self.pictures[frame] * 255).astype(np.uint8), frame)

    def heatmap(self, axes: Axes, frame: int, *, cmap: str | Colormap, alpha: float) -> None:
        """Weights in colour; where they are dark the picture shines through, faint and grey."""
        picture = self.pictures[frame]
        if self.wholes:
            size = self.values.layout.image_size
            picture = self.wholes[frame].without_borders(picture, size)
        # One frame at a time: all of them at full size are not needed at once.
        heat = resize(self.values.maps[self.values.frames.index(frame)], picture.shape[:2])
        laid = lay_over(picture, heat, normalizer=self.scale, cmap=cmap, alpha=alpha)
        self._show(axes, laid, frame, heat=True)

    def _show(
        self, axes: Axes, levels: NDArray[np.uint8], frame: int, *, heat: bool = False
    ) -> None:
        height, width = self.values.layout.image_size
        # Places count in the model's pixels, however many the picture shown has.
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        axes.imshow(levels, interpolation="antialiased", extent=extent)
        if self.wholes:
            self.wholes[frame].draw(axes, (height, width), heat=heat)
        show_view(axes, self.view)


# -- where things go -----------------------------------------------------------------------------


class _Plan:
    """A figure and the places in it, in inches.

    One frame has its heatmap beside it, several have theirs below. Letters are small where a width
    is asked for, as papers have them.
    """

    def __init__(
        self,
        values: QueryValues,
        lines: list[str],
        width: float | None,
        view: Edges,
        *,
        named: bool,
    ) -> None:
        sizes = (13.0, 9.5, 9.5, 8.5) if width is None else (9.0, 7.0, 7.0, 6.5)
        self.panel_size, self.note_size = sizes[2:]
        self._title = 1.75 * self.panel_size / 72
        self._under = 1.75 * self.note_size / 72
        frames, aspect = len(values.pictures), (view[3] - view[1]) / (view[2] - view[0])
        self.heat_below = frames > 1
        self.columns, self.rows = 2, 1
        # A group is a title, a picture, perhaps its name and a heatmap below, a note.
        self._between = (self._under + 0.03 if named else _GAP) if self.heat_below else 0.0
        fixed = self._title + self._between + self._under
        beside = 0.85 if width is None else 0.7  # for the colour bar
        around = 2 * _SIDE + beside
        if self.heat_below:
            self.columns = _columns(frames, width and width - around)
            self.rows = math.ceil(frames / self.columns)
        gaps = (self.columns - 1) * _GAP
        if width is None:
            panel = min(_WIDEST, 12.4 / self.columns, _HIGHEST / aspect)
        else:
            # A page has an end.
            room = _TALLEST / self.rows - fixed - _GROUP_GAP
            panel = (width - around - gaps) / self.columns
            panel = min(panel, room / (1 + self.heat_below) / aspect)
        self.cell = (panel, panel * aspect)
        self.group = fixed + (1 + self.heat_below) * self.cell[1]
        body = (self.columns * panel + gaps, self.rows * (self.group + _GROUP_GAP) - _GROUP_GAP)
        self.width = max(_MIN_WIDTH, body[0] + around) if width is None else width
        # In the middle of a figure that is wider than its pictures.
        self.left = max(_SIDE, (self.width - body[0] - beside) / 2)
        self._write(lines, sizes, body[1])

    def _write(self, lines: list[str], sizes: tuple[float, ...], body: float) -> None:
        """Make the figure, as high as its lines need it to be, and write them."""
        placed: list[tuple[float, str, dict[str, Any]]] = []
        y = _SIDE
        styles = ((sizes[0], "bold", INK), (sizes[1], "normal", INK), (sizes[1], "normal", QUIET))
        for line, (size, weight, colour) in zip(lines, (*styles, styles[-1]), strict=True):
            text = wrap(line, self.width - 2 * _SIDE, size, weight=weight)
            placed.append((y, text, {"size": size, "fontweight": weight, "color": colour}))
            y += text_height(text, size) + 0.02
        self.top = y + 0.06
        height = self.top + body + 0.6 * _SIDE
        self.figure = NotebookFigure(figsize=(self.width, height), dpi=DPI, facecolor="white")
        for y, text, style in placed:
            self.figure.write(_SIDE, y, text, **style)

    def axes(self, number: int, *, heat: bool = False) -> Axes:
        """Axes for the picture of the frame so many from the first, or for its heatmap."""
        row, column = divmod(number, self.columns)
        y = self.top + row * (self.group + _GROUP_GAP) + self._title
        if heat and self.heat_below:
            y += self.cell[1] + self._between
        elif heat:
            column += 1
        axes = self.figure.add_box(self.left + column * (self.cell[0] + _GAP), y, *self.cell)
        frame_axes(axes)
        return axes

    def title(self, axes: Axes, *texts: str, strong: bool = False) -> None:
        """A line above a panel: the first of the texts that fits."""
        size, weight = self.panel_size, "bold" if strong else "normal"
        text = _fitting(texts, self.cell[0], size, weight=weight)
        style: dict[str, Any] = {"fontsize": size, "fontweight": weight, "color": INK}
        axes.set_title(text, pad=0.4 * size, loc="left", **style)

    def note(self, axes: Axes, *texts: str) -> None:
        """A line below a panel: the first of the texts that fits."""
        text = _fitting(texts, self.cell[0], self.note_size)
        style: dict[str, Any] = {"fontsize": self.note_size, "color": QUIET, "parse_math": False}
        axes.set_xlabel(text, labelpad=0.3 * self.note_size, loc="left", **style)

    def colour_bar(self, scale: Normalize, cmap: str | Colormap, *, clipped: bool) -> None:
        """One bar for all heatmaps, beside them."""
        y, span = self.top + self._title, self.cell[1]
        columns = min(self.columns, 2) if not self.heat_below else self.columns
        if self.heat_below and self.rows == 1:
            y += self.cell[1] + self._between
        elif self.heat_below:
            span = self.rows * (self.group + _GROUP_GAP) - _GROUP_GAP - self._title - self._under
        x = self.left + columns * (self.cell[0] + _GAP)
        axes = self.figure.add_box(x, y, _BAR, min(span, _HIGHEST_BAR))
        colour_bar(axes, normalizer=scale, cmap=cmap, clipped=clipped, size=self.note_size)


def _columns(frames: int, width: float | None) -> int:
    """Frames in a line: as many as can be told apart, in lines of about as many each."""
    most = 4 if width is None else int((width + _GAP) / (_MIN_PANEL + _GAP))
    if width is None and frames > most:
        most = math.ceil(math.sqrt(1.5 * frames))
    return math.ceil(frames / math.ceil(frames / max(most, 1)))


def _fitting(texts: Sequence[str], width: float, size: float, *, weight: str = "normal") -> str:
    """The first of the texts that fits, or the last, shortened."""
    shown = [shorten(text, width, size, weight=weight) for text in texts]
    return next((one for one, text in zip(shown, texts, strict=True) if one == text), shown[-1])


# -- marks and words -----------------------------------------------------------------------------


def _mark_match(axes: Axes, values: QueryValues, match: Match) -> None:
    if match.place == values.query:
        return  # its square says it all
    assert match.place.box is not None
    x0, y0, x1, y1 = match.place.box
    centre = ((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2)
    # Around a small patch, inside a large one: about as large in every figure.
    patch, width = max(x1 - x0, y1 - y0), values.layout.image_size[1]
    radius = max(0.35 * patch, min(1.1 * patch, 0.03 * width))
    # As thick as a small ring bears; it ends with the picture, so that no caption is overprinted.
    line = min(max(points_of(axes, radius) / 6, 0.5), 1.1) * (0.75 if match.weak else 1)
    dashes = (0, (2.5, 2)) if match.weak else "solid"
    for colour, thick in (("black", 2.2 * line), ("white", line)):
        style: dict[str, Any] = {"edgecolor": colour, "linewidth": thick, "zorder": 4}
        axes.add_patch(Circle(centre, radius, fill=False, linestyle=dashes, **style))


def _shares(match: Match, values: QueryValues) -> tuple[str, str]:
    """Under a heatmap: how much of the weight lies in this frame, in words and in few."""
    weak = " · weak" * match.weak
    if values.head == "max":  # maxima over heads don't add up to a share of anything
        return f"largest weight {match.weight:.3g}{weak}", f"{match.weight:.3g}{weak}"
    of = "of the patch weight" if values.renormalized else "of the weight"
    share = f"{100 * match.share:.1f} %"
    return f"{share} {of}{weak}", f"{share}{weak}"


def _title_lines(values: QueryValues, block_idx: int | None, *, untrained: bool) -> list[str]:
    site = values.site
    block = site.block if site is not None and site.block is not None else block_idx
    title = [f"{values.attention_type.capitalize()} attention"]
    if block is not None:
        title.append(f"block {block}")
    title.append(values.head_text)
    if site is not None and site.rope is False:
        title.append("taken before RoPE")
    if site is not None and site.intervened:
        title.append(f"intervened: {site.intervened}")
    if values.merged:
        title.append("merged tokens")
    if untrained:
        title.append("untrained weights")
    place = values.query
    where = f"row {place.row}, col {place.col}" if place.is_patch else f"a {place.kind} token"
    inside = "of no frame" if place.frame is None else f"of frame {place.frame}"
    query = f"query: token {place.token_in_frame} {inside} (absolute {place.token}), {where}"
    note = "weights over patches only" if values.renormalized else "softmax over all tokens"
    if values.head != "max":
        note += f"; {100 * values.patch_mass:.1f} % lies on patches"
    return [" · ".join(title), query, note]


def _legend(values: QueryValues) -> str:
    legend = "□ query · ○ strongest patch of a frame"
    return legend + " (dashed: weak)" * any(match.weak for match in values.matches)
