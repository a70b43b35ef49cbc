"""Single files of tensors: whole writes, mapped reads, no unpickling.

A file's ending says its format:

    .pt .pth       torch, one plain tensor; mapped when read
    .npy           numpy; mapped when read; bfloat16 becomes float32
    .npz           numpy, one array; read whole; bfloat16 becomes float32
    .safetensors   one tensor, or the queries and keys of an `Attention`; mapped when read

Mapped means that opening costs nothing and only the rows that are asked for come from the disk.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vistvis.attention import DENSE_LIMIT, Attention
from vistvis.attention.checks import describe
from vistvis.attention.site import SiteInfo
from vistvis.errors import InputError, StoreError, VistvisError
from vistvis.files import PathLike, atomic_file, checked_name

FORMATS = (".pt", ".pth", ".npy", ".npz", ".safetensors")
# What the one tensor of a file is called where the format wants a name.
_NAME = "data"
# Names under which others keep the tensor that is meant, looked for in this order.
_USUAL_NAMES = (_NAME, "weights", "attn", "attention", "input", "images", "x", "arr_0")
_CONTENT = "vistvis attention 1"


def checked_format(file_name: str, what: str = "file_name") -> str:
    """A plain file name with an ending that is known; without one, `.pt` is added.

    Raises
    ------
    InputError
        For another ending.
    """
    name = checked_name(file_name, what)
    ending = Path(name).suffix.lower()
    if not ending:
        return f"{name}.pt"
    if ending not in FORMATS:
        raise InputError(
            f"{what} ends in one of {', '.join(FORMATS)}, or has no ending and gets .pt; got "
            f"{name!r}"
        )
    return name


# -- writing -------------------------------------------------------------------------------------


def write(value: Any, path: PathLike, *, max_bytes: int = DENSE_LIMIT) -> Path:
    """Write a tensor, an array or an `Attention`; the ending chooses the format.

    An `Attention` keeps its queries and keys in `.safetensors`; elsewhere its dense weights are
    written, if they take at most `max_bytes`. The folder is made where it is missing; the file is
    whole or not there.

    Raises
    ------
    InputError
        For other values and endings.
    DenseLimitError
        If dense weights would be too large.
    StoreError
        If the disk is full, the folder read-only, and the like.
    """
    target = Path(path)
    checked_format(target.name, "the file")
    ending = target.suffix.lower()
    tensors, about = _content(value, ending, max_bytes)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            _WRITERS[ending](file, tensors, about)
    except VistvisError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise StoreError(
            f"can't write {target}: {getattr(error, 'strerror', 0) or error}"
        ) from error
    return target


def _content(value: Any, ending: str, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and what else has to be kept."""
    about: dict[str, str] = {}
    if isinstance(value, Attention):
        if value.site is not None:
            about["site"] = json.dumps(value.site.to_dict())
        if ending != ".safetensors":
            return {_NAME: _plain(value.dense(max_bytes=max_bytes))}, about
        about["content"] = _CONTENT
        if value.weights is not None:
            return {"weights": _plain(value.weights)}, about
        parts = {"query": value.query, "key": value.key, "mask": value.mask}
        if isinstance(value.scale, Tensor):
            parts["scale"] = value.scale
        else:
            about["scale"] = repr(float(value.scale))
        about["causal"] = json.dumps(value.causal)
        return {name: _plain(part) for name, part in parts.items() if part is not None}, about
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:
            raise InputError(f"an array of {value.dtype} can't be stored as a tensor") from error
    if not isinstance(value, Tensor):
        raise InputError(
            f"what is stored is a tensor, an array or an Attention, got {describe(value)}"
        )
    return {_NAME: _plain(value)}, about


def _plain(tensor: Tensor) -> Tensor:
    """A tensor of its own in host memory: torch would save all that a view looks into."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise InputError(
            f"only a plain dense tensor can be stored, got {describe(tensor)}; call .to_dense()"
        )
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.untyped_storage().nbytes() != plain.nbytes:
        plain = plain.clone()
    return plain.as_subclass(Tensor)


def _write_torch(file: BinaryIO, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    torch.save(tensors[_NAME], file)


def _write_npy(file: BinaryIO, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    np.save(file, _as_numpy(tensors[_NAME]), allow_pickle=False)


def _write_npz(file: BinaryIO, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    arrays: dict[str, Any] = {_NAME: _as_numpy(tensors[_NAME])}
    np.savez(file, **arrays)


def _write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], about: Mapping[str, str]
) -> None:
    from safetensors.torch import save

    # The library wants no storage twice; grouped or self-attending models may share one.
    own = {name: tensor.clone() if name == "key" else tensor for name, tensor in tensors.items()}
    file.write(save(own, metadata={"format": "pt", **about}))


_WRITERS = {
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}


def _as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    try:
        return tensor.numpy()
    except TypeError:  # numpy has no bfloat16 and no float8
        return tensor.float().numpy()


# -- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """The tensors of a file by name, and the words stored with them."""

    path: Path
    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)

    def one(self) -> Tensor:
        """The tensor that is meant: the only one, or the one under a usual name.

        Raises
        ------
        StoreError
            If that can't be told.
        """
        if len(self.tensors) == 1:
            return next(iter(self.tensors.values()))
        for name in _USUAL_NAMES:
            if name in self.tensors:
                return self.tensors[name]
        raise StoreError(
            f"{self.path} holds {', '.join(self.tensors) or 'no tensors'}; store one tensor, or "
            f"name it {_NAME!r}"
        )


def read(path: PathLike) -> Contents:
    """The tensors of a file, mapped where the format can be.

    Nothing in the file is ever run: what is more than tensors is refused.

    Raises
    ------
    StoreError
        If the file is not there, damaged, of another format, or holds more than plain tensors.
    """
    source = Path(path)
    ending = source.suffix.lower()
    if ending not in FORMATS:
        raise StoreError(f"{source} is none of {', '.join(FORMATS)}: its ending says its format")
    if not source.is_file():
        raise StoreError(f"no file {source}")
    try:
        return _READERS[ending](source)
    except VistvisError:
        raise
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{source} holds more than plain tensors and was not loaded, since that could run "
            "code; store the tensor alone with torch.save(tensor, path)"
        ) from error
    except Exception as error:  # every library has errors of its own for a damaged file
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise StoreError(f"can't read {source}: {first}") from error


def read_attention(path: PathLike) -> Attention:
    """Attention weights `(B, h, Nq, Nk)` or queries and keys from a file, lazily.

    Only rows that are asked for are read, except from `.npz`.

    Raises
    ------
    StoreError
        As `read`; also if it holds no attention.
    """
    contents = read(path)
    tensors, about = contents.tensors, contents.about
    site = SiteInfo.from_dict(json.loads(about["site"])) if about.get("site") else None
    try:
        if "query" in tensors and "key" in tensors:
            scale = float(about["scale"]) if "scale" in about else None
            return Attention(
                query=tensors["query"],
                key=tensors["key"],
                scale=tensors.get("scale", scale),
                mask=tensors.get("mask"),
                causal=json.loads(about.get("causal", "false")),
                site=site,
            )
        return Attention.from_weights(contents.one(), site=site)
    except InputError as error:
        raise StoreError(f"{contents.path} holds no attention: {error}") from error


def _read_torch(path: Path) -> Contents:
    if zipfile.is_zipfile(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    else:  # the format before torch 1.6 can't be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        loaded = {_NAME: loaded}
    if not isinstance(loaded, Mapping):
        raise StoreError(f"{path} holds a {type(loaded).__name__}; store a tensor")
    tensors = {
        str(name): part.detach() for name, part in loaded.items() if isinstance(part, Tensor)
    }
    return Contents(path, tensors)


def _read_npy(path: Path) -> Contents:
    # Mapped copy-on-write: torch wants memory that it could write to, and the file stays as it is.
    return Contents(path, {_NAME: _from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))})


def _read_npz(path: Path) -> Contents:
    with np.load(path, allow_pickle=False) as arrays:
        return Contents(path, {name: _from_numpy(arrays[name]) for name in arrays.files})


def _read_safetensors(path: Path) -> Contents:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Contents(path, tensors, file.metadata() or {})


_READERS = {
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(
        array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    )
