"""What overlays are made from: stored layers or the sites of a run, their pictures and layout.

Nothing is drawn here. A source says which rows and keys of a layer a query and a key frame mean, or
why they mean none.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

from vistvis.attention import Attention
from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.errors import IndexOutOfRange, InputError, LayoutError, StoreError
from vistvis.images import to_rgb
from vistvis.names import matches
from vistvis.store.formats import read, read_attention
from vistvis.tokens import TokenLayout
from vistvis.views.overlay_folder import Layer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PathLike: TypeAlias = "str | os.PathLike[str]"
Queries: TypeAlias = "SupportsIndex | Sequence[SupportsIndex] | str"
Frames: TypeAlias = "SupportsIndex | Sequence[SupportsIndex] | str"


@dataclass(frozen=True)
class Place:
    """Which numbers of one layer are meant: batch entry, query rows, keys of each key frame."""

    batch: int
    rows: tuple[int, ...]
    keys: tuple[slice, ...]
    grid: tuple[int, int]


class Source:
    """Pictures, layout and layers, wherever they are stored."""

    layers: Sequence[Layer]
    images: NDArray[np.uint8]
    """`(S, H, W, 3)` of the chosen batch entry."""
    layout: TokenLayout
    """Of the query frames."""
    batch: int

    def attention(self, layer: Layer) -> Attention:
        raise NotImplementedError

    def place(self, layer: Layer, attention: Attention, asked: Asked) -> Place:
        raise NotImplementedError

    def chosen(self, layers: Sequence[Layer] | str | None) -> list[Layer]:
        """The layers that are asked for, in stored order."""
        if layers is None:
            return list(self.layers)
        wanted = [layers] if isinstance(layers, (str, SupportsIndex)) else list(layers)
        found: set[Layer] = set()
        for one in wanted:
            hits = [layer for layer in self.layers if _matches(layer, one)]
            if not hits:
                have = ", ".join(str(layer) for layer in self.layers)
                raise InputError(f"no layer {one!r}; there are {have}")
            found.update(hits)
        return [layer for layer in self.layers if layer in found]


def _matches(layer: Layer, wanted: Layer) -> bool:
    if isinstance(layer, str) and isinstance(wanted, str):
        return matches(wanted, layer)
    return layer == wanted


class FileSource(Source):
    """Layers as single files."""

    def __init__(
        self,
        layers: Sequence[Layer],
        load: Callable[[Any], Attention],
        input_path: PathLike,
        metadata: StaticMetadata | None,
        cross: bool,
        batch: SupportsIndex,
    ) -> None:
        self.layers, self._load, self._cross = layers, load, cross
        self._metadata = metadata or StaticMetadata.from_environment()
        images = read(input_path).one()
        if images.ndim != 5:
            raise InputError(
                f"pictures are stored as (B, S, C, H, W), {input_path} has {tuple(images.shape)}; "
                "a single picture is images[None, None]"
            )
        self.batch = index_of(batch, images.shape[0], "batch_idx")
        self.images = to_rgb(images[self.batch])
        frames, height, width, _ = self.images.shape
        self.layout = self._metadata.layout(frames, (height, width))

    def attention(self, layer: Layer) -> Attention:
        return self._load(layer)

    def place(self, layer: Layer, attention: Attention, asked: Asked) -> Place:
        batch, _, queries, keys = attention.shape
        layout = self.layout
        one = layout.frame_layout()
        side = one if self._cross else layout
        if queries != side.num_tokens or keys != side.num_tokens:
            hint = "" if self._cross else _cross_hint(attention, one)
            raise LayoutError(
                f"layer {layer} has {queries} queries and {keys} keys, but {side} make "
                f"{side.num_tokens} tokens (patch size {self._metadata.patch_size}); check patch "
                f"size, special tokens and pictures{hint}"
            )
        index_of(self.batch, batch, f"batch_idx, in layer {layer},")
        if self._cross and len(asked.key_frames) != 1:
            raise InputError("cross-attention has the keys of one frame: give one key_frame_idx")
        frame = 0 if self._cross else asked.query_frame
        return Place(
            self.batch,
            tuple(side.index(frame=frame, token=q) for q in asked.queries),
            tuple(_patches(side, 0 if self._cross else k) for k in asked.key_frames),
            side.grid,
        )


class RunSource(Source):
    """Sites of a run, or of anything that maps names to `Attention` and has pictures."""

    def __init__(
        self,
        run: Mapping[str, Attention],
        metadata: StaticMetadata | None,
        cross: bool,
        batch: SupportsIndex,
    ) -> None:
        self._run, self._cross = run, cross
        self.layers = list(getattr(run, "sites", None) or run)
        images = getattr(run, "images", None)
        if images is None:
            raise InputError(
                "overlays need the pictures: store the run with save_run(…, images=images)"
            )
        shape = tuple(images.shape)
        layout: TokenLayout | None = getattr(run, "layout", None)
        if metadata is not None:
            frames = shape[-4] if len(shape) == 5 or layout is None else layout.frames
            layout = metadata.layout(frames, shape[-2:])
        if layout is None:
            raise InputError(
                "the run does not say how tokens lie; store it with save_run(…, layout=layout), or "
                "pass metadata=StaticMetadata(patch_size=…, num_special_tokens=…)"
            )
        self.layout = layout
        self._own_layouts = metadata is None
        if len(shape) == 4:  # frames of one scene; or, for a model of single pictures, a batch
            images = images[None] if layout.frames == shape[0] else images[:, None]
        self.batch = index_of(batch, images.shape[0], "batch_idx")
        self.images = to_rgb(images[self.batch])
        if len(self.images) != layout.frames:
            raise LayoutError(
                f"the layout says {layout}, but there are pictures of shape {shape}; store what "
                "the model saw"
            )

    def attention(self, layer: Layer) -> Attention:
        return self._run[str(layer)]

    def place(self, layer: Layer, attention: Attention, asked: Asked) -> Place:
        site = attention.site
        batch, _, queries, keys = attention.shape
        if site is not None and (site.kind == "window" or site.window is not None):
            raise InputError(
                f"{layer} attends within windows: a row covers a part of the picture only; put one "
                "together with vistvis.windows.stitch, or leave it out with layers="
            )
        one = self.layout.frame_layout()
        known = site if self._own_layouts and not self._cross else None
        query_layout = (known.query_layout if known else None) or _fitting(queries, self.layout)
        key_layout = (known.key_layout if known else None) or _fitting(keys, self.layout)
        for count, side, what in ((queries, query_layout, "queries"), (keys, key_layout, "keys")):
            if side is None or side.num_tokens != count:
                raise LayoutError(
                    f"{layer} has {count} {what}, but the layout says {self.layout}: "
                    f"{one.tokens_per_frame} tokens each, {self.layout.num_tokens} in all; leave "
                    "it out with layers="
                )
        assert query_layout is not None
        assert key_layout is not None
        if site is not None and site.frames_in_batch and self.layout.frames > 1:
            if set(asked.key_frames) != {asked.query_frame}:
                raise InputError(
                    f"{layer} attends within one frame: its keys are those of query_frame_idx "
                    f"{asked.query_frame}, not of key_frame_idx {list(asked.key_frames)}; ask for "
                    "that frame, or for other sites with layers="
                )
            at = self.batch * self.layout.frames + asked.query_frame
        else:
            at = self.batch
        several = query_layout.frames > 1
        rows = tuple(
            query_layout.index(frame=asked.query_frame if several else 0, token=q)
            for q in asked.queries
        )
        if key_layout.frames == 1 and len(asked.key_frames) != 1:
            raise InputError(f"{layer} has the keys of one frame: give one key_frame_idx")
        frames = (k if key_layout.frames > 1 else 0 for k in asked.key_frames)
        return Place(
            index_of(at, batch, f"batch_idx, in {layer},"),
            rows,
            tuple(_patches(key_layout, k) for k in frames),
            key_layout.grid,
        )


def opened(
    paths: AttentionPath | Mapping[str, Attention],
    metadata: StaticMetadata | None,
    cross: bool,
    batch: SupportsIndex,
) -> Source:
    if isinstance(paths, AttentionPath):
        layers = paths.list_layers()
        if not layers:
            raise StoreError(
                f"no layers under {paths.attn_root}: there should be folders layer_0, layer_1, …"
            )
        return FileSource(
            layers,
            lambda layer: read_attention(paths.attn_layer_file(layer)),
            paths.input_layer_file(0),
            metadata,
            cross,
            batch,
        )
    if not isinstance(paths, Mapping):
        raise InputError(
            "attention comes from an AttentionPath or a run; for a run's folder pass "
            f"open_run(folder), got {type(paths).__name__}"
        )
    if not paths:
        raise InputError("the run has no finished site to draw")
    return RunSource(paths, metadata, cross, batch)


# -- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Queries and frames, checked against the pictures."""

    query_frame: int
    queries: tuple[int, ...]
    key_frames: tuple[int, ...]
    frame_in_name: bool

    @classmethod
    def checked(
        cls,
        source: Source,
        *,
        query_frame_idx: SupportsIndex,
        query_idx: Queries,
        key_frame_idx: Frames,
        pick: Callable[[Source, int], tuple[int, ...]],
    ) -> Asked:
        frames = len(source.images)
        query_frame = index_of(query_frame_idx, frames, "query_frame_idx")
        several = getattr(key_frame_idx, "ndim", 0) > 0 or not isinstance(
            key_frame_idx, SupportsIndex
        )
        if isinstance(key_frame_idx, str):
            if key_frame_idx != "all":
                raise InputError(
                    f'key_frame_idx is a number, a list or "all", got {key_frame_idx!r}'
                )
            key_frames = tuple(range(frames))
        else:
            key_frames = indices_of(key_frame_idx, frames, "key_frame_idx")
        if isinstance(query_idx, str):
            if query_idx != "interactive":
                raise InputError(
                    f'query_idx is a token, a list of them or "interactive", got {query_idx!r}'
                )
            queries = pick(source, query_frame)
        else:
            tokens = source.layout.tokens_per_frame
            queries = indices_of(query_idx, tokens, "query_idx (a token within its frame)")
        return cls(query_frame, queries, key_frames, several)


def indices_of(values: Any, size: int, name: str) -> tuple[int, ...]:
    # Arrays and tensors have `__index__` too, which fails for all but single numbers.
    single = isinstance(values, SupportsIndex) and getattr(values, "ndim", 0) == 0
    try:
        listed = [values] if single else list(values)
    except TypeError as error:
        raise InputError(f"{name} is a whole number or a list of them, got {values!r}") from error
    numbers = tuple(dict.fromkeys(index_of(value, size, name) for value in listed))
    if not numbers:
        raise InputError(f"{name}: the list is empty")
    return numbers


def index_of(value: SupportsIndex, size: int, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is a whole number, got {value!r}") from error
    if isinstance(value, bool) or not 0 <= number < size:
        raise IndexOutOfRange(f"{name} {value} is outside 0…{size - 1}")
    return number


def _patches(layout: TokenLayout, frame: int) -> slice:
    start = layout.index(frame=frame, patch=0)
    return slice(start, start + layout.num_patches)


def _fitting(count: int, layout: TokenLayout) -> TokenLayout | None:
    for candidate in (layout, layout.frame_layout()):
        if candidate.num_tokens == count:
            return candidate
    return None


def _cross_hint(attention: Attention, one: TokenLayout) -> str:
    if attention.shape[2] == attention.shape[3] == one.num_tokens:
        return "; keys and queries of one frame each are is_cross_attention=True"
    return ""
