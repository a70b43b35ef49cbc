"""A run that is being written: what it is so far, on disk sound at every moment."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from vistvis.attention import Attention, SiteInfo
from vistvis.errors import StoreError
from vistvis.names import few
from vistvis.store.codec import tensors_of
from vistvis.store.folders import SITES, Folder, reported
from vistvis.store.manifest import NAME, NEXT, OLD, Manifest, longest_layout, record_text
from vistvis.store.records import SiteRecord, token_of
from vistvis.store.shelf import Shelf, manifest_of
from vistvis.store.tensors import Encoded

# Where nothing can be locked: how often to look whether someone else has written meanwhile.
_LOOK_SECONDS = 1.0


def new_writer() -> str:
    """What tells a writer from every other."""
    return secrets.token_hex(8)


def _nothing() -> None:
    pass


class Ledger:
    """Adds sites to a run so that what is on disk is sound at every moment.

    `manifest` is what a writer was asked for, before the first site, and `scene` its images and
    such; `resume` whether what earlier writers left may be used.

    A finished site is a file and then a record beside it; the manifest is written at the start, at
    `expect` and at the end, so that the cost is linear. A run that begins, or goes on with its own
    pass, is written into `manifest.json`. One that is to replace another gathers in
    `manifest.next.json` until `finish` writes it over the first: the replacement is whole or has
    not happened.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, scene: Mapping[str, Encoded], *, resume: bool
    ) -> None:
        def goes_on(earlier: Manifest | None) -> Manifest | None:
            same = earlier and manifest.pass_id and earlier.pass_id == manifest.pass_id
            if not (resume and same and earlier) or earlier.complete:
                return None
            announced = not manifest.expected or set(earlier.sites) <= set(manifest.expected)
            return earlier if announced else None

        self._folder, self._resume, self.manifest = folder, resume, manifest
        current, following, old = (manifest_of(folder, name) for name in (NAME, NEXT, OLD))
        if following and current and following.writer == current.writer:
            following = None  # a writer killed after its last step but one
        self._shelf = Shelf(folder, (current, following, old))
        if current is not None and not current.complete and not current.sites:
            current = None  # an announcement alone is not worth keeping beside the new run
        # `_replaced` is what the run on disk held; None once that is this writer's own.
        if current is None or goes_on(current):
            self._file, self._replaced, earlier = NAME, None, current
        else:
            self._file, self._replaced, earlier = NEXT, current, goes_on(following)
        self._earlier, self._announced = earlier, bool(manifest.expected)
        # Sites of this writer: written, or found stored with the same content.
        self._confirmed: set[str] = set()
        self._records: list[str] = []
        self._looked = time.monotonic()
        sites: dict[str, SiteRecord] = {}
        if earlier is not None:
            sites.update(earlier.without(earlier.damage(folder)).sites)
            manifest = replace(manifest, expected=manifest.expected or earlier.names)
        self._begin(manifest, sites)
        gone = [OLD]
        if self._replaced is None:  # the new manifest says what these did
            gone += [NEXT, *(name for name in self._shelf.ours if name.endswith(".json"))]
        self._shelf.remove(gone)
        files = {
            name: self._shelf.put(name, one, self.manifest.token, reuse=resume, check=_nothing)
            for name, one in scene.items()
        }
        if files:
            self._save(replace(self.manifest, scene=files))

    def _begin(self, manifest: Manifest, sites: dict[str, SiteRecord]) -> None:
        """Put a manifest in place, with sites that are finished already."""
        # By default the run's layout is the longest of its sites' keys'.
        self._layout = manifest.layout or longest_layout(sites.values())
        self._sites = sites  # grows, and is that of `self.manifest`
        kept = [*(record.file for record in sites.values()), *manifest.scene.values()]
        kept += self._replaced.files if self._replaced else []
        self._write(replace(manifest, sites=sites, leftover=self._shelf.leftover(kept)))

    def expect(self, names: tuple[str, ...]) -> None:
        with reported(f"can't write {self._folder.where(self._file)}"):
            if self._earlier and not set(self._sites) <= set(names):
                self._restage()
            # What a resumed run expected was said by another writer, and does not bind this one.
            stored = tuple(name for name in self._sites if name in self._confirmed)
            said = self.manifest.expected if self._announced else stored
            before = set(said)
            new = tuple(name for name in names if name not in before)
            if new or not self._announced:
                self._save(replace(self.manifest, expected=(*said, *new)))
        self._announced = True

    def add(self, name: str, attention: Attention, check: Callable[[], None]) -> None:
        """Store a site, or confirm that it is stored; `check` may still refuse it at the end."""
        tensors, facts = tensors_of(attention)
        encoded, shape = Encoded(tensors), tuple(attention.shape)
        with reported(f"can't write site {name!r} in {self._folder.root}"):
            before, site = self._sites.get(name), attention.site
            if before is not None:
                same = SiteRecord(before.file, shape, site or before.site, **facts) == before
                if same and self._shelf.holds(encoded, before.file):
                    check()
                    self._confirmed.add(name)
                    return
                if not (same and before.file.is_of(encoded)):
                    # Another forward pass: its sites must not mix with those of the last one.
                    self._restage()
            if site is None:
                sides = self._layout.sides(*shape[2:]) if self._layout else (None, None)
                site = SiteInfo(name, query_layout=sides[0], key_layout=sides[1])
            self._look()
            token = self.manifest.token
            file = self._shelf.put(
                f"{SITES}/{name}", encoded, token, reuse=self._resume, check=check
            )
            record = SiteRecord(file, shape, site, **facts)
            self._record(name, record)
            self._sites[name] = record
            self._confirmed.add(name)
            if not self.manifest.layout:
                layouts = [one for one in (self._layout, site.key_layout) if one]
                self._layout = max(layouts, key=lambda one: one.num_tokens, default=None)

    def finish(self) -> None:
        """Close the run; a replacement takes its place, or StoreError if it is not whole."""
        with reported(f"can't finish the run in {self._folder.root}"):
            missing = self.manifest.missing
            if self._file == NEXT and missing:
                raise StoreError(
                    f"{self._folder.root} was left as it was: the run to replace it lacks "
                    f"{few(missing)}. Call again to go on with it"
                )
            self._check_alone(self._file, self.manifest)
            self._check_alone(NAME, self._replaced)
            leftover = self._shelf.leftover(self.manifest.files)
            closed = replace(self.manifest, closed=True, layout=self._layout, leftover=leftover)
            self._folder.write(NAME, [closed.to_json()])
            self.manifest = closed
            # A manifest goes before the files it names.
            for name in ([NEXT] if self._file == NEXT else []) + self._records:
                self._shelf.drop(name)
            self._shelf.remove([OLD, *leftover])

    def _record(self, name: str, record: SiteRecord) -> None:
        """Say beside the site that it is finished."""
        writer, number = self.manifest.writer, len(self._records)
        path = self._shelf.free(f"{SITES}/{name}", self.manifest.token, "json")
        try:
            self._folder.write(path, [record_text(writer, number, name, record)])
        except BaseException:
            if token_of(record.file.file) == self.manifest.token:
                self._shelf.drop(path)
                self._shelf.drop(record.file.file)
            raise
        self._records.append(path)

    def _save(self, manifest: Manifest) -> None:
        self._check_alone(self._file, self.manifest)
        self._write(manifest)

    def _write(self, manifest: Manifest) -> None:
        self._folder.write(self._file, [manifest.to_json()])
        self.manifest = manifest

    def _look(self) -> None:
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._check_alone(self._file, self.manifest)
            self._looked = time.monotonic()

    def _check_alone(self, name: str, ours: Manifest | None) -> None:
        """Where nothing can be locked, see whether someone else has written meanwhile."""
        if ours is None or self._folder.locks:
            return
        where = self._folder.where(name)
        try:
            writer = Manifest.from_json(self._folder.read(name), where).writer
        except FileNotFoundError:
            writer = ""
        if writer != ours.writer:
            raise StoreError(
                f"{where} was written by someone else meanwhile; this writer stops, write to "
                "another folder"
            )

    def _restage(self) -> None:
        """Go on as a replacement of what is there, with the sites of this session alone."""
        assert self._earlier is not None
        if self._file == NAME:
            self._folder.write(NAME, [self._earlier.to_json()])  # as it was found
            self._file, self._replaced = NEXT, self._earlier
        self._earlier = None
        confirmed = {n: r for n, r in self._sites.items() if n in self._confirmed}
        # Records of the name before are of no run from here on.
        self._shelf.ours.update(self._records)
        self._begin(replace(self.manifest, writer=new_writer()), confirmed)
