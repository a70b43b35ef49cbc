"""Reading a run: a mapping from site names to `Attention` whose Q and K stay on disk."""

from __future__ import annotations

import difflib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.checks import bytes_text
from vistvis.errors import SiteError, StoreError, VistvisError
from vistvis.names import few
from vistvis.store.manifest import NAME, FileRecord, Manifest, SiteRecord
from vistvis.store.places import Place, place_of, reported
from vistvis.store.tensors import check_header, crc32_of_file, from_bytes, map_file
from vistvis.tokens import TokenLayout

# Sites read from a URL are whole in memory; this many are kept for the next look.
_KEPT_REMOTE = 4


def open_run(
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Open a stored run.

    Parameters
    ----------
    path
        The run's folder, or an fsspec URL.
    strict
        Whether a file of the wrong size or with a wrong header is an error here. If False, such
        sites are left out and named in `run.damaged`.
    storage_options
        Passed to fsspec with a URL.

    Raises
    ------
    StoreError
        If there is no run, its manifest is damaged or of a newer schema, or a file of it has the
        wrong size or header (behind a URL headers are checked at the first touch instead).

    Cost: reads the manifest and the header of every site.
    """
    place = place_of(path, storage_options)
    with reported(f"can't open the run in {place.root}"):
        text = _manifest_text(place)
        while True:
            manifest = Manifest.from_json(text, place.where(NAME))
            sizes = place.sizes()
            damaged = {}
            for name, record in manifest.sites.items():
                if found := damage(place, record.file, sizes):
                    damaged[name] = found
            problem = damage(place, manifest.images, sizes) if manifest.images else None
            before, text = text, _manifest_text(place)
            # A run that was replaced between two looks at it is no damage: look again.
            if not (damaged or problem) or text == before:
                break
    if strict and (damaged or problem):
        first = next(iter(damaged.values()), problem)
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise StoreError(
            f"{first}{more}. open_run(…, strict=False) opens what is sound; writing the run again "
            "puts the rest right"
        )
    return Run(place, manifest, damaged, problem)


def _manifest_text(place: Place) -> bytes:
    try:
        return place.read(NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"no run in {place.root}: {place.where(NAME)} is not there") from error


class Run(Mapping[str, Attention]):
    """A stored run: a mapping from site names, in the order of the model, to lazy `Attention`.

    Made by `open_run`. Nothing is read before it is asked for. At the first touch of a site its
    checksum is compared, which reads the file once; then its tensors are mapped, and pages come
    from disk as rows or columns need them. What is returned is an `Attention` as in memory.

    A run is closed by `close` or at the end of a `with` block; attention taken from it stays usable
    while it is held. A run opened before another replaced it goes on reading the sites it has
    touched, and says that it was replaced for others.
    """

    def __init__(
        self, place: Place, manifest: Manifest, damaged: Mapping[str, str], problem: str | None
    ) -> None:
        self._place, self._manifest = place, manifest
        self._damaged, self._image_problem = dict(damaged), problem
        self._cache: OrderedDict[str, Attention] = OrderedDict()
        self._images: Tensor | None = None
        self._lock = threading.RLock()
        self._closed = False

    # -- what it has -----------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Where the run lies, as it was opened."""
        return self._place.root

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be read, in the expected order."""
        return tuple(
            n for n in self.expected if n in self._manifest.sites and n not in self.damaged
        )

    @property
    def expected(self) -> tuple[str, ...]:
        """Every site that was announced or stored."""
        return self._manifest.expected

    @property
    def missing(self) -> tuple[str, ...]:
        """Announced sites that were not finished when writing stopped, and damaged ones."""
        return tuple(n for n in self.expected if n not in self._manifest.sites or n in self.damaged)

    @property
    def damaged(self) -> Mapping[str, str]:
        """What is wrong with damaged sites, by name; only with `strict=False`."""
        return dict(self._damaged)

    @property
    def complete(self) -> bool:
        """Whether writing came to its orderly end and no site is missing."""
        return self._manifest.closed and not self.missing

    @property
    def model(self) -> str | None:
        return self._manifest.model

    @property
    def layout(self) -> TokenLayout | None:
        """The token layout of the whole sequence."""
        return self._manifest.layout

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self._manifest.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all files beside the manifest."""
        return sum(record.nbytes for record in self._manifest.files)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of `images`, without reading them."""
        record = self._manifest.images
        return None if record is None else record.tensors["images"].shape

    @property
    def images(self) -> Tensor | None:
        """What the model saw, as it was given, `(S, C, H, W)` or `(B, S, C, H, W)`; or None.

        Raises
        ------
        StoreError
            If the file is damaged.
        """
        record = self._manifest.images
        if record is None:
            return None
        with self._lock:
            if self._images is None:
                if self._image_problem:
                    raise StoreError(self._image_problem)
                self._images = self._load(record)["images"]
            return self._images

    def record(self, name: str) -> SiteRecord:
        """What the manifest says about a finished site: shape, kind, dtype, file, `SiteInfo`."""
        if name not in self.sites:
            raise self._no_site(name)
        return self._manifest.sites[name]

    # -- a mapping -------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Attention:
        with self._lock:
            known = self._cache.get(name)
            if known is not None:
                self._cache.move_to_end(name)
                return known
            record = self.record(name)
            attention = _attention_of(record, self._load(record.file), self._place)
            self._cache[name] = attention
            if self._place.local(record.file.file) is None and len(self._cache) > _KEPT_REMOTE:
                self._cache.popitem(last=False)
            return attention

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self.sites

    def get(self, name: str, default: Any = None) -> Any:
        """The site, or `default` where it is not finished. Damage is still an error."""
        return self[name] if name in self.sites else default

    # -- life cycle ------------------------------------------------------------------------------

    def check(self, *, progress: bool = False) -> None:
        """Compare the checksum of every file. Cost: reads the whole run once.

        Raises
        ------
        StoreError
            At the first file that is damaged.
        """
        files: Any = self._manifest.files
        if progress:
            from tqdm.auto import tqdm

            files = tqdm(files, desc="checking", unit="file")
        for record in files:
            self._load(record)

    def close(self) -> None:
        """Let go of files. Attention taken before keeps what it holds."""
        self._closed = True
        with self._lock:
            self._cache.clear()
            self._images = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        parts = [f"{len(self)} sites"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing")
        elif not self._manifest.closed:
            parts.append("not closed by its writer")
        if self.model:
            parts.append(f"model {self.model!r}")
        if self.layout:
            parts.append(str(self.layout))
        if self.image_shape:
            parts.append(f"images {self.image_shape}")
        parts.append(bytes_text(self.nbytes))
        return f"Run({self.path!r}: {', '.join(parts)})"

    # -- reading ---------------------------------------------------------------------------------

    def _load(self, record: FileRecord) -> dict[str, Tensor]:
        if self._closed:
            raise StoreError(f"the run in {self.path} was closed; open it again")
        where = self._place.where(record.file)
        try:
            with reported(f"can't read {where}"):
                local = self._place.local(record.file)
                if local is not None:
                    return _checked_map(local, record)
                return _checked_bytes(self._place.read(record.file), where, record)
        except StoreError as error:
            if self._was_replaced():
                raise StoreError(
                    f"the run in {self.path} was replaced after it was opened; open it again"
                ) from error
            raise

    def _was_replaced(self) -> bool:
        try:
            now = Manifest.from_json(self._place.read(NAME), self._place.where(NAME))
        except (OSError, VistvisError):
            return False
        files = {record.file: record.crc32 for record in self._manifest.files}
        current = {record.file: record.crc32 for record in now.files}
        return any(current.get(file) != crc for file, crc in files.items())

    def _no_site(self, name: Any) -> VistvisError:
        if name in self._damaged:
            return StoreError(self._damaged[name])
        if name in self.missing:
            return SiteError(
                f"site {name!r} of {self.path} was expected, but not finished when writing "
                f"stopped; finished are {few(self.sites)}. Store the run again to resume it"
            )
        near = difflib.get_close_matches(str(name), self.sites, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {few(self.sites)}"
        return SiteError(f"no site {name!r} in {self.path}: {hint}")


def damage(place: Place, record: FileRecord, sizes: Mapping[str, int] | None = None) -> str | None:
    """What is wrong with a file's size or header, or None."""
    where = place.where(record.file)
    size = (place.sizes() if sizes is None else sizes).get(record.file)
    if size is None:
        return f"{where} is not there"
    if size != record.nbytes:
        return f"{where} is damaged: it has {size:,} bytes, and should have {record.nbytes:,}"
    try:
        local = place.local(record.file)
        if local is not None:
            check_header(local, record.tensors)
    except (StoreError, OSError) as error:
        return str(error)
    return None


def _checked_map(path: Path, record: FileRecord) -> dict[str, Tensor]:
    _compare(str(path), crc32_of_file(path), record)
    check_header(path, record.tensors)
    return map_file(path)


def _checked_bytes(data: bytes, where: str, record: FileRecord) -> dict[str, Tensor]:
    import zlib

    _compare(where, (len(data), zlib.crc32(data)), record)
    return from_bytes(data, where, record.tensors)


def _compare(where: str, found: tuple[int, int], record: FileRecord) -> None:
    if found != (record.nbytes, record.crc32):
        raise StoreError(
            f"{where} is damaged: its {found[0]:,} bytes have the checksum {found[1]:08x}, and "
            f"should be {record.nbytes:,} with {record.crc32:08x}"
        )


def _attention_of(record: SiteRecord, tensors: Mapping[str, Tensor], place: Place) -> Attention:
    try:
        if record.kind == "weights":
            attention = Attention.from_weights(tensors["weights"], site=record.site)
        else:
            attention = Attention(
                query=tensors["query"],
                key=tensors["key"],
                scale=tensors.get("scale", record.scale),
                mask=tensors.get("mask"),
                causal=record.causal,
                site=record.site,
            )
    except VistvisError as error:
        raise StoreError(f"{place.where(record.file.file)} does not fit: {error}") from error
    if tuple(attention.shape) != record.shape:
        raise StoreError(
            f"{place.where(record.file.file)} does not fit: it gives attention of shape "
            f"{tuple(attention.shape)}, the manifest says {record.shape}"
        )
    return attention
