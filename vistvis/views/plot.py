"""`plot`: one query's attention in one picture, for one site over its heads, or for many sites."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np

from vistvis.attention import Attention
from vistvis.attention.site import chosen_names
from vistvis.errors import CaptureError, IndexOutOfRange, InputError, LayoutError, VistvisWarning
from vistvis.progress import progress as bar
from vistvis.views.board import Board, draw_board
from vistvis.views.maps import (
    Query,
    Scene,
    SiteMaps,
    last_of,
    layout_of,
    pictures_of,
    scene_of,
    site_maps,
)
from vistvis.views.painting import ALPHA, CMAP, normalizer, scale_text

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize
    from numpy.typing import NDArray

    from vistvis.views.board import Tiles
    from vistvis.views.figures import NotebookFigure

Head: TypeAlias = "int | str"
Heads: TypeAlias = "SupportsIndex | str | Sequence[SupportsIndex | str] | None"

# More frames than these are not all shown, unless they are asked for.
MOST_FRAMES = 9


@dataclass(frozen=True)
class Look:
    """How maps are drawn; the names are those of `plot`."""

    heads: Heads = None
    frames: Sequence[SupportsIndex] | None = None
    names: Sequence[str] | None = None
    norm: str = "auto"
    cmap: str | Colormap = CMAP
    alpha: float = ALPHA
    width: str | float | None = None
    title: str = ""


def plot(
    source: Attention | Mapping[str, Attention],
    query: Query = None,
    *,
    images: Any = None,
    sites: str | Sequence[str] | None = None,
    heads: Heads = None,
    frames: Sequence[SupportsIndex] | None = None,
    batch: SupportsIndex = 0,
    names: Sequence[str] | None = None,
    norm: str = "auto",
    cmap: str | Colormap = CMAP,
    alpha: float = ALPHA,
    width: str | float | None = None,
    title: str | None = None,
    progress: bool | None = None,
) -> NotebookFigure:
    """Draw where one query looks: heads × frames of one site, or sites × heads of many.

    All maps are on one colour scale. A site of all frames shows them within each cell, in reading
    order as in the strip of pictures above; one of single frames shows the query's, in the place of
    all. The query is outlined where it lies.

    Parameters
    ----------
    source
        An `Attention`, a `Capture`, a `Run`, or any mapping of names to `Attention` whose sites
        know their layouts. Sites that don't, that give no weight to patches or did not see the
        query are left out, with a `VistvisWarning` that names them.
    query
        A token counted over all frames; a text as `vistvis help queries` has it ("1:r13,c15",
        "cls", "camera@2"), its pixels those of the pictures that the model saw; or None, the middle
        of frame 0.
    images
        What the model saw, `(S, 3, H, W)` or `(B, S, 3, H, W)` in 0…1 or 0…255; by default those
        of the run. Without, maps are drawn on black.
    sites
        Names or globs, as in `capture`; default: all.
    heads
        A number, "mean", a list of them, or "all": every head and their mean, the default.
    frames
        Which frames are shown; default: all, or of more than nine the query's and those that get
        most.
    batch
        Which scene, where the model saw several.
    names
        What each frame is called; by default its number.
    norm, cmap, alpha
        The scale ("auto", "linear", "log", "percentile"; see `views.painting.normalizer`), the
        matplotlib colour map, and how far the maps hide the picture.
    width
        "column" (3.35 inches), "double" (6.9) or inches; default: as wide as it takes.
    title
        What stands before the query; by default the model of a run.
    progress
        Whether a bar is shown; default: where somebody watches a terminal and it takes long.

    Raises
    ------
    InputError, IndexOutOfRange
        If the query, a head, a frame or an option does not exist, or the pictures do not fit.
    SiteError
        If `sites` match nothing.
    LayoutError
        If no site can be drawn; the text says why.

    Cost: one row of every site and head, `h·N·d` multiply-adds each, of which the maps are kept;
    then 2 to 5 ms for each map that is drawn (24 sites of 16 heads and 4 frames: 4 s).
    """
    if isinstance(source, Attention):
        source = {source.site.name if source.site else "attention": source}
    elif not isinstance(source, Mapping):
        raise InputError(
            "plot takes an Attention or a mapping of names to them, such as a Capture or a run; "
            f"for a run's folder pass open_run(folder), got {type(source).__name__}"
        )
    if title is None:
        title = model_title(getattr(source, "model", None) or "")
    look = Look(heads, frames, names, norm, cmap, alpha, width, title)
    chosen = chosen_names(source, sites)
    images = getattr(source, "images", None) if images is None else images
    layout = layout_of(source, chosen, images)
    scene = scene_of(layout, query, batch=operator.index(batch))
    pictures = {} if images is None else pictures_of(images, scene)
    gathered = Gathered(scene)
    for name in bar(chosen, "attention", shown=progress, unit="site", delay=0.5):
        gathered.take(name, partial(_site, source, name))
    return gathered.draw(pictures, look)


def model_title(model: str) -> str:
    """What a title says of a model."""
    name, _, weights = model.partition("@")
    return f"{name}, untrained weights" if weights == "random" else name


def _site(source: Mapping[str, Attention], name: str) -> Attention:
    return last_of(source[name])


class Gathered:
    """The maps of a scene's query at one site after another, and why others have none."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._found: list[SiteMaps] = []
        self._reasons: dict[str, str] = {}

    def take(self, name: str, site: Callable[[], Attention]) -> None:
        """Compute the maps of a site; it is not kept."""
        try:
            self._found.append(site_maps(name, site(), self.scene))
        except (CaptureError, InputError, IndexOutOfRange, LayoutError) as error:
            self._reasons[name] = str(error)

    def draw(self, pictures: Mapping[int, NDArray[np.float32]], look: Look) -> NotebookFigure:
        """Draw what there is, and warn of what is left out; LayoutError where there is nothing."""
        if self._reasons:
            told = "; ".join(f"{name!r} {why}" for name, why in list(self._reasons.items())[:3])
            more = f"; and {len(self._reasons) - 3} more sites" if len(self._reasons) > 3 else ""
            if not self._found:
                raise LayoutError(f"no site can be drawn: {told}{more}")
            warnings.warn(f"left out: {told}{more}", VistvisWarning, stacklevel=3)
        return _draw_sites(self._found, self.scene, pictures, look)


def _draw_sites(
    found: Sequence[SiteMaps],
    scene: Scene,
    pictures: Mapping[int, NDArray[np.float32]],
    look: Look,
) -> NotebookFigure:
    """What `plot` draws of what was computed."""
    columns = chosen_heads(look.heads, max(one.num_heads for one in found))
    maps = [{head: one.of(head) for head in columns} for one in found]
    shown = _frames(look.frames, [tiles for row in maps for tiles in row.values()], scene)
    count, names = scene.layout.frames, look.names
    if names is not None and len(names) != count:
        raise InputError(f"{count} frames need as many names, got {len(names)}")
    one = "picture" if count == 1 else ""
    labels = {f: (one or f"frame {f}") if names is None else str(names[f]) for f in shown}
    cells = [
        {head: {f: tiles[f] for f in shown if f in tiles} for head, tiles in row.items()}
        for row in maps
    ]
    height, width = scene.layout.image_size
    box = scene.place.box
    x0, y0, x1, y1 = box or (0, 0, 0, 0)
    board = Board(
        **(_by_site if len(found) > 1 else _by_head)(found, cells, labels, bool(pictures)),
        frames=shown,
        names=labels,
        aspect=width / height,
        pictures=pictures,
        query_frame=scene.place.frame,
        box=box and (x0 / width, y0 / height, x1 / width, y1 / height),
    )
    normal, scale = _scale(board, scene, look.norm)
    parts = (
        look.title,
        found[0].name if len(found) == 1 else "",
        f"query: {scene.query}",
        f"{len(shown)} of {count} frames" if len(shown) < count else "",
    )
    return draw_board(
        board,
        normalizer=normal,
        cmap=look.cmap,
        alpha=look.alpha,
        title=", ".join(filter(None, parts)),
        scale=f"attention weight, {scale}",
        width=look.width,
    )


def _by_head(
    found: Sequence[SiteMaps],
    cells: Sequence[Mapping[Head, Tiles]],
    labels: Mapping[int, str],
    with_pictures: bool,
) -> dict[str, Any]:
    """One site: a row a head and a column a frame; of one frame, the heads in reading order."""
    rows: dict[str, Tiles] = {"picture": dict.fromkeys(labels)} if with_pictures else {}
    rows |= {_head(head): tiles for head, tiles in cells[0].items()}
    if len(found[0].frames) == 1 or len(labels) == 1:
        across = _across(len(rows))
        places = [divmod(number, across) for number in range(len(rows))]
        # The pictures of other frames than the one that the site sees are not shown.
        only = next(iter(next(iter(cells[0].values()))), None)
        tiles = [{f: t for f, t in one.items() if f == only} for one in rows.values()]
        return {
            "cells": dict(zip(places, tiles, strict=True)),
            "above": dict(zip(places, rows, strict=True)),
        }
    return {
        "cells": {
            (row, col): {frame: tiles[frame]}
            for row, tiles in enumerate(rows.values())
            for col, frame in enumerate(labels)
            if frame in tiles
        },
        "left": list(rows),
        "above": {(0, col): label for col, label in enumerate(labels.values())},
    }


def _by_site(
    found: Sequence[SiteMaps],
    cells: Sequence[Mapping[Head, Tiles]],
    labels: Mapping[int, str],
    with_pictures: bool,
) -> dict[str, Any]:
    """Many sites: a row each, and a column a head."""
    return {
        "cells": {
            (row, col): tiles
            for row, heads in enumerate(cells)
            for col, tiles in enumerate(heads.values())
            if tiles
        },
        "left": [one.name for one in found],
        "above": {(0, col): _head(head) for col, head in enumerate(cells[0])},
        "strip": with_pictures,
    }


def _across(count: int) -> int:
    """In how many columns so many pictures make a block that is wide rather than high, and full."""

    def unlike(across: int) -> float:
        down = math.ceil(count / across)
        return abs(math.log(across / down / 1.5)) + 2 * (1 - count / (down * across))

    return min(range(1, count + 1), key=unlike)


def _head(head: Head) -> str:
    return "mean" if head == "mean" else f"head {head}"


def chosen_heads(heads: Heads, count: int) -> list[Head]:
    """The heads that are meant, of `count`."""
    if heads is None or (isinstance(heads, str) and heads == "all"):
        return [*range(count), *(["mean"] if count > 1 else [])]
    chosen: list[Head] = []
    for head in [heads] if isinstance(heads, (str, SupportsIndex)) else heads:
        if isinstance(head, str):
            if head != "mean":
                raise InputError(f'a head is a number, "mean" or "all", got {head!r}')
            chosen.append(head)
            continue
        try:
            number = operator.index(head)
        except TypeError as error:
            raise InputError(f'a head is a number, "mean" or "all", got {head!r}') from error
        if not 0 <= number < count:
            raise IndexOutOfRange(f"head {number} is outside 0…{count - 1}")
        chosen.append(number)
    if not chosen:
        raise InputError('heads are numbers, "mean" or "all", got none')
    return chosen


def _frames(
    frames: Sequence[SupportsIndex] | None, maps: Sequence[Tiles], scene: Scene
) -> list[int]:
    """The frames to show: those asked for, or all, or the query's and those that get most."""
    count = scene.layout.frames
    if frames is not None:
        chosen = [operator.index(frame) for frame in frames]
        for frame in chosen:
            if not 0 <= frame < count:
                raise IndexOutOfRange(f"frame {frame} is outside 0…{count - 1}")
        if not chosen:
            raise InputError("frames are numbers, got none")
        return chosen
    if count <= MOST_FRAMES:
        return list(range(count))
    mass = np.zeros(count)
    for tiles in maps:
        for frame, heat in tiles.items():
            assert heat is not None
            mass[frame] += heat.sum(dtype=np.float64)
    if scene.place.frame is not None:
        mass[scene.place.frame] = np.inf
    return sorted(np.argsort(-mass, kind="stable")[:MOST_FRAMES].tolist())


def _scale(board: Board, scene: Scene, norm: str) -> tuple[Normalize, str]:
    """One colour scale for all maps that are shown, and what it is in words."""
    values = np.concatenate([heat.ravel() for heat in board.values()])
    row, col = scene.place.row, scene.place.col
    others = []
    for tiles in board.cells.values():
        for frame, heat in tiles.items():
            if heat is None:
                continue
            counted = np.array(heat)
            if norm == "auto" and frame == scene.place.frame and row is not None is not col:
                counted[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2] = np.nan
            others.append(counted.ravel())
    # Maps may be of several grids, so that `normalizer` can't be told where the query lies in each.
    kept = np.concatenate(others)
    scale = normalizer(kept if np.nanmax(kept, initial=0) > 0 else values, norm=norm)
    own = None if row is None or col is None else (0, row, col)
    return scale, scale_text(values, scale, norm=norm, own=own)
