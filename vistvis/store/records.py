"""What a run says of each of its files: how it is sealed, named, and known to be sound."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from vistvis.attention import Attention, SiteInfo
from vistvis.errors import InputError, LayoutError, StoreError
from vistvis.names import few
from vistvis.store.codec import HOLDINGS, attention_of
from vistvis.store.folders import SITES, Folder
from vistvis.store.tensors import DTYPES, Encoded, TensorRecord, check_header, checksum, tensors_in
from vistvis.tokens import TokenLayout

# What a run holds of its scene, each in a file of its own.
SCENE = ("images", "points", "confidence", "cameras")

# Names of files as writers make them, the last with a token of the writer's own. A manifest is data
# from elsewhere: any other name in it, one that leaves the folder first of all, is refused.
SITE_FILE = re.compile(rf"{SITES}/[A-Za-z0-9_][A-Za-z0-9._+-]{{0,200}}\.safetensors")
SCENE_FILE = re.compile(rf"({'|'.join(SCENE)})(-[0-9]{{1,9}}|-[0-9a-f]{{8}})?\.safetensors")
RECORD_FILE = re.compile(rf"{SITES}/[A-Za-z0-9_][A-Za-z0-9._+-]{{0,200}}-[0-9a-f]{{8}}\.json")
_TOKEN = re.compile(r"-([0-9a-f]{8})\.(safetensors|json)")

# What data of other types and values than a writer's make Python raise. Ours are ValueErrors too.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def is_file_of_run(name: str) -> bool:
    return any(kind.fullmatch(name) for kind in (SITE_FILE, SCENE_FILE, RECORD_FILE))


def token_of(name: str) -> str | None:
    """The token of the writer that made a file of a run, where its name has one."""
    match = _TOKEN.search(name)
    return match[1] if match and match.end() == len(name) and is_file_of_run(name) else None


# -- JSON with a checksum -------------------------------------------------------------------------

_SEAL = re.compile(rb',\n "crc32": "([0-9a-f]{8})"\n\}\n')
_SEAL_BYTES = len(b',\n "crc32": "01234567"\n}\n')


def sealed(data: Mapping[str, Any]) -> bytes:
    """An object as JSON; its last key is the checksum of every byte before."""
    body = json.dumps(data, indent=1, allow_nan=False)[: -len("\n}")].encode()
    return body + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body)


def unsealed(text: bytes, where: str) -> tuple[dict[str, Any], bool]:
    """The object of such a text and whether it has a checksum; StoreError if that disagrees."""
    seal = _SEAL.fullmatch(text[-_SEAL_BYTES:])
    if seal and int(seal[1], 16) != zlib.crc32(text[:-_SEAL_BYTES]):
        raise StoreError(f"{where} is damaged: its checksum does not agree")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is damaged: it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise StoreError(f"{where} is damaged: it is no JSON object")
    if seal:
        data.pop("crc32", None)
    return data, bool(seal)


def check_keys(data: Any, what: str, keys: Iterable[str], *, optional: Iterable[str] = ()) -> None:
    """A TypeError or ValueError for what is no object, or has other keys than it should."""
    if not isinstance(data, dict):
        raise TypeError(f"{what} is {type(data).__name__}, not an object")
    if unknown := sorted(set(data) - {*keys, *optional}):
        raise ValueError(f"{what} has unknown keys {few(unknown)}")
    if missing := [key for key in keys if key not in data]:
        raise ValueError(f"{what} lacks {few(missing)}")


def layout_from(data: Any) -> TokenLayout:
    keys = ("frames", "grid", "special", "patch_size")
    check_keys(data, "a layout", keys, optional=("behind", "before", "after"))
    return TokenLayout.from_dict(data)


def _site_from(data: Any) -> SiteInfo:
    site = SiteInfo.from_dict(data)
    # What is a tensor there is none here.
    check_keys(data, "a site", (), optional={*site.to_dict(), "path", "first_frame"})
    for side in ("query_layout", "key_layout"):
        if data.get(side):
            layout_from(data[side])
    return site


# -- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    file: str
    nbytes: int
    crc32: int
    tensors: Mapping[str, TensorRecord]

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "bytes": self.nbytes,
            "crc32": f"{self.crc32:08x}",
            "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()},
        }

    @classmethod
    def from_dict(cls, data: Any, pattern: re.Pattern[str]) -> FileRecord:
        check_keys(data, "a file", ("file", "bytes", "crc32", "tensors"))
        file = data["file"]
        if not isinstance(file, str) or not pattern.fullmatch(file):
            raise ValueError(f"no file of a run is named {file!r}")
        for tensor in data["tensors"].values():
            check_keys(tensor, "a tensor", ("dtype", "shape"))
        tensors = {
            name: TensorRecord(tensor["dtype"], _sizes(tensor["shape"]))
            for name, tensor in data["tensors"].items()
        }
        if unknown := {tensor.dtype for tensor in tensors.values()} - set(DTYPES):
            raise ValueError(f"unknown dtype {unknown.pop()!r}")
        return cls(file, _whole(data["bytes"]), int(data["crc32"], 16), tensors)

    def is_of(self, encoded: Encoded) -> bool:
        """Whether these tensors make this file. Cost: one pass over them."""
        return self.nbytes == encoded.nbytes and self.crc32 == encoded.crc32()

    def damage(self, folder: Folder, sizes: Mapping[str, int]) -> str | None:
        """What is wrong with the file's size or header, or None; `sizes` are the folder's."""
        where, size = folder.where(self.file), sizes.get(self.file)
        if size is None:
            return f"{where} is not there"
        if size != self.nbytes:
            return f"{where} is damaged: it has {size:,} bytes, and should have {self.nbytes:,}"
        try:
            if path := folder.local(self.file):
                check_header(path, self.tensors, where)
        except StoreError as error:
            return str(error)
        except OSError as error:
            return f"{where} can't be read: {error.strerror or error}"
        return None

    def load(self, folder: Folder) -> dict[str, Tensor]:
        """The tensors, mapped where they can be, after a pass over the file for its checksum."""
        where, source = folder.where(self.file), folder.local(self.file) or folder.read(self.file)
        size, crc = checksum(source)
        if (size, crc) != (self.nbytes, self.crc32):
            raise StoreError(
                f"{where} is damaged: its {size:,} bytes have the checksum {crc:08x}, and should "
                f"be {self.nbytes:,} with {self.crc32:08x}"
            )
        return tensors_in(source, self.tensors, where)


@dataclass(frozen=True)
class SiteRecord:
    """One finished site: its file, and what `Attention` needs beside the tensors.

    `scale` is None where it is one of the tensors; given weights have neither it nor `causal`.
    The orders of the site are tensors, and not in `site`.
    """

    file: FileRecord
    shape: tuple[int, ...]
    site: SiteInfo
    scale: float | None = 1.0
    causal: bool = False

    def __post_init__(self) -> None:
        plain = replace(self.site, query_order=None, key_order=None, frame_order=None)
        object.__setattr__(self, "site", plain)

    @property
    def holds(self) -> str:
        """`"qk"` or `"weights"`: what the manifest calls the kind."""
        return "weights" if "weights" in self.file.tensors else "qk"

    @property
    def dtype(self) -> str:
        """Of the queries and keys, or of the weights, as in `TensorRecord`."""
        return self.file.tensors["query" if self.holds == "qk" else "weights"].dtype

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.holds,
            "shape": self.shape,
            "dtype": self.dtype,
            "scale": self.scale,
            "causal": self.causal,
            "site": self.site.to_dict(),
            **self.file.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> SiteRecord:
        own = ("kind", "shape", "dtype", "scale", "causal", "site")
        check_keys(data, "a site", (*own, "file", "bytes", "crc32", "tensors"))
        rest = {key: value for key, value in data.items() if key not in own}
        file = FileRecord.from_dict(rest, SITE_FILE)
        holds = data["kind"]
        needed, allowed = HOLDINGS[holds]
        if not needed <= set(file.tensors) <= allowed:
            raise ValueError(f"{holds} needs {sorted(needed)}, found {sorted(file.tensors)}")
        shape = _sizes(data["shape"])
        if len(shape) != 4:
            raise ValueError(f"attention has 4 dimensions, not {shape}")
        scale, causal = data["scale"], data["causal"]
        if (scale is None) != ("scale" in file.tensors):
            raise ValueError(f"scale is {scale!r}, and its tensors are {sorted(file.tensors)}")
        scale = None if scale is None else float(scale)
        if not math.isfinite(scale or 0):
            raise ValueError("scale is not finite")
        if not isinstance(causal, bool):
            raise TypeError(f"causal is {causal!r}")
        record = cls(file, shape, _site_from(data["site"]), scale, causal)
        if data["dtype"] != record.dtype:
            raise ValueError(f"dtype is {data['dtype']!r}, and that of the tensors {record.dtype}")
        return record

    def load(self, folder: Folder) -> Attention:
        """The site, as `FileRecord.load`; StoreError also if its tensors do not fit."""
        tensors = self.file.load(folder)
        try:
            attention = attention_of(tensors, vars(self), self.site)
            if tuple(attention.shape) != self.shape:
                raise InputError(
                    f"it gives attention of shape {tuple(attention.shape)}, the manifest says "
                    f"{self.shape}"
                )
        except (InputError, LayoutError) as error:
            raise StoreError(f"{folder.where(self.file.file)} does not fit: {error}") from error
        return attention


def _sizes(values: Any) -> tuple[int, ...]:
    return tuple(_whole(value) for value in values)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
