"""Single files of tensors: whole writes, mapped reads, no unpickling.

A file's ending says its format:

    .pt .pth       torch, one plain tensor; mapped when read
    .npy           numpy; mapped when read; bfloat16 becomes float32
    .npz           numpy, one array; read whole; bfloat16 becomes float32
    .safetensors   one tensor, or the queries, keys (and values) of an `Attention`; mapped

Mapped means that opening costs nothing and only the rows that are asked for come from the disk.

What is checked when a file is read: that its header can be, and that the file has the bytes that
the header speaks of; in `.npz` the values too, against a checksum. Values of mapped files are not:
a flipped bit in a weight is not seen, since a checksum would cost the reading of all of them. Runs
have one of every file (`vistvis info --check`).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vistvis.attention import DENSE_LIMIT, Attention, SiteInfo
from vistvis.attention.checks import bytes_text, describe
from vistvis.errors import DenseLimitError, InputError, StoreError, VistvisError
from vistvis.files import (
    PathLike,
    atomic_file,
    check_torch_archive,
    checked_name,
    checked_path,
    regular_file,
)
from vistvis.store.codec import attention_of, tensors_of
from vistvis.store.tensors import Encoded

# What the one tensor of a file is called where the format wants a name.
_NAME = "data"
# Names under which others keep the tensor that is meant, looked for in this order.
_USUAL_NAMES = (_NAME, "weights", "attn", "attention", "input", "images", "x", "arr_0")
_CONTENT = "vistvis attention 1"
_FACTS = ("scale", "causal", "site")


@dataclass(frozen=True)
class Contents:
    """The tensors of a file by name, and the words stored with them."""

    path: Path
    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)

    def one(self) -> Tensor:
        """The tensor that is meant: the only one or one of a usual name, else StoreError."""
        names = self.tensors if len(self.tensors) == 1 else _USUAL_NAMES
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise StoreError(
            f"{self.path} holds {', '.join(self.tensors) or 'no tensors'}; store one tensor, or "
            f"name it {_NAME!r}"
        )


def checked_format(file_name: str, what: str = "file_name") -> str:
    """A plain file name; `.pt` is added where it has no ending, InputError for an unknown one."""
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

    An `Attention` keeps its queries, keys and values in `.safetensors`; elsewhere its dense weights
    are written, if they take at most `max_bytes`, else DenseLimitError. The folder is made where it
    is missing; the file is whole or not there. InputError for other values and endings, StoreError
    if the disk is full, the folder read-only, and the like.
    """
    target = checked_path(path)
    target = target.with_name(checked_format(target.name, "the file"))
    ending = target.suffix.lower()
    if isinstance(value, Attention) and ending != ".safetensors":
        value = value.dense(max_bytes=max_bytes)
    contents = _contents(value, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            _FORMATS[ending].write(file, contents)
    except VistvisError:
        raise
    except (OSError, RuntimeError) as error:
        raise StoreError(f"can't write {target}: {_reason(error)}") from error
    return target


def _reason(error: BaseException) -> str:
    """The system's word where it has one: torch hides a full disk behind a RuntimeError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def _contents(value: Any, path: Path) -> Contents:
    about: dict[str, str] = {}
    if isinstance(value, Attention):
        value.check_unwritten()
        tensors, facts = tensors_of(value)
        facts["site"] = value.site and value.site.to_dict()
        about = {key: json.dumps(fact) for key, fact in facts.items() if fact is not None}
        about["content"] = _CONTENT
    else:
        tensors = {_NAME: _tensor(value)}
    for tensor in tensors.values():
        if not _is_dense(tensor):
            raise InputError(
                f"only a plain dense tensor can be stored, got {describe(tensor)}; call .to_dense()"
            )
    return Contents(path, tensors, about)


def _is_dense(tensor: Tensor) -> bool:
    unlike = tensor.is_meta or tensor.is_quantized or tensor.is_nested
    return tensor.layout == torch.strided and not unlike


def _tensor(value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:
            raise InputError(f"an array of {value.dtype} can't be stored as a tensor") from error
    if not isinstance(value, Tensor):
        raise InputError(
            f"what is stored is a tensor, an array or an Attention, got {describe(value)}"
        )
    return value


def _plain(contents: Contents) -> Tensor:
    """The tensor by itself in host memory: torch would save all that a view looks into."""
    plain = contents.one().detach().cpu().resolve_conj().resolve_neg().contiguous()
    alone = plain.untyped_storage().nbytes() == plain.nbytes
    return (plain if alone else plain.clone()).as_subclass(Tensor)


def _array(contents: Contents) -> np.ndarray[Any, Any]:
    plain = _plain(contents)
    try:
        return plain.numpy()
    except TypeError:  # numpy has no bfloat16 and no float8
        return plain.float().numpy()


def _write_npy(file: BinaryIO, contents: Contents) -> None:
    # By hand: of a full disk numpy only says how many values were written.
    array, layout = _array(contents), np.lib.format
    layout.write_array_header_1_0(file, layout.header_data_from_array_1_0(array))
    file.write(array.data)


def _write_safetensors(file: BinaryIO, contents: Contents) -> None:
    # Other readers of safetensors look for "format".
    file.writelines(Encoded(contents.tensors, {"format": "pt", **contents.about}).pieces())


# -- reading -------------------------------------------------------------------------------------


def read(path: PathLike, *, max_bytes: int = DENSE_LIMIT) -> Contents:
    """The tensors of a file, mapped where the format can be.

    Nothing in the file is ever run: StoreError if it holds more than plain dense tensors, is not
    there, damaged, or of another format. DenseLimitError if what is read whole (`.npz`) unpacks to
    more than the file itself and more than `max_bytes` (default 2 GiB).
    """
    source = checked_path(path)
    ending = source.suffix.lower()
    if ending not in FORMATS:
        raise StoreError(f"{source} is none of {', '.join(FORMATS)}: its ending says its format")
    regular_file(source).close()
    try:
        if ending == ".npz":
            _check_unpacked(source, max_bytes)
        contents = _FORMATS[ending].read(source)
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
    for name, tensor in contents.tensors.items():
        if not _is_dense(tensor):
            raise StoreError(f"{name!r} in {source} is no plain dense tensor; store .to_dense()")
    return contents


def read_attention(path: PathLike, *, max_bytes: int = DENSE_LIMIT) -> Attention:
    """Attention weights `(B, h, Nq, Nk)` or queries and keys from a file, lazily.

    Only rows that are asked for are read, except from `.npz`. Errors as in `read`; StoreError also
    if it holds no attention.
    """
    contents = read(path, max_bytes=max_bytes)
    ours = contents.about.get("content") == _CONTENT or {"query", "key"} <= set(contents.tensors)
    tensors = contents.tensors if ours else {"weights": contents.one()}
    try:
        about = {key: json.loads(contents.about.get(key, "null")) for key in _FACTS}
        site = SiteInfo.from_dict(about["site"]) if about["site"] else None
        return attention_of(tensors, about, site)
    except Exception as error:  # the words may be anything
        raise StoreError(f"{contents.path} holds no attention: {error}") from error


def _read_torch(path: Path) -> Contents:
    # The format before torch 1.6 can't be mapped.
    mapped = zipfile.is_zipfile(path)
    if mapped:
        check_torch_archive(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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


def _check_unpacked(path: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(path) as archive:
        size = sum(record.file_size for record in archive.infolist())
    if size > max(max_bytes, path.stat().st_size):
        raise DenseLimitError(
            f"{path} unpacks to {bytes_text(size)}, more than the limit of "
            f"{bytes_text(max_bytes)}; store it as .npy, of which only what is asked for is read, "
            "or read it with max_bytes=… if it does fit in memory"
        )


def _read_npz(path: Path) -> Contents:
    with np.load(path, allow_pickle=False) as arrays:
        return Contents(path, {name: _from_numpy(arrays[name]) for name in arrays.files})


def _read_safetensors(path: Path) -> Contents:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Contents(path, tensors, file.metadata() or {})


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


@dataclass(frozen=True)
class _Format:
    read: Callable[[Path], Contents]
    write: Callable[[BinaryIO, Contents], None]


_TORCH = _Format(_read_torch, lambda file, contents: torch.save(_plain(contents), file))
_FORMATS = {
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".npy": _Format(_read_npy, _write_npy),
    ".npz": _Format(_read_npz, lambda file, contents: np.savez(file, data=_array(contents))),
    ".safetensors": _Format(_read_safetensors, _write_safetensors),
}
FORMATS = tuple(_FORMATS)
