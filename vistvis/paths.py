"""Where stored layers and their pictures lie, and what has to be known about the tokens."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias
from urllib.parse import quote, unquote

from vistvis.errors import InputError, StoreError
from vistvis.files import FORMATS, checked_name, inside
from vistvis.tokens import TokenLayout

METADATA_VARIABLE = "VIS_TVIS_METADATA_PATH"

Layer: TypeAlias = "int | str"
"""A layer's number; in a run, a site's name."""
Head: TypeAlias = "int | str"
"""A head's number, or `"mean"`."""


@dataclass(frozen=True)
class AttentionPath:
    """Files that `visTvis_store` wrote: attention under `attn/`, pictures under `input/`.

        <base_dir>/<experiment_name>/attn/layer_<i>/<attn_filename>
        <base_dir>/<experiment_name>/input/layer_<i>/<input_filename>

    Raises
    ------
    InputError
        If a name would leave the base folder.
    """

    base_dir: str
    experiment_name: str
    attn_filename: str = "attn.pt"
    input_filename: str = "input.pt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_dir", os.path.expanduser(os.fspath(self.base_dir)))
        for name in ("experiment_name", "attn_filename", "input_filename"):
            checked_name(getattr(self, name), name)

    @property
    def experiment_root(self) -> str:
        return os.path.join(self.base_dir, self.experiment_name)

    @property
    def attn_root(self) -> str:
        return os.path.join(self.experiment_root, "attn")

    @property
    def input_root(self) -> str:
        return os.path.join(self.experiment_root, "input")

    def attn_layer_file(self, layer_id: SupportsIndex) -> str:
        """The attention file of a layer.

        Where it is not there but `<name>.pt` is, which version 0.1.1 wrote, that one.
        """
        return self._file("attn", layer_id, self.attn_filename)

    def input_layer_file(self, layer_id: SupportsIndex = 0) -> str:
        """The picture file; also `<name>.pt` as above."""
        return self._file("input", layer_id, self.input_filename)

    def list_layers(self) -> list[int]:
        """Numbers of the layers that have a folder under `attn/`, in numeric order."""
        return sorted(n for n in _listed(self.attn_root, "layer_") if isinstance(n, int))

    def _file(self, folder: str, layer_id: SupportsIndex, name: str) -> str:
        layer = operator.index(layer_id)
        if layer < 0:
            raise InputError(f"layers count from 0, got {layer}")
        where = (self.experiment_name, folder, f"layer_{layer}")
        path = inside(self.base_dir, *where, name)
        if not path.exists():
            other = inside(self.base_dir, *where, f"{name}.pt")
            if other.exists() or Path(name).suffix.lower() not in FORMATS:
                path = other
        return str(path)


@dataclass(frozen=True)
class OverlayOutputPath:
    """Where overlays are written, and PDF pages found.

        <output_path>/query_frames/query_image_<q>.png
        <output_path>/layer=layer_<i>/head=<h>/overlays/overlay_<q>.png

    For a site of a run its name stands in the place of `layer_<i>`. Where several key frames were
    asked for, the file is `overlay_<q>_frame_<k>.png`.
    """

    output_path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_path", os.path.expanduser(os.fspath(self.output_path)))

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
        name = overlay_name(query_idx, key_frame_idx)
        return os.path.join(self.head_dir(layer_id, head), "overlays", name)

    def list_layers(self) -> list[Layer]:
        """Layers in numeric order, then sites by name, numbers in names in numeric order."""
        found: list[Layer] = []
        for name in _listed(self.output_path, "layer="):
            number = re.fullmatch(r"layer_(\d+)", str(name))
            found.append(int(number[1]) if number else unquote(str(name)))
        return sorted(found, key=_natural)

    def list_heads(self, layer_id: Layer) -> list[Head]:
        """Numbered heads in order, then others such as "mean"."""
        return sorted(_listed(self.layer_dir(layer_id), "head="), key=_natural)

    def list_queries(self, layer_id: Layer, head: Head) -> list[tuple[int, int | None]]:
        """`(query, key frame)` of every overlay; the key frame is None where the name has none."""
        folder = Path(self.head_dir(layer_id, head), "overlays")
        found = set()
        for path in folder.glob("overlay_*.png"):
            parts = re.fullmatch(r"overlay_(\d+)(?:_frame_(\d+))?\.png", path.name)
            if parts:
                found.add((int(parts[1]), None if parts[2] is None else int(parts[2])))
        return sorted(found, key=lambda pair: (pair[0], -1 if pair[1] is None else pair[1]))


def overlay_name(query_idx: int, key_frame_idx: int | None = None) -> str:
    """The file name of an overlay."""
    frame = "" if key_frame_idx is None else f"_frame_{key_frame_idx}"
    return f"overlay_{query_idx}{frame}.png"


@dataclass(frozen=True)
class StaticMetadata:
    """What the stored tensors don't say: patch size in pixels and special tokens per frame."""

    patch_size: int
    num_special_tokens: int

    def __post_init__(self) -> None:
        for name, least in (("patch_size", 1), ("num_special_tokens", 0)):
            value = getattr(self, name)
            try:
                number = operator.index(value)
            except TypeError:
                number = -1
            if number < least or isinstance(value, bool):
                raise InputError(f"{name} is a whole number of at least {least}, got {value!r}")
            object.__setattr__(self, name, number)

    def layout(self, frames: int, size: tuple[int, int]) -> TokenLayout:
        """The layout of `frames` pictures of `(H, W)` pixels.

        Raises
        ------
        InputError
            If the patch size does not divide them.
        """
        height, width = size
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"pictures of {height}×{width} pixels (H×W) don't divide into patches of "
                f"{self.patch_size}; store what the model saw, and check the patch size"
            )
        grid = height // self.patch_size, width // self.patch_size
        special = ("special",) * self.num_special_tokens
        return TokenLayout(frames, grid, special, (self.patch_size, self.patch_size))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, json_str: str) -> StaticMetadata:
        """The reverse of `to_json`."""
        try:
            return cls._from(json.loads(json_str), "the JSON text")
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON: {error}") from error

    @classmethod
    def from_yaml_file(cls, file_path: str | os.PathLike[str]) -> StaticMetadata:
        """From a YAML file with `patch_size` and `num_special_tokens`."""
        import yaml

        where = os.fspath(file_path)
        try:
            data = yaml.safe_load(Path(file_path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(f"can't read {where}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
        return cls._from(data, where)

    @classmethod
    def from_environment(cls) -> StaticMetadata:
        """From the YAML file that `VIS_TVIS_METADATA_PATH` names."""
        path = os.environ.get(METADATA_VARIABLE)
        if not path:
            raise InputError(
                "the patch size and number of special tokens are needed: pass "
                "metadata=StaticMetadata(patch_size=…, num_special_tokens=…), or name a YAML file "
                f"with both in the environment variable {METADATA_VARIABLE}"
            )
        return cls.from_yaml_file(path)

    @classmethod
    def _from(cls, data: Any, where: str) -> StaticMetadata:
        names = ("patch_size", "num_special_tokens")
        if not isinstance(data, Mapping) or any(name not in data for name in names):
            raise InputError(f"{where} needs {' and '.join(names)}, has {data!r}")
        return cls(*(data[name] for name in names))


def _listed(folder: str, prefix: str) -> list[Layer]:
    """What follows `prefix` in the names of the folders in `folder`; numbers as ints."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    rests = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    # Only digits as Python writes them: "٣" is a digit too, and "007" another folder than "7".
    return [int(r) if re.fullmatch(r"0|[1-9][0-9]*", r) else r for r in rests if r]


def _natural(value: Layer) -> tuple[Any, ...]:
    if isinstance(value, int):
        return (0, [(0, value)])
    parts = re.split(r"([0-9]+)", value)
    return (1, [(0, int(p)) if p.isdigit() and p.isascii() else (1, p) for p in parts])
