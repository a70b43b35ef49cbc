"""Where stored queries look: one overlay for every layer, head, query and key frame.

Stored layers (`AttentionPath`) and stored runs (`open_run`) go through the same steps: find the
pictures and the token layout, take the rows that are asked for, turn each into a map, lay the map
over the picture. Only those rows are read or computed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch

from vistvis.attention import Attention
from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.decorators.sources import (
    Asked,
    FileSource,
    Frames,
    PathLike,
    Place,
    Queries,
    Source,
    index_of,
    opened,
)
from vistvis.errors import InputError, StoreError
from vistvis.files import atomic_file
from vistvis.store.formats import read_attention
from vistvis.views import painting
from vistvis.views.overlay_folder import Head, Layer, OverlayOutputPath, overlay_name
from vistvis.views.png import encode_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How far a stored row may sum from 1: the rounding of its dtype, with room to spare.
_SUM_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SUM_TOLERANCE_FULL = 1e-3
# Pixels of white around the query's outline.
_RING = 2
# Pictures being encoded at once; more would only wait for each other.
_THREADS = min(4, os.cpu_count() or 1)


def run_overlay_for_reconstruction(
    paths: AttentionPath | Mapping[str, Attention],
    *,
    query_frame_idx: SupportsIndex,
    query_idx: Queries,
    key_frame_idx: Frames,
    head: Head,
    output_path: PathLike,
    metadata: StaticMetadata | None = None,
    is_cross_attention: bool = False,
    batch_idx: SupportsIndex = 0,
    alpha: float = 0.45,
    cmap_name: str = "jet",
    eps: float = 1e-8,
    layers: Sequence[Layer] | str | None = None,
    progress: bool = True,
) -> dict[tuple[Layer, Head], list[str]]:
    """Overlay what query tokens attend to, for every stored layer.

    Writes under `output_path`:

        layer=layer_<i>/head=<h>/overlays/overlay_<q>.png
        query_frames/query_image_<q>.png

    Parameters
    ----------
    paths
        An `AttentionPath`, a run from `open_run`, or any mapping of names to `Attention` that has
        `images` (and `layout`, unless the sites or `metadata` say it). For those, the layer is the
        site's name, and stands where `layer_<i>` does.
    query_frame_idx
        The frame of the queries.
    query_idx
        A token, counted within its frame, special tokens included; a list of them; or
        "interactive" to click them in a window.
    key_frame_idx
        The frame to look at; a list or "all" gives one overlay for each, and the file name then
        carries the frame: `overlay_<q>_frame_<k>.png`.
    head
        A number, "mean" over all heads, or "all" for every head and the mean.
    metadata
        Patch size and special tokens of stored files; without it, the YAML file that
        `VIS_TVIS_METADATA_PATH` names. A run knows its layout.
    is_cross_attention
        Queries cover one frame (`query_frame_idx`) and keys one frame (`key_frame_idx`).
    batch_idx
        Of the batch as the model was called.
    alpha, cmap_name
        Opacity and matplotlib colour map. Every map is stretched from its minimum to its maximum
        over the patches of its frame: colours compare within one overlay, not between two.
    eps
        Added to that span, so that a constant map stays dark.
    layers
        Only these: layer numbers; for a run, site names or patterns as in `capture`, such as
        "global_*" or "**.global_blocks.**".
    progress
        Show a progress bar.

    Returns
    -------
    `{(layer, head): [paths]}`; for each query, in its order, each key frame.

    Raises
    ------
    InputError, IndexOutOfRange
        If indices, shapes and layout do not fit together; the message says which.
    StoreError
        If a file can't be read or written.
    DisplayError
        For "interactive" where no window can be opened.

    Cost: a layer of N tokens, h heads of width d costs `Q·h·N·d` multiply-adds from queries and
    keys, or the reading of `Q·h·N` weights; drawing and writing take about 15 ms for each overlay
    of 518×518 pixels and one thread.
    """
    source = opened(paths, metadata, bool(is_cross_attention), batch_idx)
    asked = Asked.checked(
        source,
        query_frame_idx=query_frame_idx,
        query_idx=query_idx,
        key_frame_idx=key_frame_idx,
        pick=_picked,
    )
    brush = _Brush(source.images, asked.key_frames, cmap_name=cmap_name, alpha=alpha, eps=eps)
    output = OverlayOutputPath(output_path=os.fspath(output_path))
    chosen = source.chosen(layers)
    results: dict[tuple[Layer, Head], list[str]] = {}
    with _Writer(_bar(chosen, progress)) as writer:
        for layer in writer.steps:
            attention = source.attention(layer)
            heads = _heads(head, attention)
            maps = _maps(layer, attention, heads, source.place(layer, attention, asked))
            for one in heads:
                folder = Path(output.head_dir(layer, one), "overlays")
                results[layer, one] = _draw(maps[one], asked, brush, folder, writer)
            writer.wait()
        _write_query_frames(source, asked, Path(output.query_frames_dir), writer)
    return results


def overlay_query_to_frame_attention(
    attn_path: PathLike,
    input_path: PathLike,
    metadata: StaticMetadata | None,
    query_frame_idx: SupportsIndex,
    query_idx: Queries,
    key_frame_idx: Frames,
    head: Head,
    output_path: PathLike,
    *,
    batch_idx: SupportsIndex = 0,
    alpha: float = 0.45,
    cmap_name: str = "jet",
    eps: float = 1e-8,
    is_cross_attention: bool = False,
    query_output_path: PathLike | None = None,
) -> list[str]:
    """The same for one attention file and one head (a number or "mean").

    Parameters
    ----------
    attn_path
        Weights `(B, h, Nq, Nk)`, or queries and keys; see `vistvis.store.formats`.
    input_path
        Pictures `(B, S, C, H, W)`, uint8 or floating in 0…1 or 0…255, 1 or 3 channels.
    query_output_path
        Where pictures of the queries go, by default `<output_path>/query_frames`.

    Other parameters and errors are those of `run_overlay_for_reconstruction`.

    Returns
    -------
    Paths of the overlays, `<output_path>/overlays/overlay_<q>.png`.
    """
    if head != "mean" and not isinstance(head, SupportsIndex):
        raise InputError(f'head is a number or "mean" here, got {head!r}')
    attention = read_attention(attn_path)
    source = FileSource(
        [0], lambda _: attention, input_path, metadata, bool(is_cross_attention), batch_idx
    )
    asked = Asked.checked(
        source,
        query_frame_idx=query_frame_idx,
        query_idx=query_idx,
        key_frame_idx=key_frame_idx,
        pick=_picked,
    )
    brush = _Brush(source.images, asked.key_frames, cmap_name=cmap_name, alpha=alpha, eps=eps)
    folder = Path(output_path).expanduser()
    query_folder = Path(query_output_path or folder / "query_frames").expanduser()
    with _Writer([]) as writer:
        _write_query_frames(source, asked, query_folder, writer)
        heads = _heads(head, attention)
        maps = _maps(0, attention, heads, source.place(0, attention, asked))
        return _draw(maps[heads[0]], asked, brush, folder / "overlays", writer)


def _heads(head: Head, attention: Attention) -> list[Head]:
    if isinstance(head, str):
        if head == "all":
            return [*range(attention.num_heads), "mean"]
        if head == "mean":
            return ["mean"]
        raise InputError(f'head is a number, "mean" or "all", got {head!r}')
    return [index_of(head, attention.num_heads, "head")]


def _picked(source: Source, frame: int) -> tuple[int, ...]:
    from vistvis.views.pick import pick_patches

    picked = pick_patches(source.images[frame], source.layout, title=f"frame {frame}")
    if not picked:
        raise InputError("no patch was chosen in the window, so there is no query to draw")
    return tuple(picked)


# -- computing -----------------------------------------------------------------------------------


def _maps(
    layer: Layer, attention: Attention, heads: Sequence[Head], place: Place
) -> dict[Head, NDArray[np.float32]]:
    """For each head, weights of the queries over patches of the key frames, `(Q, K, rows, cols)`.

    Softmax has gone over all keys before any are left out.
    """
    numbers = None if "mean" in heads else [int(head) for head in heads]
    rows = attention.rows(list(place.rows), batch=place.batch, heads=numbers)[0]
    _check_rows(layer, attention, rows)
    parts = torch.stack([rows[..., keys] for keys in place.keys], 2)
    by_head = painting.as_array(parts.reshape(*parts.shape[:3], *place.grid))
    if numbers is None:
        mean = by_head.mean(0, dtype=np.float64).astype(np.float32)
        return {head: mean if head == "mean" else by_head[int(head)] for head in heads}
    return dict(zip(heads, by_head, strict=True))


def _check_rows(layer: Layer, attention: Attention, rows: torch.Tensor) -> None:
    """Stored weights may be anything; those from queries and keys are softmax by construction."""
    if not bool(torch.isfinite(rows).all()):
        raise InputError(f"the attention of layer {layer} has NaN or infinite weights")
    # Some models' weights don't sum to 1 (talking heads); a site that was captured says it is so.
    if attention.weights is None or attention.site is not None:
        return
    sums = rows.double().sum(-1)
    tolerance = _SUM_TOLERANCE.get(attention.weights.dtype, _SUM_TOLERANCE_FULL)
    # A row of zeros is a query whose keys were all masked.
    off = ((sums - 1).abs() > tolerance) & (sums != 0)
    if bool(off.any()) or bool((rows < 0).any()):
        worst = float(sums.flatten()[int((sums - 1).abs().argmax())])
        raise InputError(
            f"rows of attention sum to 1, but in layer {layer} one sums to "
            f"{worst:.6g}; store weights after the softmax (and before dropout)"
        )


# -- drawing and writing -------------------------------------------------------------------------


class _Brush:
    """Pictures and colour table, weighted once for all overlays."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        frames: Sequence[int],
        *,
        cmap_name: str,
        alpha: float,
        eps: float,
    ) -> None:
        painting.check_alpha(alpha)
        self._under = {k: painting.weighted(images[k], 1 - alpha) for k in frames}
        self._over = painting.weighted(painting.table(cmap_name), alpha)
        self._eps = eps

    def paint(self, weights: NDArray[np.float32], frame: int) -> NDArray[np.uint8]:
        """One overlay `(H, W, 3)` from one map `(rows, cols)`."""
        under = self._under[frame]
        scalar = painting.resize(painting.stretch(weights, eps=self._eps), under.shape[:2])
        return painting.mixed(under, self._over.take(painting.levels(scalar), axis=0))


class _Writer:
    """Paints, encodes and writes in a few threads; errors come up at `wait` or at the end."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="vistvis-overlay")
        self._pending: list[Future[None]] = []

    def put(self, path: Path, paint: Callable[[], NDArray[np.uint8]]) -> None:
        self._pending.append(self._pool.submit(_write_picture, path, paint))

    def wait(self) -> None:
        """Until everything is written, so that pictures of one layer are waiting at most."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)


def _write_picture(path: Path, paint: Callable[[], NDArray[np.uint8]]) -> None:
    data = encode_png(paint())
    try:
        with atomic_file(path, sync=False) as file:
            file.write(data)
    except OSError as error:
        raise StoreError(f"can't write {path}: {error.strerror or error}") from error


def _draw(
    maps: NDArray[np.float32], asked: Asked, brush: _Brush, folder: Path, writer: _Writer
) -> list[str]:
    _make(folder)
    written = []
    for query, of_query in zip(asked.queries, maps, strict=True):
        for frame, weights in zip(asked.key_frames, of_query, strict=True):
            path = folder / overlay_name(query, frame if asked.frame_in_name else None)
            writer.put(path, functools.partial(brush.paint, weights, frame))
            written.append(str(path))
    return written


def _write_query_frames(source: Source, asked: Asked, folder: Path, writer: _Writer) -> None:
    """The query frame with each query outlined; a special token has no place: the whole frame."""
    _make(folder)
    picture = source.images[asked.query_frame]
    height, width = picture.shape[:2]
    layout = source.layout.frame_layout()
    for query in asked.queries:
        x0, y0, x1, y1 = layout.locate(query).box or (0, 0, *layout.image_size[::-1])
        # Pictures may have another size than the grid says, where they were resized for the model.
        down, across = height / layout.image_size[0], width / layout.image_size[1]
        box = round(x0 * across), round(y0 * down), round(x1 * across), round(y1 * down)
        writer.put(folder / f"query_image_{query}.png", functools.partial(_outlined, picture, box))


def _outlined(picture: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """The box in green, within white: one of the two stands out on any picture."""
    x0, y0, x1, y1 = box
    around = x0 - _RING, y0 - _RING, x1 + _RING, y1 + _RING
    ringed = painting.outline(picture, around, colour=painting.WHITE, width=_RING)
    return painting.outline(ringed, box)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"can't make the folder {folder}: {error.strerror or error}") from error


def _bar(layers: Sequence[Layer], shown: bool) -> Any:
    if not shown:
        return layers
    from tqdm.auto import tqdm

    return tqdm(layers, desc="overlays", unit="layer")
