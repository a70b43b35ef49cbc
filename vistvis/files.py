"""Names that stay in their folder, files that are whole or not there, and who writes them."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from vistvis.errors import InputError, StoreError

PathLike: TypeAlias = "str | os.PathLike[str]"

TEMPORARY = ".part"  # how the name of a file ends that `atomic_file` has not finished


def checked_name(name: object, what: str = "name") -> str:
    """`name`, if it is one plain component of a path; InputError for what could lead elsewhere."""
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f"{what} is a string, got {type(name).__name__}")
    text = os.fspath(name)
    # Both separators count everywhere: a run written on one system is read on another.
    bad = (
        not isinstance(text, str)
        or text.strip() in ("", ".", "..")
        or any(sign in text for sign in "/\\\0")
        or (len(text) > 1 and text[1] == ":")
        or len(os.fsencode(text)) > 240
    )
    if bad:
        raise InputError(
            f"{what} is one plain name that stays inside its folder, got {text!r}; leave out "
            "'..', '/', '\\', drives and NUL"
        )
    return str(text)


def inside(base: PathLike, *names: str) -> Path:
    """`base/name/…`: InputError if a name is not plain, StoreError if a symbolic link leads out."""
    path = Path(base, *(checked_name(name) for name in names))
    root = os.path.realpath(base)
    if os.path.commonpath((root, os.path.realpath(path))) != root:
        raise StoreError(
            f"{path} leads out of {os.fspath(base)} through a symbolic link; remove the link, or "
            "choose the folder that it leads to as the base"
        )
    return path


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
    file, which is right for pictures that can be drawn again.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
