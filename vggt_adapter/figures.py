"""Figures of one query token, drawn from `vggt_adapter.values`.

Positions are worked out in inches, so that pictures keep their shape and no label is clipped.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from vggt_adapter.inputs import FloatArray, Head, Images, Query, Weights
from vggt_adapter.values import Match, QueryValues, query_values
from vistvis.errors import InputError
from vistvis.views.figures import NotebookFigure, outline_box
from vistvis.views.painting import colourise, normalizer, resize

DPI = 150

# Inches.
_HEAD = 1.05
_SIDE = 0.3
_PANEL_TITLE = 0.3
_UNDER = 0.28
_GAP = 0.12
_GROUP_GAP = 0.2
_BAR = 0.16
_BAR_SPACE = 1.15
_HIGHEST_BAR = 5.0
_WIDEST, _HIGHEST = 4.4, 3.6
_MIN_WIDTH = 7.4

_LUMA = (0.299, 0.587, 0.114)
_BACKDROP = 0.22
_HAIRLINE = "#c9c9cf"
_INK, _QUIET = "#1b1b1f", "#6a6a73"


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
    norm: str = "linear",
    cmap: str = "inferno",
    block_idx: int | None = None,
    save_path: str | os.PathLike[str] | None = None,
) -> NotebookFigure:
    """Draw what one query token attends to.

    Frame attention: the frame on the left with the query outlined, its heatmap on the right.
    Global attention: all frames above, their heatmaps below on one colour scale, the query
    outlined in its frame. Cross attention: the query's picture first, then those that it looks at.
    A ring marks the strongest patch of every frame.

    Parameters
    ----------
    attn_weights, images, token_idx, head_idx, patch_start_idx, attention_type, frame_idx, \
batch_idx, patch_size, renormalize, allow_special
        As in `get_attention_values`.
    norm
        "linear" from 0 to the largest weight; "log"; "percentile": linear up to the 99th, so that
        one strong sink does not turn everything else black.
    cmap
        A matplotlib colour map.
    block_idx
        For the title, where plain tensors don't say which block they come from.
    save_path
        Write the figure there too; the ending chooses the format.

    Returns a figure that pyplot does not know: nothing to close, and it shows in notebooks. Errors
    as in `get_attention_values`; InputError also for an unknown `norm`, and for register blocks,
    which hold no patches.
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
    figure = draw_values(values, norm=norm, cmap=cmap, block_idx=block_idx)
    if save_path is not None:
        figure.save(save_path)
    return figure


def draw_values(
    values: QueryValues,
    *,
    norm: str = "linear",
    cmap: str = "inferno",
    block_idx: int | None = None,
    pictures: FloatArray | None = None,
) -> NotebookFigure:
    """The figure of values that are already computed; see `visualize_attention_on_image`.

    `pictures` are what is shown in place of `values.images`: the same view of every frame, with
    more pixels, `(S, k·H, k·W, 3)` in [0, 1].
    """
    if values.attention_type == "register":
        raise InputError(
            "register blocks hold no patches, so no picture shows where they look; ask for a "
            f"camera or register token's row with attention.token_rows({values.query.token})"
        )
    # The scale comes from the maps, not from the resized ones: resizing softens the peaks.
    scale = normalizer(values.maps, norm=norm)
    drawing = _Drawing(values, values.images if pictures is None else pictures, scale, cmap)
    plan = _Plan(values)
    figure = plan.figure(_title_lines(values, block_idx))
    matches = {match.place.frame_idx: match for match in values.matches}
    for number, frame in enumerate(values.pictures):
        row, column = divmod(number, plan.columns)
        panels = [plan.axes(figure, row, column)]
        drawing.picture(panels[0], frame)
        match = matches.get(frame)
        if match is not None:
            beside = 0 if plan.heat_below else 1
            panels.append(plan.axes(figure, row, column + beside, below=plan.heat_below))
            if beside:
                _panel_title(panels[1], "attention within the frame")
            drawing.heatmap(panels[1], frame)
            _note(panels[1], match, values)
        for axes in panels:
            if match is not None:
                _mark_match(axes, values, match)
            if frame == values.query.frame:
                _mark_query(axes, values)
    plan.colour_bar(figure, ScalarMappable(norm=scale, cmap=cmap), norm)
    return figure


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What the panels show, and in which colours."""

    values: QueryValues
    pictures: FloatArray
    scale: Normalize
    cmap: str

    def picture(self, axes: Axes, frame: int) -> None:
        said = frame == self.values.query.frame and self.values.attention_type != "frame"
        _panel_title(axes, f"frame {frame}" + " · query" * said, strong=said)
        self._show(axes, self.pictures[frame] * 255)

    def heatmap(self, axes: Axes, frame: int) -> None:
        self._show(axes, self._heat(frame))

    def _heat(self, frame: int) -> FloatArray:
        """Weights in colour; where they are dark the picture shines through, faint and grey."""
        picture = self.pictures[frame]
        # One frame at a time: all of them at full size are not needed at once.
        weights = resize(self.values.maps[self.values.frames.index(frame)], picture.shape[:2])
        heat = colourise(weights, cmap=self.cmap, normalizer=self.scale).astype(np.float32)
        grey = picture @ np.array(_LUMA, np.float32)
        # "Screen": bright colours, which carry the message, stay as the colour bar has them.
        screened: FloatArray = heat + (255 - heat) * (_BACKDROP * grey[..., None])
        return screened

    def _show(self, axes: Axes, levels: FloatArray) -> None:
        height, width = self.values.layout.image_size
        axes.imshow(
            # As bytes: matplotlib keeps what it is given and turns floats into more floats.
            np.rint(levels).astype(np.uint8),
            interpolation="antialiased",
            # Places count in the model's pixels, however many the picture shown has.
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )


# -- where things go -----------------------------------------------------------------------------


class _Plan:
    """Sizes in inches: frame attention shows one frame, others all, with heatmaps below."""

    def __init__(self, values: QueryValues) -> None:
        height, width = values.layout.image_size
        frames, aspect = len(values.pictures), height / width
        self.heat_below = values.attention_type != "frame"
        self.columns, self.rows = 2, 1
        if self.heat_below:
            self.columns = frames if frames <= 4 else math.ceil(math.sqrt(1.5 * frames))
            self.rows = math.ceil(frames / self.columns)
        panel = min(_WIDEST, 12.4 / self.columns, _HIGHEST / aspect)
        self.cell = (panel, panel * aspect)
        panels = 2 if self.heat_below else 1
        # A group is a title, a picture, perhaps a heatmap below, a note.
        self.group = _PANEL_TITLE + panels * self.cell[1] + (panels - 1) * _GAP + _UNDER
        self.body = (
            self.columns * panel + (self.columns - 1) * _GAP,
            self.rows * self.group + (self.rows - 1) * _GROUP_GAP,
        )
        needed = self.body[0] + 2 * _SIDE + _BAR_SPACE
        self.size = (max(_MIN_WIDTH, needed), _HEAD + self.body[1] + _SIDE / 2)
        # In the middle of a figure that the title made wide.
        self.left = max(_SIDE, (self.size[0] - self.body[0] - _BAR_SPACE) / 2)

    def figure(self, lines: list[str]) -> NotebookFigure:
        figure = NotebookFigure(figsize=self.size, dpi=DPI, facecolor="white")
        width, height = self.size
        styles = ((0, 14, "bold", _INK), (0.27, 10, "normal", _INK), (0.49, 10, "normal", _QUIET))
        for line, (down, size, weight, colour) in zip(lines, styles, strict=True):
            place = (_SIDE / width, (height - 0.34 - down) / height)
            figure.text(*place, line, fontsize=size, fontweight=weight, color=colour, va="center")
        return figure

    def axes(self, figure: Figure, row: int, column: int, *, below: bool = False) -> Axes:
        width, height = self.cell
        x = self.left + column * (width + _GAP)
        y = _HEAD + row * (self.group + _GROUP_GAP) + _PANEL_TITLE
        if below:
            y += height + _GAP
        axes = self._add_axes(figure, x, y, width, height)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():  # a hairline: padded pictures are white at their edge
            spine.set(color=_HAIRLINE, linewidth=0.5)
        return axes

    def colour_bar(self, figure: Figure, drawn: Any, norm: str) -> None:
        """One bar for all heatmaps, beside them."""
        height, y = self.cell[1], _HEAD + _PANEL_TITLE
        x, span = self.left + self.body[0] + 0.18, self.body[1] - _PANEL_TITLE - _UNDER
        if self.heat_below and self.rows == 1:
            y, span = y + height + _GAP, height
        span = min(span, _HIGHEST_BAR)
        axes = self._add_axes(figure, x, y, _BAR, span)
        extend = "max" if norm == "percentile" else "neither"
        bar = figure.colorbar(drawn, cax=axes, extend=extend, extendfrac=_BAR / span)
        label = {"linear": "attention weight", "log": "attention weight, log scale"}
        bar.set_label(label.get(norm, "attention weight, to the 99th percentile"), fontsize=9)
        bar.outline.set_visible(False)
        axes.tick_params(labelsize=8, length=2.5, color=_QUIET, labelcolor=_INK)
        if norm != "log":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            axes.yaxis.get_offset_text().set(fontsize=8, horizontalalignment="left")

    def _add_axes(self, figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
        """Axes in a box from the top left in inches; matplotlib counts fractions from below."""
        across, down = self.size
        return figure.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))


# -- marks and words -----------------------------------------------------------------------------


def _mark_query(axes: Axes, values: QueryValues) -> None:
    """Outline the query's patch; a special token has no place, so its whole frame is outlined."""
    height, width = values.layout.image_size
    x0, y0, x1, y1 = values.query.box or (0, 0, width, height)
    # The line runs just outside the patch, which stays to be seen, but not outside the picture; of
    # its three colours one stands out on any picture.
    pad = 0.3 * values.layout.patch_size[0]
    box = (max(x0 - pad, 0), max(y0 - pad, 0), min(x1 + pad, width), min(y1 + pad, height))
    strokes = (("black", 3.8), ("white", 2.8), ("#e6007e", 1.5))
    outline_box(axes, box, strokes=strokes, zorder=5, clip_on=False, joinstyle="miter")


def _mark_match(axes: Axes, values: QueryValues, match: Match) -> None:
    if match.place == values.query:
        return  # its square says it all
    assert match.place.box is not None
    x0, y0, x1, y1 = match.place.box
    centre = ((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2)
    # Around a small patch, inside a large one: about as large in every figure.
    patch, width = max(x1 - x0, y1 - y0), values.layout.image_size[1]
    radius = max(0.35 * patch, min(1.1 * patch, 0.03 * width))
    style: dict[str, Any] = {"fill": False, "zorder": 4, "clip_on": False}
    for colour, line in (("black", 2.4), ("white", 1.1)):
        axes.add_patch(Circle(centre, radius, edgecolor=colour, linewidth=line, **style))


def _panel_title(axes: Axes, text: str, *, strong: bool = False) -> None:
    axes.set_title(
        text, fontsize=10, pad=4, color=_INK, fontweight="bold" if strong else "normal", loc="left"
    )


def _note(axes: Axes, match: Match, values: QueryValues) -> None:
    """Under a heatmap: how much of the weight lies in this frame."""
    of = "of the patch weight" if values.renormalized else "of the weight"
    share = f"{100 * match.share:.1f} % {of}"
    if values.head == "max":  # maxima over heads don't add up to a share of anything
        share = f"largest {match.weight:.3g}"
    axes.set_xlabel(share, fontsize=8.5, color=_QUIET, labelpad=3, loc="left")


def _title_lines(values: QueryValues, block_idx: int | None) -> list[str]:
    site = values.site
    block = site.block if site is not None and site.block is not None else block_idx
    title = [f"{values.attention_type.capitalize()} attention"]
    if block is not None:
        title.append(f"block {block}")
    title.append(values.head_text)
    if site is not None and site.rope is False:
        title.append("taken before RoPE")
    if values.merged:
        title.append("merged tokens")
    place = values.query
    where = f"row {place.row}, col {place.col}" if place.is_patch else f"a {place.kind} token"
    inside = "of no frame" if place.frame is None else f"of frame {place.frame}"
    query = f"query: token {place.token_in_frame} {inside} (absolute {place.token}), {where}"
    scale = "weights over patches only" if values.renormalized else "softmax over all tokens"
    note = f"{scale}; {100 * values.patch_mass:.1f} % lies on patches" * (values.head != "max")
    return [" · ".join(title), query, f"{note or scale}   □ query   ○ strongest patch of a frame"]
