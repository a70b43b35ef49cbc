"""Tensors as a safetensors file: written in pieces with a checksum on the way, read by mapping.

The library's own writer takes whole contiguous tensors and leaves the checksum to a second pass
over the file. Queries and keys are views into a projection, and a run is written while a model
runs, so here each head is copied, summed and written by itself. Reading is the library's.

The checksum is CRC-32 as zlib computes it: 3 GiB/s on the machine where BLAKE2b reached 0.6 and
SHA-256 1.2, in every Python, and sure to notice any damaged stretch of up to 32 bits (others with
odds of 1 in 4 billion to miss). It is there against damage, not against forgery: nothing read from
a run is ever run as code, so a forged file gives wrong pictures at worst.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistvis.errors import StoreError

CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}

_ALIGNMENT = 64
_READ_BYTES = 4 * 2**20
# Views larger than this are copied part by part.
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class TensorRecord:
    """Type and shape of one stored tensor; `dtype` is safetensors' code, such as `"BF16"`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Encoded:
    """The bytes of a safetensors file for some tensors, made piece by piece.

    The same tensors always give the same bytes.

    Raises
    ------
    StoreError
        If safetensors has no code for a dtype.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype not in CODES:
                raise StoreError(
                    f"{name} is {tensor.dtype}, which safetensors can't hold; cast it, for "
                    "example with attention.to(torch.float32)"
                )
        # Widest first: every tensor then starts at a multiple of its item size.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self.tensors = {name: tensors[name].detach() for name in order}
        self.records = {
            name: TensorRecord(CODES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        }
        self._header = self._make_header()
        self.nbytes = len(self._header) + sum(record.nbytes for record in self.records.values())

    def _make_header(self) -> bytes:
        entries: dict[str, Any] = {}
        start = 0
        for name, record in self.records.items():
            end = start + record.nbytes
            shape = list(record.shape)
            entries[name] = {"dtype": record.dtype, "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        # The format lets the header end in spaces; so the data start where loads are fast.
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def pieces(self) -> Iterator[Any]:
        """Everything in order, as objects with the buffer interface."""
        yield self._header
        for tensor in self.tensors.values():
            yield from _pieces(tensor)

    def crc32(self) -> int:
        """The checksum, without writing anything. Cost: one pass over the tensors."""
        crc = 0
        for piece in self.pieces():
            crc = zlib.crc32(piece, crc)
        return crc


def _pieces(tensor: Tensor) -> Iterator[Any]:
    if tensor.numel() == 0:
        return
    if tensor.nbytes > _PIECE_BYTES and tensor.ndim > 2 and not tensor.is_contiguous():
        for part in tensor:
            yield from _pieces(part)
        return
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    yield flat.numpy().data


def crc32_of_file(path: Path) -> tuple[int, int]:
    """Size and checksum of a file. Cost: one pass over it, 4 MB at a time."""
    crc = size = 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_READ_BYTES))
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            size += count
    return size, crc


def check_header(path: Path, records: Mapping[str, TensorRecord]) -> None:
    """Compare a file's header with what it should hold, without reading the data.

    Raises
    ------
    StoreError
        If it is no safetensors file, or holds other tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: TensorRecord(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if found != dict(records):
        raise StoreError(
            f"{path} is damaged: it should hold {_listed(records)}, its header says "
            f"{_listed(found)}"
        )


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: pages come from disk when they are touched.

    The mapping is private: writing into a tensor does not reach the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def from_bytes(data: bytes, where: str, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
    """The tensors of a file that was read whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise StoreError(f"{where} is damaged: {error}") from error
    found = {name: TensorRecord(CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    if found != dict(records):
        raise StoreError(
            f"{where} is damaged: it should hold {_listed(records)}, its header says "
            f"{_listed(found)}"
        )
    return tensors


def _listed(records: Mapping[str, TensorRecord]) -> str:
    return ", ".join(f"{name} {r.dtype} {list(r.shape)}" for name, r in sorted(records.items()))
