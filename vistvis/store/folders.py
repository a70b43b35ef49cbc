"""Where a run lies: a folder of this machine, or one behind an fsspec URL (`docs/runs.md`)."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from vistvis.errors import StoreError
from vistvis.files import atomic_file, inside

LOCK = ".lock"
SITES = "sites"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")


@contextlib.contextmanager
def reported(action: str) -> Iterator[None]:
    """Turn what the operating system or a service refuses into a `StoreError` that says what."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "")
        raise StoreError(f"{action}: {error.strerror or error}{hint}") from error


_HINTS = {
    errno.ENOSPC: "; free some space and call again: finished sites are kept",
    errno.EDQUOT: "; free some space and call again: finished sites are kept",
    errno.EFBIG: "; the limit on file sizes is in the way",
    errno.EROFS: "; choose a folder that can be written",
    errno.EACCES: "; choose a folder that can be written and read by you",
    errno.EPERM: "; choose a folder that can be written and read by you",
}


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Services raise errors of their own classes; here they become what a disk would raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _sync(folder: Path) -> None:
    """Let renames in a folder reach the disk, where the system can be told to."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(handle)


class Folder(Protocol):
    """A folder of whole files. Names are relative, with `/`; messages call it `root`."""

    root: str
    locks: bool = False

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        """FileNotFoundError where there is none."""

    def write(self, name: str, pieces: Iterable[Any]) -> tuple[int, int]:
        """Put a file in place whole or not at all; returns its size and CRC-32."""

    def sizes(self) -> dict[str, int]:
        """Every file of the folder and of its `sites` with its size."""

    def names(self) -> list[str]:
        """Everything in the folder and its `sites`, whatever it is; `sites` itself left out."""

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""

    def age(self, name: str) -> float | None:
        """Seconds since a file was written; None where that is not known, or there is no file."""

    def lock(self) -> Lock | None:
        """What keeps other writers away, not held yet; None where there is no such thing."""
        return None

    def local(self, name: str) -> Path | None:
        """The path of a file that can be mapped, or None."""
        return None


def folder_of(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> Folder:
    """The folder that a path or fsspec URL names; StoreError where fsspec can't reach it."""
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text or not _can_be_a_path(text):
        raise StoreError(f"a run lies in a folder or at an fsspec URL, got {text!r}")
    if not _URL.match(text):
        return LocalFolder(Path(text))
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, root = fsspec.core.url_to_fs(text, **(storage_options or {}))
    except Exception as error:  # every file system has errors of its own for a bad URL
        reason = str(error) or type(error).__name__
        raise StoreError(f"{text!r} can't be reached: {reason}") from error
    if isinstance(system, LocalFileSystem):
        return LocalFolder(Path(root))
    return RemoteFolder(system, root, text)


def _can_be_a_path(text: str) -> bool:
    try:
        return bool(os.fsencode(text))
    except UnicodeError:
        return False


class Lock:
    """A lock of the operating system, which lets go of it when its holder dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self) -> None:
        """Take it, or StoreError at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Held by this file object: an interrupt on any line leaves it to `release`.
        self._file = file = open(inside(self._path.parent, self._path.name), "ab")  # noqa: SIM115
        try:
            _lock(file)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise StoreError(
                    f"{self._path.parent} is being written by someone else (its {LOCK} is held); "
                    "wait for them, or write to another folder"
                ) from error
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
                raise StoreError(
                    f"{self._path.parent} lies on a file system without locks ({error.strerror}); "
                    "write to a local folder and copy the run"
                ) from error
            raise

    def release(self) -> None:
        """Let go, if it is held."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                _unlock(
                    self._file
                )  # a forked child may hold the file too, so closing is not enough
            self._file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _unlock(file: BinaryIO) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)


class LocalFolder(Folder):
    """A folder of this machine: after a crash or a power cut files are whole, or as before."""

    locks = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, str(folder)

    def local(self, name: str) -> Path:
        """The path of a file; a symbolic link that leads out of the folder is refused."""
        return inside(self.folder, *name.split("/"))

    def read(self, name: str) -> bytes:
        path = self.local(name)
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would make us wait, a device never end
            raise StoreError(f"{path} is no regular file; move it away")
        return path.read_bytes()

    def write(self, name: str, pieces: Iterable[Any]) -> tuple[int, int]:
        path = self.local(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        size = crc = 0
        with atomic_file(path) as file:
            for piece in pieces:
                file.write(piece)
                crc = zlib.crc32(piece, crc)
                size += len(piece)
        _sync(path.parent)
        return size, crc

    def _entries(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for prefix, folder in (("", self.folder), (f"{SITES}/", self.local(SITES))):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    yield prefix + entry.name, entry

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for name, entry in self._entries():
            with contextlib.suppress(FileNotFoundError):  # a writer is at work beside us
                if entry.is_file():
                    sizes[name] = entry.stat().st_size
        return sizes

    def names(self) -> list[str]:
        return [name for name, _ in self._entries() if name != SITES]

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def age(self, name: str) -> float | None:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - self.local(name).stat().st_mtime
        return None

    def lock(self) -> Lock:
        return Lock(self.folder / LOCK)


class RemoteFolder(Folder):
    """A folder behind an fsspec URL: whole objects only, no mapping, no lock.

    An object appears whole or not at all where the service promises so (S3, GCS, Azure and
    `memory://` do; a remote file system such as SFTP does not). Two writers are noticed, not kept
    apart.
    """

    def __init__(self, system: Any, root: str, url: str) -> None:
        self.system, self.base, self.root = system, root.rstrip("/"), url.rstrip("/")

    @_as_os_error()
    def read(self, name: str) -> bytes:
        return bytes(self.system.cat_file(f"{self.base}/{name}"))

    @_as_os_error()
    def write(self, name: str, pieces: Iterable[Any]) -> tuple[int, int]:
        data = b"".join(pieces)
        path = f"{self.base}/{name}"
        try:
            self.system.pipe_file(path, data)
        except FileNotFoundError:  # a service that has real folders
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.system.pipe_file(path, data)
        return len(data), zlib.crc32(data)

    @_as_os_error()
    def _entries(self) -> list[tuple[str, Mapping[str, Any]]]:
        self.system.invalidate_cache()
        entries = []
        for prefix in ("", f"{SITES}/"):
            with contextlib.suppress(FileNotFoundError):
                for entry in self.system.ls(f"{self.base}/{prefix}".rstrip("/"), detail=True):
                    name = entry["name"].rstrip("/").rpartition("/")[2]
                    entries.append((prefix + name, entry))
        return entries

    def sizes(self) -> dict[str, int]:
        entries = self._entries()
        return {name: int(entry["size"]) for name, entry in entries if entry["type"] == "file"}

    def names(self) -> list[str]:
        return [name for name, _ in self._entries() if name != SITES]

    def age(self, name: str) -> float | None:
        with contextlib.suppress(Exception):  # services that don't know raise what they like
            written = self.system.modified(f"{self.base}/{name}")
            if written.tzinfo is not None:  # without a zone it may be hours off
                return time.time() - float(written.timestamp())
        return None

    @_as_os_error()
    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.base}/{name}")
