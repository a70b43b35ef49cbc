"""What callers give to a run beside attention: names and metadata; checked and plain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from vistvis.errors import InputError
from vistvis.files import checked_name
from vistvis.names import few


def site_names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise InputError(f"names are a list, got the string {names!r}")
    result = tuple(checked_name(name, "the name of a site") for name in names)
    if len(set(result)) != len(result):
        raise InputError(f"names of sites are given twice: {few(result)}")
    return result


def plain_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata is what JSON can hold: {error}") from error
    return plain


def made_by() -> str:
    from importlib import metadata

    try:
        return f"vistvis {metadata.version('vistvis')}"
    except metadata.PackageNotFoundError:
        return "vistvis"
