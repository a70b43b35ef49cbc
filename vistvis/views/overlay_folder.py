"""Where overlays lie: one folder for each layer and head, one picture for each query."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from vistvis.files import checked_name, checked_path

Layer: TypeAlias = "int | str"
"""A layer's number; in a run, a site's name."""
Head: TypeAlias = "int | str"
"""A head's number, or `"mean"`."""


@dataclass(frozen=True)
class OverlayOutputPath:
    """Where overlays are written, and PDF pages found.

        <output_path>/query_frames/query_image_<q>.png
        <output_path>/layer=layer_<i>/head=<h>/overlays/overlay_<q>_frame_<k>.png
        <output_path>/overlays.json

    For a site of a run its name stands in the place of `layer_<i>`. Earlier versions wrote
    `overlay_<q>.png` where one key frame was asked for, and no `overlays.json`.
    """

    output_path: str

    def __post_init__(self) -> None:
        base = os.path.expanduser(checked_path(self.output_path))
        object.__setattr__(self, "output_path", os.fspath(base))

    @property
    def query_frames_dir(self) -> str:
        return os.path.join(self.output_path, "query_frames")

    def query_file(self, query_idx: int) -> str:
        """The picture with the query outlined."""
        return os.path.join(self.query_frames_dir, f"query_image_{query_idx}.png")

    def layer_dir(self, layer_id: Layer) -> str:
        # A site's name may hold anything; quoted, it is one component and can be read back.
        name = f"layer_{layer_id}" if isinstance(layer_id, int) else quote(layer_id, safe=" ")
        return os.path.join(self.output_path, f"layer={checked_name(name, 'layer')}")

    def head_dir(self, layer_id: Layer, head: Head) -> str:
        return os.path.join(self.layer_dir(layer_id), checked_name(f"head={head}", "head"))

    def overlay_file(
        self, layer_id: Layer, head: Head, query_idx: int, key_frame_idx: int | None = None
    ) -> str:
        frame = "" if key_frame_idx is None else f"_frame_{key_frame_idx}"
        name = f"overlay_{query_idx}{frame}.png"
        return os.path.join(self.head_dir(layer_id, head), "overlays", name)

    def list_layers(self) -> list[Layer]:
        """Layers in numeric order, then sites by name, numbers in names in numeric order."""
        names = (str(name) for name in folder_names(self.output_path, "layer="))
        numbered = ((name, re.fullmatch(r"layer_(\d+)", name)) for name in names)
        layers = (int(match[1]) if match else unquote(name) for name, match in numbered)
        return sorted(layers, key=natural_order)

    def list_heads(self, layer_id: Layer) -> list[Head]:
        """Numbered heads in order, then others such as "mean"."""
        return sorted(folder_names(self.layer_dir(layer_id), "head="), key=natural_order)

    def list_queries(self, layer_id: Layer, head: Head) -> list[tuple[int, int | None]]:
        """`(query, key frame)` of every overlay; the key frame is None where the name has none."""
        files = Path(self.head_dir(layer_id, head), "overlays").glob("overlay_*.png")
        names = (re.fullmatch(r"overlay_(\d+)(?:_frame_(\d+))?\.png", f.name) for f in files)
        return sorted(
            {(int(name[1]), int(name[2]) if name[2] else None) for name in names if name},
            key=query_order,
        )


def layer_label(layer_id: Layer) -> str:
    """What a layer is called in words."""
    return f"layer {layer_id}" if isinstance(layer_id, int) else layer_id


def query_order(query: tuple[int, int | None]) -> tuple[int, int]:
    """For sorting: by token, then by key frame."""
    token, key_frame = query
    return token, -1 if key_frame is None else key_frame


def folder_names(folder: str, prefix: str) -> list[Layer]:
    """What follows `prefix` in the names of the folders in `folder`; numbers as ints."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    rests = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    # Only digits as Python writes them: "٣" is a digit too, and "007" another folder than "7".
    return [int(r) if re.fullmatch(r"0|[1-9][0-9]*", r) else r for r in rests if r]


def natural_order(value: Layer) -> tuple[Any, ...]:
    """For sorting: numbers, then names with their numbers in numeric order."""
    if isinstance(value, int):
        return (0, [(0, value)])
    parts = re.split(r"([0-9]+)", value)
    return (1, [(0, int(p)) if p.isdigit() and p.isascii() else (1, p) for p in parts])
