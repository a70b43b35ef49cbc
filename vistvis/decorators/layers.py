"""The layers that overlays are made of: stored files or sites of a run, their pictures and layout.

Nothing is drawn here. `Layers` says which rows and keys of a layer a query and its key frames mean,
or why they mean none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

from vistvis.attention import Attention, SiteInfo
from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.decorators.requests import FrameQuery, OverlayRequest, checked_index
from vistvis.errors import InputError, LayoutError, StoreError
from vistvis.files import PathLike
from vistvis.images import image_tensor, to_rgb
from vistvis.names import matches
from vistvis.store.formats import read, read_attention
from vistvis.tokens import TokenLayout
from vistvis.views.overlay_folder import Layer, layer_label

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Which numbers of one layer are drawn: batch item, query tokens, keys of each key frame.

    Tokens as they came into the model: `Attention.token_rows` takes and gives them so.
    """

    batch: int
    tokens: tuple[int, ...]
    keys: tuple[slice, ...]
    grid: tuple[int, int]


class Layers(ABC):
    """Layers with their pictures and the layout of their tokens, wherever they are stored.

    `names` are in stored order, and `attention` gives what one of them has, lazily; `images` are
    uint8 `(S, H, W, 3)`, of the batch entry asked for.
    """

    def __init__(
        self,
        names: Sequence[Layer],
        attention: Callable[[Any], Attention],
        images: Tensor,
        layout: TokenLayout,
        batch_idx: SupportsIndex,
    ) -> None:
        self.names, self.attention, self.layout = names, attention, layout
        self.batch = checked_index(batch_idx, images.shape[0], "batch_idx")
        self.images = to_rgb(images[self.batch])

    @abstractmethod
    def sides(self, layer: Layer, attention: Attention) -> tuple[TokenLayout, TokenLayout]:
        """The layouts of its queries and of its keys: all frames or one of them, or an error."""

    def chosen(self, layers: Sequence[Layer] | str | None) -> list[Layer]:
        """The layers that are asked for by number, name or glob, in stored order."""
        if layers is None:
            return list(self.names)
        patterns = [layers] if isinstance(layers, (str, SupportsIndex)) else list(layers)
        for pattern in patterns:
            if not any(_fits(layer, pattern) for layer in self.names):
                have = ", ".join(str(layer) for layer in self.names)
                raise InputError(f"no layer {pattern!r}; there are {have}")
        return [layer for layer in self.names if any(_fits(layer, p) for p in patterns)]

    def selection(self, layer: Layer, attention: Attention, query: FrameQuery) -> Selection:
        """What of a layer shows the query.

        Raises
        ------
        InputError, IndexOutOfRange, LayoutError
            If the layer has no such weights; the message says why.
        """
        name, site, batch = layer_label(layer), attention.site, self.batch
        if site is not None and (site.kind == "window" or site.window is not None):
            raise InputError(
                f"{name} attends within windows: a row covers a part of the picture only; put one "
                "together with vistvis.attention.windows.stitch, or leave it out with layers="
            )
        query_side, key_side = self.sides(layer, attention)
        if site is not None and site.frames_in_batch and self.layout.frames > 1:
            if set(query.key_frames) != {query.frame}:
                raise InputError(
                    f"{name} attends within one frame: its keys are those of query_frame_idx "
                    f"{query.frame}, not of key_frame_idx {list(query.key_frames)}; ask for that "
                    "frame, or for other sites with layers="
                )
            batch = site.batch_item(batch, query.frame, frames=self.layout.frames)
        if key_side.frames == 1 and len(query.key_frames) != 1:
            raise InputError(f"{name} has the keys of one frame: give one key_frame_idx")
        frame = self._query_frame(name, query.frame, site, query_side)
        key_frames = query.key_frames if key_side.frames > 1 else (0,)
        starts = [key_side.index(frame=k, patch=0) for k in key_frames]
        return Selection(
            checked_index(batch, attention.shape[0], f"batch_idx, in {name},"),
            tuple(query_side.index(frame=frame, token=token) for token in query.tokens),
            tuple(slice(start, start + key_side.num_patches) for start in starts),
            key_side.grid,
        )

    @staticmethod
    def _query_frame(name: str, frame: int, site: SiteInfo | None, query_side: TokenLayout) -> int:
        """The number of a frame on the query side."""
        first = site.first_frame if site is not None else 0
        if first:
            # Keys of earlier frames come from a cache; queries are those of this pass alone.
            if not first <= frame < first + query_side.frames:
                raise InputError(
                    f"{name} has the queries of frame {first} to {first + query_side.frames - 1} "
                    f"(keys of others come from a cache), not of query_frame_idx {frame}"
                )
            return frame - first
        # On a side of one frame that frame is the first, whichever it is of the pictures.
        return frame if query_side.frames > 1 else 0


class StoredLayers(Layers):
    """Layers as single files, and the file of their pictures."""

    def __init__(
        self, files: Mapping[Layer, PathLike], input_path: PathLike, request: OverlayRequest
    ) -> None:
        self._cross = request.is_cross_attention
        self._metadata = request.metadata or StaticMetadata.from_environment()
        images = read(input_path).one()
        if images.ndim != 5:
            raise InputError(
                f"pictures are stored as (B, S, C, H, W), {input_path} has {tuple(images.shape)}; "
                "a single picture is images[None, None]"
            )
        _, frames, _, height, width = images.shape
        layout = self._metadata.layout(frames, (height, width))
        super().__init__(
            list(files), lambda n: read_attention(files[n]), images, layout, request.batch_idx
        )

    def sides(self, layer: Layer, attention: Attention) -> tuple[TokenLayout, TokenLayout]:
        one = self.layout.frame_layout()
        side = one if self._cross else self.layout
        queries, keys = attention.shape[2:]
        if not queries == keys == side.num_tokens:
            hint = ""
            if queries == keys == one.num_tokens:
                hint = "; keys and queries of one frame each are is_cross_attention=True"
            raise LayoutError(
                f"{layer_label(layer)} has {queries} queries and {keys} keys, but {side} make "
                f"{side.num_tokens} tokens (patch size {self._metadata.patch_size}); check patch "
                f"size, special tokens and pictures{hint}"
            )
        return side, side


class RunLayers(Layers):
    """Sites of a run, or of anything that maps names to `Attention` and has pictures."""

    def __init__(
        self, run: Mapping[str, Attention], request: OverlayRequest, images: Any = None
    ) -> None:
        images = getattr(run, "images", None) if images is None else image_tensor(images)
        if images is None:
            raise InputError(
                "overlays need the pictures: pass images=, or store the run with "
                "save_run(…, images=images)"
            )
        shape = tuple(images.shape)
        layout: TokenLayout | None = getattr(run, "layout", _longest_layout(run))
        if request.metadata is not None:
            frames = shape[-4] if len(shape) == 5 or layout is None else layout.frames
            layout = request.metadata.layout(frames, shape[-2:])
        if layout is None:
            raise InputError(
                "the run does not say how tokens lie; store it with save_run(…, layout=layout), or "
                "pass metadata=StaticMetadata(patch_size=…, num_special_tokens=…)"
            )
        # What the caller says about tokens goes before what the sites say.
        self._own_layouts = request.metadata is None and not request.is_cross_attention
        if len(shape) == 4:  # frames of one scene; or, for a model of single pictures, a batch
            images = images[None] if layout.frames == shape[0] else images[:, None]
        names = list(run)
        super().__init__(names, run.__getitem__, images, layout, request.batch_idx)
        if len(self.images) != layout.frames:
            raise LayoutError(
                f"the layout says {layout}, but there are pictures of shape {shape}; store what "
                "the model saw"
            )

    def sides(self, layer: Layer, attention: Attention) -> tuple[TokenLayout, TokenLayout]:
        site, counts = attention.site, list(attention.shape[2:])
        # Through an order, rows are over the tokens of its layout, however many were captured.
        if site is not None:
            if site.query_order is not None and site.query_layout is not None:
                counts[0] = site.query_layout.num_tokens
            if site.key_order is not None and site.key_layout is not None:
                counts[1] = site.key_layout.num_tokens
        query_side, key_side = self.layout.sides(*counts)
        if self._own_layouts and site is not None:
            query_side = site.query_layout or query_side
            key_side = site.key_layout or key_side
        sides = []
        pairs = (("queries", query_side), ("keys", key_side))
        for (what, side), count in zip(pairs, counts, strict=True):
            if side is None or side.num_tokens != count:
                raise LayoutError(
                    f"{layer} has {count} {what}, but the layout says {self.layout}: "
                    f"{self.layout.tokens_per_frame} tokens each, {self.layout.num_tokens} in all; "
                    "leave it out with layers="
                )
            sides.append(side)
        return sides[0], sides[1]


def _longest_layout(run: Mapping[str, Attention]) -> TokenLayout | None:
    """The key layout of most tokens, of what says no layout for all its sites."""
    if hasattr(run, "layout"):
        return None
    sites = [attention.site for attention in run.values()]
    layouts = [site.key_layout for site in sites if site is not None and site.key_layout]
    return max(layouts, key=lambda layout: layout.num_tokens, default=None)


def open_layers(
    paths: AttentionPath | Mapping[str, Attention], request: OverlayRequest, images: Any = None
) -> Layers:
    """Stored layers or the sites of a run, as overlays take them."""
    if isinstance(paths, AttentionPath):
        if images is not None:
            raise InputError(
                f"the pictures of stored layers lie in {paths.input_root}; leave out images="
            )
        files: dict[Layer, PathLike] = {
            layer: paths.attn_layer_file(layer) for layer in paths.list_layers()
        }
        if not files:
            raise StoreError(
                f"no layers under {paths.attn_root}: there should be folders layer_0, layer_1, …"
            )
        return StoredLayers(files, paths.input_layer_file(0), request)
    if not isinstance(paths, Mapping):
        raise InputError(
            "attention comes from an AttentionPath or a run; for a run's folder pass "
            f"open_run(folder), got {type(paths).__name__}"
        )
    if not paths:
        raise InputError("the run has no finished site to draw")
    return RunLayers(paths, request, images)


def _fits(layer: Layer, pattern: Layer) -> bool:
    if isinstance(layer, str) and isinstance(pattern, str):
        return matches(pattern, layer)
    return layer == pattern
