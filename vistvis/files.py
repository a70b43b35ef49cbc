"""Names that stay in their folder, files that are whole or not there, and who writes them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from vistvis.errors import InputError, StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PathLike: TypeAlias = "str | os.PathLike[str]"

TEMPORARY = ".part"  # how the name of a file ends that `atomic_file` has not finished

# Control characters, line separators, marks that reorder text, halves of UTF-16 pairs.
_UNREADABLE = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Devices of Windows: in every folder, with any ending.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³])\s*(\..*)?", re.I)


def checked_name(name: object, what: str = "name") -> str:
    """`name`, if it is one plain component of a path; InputError for what could lead elsewhere.

    On any system, since a run written on one is read on another: no separators, drives, streams or
    devices of Windows, nothing that vanishes there (a dot or space at the end), and nothing that a
    terminal would not show as it is.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f"{what} is a string, got {type(name).__name__}")
    text = os.fspath(name)
    bad = (
        not isinstance(text, str)
        or _UNREADABLE.search(text)
        or text.strip() in ("", ".", "..")
        or text[-1] in ". "
        or any(sign in text for sign in "/\\:")
        or _DEVICE.fullmatch(text)
        or len(os.fsencode(text)) > 240
    )
    if bad:
        raise InputError(
            f"{what} is one plain name that stays inside its folder on every system, got {text!r}; "
            "leave out '..', '/', '\\', ':', control characters, a dot or space at the end, and "
            "names of devices such as CON"
        )
    return str(text)


def checked_path(path: PathLike) -> Path:
    """`path` as a `Path`; InputError for text that no file system takes as one."""
    text = os.fspath(path)
    try:
        taken = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a UTF-16 pair
        taken = False
    if not taken:
        raise InputError(f"a path is text without NUL and lone surrogates, got {text!r}")
    return Path(text)


def inside(base: PathLike, *names: str) -> Path:
    """`base/name/…`: InputError if a name is not plain, StoreError if a symbolic link leads out."""
    path = Path(checked_path(base), *(checked_name(name) for name in names))
    root = os.path.realpath(base)
    if os.path.commonpath((root, os.path.realpath(path))) != root:
        raise StoreError(
            f"{path} leads out of {os.fspath(base)} through a symbolic link; remove the link, or "
            "choose the folder that it leads to as the base"
        )
    return path


def regular_file(path: PathLike) -> BinaryIO:
    """A file, opened to be read; StoreError where there is none that can be.

    Whatever reads a file that a caller names opens it here, or asks here first: a pipe would wait
    for ever, and a device never end.
    """
    file = checked_path(path)
    try:
        if stat.S_ISREG(os.stat(file).st_mode):
            return open(file, "rb")
        kind = "a folder" if file.is_dir() else "a pipe, a socket or a device"
    except FileNotFoundError as error:
        raise StoreError(f"no file {str(file)!r}; check its path") from error
    except OSError as error:
        raise StoreError(f"can't read {str(file)!r}: {error.strerror}") from error
    raise StoreError(f"{str(file)!r} is {kind}; give the path of a file")


def check_torch_archive(path: PathLike) -> None:
    """StoreError for an archive whose records hold more than the file: torch packs nothing.

    Others can, and a few bytes may then stand for gigabytes.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    held = sum(record.file_size for record in records)
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or held > os.stat(path).st_size:
        raise StoreError(
            f"{str(path)!r} has compressed records ({held} bytes in all), which torch.save never "
            "writes; load it where you trust it, and save it again with torch.save"
        )


def version() -> str | None:
    """The installed version of this package; None in a checkout that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("vistvis")
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and else vanishes.

    With `sync` the bytes are on the disk before the name is; without, a power cut may lose the
    file, which is right for pictures that can be drawn again. What a killed writer left is written
    over by the next one of the same file.
    """
    with _temporary(path) as (temporary, mode):
        try:
            with open(temporary, mode) as file:
                yield file
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, Literal["wb", "xb"]]]:
    """A name beside `path` that no other live writer has, and the mode that opens it.

    The same name every time, so that no leftovers pile up, where a lock says that nobody is at
    work under it; else a new one.
    """
    stem = os.fsencode(path.name)[:200].decode(errors="ignore")
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            # One name for each machine: some network file systems lock within one machine only.
            machine = zlib.crc32(os.uname().nodename.encode())
            mine = path.with_name(f".{stem}.{machine:08x}{TEMPORARY}")
            # Twice: the writer before us may have put in place what we opened.
            for _ in range(2):
                if _lock(mine, held):
                    yield mine, "wb"
                    return
        yield path.with_name(f".{stem}.{secrets.token_hex(4)}{TEMPORARY}"), "xb"


def _lock(name: Path, held: contextlib.ExitStack) -> bool:
    """Whether the file of this name, made where it is missing, is ours alone until `held` ends."""
    try:
        # To append: what a live writer has there is not cut off.
        file = held.enter_context(open(name, "ab", opener=_as_it_is))  # noqa: SIM115 - it does
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, there = os.fstat(file.fileno()), os.lstat(name)
    except OSError:
        return False
    # Still that name's, and nothing of anybody else's that stands there as a link.
    mine = stat.S_ISREG(ours.st_mode) and ours.st_nlink == 1 and ours.st_uid == os.geteuid()
    return mine and os.path.samestat(ours, there)


def _as_it_is(name: str, flags: int) -> int:
    """For `open`: no link is followed, no pipe waited for."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
