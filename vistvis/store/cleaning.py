"""Removing what no manifest points to: an act of its own, since nothing tells whose it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vistvis.errors import InputError, StoreError
from vistvis.store.folders import folder_of, reported
from vistvis.store.manifest import NAME, NEXT, OLD
from vistvis.store.records import token_of
from vistvis.store.shelf import is_temporary, manifest_of


def clean_run(
    path: str | os.PathLike[str],
    *,
    older_than: float = 24.0,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Remove what writers left in a run's folder; the sizes of what is gone, by name.

    That are files with the token of a writer in their name to which neither the run nor one that is
    to replace it points, and temporary files; each only where it was written more than `older_than`
    hours ago, and not where its age is unknown. Behind a URL let no writer be at work that began
    before that. InputError for a negative age. StoreError if there is no run, its manifest can't be
    read (what it points to is not known then), or someone is writing it.
    """
    if not older_than >= 0:
        raise InputError(f"older_than is a number of hours, 0 or more, got {older_than}")
    folder, removed = folder_of(path, storage_options), dict[str, int]()
    with reported(f"can't clean the run in {folder.root}"):
        if NAME not in folder.names():
            raise StoreError(f"no run in {folder.root}: {folder.where(NAME)} is not there")
        lock = folder.lock()
        try:
            if lock:
                lock.acquire()
            manifests = [
                manifest for n in (NAME, NEXT, OLD) if (manifest := manifest_of(folder, n))
            ]
            used = {record.file for manifest in manifests for record in manifest.files}
            tokens = {manifest.token for manifest in manifests if not manifest.closed}
            for name, size in folder.sizes().items():
                record = name.endswith(".json") and token_of(name) in tokens
                ours = token_of(name) and name not in used and not record
                if not (ours or is_temporary(name)):
                    continue
                age = folder.age(name)
                if age is not None and age > 3600 * older_than:
                    folder.remove(name)
                    removed[name] = size
        finally:
            if lock:
                lock.release()
    return removed
