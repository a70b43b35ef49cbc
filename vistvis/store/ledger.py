"""A run that is being written: its manifest on disk, and which files are whose."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from vistvis.attention import Attention, SiteInfo
from vistvis.errors import StoreError
from vistvis.files import TEMPORARY
from vistvis.names import few
from vistvis.store.codec import tensors_of
from vistvis.store.folders import LOCK, SITES, Folder, reported
from vistvis.store.manifest import (
    NAME,
    NEXT,
    OLD,
    FileRecord,
    Manifest,
    NewerSchemaError,
    SiteRecord,
    is_file_of_run,
)
from vistvis.store.tensors import Encoded, checksum

# What the writers of a run say of it, as far as they say it.
_SAID = ("model", "layout", "metadata")


def _fits(earlier: Manifest, asked: Manifest, images: Encoded | None) -> bool:
    """Whether an unfinished run is the one asked for, as far as can be told."""
    pairs = [(getattr(asked, key), getattr(earlier, key)) for key in _SAID]
    same = all(ours == theirs for ours, theirs in pairs if ours and theirs)
    announced = not asked.expected or set(earlier.sites) <= set(asked.expected)
    if not (same and announced):
        return False
    if images is None or earlier.images is None:
        return images is None or not earlier.sites
    return earlier.images.is_of(images)


# What `atomic_file` calls a file of a run that it has not finished.
_TEMPORARY = re.compile(rf"({SITES}/)?\.(.+)\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}")


def _is_temporary(name: str) -> bool:
    match = _TEMPORARY.fullmatch(name)
    final = match and (match[1] or "") + match[2]
    return bool(final and (final in (NAME, NEXT, OLD) or is_file_of_run(final)))


def check_free(folder: Folder) -> None:
    """`StoreError` for a folder that is neither a run nor empty: what it holds is someone's."""
    names = folder.names()
    others = sorted(name for name in names if name != LOCK and not _is_temporary(name))
    if NAME in names or not others:
        return
    sites = [name for name in others if is_file_of_run(name)]
    lost = f", of them files of a run whose manifest is lost: {few(sites)}" if sites else ""
    raise StoreError(
        f"a run is written into a folder that is new, empty or a run: {folder.root} has no {NAME}, "
        f"and holds {few(others)}{lost}. All of it was left alone; choose another folder"
    )


class _Files:
    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._taken = {name.casefold() for name in folder.names()}  # some systems: A is a
        self._ours: set[str] = set()  # named by a manifest of this folder, or written here

    def manifest(self, name: str) -> Manifest | None:
        try:
            text = self.folder.read(name)
        except FileNotFoundError:
            return None
        try:
            return Manifest.from_json(text, self.folder.where(name))
        except StoreError as error:
            # What is read is `manifest.json` alone: of the others damage costs only what they
            # gathered, and the sound run stays.
            if name != NAME and not isinstance(error, NewerSchemaError):
                return None
            raise StoreError(
                f"{error}. Nothing was written; move that folder away, or choose another"
            ) from error

    def check_alone(self, name: str, ours: Manifest | None) -> None:
        """Where nothing can be locked, see whether someone else has written meanwhile."""
        if ours is None or self.folder.locks:
            return
        there = self.manifest(name)
        if there is None or there.writer != ours.writer:
            raise StoreError(
                f"{self.folder.where(name)} was written by someone else meanwhile; this writer "
                "stops, write to another folder"
            )

    def own(self, manifest: Manifest | None) -> None:
        """Take what a manifest of this folder names for files that a writer of it has made."""
        self._ours |= {record.file for record in manifest.files} if manifest else set()

    def clean(self, kept: Sequence[Manifest | None], *, keep_next: bool) -> None:
        """Remove our files that no manifest names any more, and the temporary ones.

        Files that no manifest named are someone's: they stay. What can't go now goes next time.
        """
        used = {record.file for manifest in kept if manifest for record in manifest.files}
        there = self.folder.sizes()
        unused = [name for name in there if name in self._ours - used or _is_temporary(name)]
        # A manifest goes before the files it names; what remembers them goes after.
        first = [NEXT] if NEXT in there and not keep_next else []
        try:
            for name in (*first, *unused, *([OLD] if OLD in there else [])):
                self.folder.remove(name)
                self._taken.discard(name.casefold())
        except OSError:
            return

    def put(
        self, name: str, encoded: Encoded, check: Callable[[], None] | None = None
    ) -> FileRecord:
        """Write a file as `name`, made plain and free; nothing is left of what `check` refuses."""
        prefix, slash, last = name.rpartition("/")
        stem = re.sub(r"[^A-Za-z0-9._+-]", "_", last)[:150]
        stem = stem if re.match(r"[A-Za-z0-9_]", stem) else f"_{stem}"
        number, file = 1, f"{prefix}{slash}{stem}.safetensors"
        while file.casefold() in self._taken:
            if record := self._left(file, encoded):
                if check is not None:
                    check()
                self._ours.add(file)
                return record
            number += 1
            file = f"{prefix}{slash}{stem}-{number}.safetensors"
        self._taken.add(file.casefold())
        try:
            size, crc = self.folder.write(file, encoded.pieces())
            if check is not None:
                check()
        except BaseException:
            with contextlib.suppress(OSError):
                self.folder.remove(file)
            raise
        self._ours.add(file)
        return FileRecord(file, size, crc, encoded.records)

    def _left(self, file: str, encoded: Encoded) -> FileRecord | None:
        """A file of just this content, of a writer killed before its manifest said so."""
        path = self.folder.local(file)
        if path is None or file in self._ours or not path.is_file():
            return None
        record = FileRecord(file, *checksum(path), encoded.records)
        return record if record.is_of(encoded) else None

    def has(self, encoded: Encoded, record: FileRecord) -> bool:
        """Whether a file is there with just this content."""
        if not record.is_of(encoded):
            return False
        path = self.folder.local(record.file)
        return path is None or checksum(path) == (record.nbytes, record.crc32)


class Ledger:
    """Adds sites to a run so that what is on disk is sound at every moment.

    `manifest` is what a writer was asked for, before the first site; `resume` whether an unfinished
    run of the same may be gone on with.

    A run that continues or begins one is written into `manifest.json` site by site. A run that is
    to replace another gathers in `manifest.next.json`, with files of its own names, until `finish`
    renames that over the first: one rename, so that the replacement is whole or has not happened.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, images: Encoded | None, *, resume: bool
    ) -> None:
        def fits(earlier: Manifest) -> bool:
            return resume and _fits(earlier, manifest, images)

        self._folder, self._files = folder, _Files(folder)
        current, following = self._files.manifest(NAME), self._files.manifest(NEXT)
        on_disk = current
        for manifest_there in (current, following, self._files.manifest(OLD)):
            self._files.own(manifest_there)
        if current is not None and not current.complete and not current.sites:
            current = None  # an announcement alone is not worth keeping beside the new run
        # `_replaced` is what the run on disk held; None once that is this writer's own.
        if current is None or (not current.complete and fits(current)):
            self._file, self._replaced, earlier = NAME, None, current
        else:
            self._file, self._replaced = NEXT, current
            earlier = following if following and fits(following) else None
        self._resumed, self._announced = earlier is not None, bool(manifest.expected)
        self._layout = manifest.layout
        # Sites that this writer wrote, or found stored with the same content.
        self._confirmed: set[str] = set()
        self.manifest = manifest
        if earlier is not None:
            left = earlier.without(earlier.damage(folder))
            said = {k: getattr(manifest, k) or getattr(left, k) for k in (*_SAID, "expected")}
            self.manifest = replace(manifest, sites=left.sites, images=left.images, **said)
        self._files.clean((on_disk, earlier), keep_next=self._file == NEXT and bool(earlier))
        self._save(self.manifest, first=True)
        self._files.clean((self._replaced, self.manifest), keep_next=self._file == NEXT)
        if images is not None and self.manifest.images is None:
            file = self._files.put("images", images)
            self._save(replace(self.manifest, images=file), new=file)

    def expect(self, names: tuple[str, ...]) -> None:
        with reported(f"can't write {self._folder.where(self._file)}"):
            if self._resumed and not set(self.manifest.sites) <= set(names):
                self._restage()
            # What a resumed run expected was said by another writer, and does not bind this one.
            before = self.manifest.expected if self._announced else tuple(self._confirmed)
            new = tuple(name for name in names if name not in before)
            if new or not self._announced:
                self._save(replace(self.manifest, expected=(*before, *new)))
        self._announced = True

    def add(self, name: str, attention: Attention, check: Callable[[], None]) -> None:
        """Store a site, or confirm that it is stored; `check` may still refuse it at the end."""
        tensors, facts = tensors_of(attention)
        encoded = Encoded(tensors)
        with reported(f"can't write site {name!r} in {self._folder.root}"):
            before = self.manifest.sites.get(name)
            if before is not None and self._files.has(encoded, before.file):
                check()
                self._confirmed.add(name)
                return
            if before is not None:
                # Another forward pass: its sites must not mix with those of the last one.
                self._restage()
            file = self._files.put(f"{SITES}/{name}", encoded, check)
            site = attention.site
            if site is None:
                layout = self.manifest.layout
                sides = layout.sides(*attention.shape[2:]) if layout else (None, None)
                site = SiteInfo(name, query_layout=sides[0], key_layout=sides[1])
            record = SiteRecord(file, tuple(attention.shape), site, **facts)
            self._confirmed.add(name)
            # By default the run's layout is the longest of its keys'.
            layouts = [layout for layout in (self.manifest.layout, site.key_layout) if layout]
            layout = self._layout or max(layouts, key=lambda one: one.num_tokens, default=None)
            self._save(replace(self.manifest.with_site(name, record), layout=layout), new=file)

    def finish(self) -> None:
        """Close the run; a replacement takes its place, or StoreError if it is not whole."""
        with reported(f"can't finish the run in {self._folder.root}"):
            missing = self.manifest.missing
            if self._file == NEXT and missing:
                raise StoreError(
                    f"{self._folder.root} was left as it was: the run to replace it lacks "
                    f"{few(missing)}. Call again to go on with it"
                )
            self._save(replace(self.manifest, closed=True))
            if self._file == NEXT:
                self._files.check_alone(NAME, self._replaced)
                if self._replaced:
                    self._folder.write(OLD, [self._replaced.to_json()])
                self._folder.rename(NEXT, NAME)
                self._files.clean([self.manifest], keep_next=False)

    def _save(
        self, manifest: Manifest, *, first: bool = False, new: FileRecord | None = None
    ) -> None:
        if not first:
            self._files.check_alone(self._file, self.manifest)
        try:
            self._folder.write(self._file, [manifest.to_json()])
        except OSError:
            # A new file that no manifest came to name would be nobody's.
            if new is not None:
                with contextlib.suppress(StoreError, OSError):
                    there = self._files.manifest(self._file)
                    if there is None or new.file not in {record.file for record in there.files}:
                        self._folder.remove(new.file)
            raise
        self.manifest = manifest

    def _restage(self) -> None:
        """Go on as a replacement of what is there, with the sites of this session alone."""
        if self._file == NAME:
            self._file, self._replaced = NEXT, self.manifest
        self._resumed = False
        confirmed = {n: r for n, r in self.manifest.sites.items() if n in self._confirmed}
        self._save(replace(self.manifest, sites=confirmed), first=True)
