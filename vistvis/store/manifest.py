"""The manifest: what a run says about itself, and how to know that its files are sound."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from vistvis.attention import Attention, SiteInfo
from vistvis.errors import InputError, StoreError
from vistvis.store.codec import HOLDINGS, attention_of
from vistvis.store.folders import Folder
from vistvis.store.tensors import DTYPES, Encoded, TensorRecord, check_header, checksum, tensors_in
from vistvis.tokens import TokenLayout

FORMAT = "vistvis-run"
SCHEMA = 1
NAME = "manifest.json"
# What replaces an earlier run gathers under this name, and takes the other in one rename.
NEXT = "manifest.next.json"
# What was replaced, until its files are removed: so a writer killed meanwhile leaves no orphans.
OLD = "manifest.old.json"

# What data of other types and values than a writer's make Python raise. Ours are ValueErrors too.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)

# Names of files as the writer makes them. A manifest is data from elsewhere: any other name in it,
# one that leaves the folder first of all, is refused.
SITE_FILE = re.compile(r"sites/[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}\.safetensors")
IMAGES_FILE = re.compile(r"images(-[0-9]{1,9})?\.safetensors")


class NewerSchemaError(StoreError):
    """A manifest that is no damage, but of a later version of this package."""


def is_file_of_run(name: str) -> bool:
    return bool(SITE_FILE.fullmatch(name) or IMAGES_FILE.fullmatch(name))


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
    def from_dict(cls, data: Mapping[str, Any], pattern: re.Pattern[str]) -> FileRecord:
        file = data["file"]
        if not isinstance(file, str) or not pattern.fullmatch(file):
            raise ValueError(f"no file of a run is named {file!r}")
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
        except (StoreError, OSError) as error:
            return str(error)
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
    """

    file: FileRecord
    shape: tuple[int, ...]
    site: SiteInfo
    scale: float | None = 1.0
    causal: bool = False

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
    def from_dict(cls, data: Mapping[str, Any]) -> SiteRecord:
        file = FileRecord.from_dict(data, SITE_FILE)
        holds = data["kind"]
        needed, allowed = HOLDINGS[holds]
        if not needed <= set(file.tensors) <= allowed:
            raise ValueError(f"{holds} needs {sorted(needed)}, found {sorted(file.tensors)}")
        shape = _sizes(data["shape"])
        if len(shape) != 4:
            raise ValueError(f"attention has 4 dimensions, not {shape}")
        scale, causal = data["scale"], data["causal"]
        scale = None if scale is None else float(scale)
        if not math.isfinite(scale or 0):
            raise ValueError("scale is not finite")
        if not isinstance(causal, bool):
            raise TypeError(f"causal is {causal!r}")
        return cls(file, shape, SiteInfo.from_dict(data["site"]), scale, causal)

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
        except InputError as error:
            raise StoreError(f"{folder.where(self.file.file)} does not fit: {error}") from error
        return attention


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; `model`, `layout` and `metadata` as for `RunWriter`.

    A run that is not `closed` has no orderly end: it may lack sites that nobody announced.
    """

    writer: str
    expected: tuple[str, ...] = ()
    closed: bool = False
    model: str | None = None
    layout: TokenLayout | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    images: FileRecord | None = None
    sites: Mapping[str, SiteRecord] = field(default_factory=dict)
    made_by: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Expected sites that are not finished, in order."""
        return tuple(name for name in self.expected if name not in self.sites)

    @property
    def complete(self) -> bool:
        return self.closed and not self.missing

    @property
    def files(self) -> list[FileRecord]:
        images = [self.images] if self.images else []
        return [record.file for record in self.sites.values()] + images

    def with_site(self, name: str, record: SiteRecord) -> Manifest:
        expected = self.expected if name in self.expected else (*self.expected, name)
        return replace(self, expected=expected, sites={**self.sites, name: record})

    def damage(self, folder: Folder) -> dict[str, str]:
        """What is wrong with the sizes and headers of files, by their names in the folder."""
        sizes = folder.sizes()
        problems = ((record.file, record.damage(folder, sizes)) for record in self.files)
        return {file: problem for file, problem in problems if problem}

    def without(self, files: Container[str]) -> Manifest:
        """The manifest of what is left when some files are gone."""
        sites = {name: r for name, r in self.sites.items() if r.file.file not in files}
        gone = self.images is not None and self.images.file in files
        return replace(self, sites=sites, images=None if gone else self.images)

    def to_json(self) -> bytes:
        data = {
            "format": FORMAT,
            "schema": SCHEMA,
            "made_by": self.made_by,
            "writer": self.writer,
            "model": self.model,
            "layout": self.layout.to_dict() if self.layout else None,
            "metadata": self.metadata,
            "closed": self.closed,
            "expected": self.expected,
            "missing": self.missing,
            "images": self.images.to_dict() if self.images else None,
            "sites": {name: record.to_dict() for name, record in self.sites.items()},
        }
        return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Read and check a manifest; a StoreError if it is none, damaged or newer."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{where} is damaged: it is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StoreError(f'{where} is not the manifest of a run: no "format": "{FORMAT}" in it')
        schema = data.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise StoreError(f"{where} is damaged: its schema version is {schema!r}")
        if schema > SCHEMA:
            raise NewerSchemaError(
                f"{where} has schema version {schema} (written by {data.get('made_by')!r}), and "
                f"this version of vistvis reads up to {SCHEMA}; update vistvis"
            )
        try:
            return cls._from_data(data)
        except _MALFORMED as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
            raise StoreError(f"{where} is damaged: {reason}") from error

    @classmethod
    def _from_data(cls, data: Mapping[str, Any]) -> Manifest:
        expected = tuple(data["expected"])
        sites = {name: SiteRecord.from_dict(entry) for name, entry in data["sites"].items()}
        if not all(isinstance(name, str) for name in (*expected, *sites)):
            raise TypeError("names of sites are strings")
        layout, images = data["layout"], data["images"]
        if not isinstance(data["metadata"], dict) or not isinstance(data["closed"], bool):
            raise TypeError("metadata is an object and closed is true or false")
        for key in ("writer", "made_by", "model"):
            if not isinstance(data[key], str) and not (key == "model" and data[key] is None):
                raise TypeError(f"{key} is {data[key]!r}")
        pictures = FileRecord.from_dict(images, IMAGES_FILE) if images is not None else None
        if pictures is not None and set(pictures.tensors) != {"images"}:
            raise ValueError(f"images hold {sorted(pictures.tensors)}")
        return cls(
            writer=data["writer"],
            expected=tuple(dict.fromkeys((*expected, *sites))),
            closed=data["closed"],
            model=data["model"],
            layout=TokenLayout.from_dict(layout) if layout is not None else None,
            metadata=data["metadata"],
            images=pictures,
            sites=sites,
            made_by=data["made_by"],
        )


def _sizes(values: Any) -> tuple[int, ...]:
    return tuple(_whole(value) for value in values)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
