"""`explore`: captured or stored attention as a page to point at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistvis.attention import Attention
from vistvis.errors import InputError
from vistvis.files import PathLike, atomic_file, checked_path
from vistvis.views.explorer.contents import Contents, choose, gather
from vistvis.views.explorer.page import page_parts


def explore(
    source: Attention | Mapping[str, Attention],
    out: PathLike,
    *,
    images: Any = None,
    sites: str | Sequence[str] | None = None,
    title: str | None = None,
    names: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write a page in which attention is computed while one points at it.

    The page is one file that needs no server and no network: it carries queries and keys as
    float16, and its own script computes the softmax over all keys, in float64 sums.

    Parameters
    ----------
    source
        A `Capture`, a `Run`, any mapping of names to `Attention`, or one `Attention`. Sites without
        a layout are shown as a plain strip of tokens.
    out
        The file.
    images
        What the model saw, `(S, 3, H, W)` or `(B, S, 3, H, W)` in 0…1 or 0…255, or sharper ones of
        the same shape; by default those of the run. Without, a plain grid.
    sites
        Names or globs, as in `capture`. By default the last ones that fit 100 MB; what is left out
        is named in the page and in a `VistvisWarning`.
    title
        What stands above; by default the model of the run.
    names
        What each picture is called; by default as the run has it, or by its number.
    progress
        Whether a bar is shown; default: where somebody watches a terminal and it takes long.

    Raises
    ------
    SiteError
        If `sites` match nothing.
    InputError
        If no site can be shown, or images or names do not fit.

    Cost: each site is read once, and the maxima and sums of its rows are computed,
    `B·h·Nq·Nk·d` multiply-adds in float64; one site is in memory at a time. The file takes at most
    1.2 times what queries and keys take in float16, and the pictures as JPEGs.
    """
    source = _mapping(source)
    path = checked_path(out)
    chosen = choose(source, sites)
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = gather(
        source,
        chosen,
        images=images,
        title=title,
        names=names,
        near=path.parent,
        progress=progress,
    )
    with contents.spool:
        write_page(contents, path)
    return path


def write_page(contents: Contents, path: Path) -> None:
    """The page as one file, whole or not at all."""
    with atomic_file(path) as stream:
        for part in page_parts(contents):
            stream.write(part.encode())


def _mapping(source: Any) -> Mapping[str, Attention]:
    if isinstance(source, Attention):
        return {source.site.name if source.site else "attention": source}
    if isinstance(source, Mapping):
        return source
    raise InputError(
        "explore takes an Attention or a mapping of names to them, such as a Capture or a run; "
        f"for a run's folder pass open_run(folder), got {type(source).__name__}"
    )
