"""Where stored queries look: one overlay for every layer, head, query and key frame.

Only the rows that are asked for are read or computed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from einops import rearrange

from vistvis.attention import Attention
from vistvis.decorators.layers import Layers, Selection, StoredLayers, open_layers
from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.decorators.records import Panel, drawing_of, origin_of, records_of
from vistvis.decorators.requests import FrameQuery, Indices, OverlayRequest
from vistvis.errors import InputError, LayoutError, VistvisError, VistvisWarning
from vistvis.files import PathLike
from vistvis.names import few
from vistvis.progress import progress as progress_bar
from vistvis.views.overlay_folder import Head, Layer, OverlayOutputPath, layer_label
from vistvis.views.overlay_manifest import Origin, add_records
from vistvis.views.overlay_painter import OWN, Look, OverlayPainter
from vistvis.views.painting import ALPHA, CMAP, as_array, outline_query
from vistvis.views.png import write_pngs

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How far a stored row may sum from 1: the rounding of its dtype, with room to spare.
_SUM_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SUM_TOLERANCE_FULL = 1e-3


def run_overlay_for_reconstruction(
    paths: AttentionPath | Mapping[str, Attention],
    *,
    images: Any = None,
    query_frame_idx: SupportsIndex,
    query_idx: Indices,
    key_frame_idx: Indices,
    head: Head | Sequence[Head],
    output_path: PathLike,
    metadata: StaticMetadata | None = None,
    is_cross_attention: bool = False,
    batch_idx: SupportsIndex = 0,
    norm: str = OWN,
    alpha: float = ALPHA,
    cmap_name: str = CMAP,
    eps: float = 1e-8,
    layers: Sequence[Layer] | str | None = None,
    progress: bool = True,
) -> dict[tuple[Layer, Head], list[str]]:
    """Overlay what query tokens attend to, for every stored layer.

    Writes under `output_path`:

        layer=layer_<i>/head=<h>/overlays/overlay_<q>_frame_<k>.png
        query_frames/query_image_<q>.png
        overlays.json

    The last says of every picture whose attention, which query and which colours it shows; calls
    add to it, and PDF pages are made from it.

    Parameters
    ----------
    paths
        An `AttentionPath`, a run from `open_run`, or any mapping of names to `Attention` that has
        `images`, or `images=` here (and `layout`, unless the sites or `metadata` say it). For
        those, the layer is the site's name, and stands where `layer_<i>` does.
    images
        What the model saw, as for `save_run`, where `paths` has no pictures of its own.
    query_idx
        A token, counted within the frame `query_frame_idx`, special tokens included; a list of
        them; or "interactive" to click them in a window.
    key_frame_idx
        The frame to look at; a list or "all" gives one overlay for each. A site that attends within
        frames shows the query's own; the others are left out, and a VistvisWarning says so.
    head
        A number, "mean" over all heads, a list of these, or "all" for every head and the mean.
    metadata
        Patch size and special tokens of stored files; without it, the YAML file that
        `VIS_TVIS_METADATA_PATH` names. A run knows its layout.
    is_cross_attention
        Queries cover one frame (`query_frame_idx`) and keys one frame (`key_frame_idx`).
    batch_idx
        Of the batch as the model was called.
    norm
        "own": every map from its minimum to its maximum over the patches of its frame, so that
        colours compare within one overlay, not between two. "auto", "linear", "log" or "percentile"
        as in `vistvis.views.painting.normalizer`: one scale for the key frames of a layer, head and
        query; white is what lies above it.
    alpha, cmap_name
        How much the colours outweigh the picture, which is grey, and a matplotlib colour map (see
        `lay_over`). Versions before had `cmap_name="jet", alpha=0.45`.
    eps
        With norm="own", added to the span, so that a constant map stays dark.
    layers
        Only these: layer numbers; for a run, site names or patterns as in `capture`, such as
        "global_*" or "**.global_blocks.**".

    Returns
    -------
    `{(layer, head): [paths]}`; for each query, in its order, each key frame. Layers that have not
    what was asked for (other frames, windows, other tokens) are left out with a VistvisWarning.

    Raises
    ------
    InputError, IndexOutOfRange
        If indices, shapes and layout do not fit together; the message says which.
    LayoutError
        The same for a layout; for both, where not one layer could be drawn.
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
    look = Look(norm, cmap_name, alpha, eps)
    stored = open_layers(paths, request, images)
    chosen, origin = stored.chosen(layers), origin_of(paths, stored)
    output = OverlayOutputPath(os.fspath(output_path))
    return _overlay(stored, chosen, request, look, output, origin, progress=progress)


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
    norm: str = OWN,
    alpha: float = ALPHA,
    cmap_name: str = CMAP,
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
    Paths of the overlays, `<output_path>/overlays/overlay_<q>_frame_<k>.png`.
    """
    if head != "mean" and not isinstance(head, SupportsIndex):
        raise InputError(f'head is a number or "mean" here, got {head!r}')
    request = OverlayRequest(
        query_frame_idx, query_idx, key_frame_idx, head, metadata, is_cross_attention, batch_idx
    )
    look = Look(norm, cmap_name, alpha, eps)
    stored = StoredLayers({0: attn_path}, input_path, request)
    output = _OneFolder(os.fspath(output_path), query_output_path)
    origin = origin_of(attn_path, stored)
    (files,) = _overlay(
        stored, stored.names, request, look, output, origin, progress=False
    ).values()
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
    look: Look,
    output: OverlayOutputPath,
    origin: Origin,
    *,
    progress: bool,
) -> dict[tuple[Layer, Head], list[str]]:
    """Draw the layers and the query, record it, and say which files are whose."""
    query = request.query(stored.images, stored.layout)
    painter = OverlayPainter({frame: stored.images[frame] for frame in query.key_frames}, look)
    results: dict[tuple[Layer, Head], list[str]] = {}
    shown: dict[str, Panel] = {}
    checksums: dict[str, str] = {}
    left_out: dict[Layer, VistvisError] = {}
    narrow: list[Layer] = []
    try:
        for layer in progress_bar(layers, "overlays", shown=progress, unit="layer"):
            attention = stored.attention(layer)
            heads = request.heads(attention.num_heads)
            seen = _as_seen(query, attention)
            try:
                selection = stored.selection(layer, attention, seen)
            except (InputError, LayoutError) as error:
                left_out[layer] = error
                continue
            narrow += [layer] if seen != query else []
            paints = {}
            for head, maps in _maps(layer, attention, heads, selection).items():
                files = results[layer, head] = []
                for token, of_frames in zip(query.tokens, maps, strict=True):
                    scale = look.scale(of_frames, _own_patch(stored, seen, token, selection.grid))
                    for frame, weights in zip(seen.key_frames, of_frames, strict=True):
                        files.append(str(Path(output.overlay_file(layer, head, token, frame))))
                        shown[files[-1]] = layer, head, token, frame
                        paints[files[-1]] = partial(painter.paint, weights, frame, scale)
            checksums |= write_pngs(paints)
        if left_out and not results:
            raise next(iter(left_out.values()))
        picture = stored.images[query.frame]
        boxes = {output.query_file(token): _pixel_box(stored, token) for token in query.tokens}
        outlined = {file: partial(outline_query, picture, box) for file, box in boxes.items()}
        checksums |= write_pngs(outlined)
    finally:
        # What was written is recorded also where a later layer fails or is interrupted.
        if checksums:
            drawing = partial(drawing_of, origin, stored, query, look)
            records = records_of(output, drawing, shown, checksums)
            if replaced := add_records(output.output_path, records):
                _tell(
                    f"{replaced} overlays of another query or run had the same names and were "
                    f"replaced in {output.output_path}; write to another folder to keep both"
                )
    if narrow:
        _tell(f"{_names(narrow)}: attention within one frame, drawn for frame {query.frame} alone")
    if left_out:
        _tell(f"left out {_names(list(left_out))}: {next(iter(left_out.values()))}")
    return results


def _as_seen(query: FrameQuery, attention: Attention) -> FrameQuery:
    """The query with the key frames that a site has: one that attends within frames has its own."""
    within = attention.site is not None and attention.site.frames_in_batch
    if within and query.frame in query.key_frames:
        return replace(query, key_frames=(query.frame,))
    return query


def _names(layers: Sequence[Layer]) -> str:
    return few([layer_label(layer) for layer in layers])


def _tell(text: str) -> None:
    warnings.warn(text, VistvisWarning, stacklevel=4)  # at the caller of the public function


# -- computing -----------------------------------------------------------------------------------


def _maps(
    layer: Layer, attention: Attention, heads: Sequence[Head], selection: Selection
) -> dict[Head, NDArray[np.float32]]:
    """For each head one map for every query and key frame, `(Q, K, rows, cols)`.

    Softmax has gone over all keys before any are left out.
    """
    numbers = None if "mean" in heads else [int(head) for head in heads]
    rows = attention.token_rows(list(selection.tokens), batch=selection.batch, heads=numbers)
    _check_rows(layer, attention, rows)
    by_frame = torch.stack([rows[..., keys] for keys in selection.keys])
    pattern = "frame head query (row col) -> head query frame row col"
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


def _own_patch(
    stored: Layers, query: FrameQuery, token: int, grid: tuple[int, int]
) -> tuple[int, int, int] | None:
    """Which of the key frames' maps, and of its rows and columns, is the query's own patch."""
    layout = stored.layout.frame_layout()
    place = layout.locate(token)
    if place.row is None or place.col is None or query.frame not in query.key_frames:
        return None
    row, col = place.row * grid[0] // layout.grid[0], place.col * grid[1] // layout.grid[1]
    return query.key_frames.index(query.frame), row, col


def _pixel_box(stored: Layers, token: int) -> tuple[int, int, int, int]:
    """Where a token lies in its picture; a special token has no place: the whole picture."""
    layout = stored.layout.frame_layout()
    box = layout.locate(token).box or (0, 0, *layout.image_size[::-1])
    # Pictures may have another size than the grid says, where they were resized for the model.
    down, across = (n / m for n, m in zip(stored.images.shape[1:3], layout.image_size, strict=True))
    x0, y0, x1, y1 = box
    return round(x0 * across), round(y0 * down), round(x1 * across), round(y1 * down)
