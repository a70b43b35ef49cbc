"""Where stored layers and their pictures lie, and what has to be known about the tokens."""

from __future__ import annotations

import json
import operator
import os
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from vistvis.errors import InputError, StoreError, VistvisError
from vistvis.files import checked_name, checked_path, inside, regular_file
from vistvis.store.formats import FORMATS
from vistvis.tokens import TokenLayout
from vistvis.views.overlay_folder import folder_names

METADATA_VARIABLE = "VIS_TVIS_METADATA_PATH"
# Of a file with two numbers in it.
_MOST_BYTES = 4096


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
        base = os.path.expanduser(checked_path(self.base_dir))
        object.__setattr__(self, "base_dir", os.fspath(base))
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
        return sorted(n for n in folder_names(self.attn_root, "layer_") if isinstance(n, int))

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
        special: Any = self.num_special_tokens  # the layout takes a number too
        return TokenLayout(frames, grid, special, (self.patch_size, self.patch_size))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, json_str: str) -> StaticMetadata:
        """The reverse of `to_json`."""
        try:
            data = json.loads(json_str)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}") from error
        return cls._from(data, "the JSON text")

    @classmethod
    def from_yaml_file(cls, file_path: str | os.PathLike[str]) -> StaticMetadata:
        """From a YAML file with `patch_size` and `num_special_tokens`.

        InputError if it has not both, is larger than 4 KB, or has aliases (`*name`), which can
        make much of little; StoreError if there is no such file.
        """
        import yaml

        where = os.fspath(file_path)
        try:
            with regular_file(file_path) as file:
                text = file.read(_MOST_BYTES + 1)
        except VistvisError:
            raise
        except OSError as error:
            raise StoreError(f"can't read {where}: {error.strerror}") from error
        if len(text) > _MOST_BYTES:
            raise InputError(f"{where} is larger than {_MOST_BYTES} bytes; keep the two numbers")
        try:
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                raise InputError(f"{where} has aliases (*name); write the values themselves")
            data = yaml.safe_load(text)
        except InputError:
            raise
        # Dates that are none are a ValueError, and keys that are none a TypeError.
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
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
            raise InputError(f"{where} needs {' and '.join(names)}, has {reprlib.repr(data)}")
        return cls(*(data[name] for name in names))
