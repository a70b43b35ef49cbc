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
from vistvis.store.folders import SITES, Folder, reported
from vistvis.store.manifest import NAME, NEXT, FileRecord, Manifest, SiteRecord, is_file_of_run
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


class _Files:
    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._taken: set[str] = set()  # casefolded: some systems don't tell A from a

    def manifest(self, name: str) -> Manifest | None:
        try:
            text = self.folder.read(name)
        except FileNotFoundError:
            return None
        try:
            return Manifest.from_json(text, self.folder.where(name))
        except StoreError as error:
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

    def clean(self, kept: Sequence[Manifest | None], *, keep_next: bool) -> None:
        """Remove files of this format that no manifest names. What can't go now goes next time."""
        used = {record.file for manifest in kept if manifest for record in manifest.files}
        self._taken = {name.casefold() for name in used}
        for name in self.folder.sizes():
            unused = is_file_of_run(name) and name not in used
            if unused or name.endswith(TEMPORARY) or (name == NEXT and not keep_next):
                try:
                    self.folder.remove(name)
                except OSError:
                    self._taken.add(name.casefold())

    def put(
        self, name: str, encoded: Encoded, check: Callable[[], None] | None = None
    ) -> FileRecord:
        """Write a file as `name`, made plain and free; nothing is left of what `check` refuses."""
        prefix, slash, last = name.rpartition("/")
        stem = re.sub(r"[^A-Za-z0-9._+-]", "_", last)[:150]
        stem = stem if re.match(r"[A-Za-z0-9_]", stem) else f"_{stem}"
        number, file = 1, f"{prefix}{slash}{stem}.safetensors"
        while file.casefold() in self._taken:
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
        return FileRecord(file, size, crc, encoded.records)

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
        # Only what the manifests name is kept; the rest was being written when a writer died.
        keep_next = self._file == NEXT and earlier is not None
        self._files.clean((current, earlier), keep_next=keep_next)
        self.manifest = manifest
        if earlier is not None:
            left = earlier.without(earlier.damage(folder))
            said = {k: getattr(manifest, k) or getattr(left, k) for k in (*_SAID, "expected")}
            self.manifest = replace(manifest, sites=left.sites, images=left.images, **said)
        self._save(self.manifest, first=True)
        if images is not None and self.manifest.images is None:
            self._save(replace(self.manifest, images=self._files.put("images", images)))

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
            self._save(replace(self.manifest.with_site(name, record), layout=layout))

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
                self._folder.rename(NEXT, NAME)
                self._files.clean([self.manifest], keep_next=False)

    def _save(self, manifest: Manifest, *, first: bool = False) -> None:
        if not first:
            self._files.check_alone(self._file, self.manifest)
        self._folder.write(self._file, [manifest.to_json()])
        self.manifest = manifest

    def _restage(self) -> None:
        """Go on as a replacement of what is there, with the sites of this session alone."""
        if self._file == NAME:
            self._file, self._replaced = NEXT, self.manifest
        self._resumed = False
        confirmed = {n: r for n, r in self.manifest.sites.items() if n in self._confirmed}
        self._save(replace(self.manifest, sites=confirmed), first=True)
