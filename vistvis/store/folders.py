"""Where a run lies: a folder of this machine, or one behind an fsspec URL (`docs/runs.md`)."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

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

    def rename(self, old: str, new: str) -> None:
        """Let a file take the place of another, which is never missing or half there."""

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""

    def lock(self) -> AbstractContextManager[None]:
        """Keep other writers away, as far as the folder can. Makes the folder."""
        return contextlib.nullcontext()

    def local(self, name: str) -> Path | None:
        """The path of a file that can be mapped, or None."""
        return None


def folder_of(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> Folder:
    """The folder that a path or fsspec URL names; StoreError where fsspec can't reach it."""
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise StoreError(f"a run lies in a folder or at an fsspec URL, got {text!r}")
    if not _URL.match(text):
        return LocalFolder(Path(text))
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, root = fsspec.core.url_to_fs(text, **(storage_options or {}))
    except (ValueError, ImportError) as error:
        raise StoreError(f"{text} can't be reached: {error}") from error
    if isinstance(system, LocalFileSystem):
        return LocalFolder(Path(root))
    return RemoteFolder(system, root, text)


class LocalFolder(Folder):
    """A folder of this machine: after a crash or a power cut files are whole, or as before."""

    locks = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, str(folder)

    def local(self, name: str) -> Path:
        """The path of a file; a symbolic link that leads out of the folder is refused."""
        return inside(self.folder, *name.split("/"))

    def read(self, name: str) -> bytes:
        return self.local(name).read_bytes()

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

    def rename(self, old: str, new: str) -> None:
        os.replace(self.local(old), self.local(new))
        _sync(self.folder)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        # The operating system lets go of this lock when its holder dies, however it dies.
        lock = FileLock(self.local(LOCK), timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise StoreError(
                f"{self.folder} is being written by someone else (its {LOCK} is held); wait for "
                "them, or write to another folder"
            ) from error
        except NotImplementedError as error:
            raise StoreError(
                f"{self.folder} lies on a file system without locks; write to a local folder and "
                "copy the run"
            ) from error
        try:
            yield
        finally:
            lock.release()


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

    def rename(self, old: str, new: str) -> None:
        # Object stores have no rename; a put of the same bytes is what is whole or not at all.
        self.write(new, [self.read(old)])
        self.remove(old)

    @_as_os_error()
    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.base}/{name}")
