"""The state of a run that is being written: its manifest on disk, and which files are whose."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.site import SiteInfo
from vistvis.errors import StoreError
from vistvis.names import few
from vistvis.store.manifest import (
    IMAGES_FILE,
    NAME,
    NEXT,
    SITE_FILE,
    FileRecord,
    Manifest,
    SiteRecord,
)
from vistvis.store.places import SITES, TEMPORARY, Place, reported
from vistvis.store.reader import damage
from vistvis.store.tensors import Encoded, crc32_of_file
from vistvis.tokens import TokenLayout


class Ledger:
    """Adds sites to a run so that what is on disk is sound at every moment.

    A run that continues or begins one is written into `manifest.json` site by site. A run that is
    to replace another gathers in `manifest.next.json`, with files of its own names, until `finish`
    renames that over the first: one rename, so that the replacement is whole or has not happened.
    """

    def __init__(
        self, place: Place, wanted: Manifest, pictures: Encoded | None, *, resume: bool
    ) -> None:
        self._place = place
        current, staged = self._read(NAME), self._read(NEXT)
        if current is not None and not current.complete and not current.sites:
            current = None  # an announcement alone is not worth keeping beside the new run
        self._file, found = NAME, None
        if current is not None:
            if resume and not current.complete and _fits(current, wanted, pictures):
                found = current
            else:
                self._file = NEXT
                found = staged if resume and staged and _fits(staged, wanted, pictures) else None
        # What the run on disk held before this writer; None once it is this writer's own.
        self._replaced = current if self._file == NEXT else None
        self._resumed, self._announced = found is not None, bool(wanted.expected)
        self._layout = wanted.layout
        # Sites that this writer wrote, or found stored with the same content.
        self._confirmed: set[str] = set()
        self._taken: set[str] = set()
        # Only what the manifests name is kept; the rest was being written when a writer died.
        kept = [manifest for manifest in (current, found) if manifest is not None]
        self._clean(kept, staged=found is not None and found is staged)
        self.manifest = wanted if found is None else self._continued(found, wanted)
        self._save(self.manifest, first=True)
        if pictures is not None and self.manifest.images is None:
            file = self._new_file("", "images")
            size, crc = self._place.write(file, pictures.pieces())
            record = FileRecord(file, size, crc, pictures.records)
            self._save(replace(self.manifest, images=record))

    def expect(self, names: tuple[str, ...]) -> None:
        """Announce sites."""
        with reported(f"can't write {self._place.where(self._file)}"):
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
        encoded = Encoded(_tensors_of(attention))
        with reported(f"can't write site {name!r} in {self._place.root}"):
            stored = self.manifest.sites.get(name)
            if stored is not None and self._is_stored(encoded, stored.file):
                check()
                self._confirmed.add(name)
                return
            if stored is not None:
                # Another forward pass: its sites must not mix with those of the last one.
                self._restage()
            file = self._new_file(f"{SITES}/", name)
            try:
                size, crc = self._place.write(file, encoded.pieces())
                check()
            except BaseException:
                with contextlib.suppress(OSError):
                    self._place.remove(file)
                raise
            batch, heads, queries, keys = attention.shape
            record = SiteRecord(
                file=FileRecord(file, size, crc, encoded.records),
                kind="qk" if attention.weights is None else "weights",
                shape=(batch, heads, queries, keys),
                scale=None if isinstance(attention.scale, Tensor) else float(attention.scale),
                causal=attention.causal,
                site=attention.site or self._site_of(name, attention),
            )
            self._confirmed.add(name)
            layout = self._layout or _longer(self.manifest.layout, record.site.key_layout)
            self._save(replace(self.manifest.with_site(name, record), layout=layout))

    def finish(self) -> None:
        """End the run in order; a replacement takes its place.

        Raises
        ------
        StoreError
            If a replacement is not whole. What it was to replace stays.
        """
        with reported(f"can't finish the run in {self._place.root}"):
            missing = self.manifest.missing
            if self._file == NEXT and missing:
                raise StoreError(
                    f"{self._place.root} was left as it was: the run to replace it lacks "
                    f"{few(missing)}. Call again to go on with it"
                )
            self._save(replace(self.manifest, closed=True))
            if self._file == NEXT:
                self._check_alone(NAME, self._replaced)
                self._place.rename(NEXT, NAME)
                self._clean([self.manifest], staged=False)

    # -- what is on disk -------------------------------------------------------------------------

    def _read(self, name: str) -> Manifest | None:
        try:
            text = self._place.read(name)
        except FileNotFoundError:
            return None
        try:
            return Manifest.from_json(text, self._place.where(name))
        except StoreError as error:
            raise StoreError(
                f"{error}. Nothing was written; move that folder away, or choose another"
            ) from error

    def _continued(self, found: Manifest, wanted: Manifest) -> Manifest:
        """An unfinished run as this writer goes on with it; what is damaged is missing again."""
        sizes = self._place.sizes()
        sites = {n: r for n, r in found.sites.items() if not damage(self._place, r.file, sizes)}
        images = found.images
        if images is not None and damage(self._place, images, sizes):
            images = None
        return replace(
            found,
            writer=wanted.writer,
            made_by=wanted.made_by,
            model=wanted.model or found.model,
            layout=wanted.layout or found.layout,
            metadata=wanted.metadata or found.metadata,
            expected=wanted.expected or found.expected,
            closed=False,
            sites=sites,
            images=images,
        )

    def _save(self, manifest: Manifest, *, first: bool = False) -> None:
        if not first:
            self._check_alone(self._file, self.manifest)
        self._place.write(self._file, [manifest.to_json()])
        self.manifest = manifest

    def _check_alone(self, name: str, known: Manifest | None) -> None:
        """Where nothing can be locked, see whether someone else has written meanwhile."""
        if known is None or self._place.locks:
            return
        found = self._read(name)
        if found is None or found.writer != known.writer:
            raise StoreError(
                f"{self._place.where(name)} was written by someone else meanwhile; this writer "
                "stops, write to another folder"
            )

    def _restage(self) -> None:
        """Go on as a replacement of what is there, with the sites of this session alone."""
        if self._file == NAME:
            self._file, self._replaced = NEXT, self.manifest
        self._resumed = False
        confirmed = {n: r for n, r in self.manifest.sites.items() if n in self._confirmed}
        self._save(replace(self.manifest, sites=confirmed), first=True)

    def _clean(self, kept: Sequence[Manifest], *, staged: bool) -> None:
        """Remove files of this format that no manifest names. What can't go now goes next time."""
        used = {record.file for manifest in kept for record in manifest.files}
        self._taken = {name.casefold() for name in used}
        for name in self._place.sizes():
            ours = SITE_FILE.fullmatch(name) or IMAGES_FILE.fullmatch(name)
            unused = name.endswith(TEMPORARY) or (ours is not None and name not in used)
            if unused or (name == NEXT and not staged):
                try:
                    self._place.remove(name)
                except OSError:
                    self._taken.add(name.casefold())

    def _is_stored(self, encoded: Encoded, record: FileRecord) -> bool:
        known = (record.nbytes, record.crc32)
        if (encoded.nbytes, encoded.crc32()) != known:
            return False
        local = self._place.local(record.file)
        return local is None or crc32_of_file(local) == known

    def _new_file(self, folder: str, name: str) -> str:
        """A file name for a site: the site's own where it is free and plain enough."""
        stem = re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:150]
        stem = stem if re.match(r"[A-Za-z0-9_]", stem) else f"_{stem}"
        number = 1
        file = f"{folder}{stem}.safetensors"
        while file.casefold() in self._taken:
            number += 1
            file = f"{folder}{stem}-{number}.safetensors"
        self._taken.add(file.casefold())
        return file

    def _site_of(self, name: str, attention: Attention) -> SiteInfo:
        """A description for attention that has none; the run's layout serves where it fits."""
        layouts = []
        for count in attention.shape[2:]:
            layout = self.manifest.layout
            if layout is not None and count == layout.tokens_per_frame:
                layout = layout.frame_layout()
            layouts.append(layout if layout is not None and count == layout.num_tokens else None)
        return SiteInfo(name=name, query_layout=layouts[0], key_layout=layouts[1])


def _fits(found: Manifest, wanted: Manifest, pictures: Encoded | None) -> bool:
    """Whether an unfinished run is the one that is wanted, as far as can be told."""
    said = all(
        not getattr(wanted, key)
        or not getattr(found, key)
        or getattr(wanted, key) == getattr(found, key)
        for key in ("model", "layout", "metadata")
    )
    if wanted.expected and not set(found.sites) <= set(wanted.expected):
        return False
    if pictures is None:
        return said
    if found.images is None:
        return said and not found.sites
    return said and (found.images.nbytes, found.images.crc32) == (
        pictures.nbytes,
        pictures.crc32(),
    )


def _longer(one: TokenLayout | None, other: TokenLayout | None) -> TokenLayout | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda layout: layout.num_tokens)


def _tensors_of(attention: Attention) -> dict[str, Tensor]:
    if attention.weights is not None:
        return {"weights": attention.weights}
    assert attention.query is not None
    assert attention.key is not None
    tensors = {"query": attention.query, "key": attention.key}
    if attention.mask is not None:
        tensors["mask"] = _unexpanded(attention.mask)
    if isinstance(attention.scale, Tensor):
        tensors["scale"] = attention.scale
    return tensors


def _unexpanded(mask: Tensor) -> Tensor:
    """A mask without what `expand` repeated; it broadcasts to the same."""
    index = tuple(
        slice(0, 1) if stride == 0 and size > 1 else slice(None)
        for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )
    return mask[index]
