"""Reading a run."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.checks import bytes_text
from vistvis.errors import SiteError, StoreError
from vistvis.names import few, suggestion
from vistvis.progress import progress as bar
from vistvis.store.folders import Folder, folder_of, reported
from vistvis.store.manifest import NAME, Manifest, longest_layout, read_manifest
from vistvis.store.records import SiteRecord
from vistvis.tokens import TokenLayout

_T = TypeVar("_T")

# Sites read from a URL are whole in memory; this many are kept for the next look.
_KEPT_REMOTE = 4


def open_run(
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Open a stored run: a folder, or an fsspec URL with its `storage_options`.

    StoreError if there is no run, or its manifest is damaged or of a newer schema. With `strict`
    also if a file has the wrong size or header (behind a URL headers are checked at the first touch
    instead); without, such sites are left out and named in `run.damaged`.

    Cost: reads the manifest and the header of every site.
    """
    folder = folder_of(path, storage_options)
    return Run(folder, *_opened(folder, strict), strict)


def _opened(folder: Folder, strict: bool) -> tuple[Manifest, dict[str, str]]:
    """The manifest of a run, and what is wrong with its files."""
    with reported(f"can't open the run in {folder.root}"):
        while True:
            manifest = _manifest_of(folder)
            damage = manifest.damage(folder)
            # A run that was replaced between two looks at it is no damage: look again.
            if not damage or manifest == _manifest_of(folder):
                break
    if strict and damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise StoreError(
            f"{next(iter(damage.values()))}{more}. open_run(…, strict=False) opens what is sound; "
            "writing the run again puts the rest right"
        )
    return manifest, damage


def _manifest_of(folder: Folder) -> Manifest:
    try:
        return read_manifest(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"no run in {folder.root}: {folder.where(NAME)} is not there") from error


class Run(Mapping[str, Attention]):
    """A stored run: a mapping from site names, in the order of the model, to lazy `Attention`.

    Made by `open_run`. Nothing is read before it is asked for. At the first touch of a site its
    checksum is compared, which reads the file once; then its tensors are mapped, and pages come
    from disk as rows or columns need them.

    A run is closed by `close` or at the end of a `with` block; attention taken from it stays
    usable. A run opened before another replaced it goes on reading the sites it has touched, and
    says that it was replaced for others. While a writer goes on, `refresh` shows what it finished.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, damage: Mapping[str, str], strict: bool = True
    ) -> None:
        self._folder, self._strict = folder, strict
        self._cache: OrderedDict[str, Attention] = OrderedDict()
        self._scene: dict[str, Tensor] = {}
        self._states: dict[str, tuple[Path | None, tuple[int, ...]]] = {}
        self._lock = threading.RLock()
        self._closed = False
        self._manifest = manifest
        self._show(manifest, damage)

    def _show(self, manifest: Manifest, damage: Mapping[str, str]) -> None:
        """Be what a manifest says; what was read of the last one stays where it says the same."""
        sound = manifest.without(damage)
        for name in list(self._cache):
            if sound.sites.get(name) != self._manifest.sites[name]:
                del self._cache[name]
        for name in list(self._scene):
            if sound.scene.get(name) != self._manifest.scene[name]:
                del self._scene[name]
        self._manifest, self._damage, self._sound = manifest, damage, sound
        self._layout = manifest.layout or longest_layout(manifest.sites.values())

    # -- what it has -----------------------------------------------------------------------------

    @property
    def path(self) -> str:
        return self._folder.root

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be read, in the expected order."""
        return tuple(name for name in self.expected if name in self._sound.sites)

    @property
    def expected(self) -> tuple[str, ...]:
        """Every site that was announced or stored."""
        return self._manifest.names

    @property
    def missing(self) -> tuple[str, ...]:
        """Announced sites that were not finished when writing stopped, and damaged ones."""
        return self._sound.missing

    @property
    def damaged(self) -> Mapping[str, str]:
        """What is wrong with damaged sites, by name; only with `strict=False`."""
        files = {name: record.file.file for name, record in self._manifest.sites.items()}
        return {name: self._damage[file] for name, file in files.items() if file in self._damage}

    @property
    def damaged_files(self) -> Mapping[str, str]:
        """The same by the name of the file in the folder, images and the like among them."""
        return dict(self._damage)

    @property
    def complete(self) -> bool:
        """Whether writing came to its orderly end and no site is missing."""
        return self._sound.complete

    @property
    def model(self) -> str | None:
        return self._manifest.model

    @property
    def pass_id(self) -> str | None:
        """Which forward pass it is of, as its writer was told (`pass_id_of`)."""
        return self._manifest.pass_id

    @property
    def layout(self) -> TokenLayout | None:
        return self._layout

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
        record = self._manifest.scene.get("images")
        return None if record is None else record.tensors["images"].shape

    @property
    def images(self) -> Tensor | None:
        """What the model saw, as it was given, `(S, C, H, W)` or `(B, S, C, H, W)`; or None.

        StoreError if the file is damaged; for those below too.
        """
        return self._part("images")

    @property
    def points(self) -> Tensor | None:
        """A point of the scene for every patch or pixel, `(S, rows, cols, 3)` or `(S, H, W, 3)`."""
        return self._part("points")

    @property
    def confidence(self) -> Tensor | None:
        """How sure the model is of each point, of the shape of `points` without its 3."""
        return self._part("confidence")

    @property
    def cameras(self) -> Tensor | None:
        """`(S, 3, 4)`: from the world to each camera, as OpenCV has them."""
        return self._part("cameras")

    def _part(self, name: str) -> Tensor | None:
        record = self._manifest.scene.get(name)
        if record is None:
            return None
        with self._lock:
            if name not in self._scene:
                if record.file in self._damage:
                    raise StoreError(self._damage[record.file])
                self._scene[name] = self._loaded(record.file, record.load)[name]
            return self._scene[name]

    def record(self, name: str) -> SiteRecord:
        """What the manifest says about a finished site."""
        if name in self._sound.sites:
            return self._sound.sites[name]
        if name in self.damaged:
            raise StoreError(self.damaged[name])
        if name in self.missing:
            raise SiteError(
                f"site {name!r} of {self.path} was expected, but not finished when writing "
                f"stopped; finished are {few(self.sites)}. Store the run again to resume it"
            )
        hint = suggestion(str(name), self.sites, otherwise=f"it has {few(self.sites)}")
        raise SiteError(f"no site {name!r} in {self.path}: {hint}")

    # -- a mapping -------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Attention:
        with self._lock:
            attention = self._cache.get(name)
            if attention is None or self._was_touched(name):
                record = self.record(name)
                path = self._folder.local(record.file.file)
                self._states[name] = path, _state_of(path)  # from before its checksum is compared
                attention = self._cache[name] = self._loaded(record.file.file, record.load)
                if path is None and len(self._cache) > _KEPT_REMOTE:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(name)
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

    def check(self, *, strict: bool = True, progress: bool = False) -> None:
        """Compare the checksum of every file; StoreError at the first that is damaged.

        With `strict=False` no error: all that is damaged is in `damaged` and `damaged_files` then,
        and no longer among the sites. Cost: reads the whole run once.
        """
        damage = dict(self._damage)
        for record in bar(self._manifest.files, "checking", shown=progress, unit="file"):
            try:
                self._loaded(record.file, record.load)
            except StoreError as error:
                if strict or self._closed or self._was_replaced():
                    raise
                damage.setdefault(record.file, str(error))
        with self._lock:
            self._show(self._manifest, damage)

    def refresh(self) -> None:
        """See what a writer finished since: the run becomes what `open_run` would give now.

        That is another run where it was replaced. Attention taken before stays usable, and what was
        not written again is not read again. StoreError as `open_run`; the run is as before then.
        """
        if self._closed:
            raise StoreError(f"the run in {self.path} was closed; open it again")
        manifest, damage = _opened(self._folder, self._strict)
        with self._lock:
            self._show(manifest, damage)

    def close(self) -> None:
        self._closed = True
        with self._lock:
            self._cache.clear()
            self._scene.clear()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        unclosed = "" if self._manifest.closed else "not closed by its writer"
        parts = (
            f"{len(self)} sites",
            f"{len(self.missing)} missing" if self.missing else unclosed,
            f"model {self.model!r}" if self.model else "",
            str(self.layout) if self.layout else "",
            f"images {self.image_shape}" if self.image_shape else "",
            bytes_text(self.nbytes),
        )
        return f"Run({self.path!r}: {', '.join(filter(None, parts))})"

    # -- reading ---------------------------------------------------------------------------------

    def _loaded(self, file: str, load: Callable[[Folder], _T]) -> _T:
        """What `load` reads from a file; errors say so where the run was replaced meanwhile."""
        if self._closed:
            raise StoreError(f"the run in {self.path} was closed; open it again")
        try:
            with reported(f"can't read {self._folder.where(file)}"):
                return load(self._folder)
        except StoreError as error:
            if self._was_replaced():
                raise StoreError(
                    f"the run in {self.path} was replaced after it was opened; open it again"
                ) from error
            raise

    def _was_touched(self, name: str) -> bool:
        """Whether a mapped file was written into since its checksum was compared, where it shows.

        Another file of the name, or none, leaves the one that is mapped as it was.
        """
        path, state = self._states[name]
        now = _state_of(path)
        return now != state and now[:1] == state[:1]

    def _was_replaced(self) -> bool:
        try:
            current = _manifest_of(self._folder)
        except OSError:
            return False
        files = {(record.file, record.crc32) for record in current.files}
        return any((record.file, record.crc32) not in files for record in self._manifest.files)


def _state_of(path: Path | None) -> tuple[int, ...]:
    """Number, size and time of a file."""
    try:
        state = os.stat(path) if path else None
    except OSError:
        state = None
    return (state.st_ino, state.st_size, state.st_mtime_ns) if state else ()
