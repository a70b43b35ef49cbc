"""Where stored queries look: one overlay for every layer, head, query and key frame.

Only the rows that are asked for are read or computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import torch
from einops import rearrange

from vistvis.attention import Attention
from vistvis.decorators.layers import Layers, Selection, StoredLayers, open_layers
from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.decorators.requests import Indices, OverlayRequest
from vistvis.errors import InputError
from vistvis.files import PathLike
from vistvis.progress import progress as progress_bar
from vistvis.views.overlay_folder import Head, Layer, OverlayOutputPath
from vistvis.views.overlay_painter import OverlayPainter
from vistvis.views.painting import as_array, outline_query
from vistvis.views.png import write_pngs

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How far a stored row may sum from 1: the rounding of its dtype, with room to spare.
_SUM_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SUM_TOLERANCE_FULL = 1e-3


def run_overlay_for_reconstruction(
    paths: AttentionPath | Mapping[str, Attention],
    *,
    query_frame_idx: SupportsIndex,
    query_idx: Indices,
    key_frame_idx: Indices,
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
    query_idx
        A token, counted within the frame `query_frame_idx`, special tokens included; a list of
        them; or "interactive" to click them in a window.
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
    request = OverlayRequest(
        query_frame_idx, query_idx, key_frame_idx, head, metadata, is_cross_attention, batch_idx
    )
    stored = open_layers(paths, request)
    painter = partial(OverlayPainter, cmap=cmap_name, alpha=alpha, eps=eps)
    output = OverlayOutputPath(os.fspath(output_path))
    return _overlay(stored, stored.chosen(layers), request, painter, output, progress=progress)


def overlay_query_to_frame_attention(
    attn_path: PathLike,
    input_path: PathLike,
    metadata: StaticMetadata | None,
    query_frame_idx: SupportsIndex,
    query_idx: Indices,
    key_frame_idx: Indices,
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
    request = OverlayRequest(
        query_frame_idx, query_idx, key_frame_idx, head, metadata, is_cross_attention, batch_idx
    )
    stored = StoredLayers({0: attn_path}, input_path, request)
    painter = partial(OverlayPainter, cmap=cmap_name, alpha=alpha, eps=eps)
    output = _OneFolder(os.fspath(output_path), query_output_path)
    (files,) = _overlay(stored, stored.names, request, painter, output, progress=False).values()
    return files


@dataclass(frozen=True)
class _OneFolder(OverlayOutputPath):
    """Overlays of one layer and head, without folders for these."""

    query_output_path: PathLike | None

    @property
    def query_frames_dir(self) -> str:
        return os.path.expanduser(self.query_output_path or super().query_frames_dir)

    def head_dir(self, layer_id: Layer, head: Head) -> str:
        return self.output_path


def _overlay(
    stored: Layers,
    layers: Sequence[Layer],
    request: OverlayRequest,
    painter_of: Callable[[Mapping[int, NDArray[np.uint8]]], OverlayPainter],
    output: OverlayOutputPath,
    *,
    progress: bool,
) -> dict[tuple[Layer, Head], list[str]]:
    """Draw the layers and the query, and say which files are whose."""
    query = request.query(stored.images, stored.layout)
    painter = painter_of({frame: stored.images[frame] for frame in query.key_frames})
    pairs = tuple(product(query.tokens, query.key_frames))
    results: dict[tuple[Layer, Head], list[str]] = {}
    for layer in progress_bar(layers, "overlays", shown=progress, unit="layer"):
        attention = stored.attention(layer)
        heads = request.heads(attention.num_heads)
        selection = stored.selection(layer, attention, query)
        paints = {}
        for head, maps in _maps(layer, attention, heads, selection).items():
            files = results[layer, head] = []
            for (token, frame), weights in zip(pairs, maps, strict=True):
                named = frame if query.key_frame_in_name else None
                files.append(str(Path(output.overlay_file(layer, head, token, named))))
                paints[files[-1]] = partial(painter.paint, weights, frame)
        write_pngs(paints)
    picture = stored.images[query.frame]
    boxes = {output.query_file(token): _pixel_box(stored, token) for token in query.tokens}
    write_pngs({file: partial(outline_query, picture, box) for file, box in boxes.items()})
    return results


# -- computing -----------------------------------------------------------------------------------


def _maps(
    layer: Layer, attention: Attention, heads: Sequence[Head], selection: Selection
) -> dict[Head, NDArray[np.float32]]:
    """For each head one map for every pair of query and key frame, `(Q · K, rows, cols)`.

    Softmax has gone over all keys before any are left out.
    """
    numbers = None if "mean" in heads else [int(head) for head in heads]
    rows = attention.token_rows(list(selection.tokens), batch=selection.batch, heads=numbers)
    _check_rows(layer, attention, rows)
    by_frame = torch.stack([rows[..., keys] for keys in selection.keys])
    pattern = "frame head query (row col) -> head (query frame) row col"
    maps = as_array(rearrange(by_frame, pattern, row=selection.grid[0]))
    if numbers is not None:
        return dict(zip(heads, maps, strict=True))
    mean = maps.mean(0, dtype=np.float64).astype(np.float32)
    return {head: mean if head == "mean" else maps[int(head)] for head in heads}


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


def _pixel_box(stored: Layers, token: int) -> tuple[int, int, int, int]:
    """Where a token lies in its picture; a special token has no place: the whole picture."""
    layout = stored.layout.frame_layout()
    box = layout.locate(token).box or (0, 0, *layout.image_size[::-1])
    # Pictures may have another size than the grid says, where they were resized for the model.
    down, across = (n / m for n, m in zip(stored.images.shape[1:3], layout.image_size, strict=True))
    x0, y0, x1, y1 = box
    return round(x0 * across), round(y0 * down), round(x1 * across), round(y1 * down)
