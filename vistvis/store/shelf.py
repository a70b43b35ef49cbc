"""The files of a run's folder while one writes it: which are whose, and which may be used again."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vistvis.errors import StoreError
from vistvis.files import TEMPORARY
from vistvis.names import few
from vistvis.store.folders import LOCK, SITES, Folder, folder_of, reported
from vistvis.store.manifest import NAME, NEXT, OLD, Manifest, NewerSchemaError, read_manifest
from vistvis.store.records import FileRecord, is_file_of_run, token_of
from vistvis.store.tensors import Encoded, checksum

# What `atomic_file` calls a file of a run that it has not finished.
_TEMPORARY = re.compile(rf"({SITES}/)?\.(.+?)(\.[0-9a-f]{{8}})?{re.escape(TEMPORARY)}")


def is_temporary(name: str) -> bool:
    match = _TEMPORARY.fullmatch(name)
    final = match and (match[1] or "") + match[2]
    return bool(final and (final in (NAME, NEXT, OLD) or is_file_of_run(final)))


def check_free(folder: Folder) -> None:
    """`StoreError` for a folder that is neither a run nor empty: what it holds is someone's."""
    names = folder.names()
    others = sorted(name for name in names if name != LOCK and not is_temporary(name))
    if NAME not in names and others:
        sites = [name for name in others if is_file_of_run(name)]
        lost = f", of them files of a run whose manifest is lost: {few(sites)}" if sites else ""
        raise StoreError(
            f"a run is written into a folder that is new, empty or a run: {folder.root} has no "
            f"{NAME}, and holds {few(others)}{lost}. All of it was left alone; choose another "
            "folder"
        )


def check_target(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> None:
    """`StoreError` if a `RunWriter` of this path would refuse it; for before a model is loaded."""
    folder = folder_of(path, storage_options)
    with reported(f"can't write a run in {folder.root}"):
        check_free(folder)
        manifest_of(folder, NAME)
        if LOCK in folder.names() and (lock := folder.lock()):
            try:
                lock.acquire()
            finally:
                lock.release()


def manifest_of(folder: Folder, name: str) -> Manifest | None:
    """A manifest, where there is one that is sound; StoreError for a damaged `manifest.json`."""
    try:
        return read_manifest(folder, name)
    except FileNotFoundError:
        return None
    except StoreError as error:
        # What is read is `manifest.json` alone: of the others damage costs only what they
        # gathered, and the sound run stays.
        if name != NAME and not isinstance(error, NewerSchemaError):
            return None
        raise StoreError(
            f"{error}. Nothing was written; move that folder away, or choose another"
        ) from error


class Shelf:
    """The files of a folder: those that writers before made, and those that this one adds.

    A file gets a name with the token of its writer and is never written again, so that no writer
    can hurt what another one's manifest points to.
    """

    def __init__(self, folder: Folder, manifests: Iterable[Manifest | None]) -> None:
        self.folder = folder
        there = [manifest for manifest in manifests if manifest]
        self._sizes = folder.sizes()
        named = {record.file: record for manifest in there for record in manifest.files}
        tokens = {manifest.token for manifest in there}
        leftover = {name for manifest in there for name in manifest.leftover}
        # Made by writers whose manifests tell so. Others of such a name stay, whosever they are.
        self.ours = {
            name
            for name in self._sizes
            if name in named or name in leftover or token_of(name) in tokens
        }
        self._records = named
        self._by_stem: dict[str, list[str]] = {}
        for name in self._sizes:
            if name in named or (token_of(name) and folder.local(name)):
                self._by_stem.setdefault(_stem_of(name), []).append(name)
        self._taken: set[str] = set()

    def leftover(self, used: Iterable[FileRecord]) -> tuple[str, ...]:
        """Our files of earlier writers that nothing uses; only where they can be removed."""
        kept = {record.file for record in used}
        return tuple(sorted(self.ours - kept)) if self.folder.locks else ()

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, with what temporary ones there are; what can't go now goes next time.

        Nothing behind a URL, where someone else may be at work with them.
        """
        if not self.folder.locks:
            return
        with contextlib.suppress(OSError):
            for name in (*names, *filter(is_temporary, self.folder.names())):
                self.folder.remove(name)
                self.ours.discard(name)

    def put(
        self, name: str, encoded: Encoded, token: str, *, reuse: bool, check: Callable[[], None]
    ) -> FileRecord:
        """A file of these bytes for `name`; nothing is left of what `check` refuses."""
        if reuse and (record := self._same(name, encoded)):
            check()
            self.ours.add(record.file)
            return record
        file = self.free(name, token, "safetensors")
        self.ours.add(file)
        try:
            size, crc = self.folder.write(file, encoded.pieces())
            check()
        except BaseException:
            self.drop(file)
            raise
        return FileRecord(file, size, crc, encoded.records)

    def free(self, name: str, token: str, ending: str) -> str:
        """A file name for `name` that this writer has not used."""
        base, number = _stem(name), 1
        file = f"{base}-{token}.{ending}"
        while file.casefold() in self._taken:  # for some systems A is a
            number += 1
            file = f"{base}-{number}-{token}.{ending}"
        self._taken.add(file.casefold())
        return file

    def drop(self, file: str) -> None:
        """Remove a file that this writer made and nothing came to name."""
        with contextlib.suppress(OSError):
            self.folder.remove(file)

    def holds(self, encoded: Encoded, record: FileRecord) -> bool:
        """Whether a file is there with just this content. Cost: reads it, if its size is right."""
        if self._sizes.get(record.file) != encoded.nbytes or not record.is_of(encoded):
            return False
        try:
            source = self.folder.local(record.file) or self.folder.read(record.file)
            return checksum(source) == (record.nbytes, record.crc32)
        except OSError:  # then it is written anew
            return False

    def _same(self, name: str, encoded: Encoded) -> FileRecord | None:
        """A file of just this content that an earlier writer made for the same name."""
        for file in self._by_stem.get(_stem_of(f"{_stem(name)}.safetensors"), ()):
            if self._sizes[file] == encoded.nbytes:
                record = FileRecord(file, encoded.nbytes, encoded.crc32(), encoded.records)
                known = self._records.get(file, record)
                if known.crc32 == record.crc32 and self.holds(encoded, record):
                    return record
        return None


def _stem(name: str) -> str:
    """`name` (perhaps `sites/NAME`) in the signs that a file of a run may have."""
    prefix, slash, last = name.rpartition("/")
    plain = re.sub(r"[^A-Za-z0-9._+-]", "_", last)[:150]
    plain = plain if re.match(r"[A-Za-z0-9_]", plain) else f"_{plain}"
    return f"{prefix}{slash}{plain}"


def _stem_of(file: str) -> str:
    """What files for one name have in common: no number, token and ending."""
    return re.sub(r"(-[0-9]+)?(-[0-9a-f]{8})?\.[a-z]+$", "", file)
