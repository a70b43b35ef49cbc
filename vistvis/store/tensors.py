"""Tensors as a safetensors file: written in pieces with a checksum on the way, read by mapping.

The library's own writer takes whole contiguous tensors and leaves the checksum to a second pass.
Queries and keys are views into a projection, and a run is written while a model runs, so here each
head is copied, summed and written by itself. Reading is the library's.

The checksum is CRC-32 as zlib computes it: 3 GiB/s on the machine where BLAKE2b reached 0.6 and
SHA-256 1.2, in every Python, and sure to notice any damaged stretch of up to 32 bits (others with
odds of 1 in 4 billion to miss). It is there against damage, not against forgery: nothing read from
a run is ever run as code, so a forged file gives wrong pictures at worst.
"""

from __future__ import annotations

import contextlib
import functools
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistvis.errors import StoreError

# What safetensors can hold, by its code.
DTYPES: dict[str, torch.dtype] = {
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (64, 32, 16)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (64, 32, 16, 8)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (64, 32, 16, 8)},
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

_ALIGNMENT = 64
# Files are read in pieces of this size, and views that are larger are copied part by part.
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class TensorRecord:
    """One stored tensor; `dtype` is safetensors' code, such as `"BF16"`."""

    dtype: str
    shape: tuple[int, ...]


class Encoded:
    """The bytes of a safetensors file for some tensors, made piece by piece.

    The same tensors always give the same bytes. `words` are what the file says beside them.
    StoreError where safetensors has no code for a dtype.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], words: Mapping[str, str] | None = None
    ) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype not in CODES:
                raise StoreError(
                    f"{name} is {tensor.dtype}, which safetensors can't hold; cast it, for "
                    "example with attention.to(torch.float32)"
                )
        # Widest first: every tensor then starts at a multiple of its item size.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self.tensors = {name: tensors[name].detach() for name in order}
        self.records = _records(self.tensors)
        self._header = self._made_header(words)
        self.nbytes = len(self._header) + sum(tensor.nbytes for tensor in self.tensors.values())

    def _made_header(self, words: Mapping[str, str] | None) -> bytes:
        entries: dict[str, Any] = {"__metadata__": dict(words)} if words else {}
        start = 0
        for name, record in self.records.items():
            span = [start, start + self.tensors[name].nbytes]
            entries[name] = {"dtype": record.dtype, "shape": record.shape, "data_offsets": span}
            start = span[1]
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
        return functools.reduce(lambda crc, piece: zlib.crc32(piece, crc), self.pieces(), 0)


def crc32_of(tensor: Tensor) -> int:
    """The checksum of a tensor's values. Cost: one pass over them."""
    return functools.reduce(lambda crc, piece: zlib.crc32(piece, crc), _pieces(tensor.detach()), 0)


def _pieces(tensor: Tensor) -> Iterator[Any]:
    if tensor.numel() == 0:
        return
    if tensor.nbytes > _PIECE_BYTES and tensor.ndim > 2 and not tensor.is_contiguous():
        for part in tensor:
            yield from _pieces(part)
        return
    whole = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    yield whole.reshape(-1).view(torch.uint8).numpy().data


def _records(tensors: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    return {
        name: TensorRecord(CODES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


# -- reading -------------------------------------------------------------------------------------


def checksum(source: Path | bytes) -> tuple[int, int]:
    """Size and checksum of a file or its bytes. Cost: one pass, of a file 4 MB at a time."""
    if isinstance(source, bytes):
        return len(source), zlib.crc32(source)
    crc = size = 0
    with open(source, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            size += count
    return size, crc


def check_header(path: Path, records: Mapping[str, TensorRecord], where: str) -> None:
    """StoreError if a file is not a safetensors file of just these tensors. No data is read."""
    from safetensors import safe_open

    try:
        # As if for numpy, which opens faster: torch would map the file.
        with _damage_of(where), safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            header = {
                n: TensorRecord(p.get_dtype(), tuple(p.get_shape())) for n, p in parts.items()
            }
            _compare(header, records, where)
    except FileNotFoundError:
        # What safetensors says of every file that can't be opened; Python says why.
        with open(path, "rb"):
            raise


def tensors_in(
    source: Path | bytes, records: Mapping[str, TensorRecord], where: str
) -> dict[str, Tensor]:
    """The tensors of a file, mapped (pages come from disk when they are touched), or of its bytes.

    Writing into a mapped tensor does not reach the file. StoreError as `check_header`.
    """
    from safetensors.torch import load, load_file

    with _damage_of(where):
        tensors = load(source) if isinstance(source, bytes) else load_file(source)
    _compare(_records(tensors), records, where)
    return tensors


@contextlib.contextmanager
def _damage_of(where: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise StoreError(f"{where} is damaged: {error}") from error


def _compare(
    header: Mapping[str, TensorRecord], records: Mapping[str, TensorRecord], where: str
) -> None:
    if header != dict(records):
        raise StoreError(
            f"{where} is damaged: it should hold {_listed(records)}, its header says "
            f"{_listed(header)}"
        )


def _listed(records: Mapping[str, TensorRecord]) -> str:
    return ", ".join(f"{name} {r.dtype} {list(r.shape)}" for name, r in sorted(records.items()))
