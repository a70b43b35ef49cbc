"""What one query sees at each of many sites, as maps over the pictures. Computes; draws nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import torch

from vistvis.attention import Attention, SiteInfo
from vistvis.errors import CaptureError, IndexOutOfRange, InputError, LayoutError
from vistvis.images import image_tensor, to_rgb
from vistvis.names import few
from vistvis.queries import parse_query
from vistvis.tokens import TokenLayout, TokenPlace
from vistvis.views.painting import as_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

Query: TypeAlias = "SupportsIndex | str | None"

# Pictures and layouts may differ in shape by rounding to patches.
_ASPECT_TOLERANCE = 0.03


@dataclass(frozen=True)
class Scene:
    """What is asked of every site: a token, of a batch, under a layout of all frames."""

    layout: TokenLayout
    place: TokenPlace
    batch: int = 0

    @property
    def query(self) -> str:
        """The query in words."""
        place, number = self.place, f"(token {self.place.token})"
        told = self.layout.frames > 1 and place.frame is not None
        frame = f" of frame {place.frame}" if told else ""
        what = f"patch r{place.row},c{place.col}" if place.is_patch else f"{place.kind} token"
        return f"{what}{frame} {number}"


@dataclass(frozen=True)
class SiteMaps:
    """One query's weights over the patches of each frame, `(h, rows, cols)`."""

    name: str
    frames: Mapping[int, NDArray[np.float32]]

    def of(self, head: int | str) -> dict[int, NDArray[np.float32]]:
        """The maps `(rows, cols)` of a head, or of their mean; none where there is no such head."""
        if head == "mean":
            return {
                frame: maps.mean(0, dtype=np.float64).astype(np.float32)
                for frame, maps in self.frames.items()
            }
        return {f: maps[int(head)] for f, maps in self.frames.items() if int(head) < len(maps)}

    @property
    def num_heads(self) -> int:
        return len(next(iter(self.frames.values())))


def scene_of(layout: TokenLayout, query: Query, *, batch: int = 0) -> Scene:
    """The scene of a query under a layout of all frames; InputError if there is no such token."""
    if query is None:
        query = "middle"
    try:
        if isinstance(query, str):
            place = layout.locate(parse_query(query).index(layout))
        else:
            place = layout.locate(operator.index(query))
    except TypeError as error:
        raise InputError(f"a query is a token index or a text, got {query!r}") from error
    except LayoutError as error:
        raise IndexOutOfRange(str(error)) from error
    if batch < 0:
        raise InputError(f"batch counts from 0, got {batch}")
    return Scene(layout, place, batch)


def site_maps(name: str, attention: Attention, scene: Scene) -> SiteMaps:
    """The maps of the scene's query at a site; an error that says why where there are none.

    Cost: one row of every head.
    """
    site, count = attention.site, scene.layout.frames
    if site is None or site.query_layout is None or site.key_layout is None:
        raise LayoutError("has no token layout; capture(model, layout=…) says it")
    token = _token(site, scene)
    frame = scene.place.frame
    item = scene.batch
    if site.frames_in_batch:
        if frame is None:
            raise LayoutError("sees single frames, and the query is of none")
        item = site.batch_item(scene.batch, frame, frames=count)
    rows = attention.token_rows([token], batch=item)[:, 0]
    if not bool(torch.isfinite(rows).all()):
        raise LayoutError("has NaN or infinite weights")
    maps = as_array(site.key_layout.maps(rows))
    if site.key_layout.frames == count:
        shown: Iterable[int] = range(count)
    elif site.frames_in_batch and frame is not None:
        shown = [frame]
    else:
        raise LayoutError(f"has keys of {site.key_layout.frames} of {count} frames, not said which")
    if not maps.any():
        raise LayoutError("gives this query's weight to no patch")
    seen = _seen(site, item)
    return SiteMaps(name, {f: maps[:, n] for n, f in enumerate(shown) if seen is None or f in seen})


def _token(site: SiteInfo, scene: Scene) -> int:
    """The query in a site's own layout."""
    layout, place, whole = site.query_layout, scene.place, scene.layout
    assert layout is not None
    if layout == whole:
        return place.token
    frame = place.frame
    if frame is None:
        raise LayoutError("has another layout than the query, which lies in no frame")
    if layout.frames == 1 and (site.frames_in_batch or whole.frames == 1):
        frame = 0
    elif site.first_frame or layout.frames == whole.frames:
        frame -= site.first_frame
        if not 0 <= frame < layout.frames:
            first = site.first_frame
            raise LayoutError(f"has the queries of frame {first} to {first + layout.frames - 1}")
    else:
        raise LayoutError(
            f"has queries of {layout.frames} of {whole.frames} frames, not said which"
        )
    if not place.is_patch:
        before = whole.frame_layout()
        kinds = [before.locate(token).kind for token in range(place.token_in_frame)]
        return layout.index(frame=frame, kind=place.kind, nth=kinds.count(place.kind))
    if layout.grid != whole.grid:
        raise LayoutError(f"has another grid, {layout.grid}, than the query's, {whole.grid}")
    return layout.index(frame=frame, patch=place.patch)


def _seen(site: SiteInfo, item: int) -> set[int] | None:
    """The frames that have a patch among the keys; None: all."""
    order, layout = site.key_order, site.key_layout
    if order is None or layout is None:
        return None
    tokens = order.tokens if order.tokens.ndim == 1 else order.tokens[item]
    places = (layout.locate(token) for token in tokens.tolist() if token >= 0)
    return {place.frame for place in places if place.is_patch and place.frame is not None}


def last_of(attention: Any) -> Attention:
    """A site's attention; of several passes (`accumulate=True`) the last one's."""
    one: Attention = attention[-1] if isinstance(attention, list) else attention
    return one


def layout_of(source: Mapping[str, Attention], names: Sequence[str], images: Any) -> TokenLayout:
    """The layout of all frames: the run's, or that of the sites with most tokens."""
    layout: TokenLayout | None = getattr(source, "layout", None)
    folded = False
    if layout is None:
        infos = [site for name in names if (site := _site_of(source, name)) is not None]
        layouts = [one for i in infos for one in (i.key_layout, i.query_layout) if one is not None]
        if not layouts:
            raise LayoutError(
                f"none of {few(names)} says where its tokens lie; capture(model, layout="
                "TokenLayout(frames, (rows, cols), special=(…), patch_size=…)) says it"
            )
        layout = max(layouts, key=lambda one: one.num_tokens)
        folded = any(info.frames_in_batch for info in infos)
    if layout.frames == 1 and folded and images is not None:
        # Sites of single frames alone: only the pictures say how many there are.
        tensor = image_tensor(images)
        layout = replace(layout, frames=tensor.shape[-4])
    return layout


def _site_of(source: Mapping[str, Attention], name: str) -> SiteInfo | None:
    try:
        return last_of(source[name]).site
    except CaptureError:
        return None  # told when it is to be drawn


def pictures_of(images: Any, scene: Scene) -> dict[int, NDArray[np.float32]]:
    """The pictures `(H, W, 3)` in [0, 1] of a scene by frame; InputError where they do not fit."""
    tensor, frames = image_tensor(images), scene.layout.frames
    if tensor.ndim == 4:  # frames of one scene; or, for a model of single pictures, a batch
        tensor = tensor[None] if tensor.shape[0] == frames else tensor[:, None]
    if tensor.shape[1] != frames:
        raise InputError(
            f"the sites saw {frames} frames, images have {tensor.shape[1]} of {tuple(tensor.shape)}"
            "; pass the images that the model got"
        )
    if scene.batch >= len(tensor):
        raise IndexOutOfRange(f"batch {scene.batch} is outside 0…{len(tensor) - 1} of the images")
    pictures = to_rgb(tensor[scene.batch]).astype(np.float32) / 255
    (height, width), (down, across) = pictures.shape[1:3], scene.layout.image_size
    if abs(math.log(width * down / (height * across))) > _ASPECT_TOLERANCE:
        raise InputError(
            f"the sites saw pictures of {across}×{down}, the images are {width}×{height}, of "
            "another shape; pass the images that the model got"
        )
    return dict(enumerate(pictures))
