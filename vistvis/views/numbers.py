"""Tables of numbers about attention as figures: heads, frames, depth, likeness. Draws only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from vistvis.errors import InputError
from vistvis.names import few, suggestion
from vistvis.views.figures import (
    HAIRLINE,
    INK,
    QUIET,
    NotebookFigure,
    inches_of,
    text_height,
    text_width,
    wrap,
)
from vistvis.views.painting import CMAP, normalizer
from vistvis.views.panels import Panel, draw_panels
from vistvis.views.plot import Heads, chosen_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from vistvis.analysis.likeness import Similarity
    from vistvis.analysis.summary import Summary
    from vistvis.analysis.table import Table

    Matrix = NDArray[np.float64]

# Of what changed: blue is less, red is more.
_CHANGE = "RdBu_r"
# Colours of kinds that colour-blind people can tell apart (Okabe & Ito), and lines besides.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1b1b1f")
_PARTS = ("special", "patch")
_ONE = {"patch": "a patch", "special": "a special token"}
_ALL = {"patch": "all patches", "special": "all special tokens", "all": "all tokens"}
# Inches: a panel of curves, around it, and how many stand in a line.
_CURVES, _AROUND, _IN_LINE = (2.7, 1.9), (0.62, 0.62), 3


def site_head_map(
    table: Table,
    column: str = "entropy",
    *,
    norm: str = "linear",
    cmap: str | Colormap | None = None,
    width: str | float | None = None,
    title: str | None = None,
) -> NotebookFigure:
    """Draw one column of a table as sites × heads, each kind of site in a panel of its own.

    Parameters
    ----------
    table
        What `summarize` gave, or two of them compared; mean over the batch is drawn.
    column
        Its name. "entropy_change" and others of two tables compared are drawn around zero.
    norm
        "linear" from 0, "log" or "percentile", as in `painting.normalizer`; one scale for all.
    cmap
        Default: the house's, and blue to red around zero.
    width
        "column" (3.35 in), "double" (6.9 in) or inches. Default: what it needs.
    title
        Default: what the column is called.

    A cell without a number is grey. InputError for a column that is not there, has no numbers, or
    an option that there is not.
    """
    kinds = _by_kind(table, column)
    values = np.concatenate([matrix.ravel() for _, matrix in kinds.values()])
    if column.endswith("_change"):
        most = float(np.nanmax(np.abs(values))) or 1.0
        scale, colours = Normalize(-most, most), cmap or _CHANGE
    else:
        scale, colours = _scale(values, norm), cmap or CMAP
    panels = [
        Panel(matrix, kind, names, [str(head) for head in range(matrix.shape[1])])
        for kind, (names, matrix) in kinds.items()
    ]
    rows = max(len(names) for names, _ in kinds.values())
    cols = sum(matrix.shape[1] for _, matrix in kinds.values())
    items = len(np.unique(table["batch"]))
    said = ["mean over the batch"] if items > 1 else []
    said += ["grey: no number"] if np.isnan(values).any() else []
    unit = table.units.get(column, "")
    return draw_panels(
        panels,
        normalizer=scale,
        cmap=colours,
        cell=(min(max(5.5 / cols, 0.17), 0.42), min(max(5.5 / rows, 0.125), 0.26)),
        title=title or _words(column),
        note=" · ".join([f"{unit}, of every site and head".removeprefix(", "), *said]),
        unit=unit,
        across="head",
        width=width,
    )


def frame_matrices(
    summary: Summary,
    *,
    site: str,
    heads: Heads = None,
    batch: SupportsIndex = 0,
    query_part: str = "patch",
    key_part: str = "patch",
    norm: str = "linear",
    cmap: str | Colormap = CMAP,
    width: str | float | None = None,
    title: str | None = None,
) -> NotebookFigure:
    """Draw the mean mass from frame to frame, a matrix a head: queries down, keys across.

    Parameters
    ----------
    summary
        What `summarize` gave; its `frames` are drawn.
    site, batch
        Which of them.
    heads
        A number, "mean", a list of them, or "all": every head and their mean, the default.
    query_part, key_part
        Sort of token on either side: "patch" or "special"; keys may be "all".
    norm, cmap, width, title
        As in `site_head_map`.

    Grey: frames that have no such queries. InputError for a site that has no masses of frames, for
    parts and options that there are not; IndexOutOfRange for a head.
    """
    if query_part not in _PARTS or key_part not in (*_PARTS, "all"):
        raise InputError(
            'query_part is "patch" or "special", key_part also "all"; got '
            f"{query_part!r} and {key_part!r}"
        )
    lines = summary.frames.where(site=site, batch=batch, query_part=query_part)
    if not len(lines):
        names = list(dict.fromkeys(summary.frames["site"].tolist()))
        hint = suggestion(site, names, otherwise=f"there are {few(names)}")
        raise InputError(f"no masses of frames for site {site!r}, batch {batch}: {hint}")
    shape = [int(lines[name].max()) + 1 for name in ("head", "query_frame", "key_frame")]
    masses = np.zeros(shape)
    for part in _PARTS if key_part == "all" else (key_part,):
        of = lines.where(key_part=part)
        masses[of["head"], of["query_frame"], of["key_frame"]] += of["mass"]
    chosen = chosen_heads(heads, len(masses))
    shown = {
        "mean over heads" if head == "mean" else f"head {head}": (
            masses.mean(0) if head == "mean" else masses[int(head)]
        )
        for head in chosen
    }
    values = np.stack(list(shown.values()))
    frames = [[str(n) for n in range(size)] for size in shape[1:]]
    side = min(max(1.35 / max(shape[1:]), 0.04), 0.36)
    # One matrix alone may be larger.
    side = side if len(shown) > 1 else min(2 * side, 0.42)
    return draw_panels(
        [Panel(matrix, head, *frames) for head, matrix in shown.items()],
        normalizer=_scale(values, norm),
        cmap=cmap,
        cell=(side, side),
        title=title or f"{site}: mass from frame to frame",
        note=f"what {_ONE[query_part]} of a frame gives to {_ALL[key_part]} of a frame"
        + " · grey: no such tokens" * bool(np.isnan(values).any()),
        unit="share of a row",
        down="frame of the query",
        across="frame of the key",
        width=width,
    )


def over_depth(
    table: Table,
    columns: str | Sequence[str] = ("entropy", "distance", "sink_mass"),
    *,
    width: str | float | None = None,
    title: str = "over depth",
) -> NotebookFigure:
    """Draw columns of a table over the blocks: the mean over heads, and a band from least to most.

    A panel for each of the columns, in it a curve for each kind of site. Heads are those of all
    batch items, of which the mean is taken first. `width` as in `site_head_map`. InputError for
    columns that are not there or have no numbers.
    """
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names:
        raise InputError("no column to draw over depth: name one, such as 'entropy'")
    curves = {name: _by_kind(table, name) for name in names}
    blocks, along = _depths(table)
    kinds = list(blocks)
    ends = min(map(min, blocks.values())), max(map(max, blocks.values()))
    large, small = (11.0, 8.5) if width is None else (9.0, 7.0)
    given = None if width is None else inches_of(width)
    in_line = min(len(names), _IN_LINE)
    if given is not None:
        in_line = max(1, min(in_line, int((given - 0.2) / 1.9)))
    panel = _CURVES[0] if given is None else (given - 0.25) / in_line - _AROUND[0]
    high = _CURVES[1] * min(1.0, panel / _CURVES[0] + 0.1)
    given = given or in_line * (panel + _AROUND[0]) + 0.25
    heading = wrap(title, given - 0.24, large, weight="bold")
    note = wrap("line: mean over heads · band: least to most of a head", given - 0.24, small)
    said_top = 0.12 + text_height(heading, large)
    top = said_top + text_height(note, small) + 0.42
    lines = math.ceil(len(names) / in_line)
    figure = NotebookFigure(figsize=(given, top + lines * (high + _AROUND[1])), dpi=150)
    figure.write(0.12, 0.12, heading, size=large, color=INK, fontweight="bold")
    figure.write(0.12, said_top, note, size=small, color=QUIET)
    x = 0.12
    for kind, colour in zip(kinds, _cycled(len(kinds)), strict=True):
        if len(kinds) == 1 and not kind:
            break
        down = figure.get_size_inches()[1]
        style: dict[str, Any] = {"fontsize": small, "color": colour, "fontweight": "bold"}
        figure.text(x / given, 1 - (top - 0.24) / down, f"— {kind}", parse_math=False, **style)
        x += text_width(f"— {kind}", small, weight="bold") + 0.15
    for number, name in enumerate(names):
        line, column = divmod(number, in_line)
        box = _AROUND[0] + column * (panel + _AROUND[0]), top + line * (high + _AROUND[1])
        axes = figure.add_box(*box, panel, high)
        for kind, colour in zip(kinds, _cycled(len(kinds)), strict=True):
            if kind in curves[name]:
                _curve(axes, blocks[kind], curves[name][kind][1], colour)
        unit = table.units.get(name, "")
        axes.set_title(_words(name), fontsize=small, loc="left", pad=3, color=INK)
        axes.set_ylabel(unit, fontsize=small, labelpad=2, color=QUIET)
        axes.set_xlabel(along, fontsize=small, labelpad=1.5, color=QUIET)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.set_xlim(ends[0] - 0.4, ends[1] + 0.4)
        if axes.dataLim.y0 >= 0:
            axes.set_ylim(0, 1.06 * axes.dataLim.y1 or 1.0)
        axes.tick_params(labelsize=small - 1, length=2.5, width=0.5, color=QUIET, labelcolor=INK)
        axes.grid(color=HAIRLINE, linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=QUIET, linewidth=0.5)
    return figure


def similarity_map(
    result: Similarity,
    *,
    ordered: bool = True,
    cmap: str | Colormap = CMAP,
    width: str | float | None = None,
    title: str | None = None,
) -> NotebookFigure:
    """Draw how alike heads, sites or queries attend: what `analysis.similarity` gave.

    `ordered` puts alike ones beside each other, in the order of the result. `cmap` and `width` as
    in `site_head_map`.
    """
    matrix = result.matrix.double().cpu().numpy()
    order = result.order.cpu().numpy() if ordered else np.arange(len(matrix))
    values = matrix[np.ix_(order, order)]
    names = [result.labels[number] for number in order]
    side = min(max(5.2 / len(names), 0.01), 0.34)
    numbers = [str(number) for number in order] if result.of != "queries" else names
    unit = "cosine" if result.measure == "cosine" else "Jensen–Shannon divergence, bits"
    return draw_panels(
        [Panel(values, "", names, numbers)],
        normalizer=Normalize(min(0.0, float(np.nanmin(values))), 1.0),
        cmap=cmap,
        cell=(side, side),
        title=title or f"how alike {result.of} attend",
        note=f"rows of {len(result.queries)} queries" + ", alike ones side by side" * ordered,
        unit=unit,
        across="" if result.of == "queries" else "number in the result",
        width=width,
    )


def _scale(values: Matrix, norm: str) -> Normalize:
    """As `painting.normalizer`; a log scale has two decades at least, so that its bar has words."""
    scale = normalizer(values, norm=norm)
    if norm == "log" and scale.vmin is not None and scale.vmax is not None:
        scale.vmin = min(scale.vmin, scale.vmax / 100)
    return scale


def _words(column: str) -> str:
    """What a column is called: "sink mass", "change of the sink mass"."""
    name = column.replace("_", " ")
    return f"change of {name.removesuffix(' change')}" if column.endswith("_change") else name


def _by_kind(table: Table, column: str) -> Mapping[str, tuple[list[str], Matrix]]:
    """By kind its sites and `(sites, heads)`, mean over the batch; NaN where there is no number."""
    numbers = table[column]
    if numbers.dtype.kind not in "biuf" or column in ("batch", "head", "block"):
        raise InputError(f"column {column!r} is no number of a head; {few(list(table.units))} are")
    if not np.isfinite(numbers.astype(float)).any():
        raise InputError(
            f"no site has a number in {column!r}: where tokens lie is not known (layout=), or it "
            "was not asked for (of=)"
        )
    out: dict[str, tuple[list[str], Matrix]] = {}
    for kind in dict.fromkeys(table["kind"].tolist()):
        part = table.where(kind=kind)
        names = list(dict.fromkeys(part["site"].tolist()))
        values = part[column].astype(float)
        at = np.array([names.index(name) for name in part["site"].tolist()]), part["head"]
        known = np.isfinite(values)
        sums, counts = np.zeros((2, len(names), int(part["head"].max()) + 1))
        np.add.at(sums, at, np.where(known, values, 0.0))
        np.add.at(counts, at, known)
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        out[kind] = names, mean
    return out


def _depths(table: Table) -> tuple[Mapping[str, list[int]], str]:
    """By kind the number of each site's block, and what to call it.

    Where the sites of a kind have no numbers of their own, it is their order.
    """
    out, along = {}, "block"
    for kind in dict.fromkeys(table["kind"].tolist()):
        part = table.where(kind=kind)
        of = dict(zip(part["site"].tolist(), part["block"].tolist(), strict=True))
        numbers = [int(block) for block in of.values()]
        if min(numbers) < 0 or len(set(numbers)) < len(numbers):
            numbers, along = [*range(len(numbers))], "block, or order of sites"
        out[kind] = numbers
    return out, along


def _curve(axes: Axes, blocks: Sequence[int], values: Matrix, colour: str) -> None:
    """Mean over heads `(sites, heads)`, and the band between the least and the most."""
    order = np.argsort(blocks, kind="stable")
    x, known = np.array(blocks)[order], np.ma.masked_invalid(values[order])
    parts = known.mean(1), known.min(1), known.max(1)
    mean, low, high = (np.ma.filled(part, np.nan) for part in parts)
    axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=1.4, marker="o", markersize=2.6)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]
