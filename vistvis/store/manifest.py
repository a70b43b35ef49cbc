"""The manifest: what a run says about itself, and the records of what its writer finished since."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vistvis.errors import StoreError
from vistvis.store.folders import SITES, Folder
from vistvis.store.records import (
    MALFORMED,
    RECORD_FILE,
    SCENE,
    SCENE_FILE,
    FileRecord,
    SiteRecord,
    check_keys,
    is_file_of_run,
    layout_from,
    sealed,
    token_of,
    unsealed,
)
from vistvis.tokens import TokenLayout

FORMAT = "vistvis-run"
RECORD_FORMAT = "vistvis-site"
SCHEMA = 2
NAME = "manifest.json"
# What is to replace an earlier run gathers under this name, until it is whole.
NEXT = "manifest.next.json"
# Under which writers of schema 1 kept what they replaced, until its files were removed.
OLD = "manifest.old.json"

_KEYS = ("format", "made_by", "writer", "model", "layout", "metadata", "closed", "expected")
_KEYS_OF = {
    1: (*_KEYS, "schema", "missing", "images", "sites"),
    2: (*_KEYS, "schema", "pass_id", "leftover", *SCENE, "sites"),
}


class NewerSchemaError(StoreError):
    """A manifest that is no damage, but of a later version of this package."""


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; `pass_id`, `model`, `layout`, `metadata` as for `RunWriter`.

    A run that is not `closed` has no orderly end: it may lack sites that nobody announced. What its
    writer finished since is in records beside the sites. `leftover` are files that earlier writers
    of this folder made and this run does not need.
    """

    writer: str
    expected: tuple[str, ...] = ()
    closed: bool = False
    pass_id: str | None = None
    model: str | None = None
    layout: TokenLayout | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    scene: Mapping[str, FileRecord] = field(default_factory=dict)
    sites: Mapping[str, SiteRecord] = field(default_factory=dict)
    leftover: tuple[str, ...] = ()
    made_by: str = ""

    @property
    def token(self) -> str:
        """What the names of this writer's files end in."""
        return self.writer[:8]

    @property
    def names(self) -> tuple[str, ...]:
        """Every site that was announced or finished, in order."""
        return tuple(dict.fromkeys((*self.expected, *self.sites)))

    @property
    def missing(self) -> tuple[str, ...]:
        """Expected sites that are not finished, in order."""
        return tuple(name for name in self.expected if name not in self.sites)

    @property
    def complete(self) -> bool:
        return self.closed and not self.missing

    @property
    def files(self) -> list[FileRecord]:
        return [*(record.file for record in self.sites.values()), *self.scene.values()]

    def damage(self, folder: Folder) -> dict[str, str]:
        """What is wrong with the sizes and headers of files, by their names in the folder."""
        sizes = folder.sizes()
        problems = ((record.file, record.damage(folder, sizes)) for record in self.files)
        return {file: problem for file, problem in problems if problem}

    def without(self, files: Container[str]) -> Manifest:
        """The manifest of what is left when some files are gone."""
        sites = {name: r for name, r in self.sites.items() if r.file.file not in files}
        scene = {name: r for name, r in self.scene.items() if r.file not in files}
        return replace(self, expected=self.names, sites=sites, scene=scene)

    def to_json(self) -> bytes:
        scene = {name: self.scene[name].to_dict() if name in self.scene else None for name in SCENE}
        return sealed(
            {
                "format": FORMAT,
                "schema": SCHEMA,
                "made_by": self.made_by,
                "writer": self.writer,
                "pass_id": self.pass_id,
                "model": self.model,
                "layout": self.layout.to_dict() if self.layout else None,
                "metadata": self.metadata,
                "closed": self.closed,
                "expected": self.names,
                "leftover": self.leftover,
                **scene,
                "sites": {name: record.to_dict() for name, record in self.sites.items()},
            }
        )

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Read and check a manifest; a StoreError if it is none, damaged or newer."""
        data, has_checksum = unsealed(text, where)
        if data.get("format") != FORMAT:
            raise StoreError(f'{where} is not the manifest of a run: no "format": "{FORMAT}" in it')
        schema = data.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise StoreError(f"{where} is damaged: its schema version is {schema!r}")
        if schema > SCHEMA:
            raise NewerSchemaError(
                f"{where} has schema version {schema} (written by {data.get('made_by')!r}), and "
                f"this version of vistvis reads up to {SCHEMA}; update vistvis"
            )
        try:
            if has_checksum != (schema > 1):
                raise ValueError(f"schema version {schema} ends with a checksum from 2 on")
            check_keys(data, "a manifest", _KEYS_OF[schema])
            return cls._from_data(data)
        except MALFORMED as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
            raise StoreError(f"{where} is damaged: {reason}") from error

    @classmethod
    def _from_data(cls, data: Mapping[str, Any]) -> Manifest:
        expected = tuple(data["expected"])
        sites = {name: SiteRecord.from_dict(entry) for name, entry in data["sites"].items()}
        if not all(isinstance(name, str) for name in (*expected, *sites)):
            raise TypeError("names of sites are strings")
        if not isinstance(data["metadata"], dict) or not isinstance(data["closed"], bool):
            raise TypeError("metadata is an object and closed is true or false")
        for key in ("writer", "made_by", "model", "pass_id"):
            value = data.get(key)
            if not isinstance(value, str) and not (key in ("model", "pass_id") and value is None):
                raise TypeError(f"{key} is {value!r}")
        scene = {}
        for name in SCENE:
            if data.get(name) is not None:
                record = scene[name] = FileRecord.from_dict(data[name], SCENE_FILE)
                if set(record.tensors) != {name}:
                    raise ValueError(f"{name} hold {sorted(record.tensors)}")
        leftover = tuple(data.get("leftover", ()))
        if not all(isinstance(name, str) and is_file_of_run(name) for name in leftover):
            raise ValueError("leftover names what is no file of a run")
        return cls(
            writer=data["writer"],
            expected=tuple(dict.fromkeys((*expected, *sites))),
            closed=data["closed"],
            pass_id=data.get("pass_id"),
            model=data["model"],
            layout=layout_from(data["layout"]) if data["layout"] is not None else None,
            metadata=data["metadata"],
            scene=scene,
            sites=sites,
            leftover=leftover,
            made_by=data["made_by"],
        )


def longest_layout(sites: Iterable[SiteRecord]) -> TokenLayout | None:
    """The key layout of most tokens: that of a run whose writer said none."""
    layouts = [record.site.key_layout for record in sites if record.site.key_layout]
    return max(layouts, key=lambda one: one.num_tokens, default=None)


# -- sites finished since -------------------------------------------------------------------------


def record_text(writer: str, number: int, name: str, record: SiteRecord) -> bytes:
    """The record of a site, the `number`-th that its writer finished."""
    head = {"format": RECORD_FORMAT, "schema": SCHEMA, "writer": writer, "number": number}
    return sealed({**head, "name": name, "site": record.to_dict()})


def _record_from(text: bytes, where: str, writer: str) -> tuple[int, str, SiteRecord]:
    data, has_checksum = unsealed(text, where)
    check_keys(data, "a record", ("format", "schema", "writer", "number", "name", "site"))
    said = (data["format"], data["schema"], data["writer"], has_checksum)
    if said != (RECORD_FORMAT, SCHEMA, writer, True) or not isinstance(data["name"], str):
        raise ValueError(f"{where} is no record of this writer")
    return int(data["number"]), data["name"], SiteRecord.from_dict(data["site"])


def read_manifest(folder: Folder, name: str = NAME) -> Manifest:
    """A manifest with the sites that its writer finished since; FileNotFoundError without one.

    StoreError as `Manifest.from_json`. A record that is damaged is none: its site is not finished.
    """
    text = folder.read(name)
    while True:
        manifest = Manifest.from_json(text, folder.where(name))
        if manifest.closed or not token_of(f"{SITES}/a-{manifest.token}.json"):
            return manifest
        end, records = f"-{manifest.token}.json", []
        for file in folder.names():
            if file.endswith(end) and RECORD_FILE.fullmatch(file):
                with contextlib.suppress(StoreError, FileNotFoundError, *MALFORMED):
                    where = folder.where(file)
                    records.append(_record_from(folder.read(file), where, manifest.writer))
        sites = {site: record for _, site, record in sorted(records, key=lambda one: one[0])}
        # Records go when the manifest has taken them up: then it says more than it did.
        if (again := folder.read(name)) == text:
            return replace(manifest, sites={**manifest.sites, **sites})
        text = again
