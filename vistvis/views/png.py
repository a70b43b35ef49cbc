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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vistvis.errors import InputError, StoreError
from vistvis.files import atomic_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Pictures encoded or decoded at once; more would only wait for each other.
THREADS = min(4, os.cpu_count() or 1)

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUECOLOUR = 2
_AVERAGE = 3
_CHANNELS = 3


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A picture as the bytes of a PNG file, without loss.

    Parameters
    ----------
    image
        uint8 `(H, W, 3)`.

    Raises
    ------
    InputError
        For anything else.

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
    lines = np.ascontiguousarray(image).reshape(len(image), -1)
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


class PngWriter:
    """Paints, encodes and writes in a few threads.

    What goes wrong there is raised at `wait` or at the end: StoreError, if a picture can't be
    written.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="vistvis-png")
        self._pending: list[Future[None]] = []
        self._folders: set[Path] = set()

    def put(self, path: Path, paint: Callable[[], NDArray[np.uint8]]) -> None:
        """Write what `paint` returns; the folder is made where it is missing."""
        folder = path.parent
        if folder not in self._folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = error.strerror or error
                raise StoreError(f"can't make the folder {folder}: {reason}") from error
            self._folders.add(folder)
        self._pending.append(self._pool.submit(_write, path, paint))

    def wait(self) -> None:
        """Until everything is written: whoever waits now and then has few pictures waiting."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)


def _write(path: Path, paint: Callable[[], NDArray[np.uint8]]) -> None:
    data = encode_png(paint())
    try:
        with atomic_file(path, sync=False) as file:
            file.write(data)
    except OSError as error:
        raise StoreError(f"can't write {path}: {error.strerror or error}") from error
