"""What is recorded beside overlays: whose attention they show, and what of it."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vistvis.decorators.layers import Layers
from vistvis.decorators.paths import AttentionPath
from vistvis.decorators.requests import FrameQuery
from vistvis.errors import VistvisError
from vistvis.store import Run
from vistvis.views.overlay_folder import Head, Layer, OverlayOutputPath
from vistvis.views.overlay_manifest import Drawing, Origin, OverlayRecord
from vistvis.views.overlay_painter import OWN
from vistvis.views.painting import as_array

if TYPE_CHECKING:
    from vistvis.attention import Attention
    from vistvis.files import PathLike
    from vistvis.views.overlay_painter import Look

Panel: TypeAlias = tuple[Layer, Head, int, int]
"""Layer, head, query token and key frame of one overlay."""


def origin_of(paths: AttentionPath | Mapping[str, Attention] | PathLike, stored: Layers) -> Origin:
    """Whose attention it is, with a fingerprint of the pictures and of what the weights lie in.

    That is the pass of a run, or its files' checksums where it names none; the size and time of the
    first stored file; or a part of the first tensor in memory.
    """
    crc = zlib.crc32(stored.images.data)
    if isinstance(paths, Run):
        sums = [(name, paths.record(name).file.crc32) for name in paths.sites]
        crc = zlib.crc32((paths.pass_id or repr(sums)).encode(), crc)
        return Origin(paths.path, f"{crc:08x}", paths.model)
    if isinstance(paths, Mapping):
        for name in stored.names:
            with contextlib.suppress(VistvisError):  # a site that could not be read
                first = stored.attention(name)
                tensor = first.query if first.weights is None else first.weights
                crc = zlib.crc32(as_array(tensor[0, 0, 0]).tobytes(), crc)
                break
        return Origin(None, f"{crc:08x}")
    if isinstance(paths, AttentionPath):
        folder, file = paths.experiment_root, paths.attn_layer_file(int(stored.names[0]))
    else:
        folder, file = os.fspath(paths), os.fspath(paths)
    with contextlib.suppress(OSError):  # told when the layer is drawn
        found = os.stat(file)
        crc = zlib.crc32(f"{found.st_size} {found.st_mtime_ns}".encode(), crc)
    return Origin(os.path.abspath(folder), f"{crc:08x}")


def drawing_of(
    origin: Origin, stored: Layers, query: FrameQuery, look: Look, token: int, key_frame: int
) -> Drawing:
    """What overlays of one query token and key frame show."""
    place = stored.layout.frame_layout().locate(token)
    words = place.kind if place.patch is None else f"grid row {place.row}, col {place.col}"
    frames = query.key_frames if look.norm != OWN else ()
    return Drawing(origin, query.frame, token, words, key_frame, stored.batch, look, frames)


def records_of(
    output: OverlayOutputPath,
    drawing: Callable[[int, int], Drawing],
    shown: Mapping[str, Panel],
    checksums: Mapping[str, str],
) -> list[OverlayRecord]:
    """A record for each query token and key frame of which overlays were written."""
    files: dict[tuple[int, int], dict[str, tuple[Layer, Head, str]]] = {}
    for file, (layer, head, token, frame) in shown.items():
        if file in checksums:
            name = Path(os.path.relpath(file, output.output_path)).as_posix()
            files.setdefault((token, frame), {})[name] = layer, head, checksums[file]
    return [
        OverlayRecord(drawing(*pair), names, checksums.get(output.query_file(pair[0])))
        for pair, names in files.items()
    ]
