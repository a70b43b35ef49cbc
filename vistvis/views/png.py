"""PNG files written quickly: one filter and run lengths, since every overlay is a photograph.

Overlays come by the hundred, and encoding them is most of the work. The usual encoder tries five
filters on every line and then searches for repetitions, which photographs hardly have. The average
filter for all lines and run-length matching with Huffman codes (`Z_RLE`) take 8 ms for an overlay
of 518×518 pixels, one thread; Pillow takes 64 ms by default and 19 ms with `Z_RLE` (files 2 %
smaller), since it tries the filters all the same. With that an overlay is drawn 4 times faster than
by the published package and not 10 times, and the bar of `benchmarks/overlay.py` is 6.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange

from vistvis.errors import InputError, StoreError
from vistvis.files import atomic_file, checked_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Pictures encoded or decoded at once; more would only wait for each other.
THREADS = min(4, os.cpu_count() or 1)

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUECOLOUR = 2
_AVERAGE = 3
_CHANNELS = 3


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A picture, uint8 `(H, W, 3)` or an InputError, as the bytes of a PNG file, without loss.

    The format is ISO/IEC 15948; the average filter is its section 9.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != _CHANNELS or not image.size:
        raise InputError(f"a picture to encode is uint8 (H, W, 3), got {image.dtype} {image.shape}")
    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _TRUECOLOUR, 0, 0, 0)
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    data = packer.compress(_filtered(image).data) + packer.flush()
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(name, content) for name, content in parts)


def _filtered(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every line as its filter's number and the bytes less the mean of those to the left and above.

    The mean is rounded down, and bytes outside the picture count as zero.
    """
    lines = np.ascontiguousarray(rearrange(image, "line column channel -> line (column channel)"))
    result = np.empty((len(lines), lines.shape[1] + 1), np.uint8)
    result[:, 0] = _AVERAGE
    left = np.zeros_like(lines)
    left[:, _CHANNELS:] = lines[:, :-_CHANNELS]
    above = np.zeros_like(lines)
    above[1:] = lines[:-1]
    # floor((a + b) / 2) in 8 bits: the bits that both have, and half of those that differ.
    mean = left & above
    left ^= above
    left >>= 1
    mean += left
    np.subtract(lines, mean, out=result[:, 1:])
    return result


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(name))
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def write_pngs(paints: Mapping[str, Callable[[], NDArray[np.uint8]]]) -> dict[str, str]:
    """Paint, encode and write files in a few threads; StoreError where one can't be written.

    `paints` has for each path what makes its picture; called once, so that few pictures are held at
    a time. Folders are made where they are missing. Returns the `checksum` of every file.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        checksums = pool.map(_write, paints, paints.values())
        return dict(zip(paints, checksums, strict=True))  # raises what went wrong


def checksum(data: bytes) -> str:
    """The CRC-32 of a file's bytes, 8 hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def _write(path: str, paint: Callable[[], NDArray[np.uint8]]) -> str:
    target = checked_path(path)
    data = encode_png(paint())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"can't make the folder {target.parent}: {reason}") from error
    try:
        with atomic_file(target, sync=False) as file:
            file.write(data)
    except OSError as error:
        raise StoreError(f"can't write {target}: {error.strerror or error}") from error
    return checksum(data)
