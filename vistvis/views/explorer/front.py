"""`explore`: captured or stored attention as a page to point at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistvis.attention import Attention
from vistvis.errors import InputError
from vistvis.files import PathLike, atomic_file, checked_path
from vistvis.views.explorer.contents import Contents, choose, gather
from vistvis.views.explorer.folder import write_folder
from vistvis.views.explorer.notebook import shown
from vistvis.views.explorer.page import check_page, page_parts


def explore(
    source: Attention | Mapping[str, Attention],
    out: PathLike | None = None,
    *,
    images: Any = None,
    points: Any = None,
    confidence: Any = None,
    cameras: Any = None,
    sites: str | Sequence[str] | None = None,
    title: str | None = None,
    names: Sequence[str] | None = None,
    against: Attention | Mapping[str, Attention] | None = None,
    folder: PathLike | None = None,
    static: bool | None = None,
    progress: bool | None = None,
) -> Any:
    """A page in which attention is computed while one points at it.

    The page is one file that needs no server and no network: it carries queries and keys as
    float16, and its own script computes the softmax over all keys, in float64 sums.

    Parameters
    ----------
    source
        A `Capture`, a `Run`, any mapping of names to `Attention`, or one `Attention`. Sites without
        a layout are shown as a plain strip of tokens.
    out
        The file, `.html`. One that is no page of the explorer is not written over.
    images
        What the model saw, `(S, 3, H, W)` or `(B, S, 3, H, W)` in 0…1 or 0…255, or sharper ones of
        the same shape; by default those of the run. Without, a plain grid.
    points, confidence, cameras
        What a 3-D pane shows: a point of the scene for each patch `(S, rows, cols, 3)` or pixel
        `(S, H, W, 3)`, of which those at patch centres are taken; how sure each is, the same
        without the 3; cameras `(S, 3, 4)`, world to camera, OpenCV. By default those of the run.
    sites
        Names or globs, as in `capture`. By default the last ones that fit 100 MB; what is left out
        is named in the page and in a `VistvisWarning`.
    title
        What stands above; by default the model of the run.
    names
        What each picture is called; by default as the run has it, or by its number.
    against
        A second source of the same pictures, such as a run of another checkpoint: both are shown
        side by side, with their difference, at the sites that both have alike; others are named.
    folder
        Instead of `out`: a folder for `index.html` and one binary a site, which any host of static
        files can serve. A browser shows it over http only; `python -m http.server` will do.
    static
        Without `out` and `folder` it is shown in a notebook: as a widget, which asks the kernel for
        its sites (the extra `widget`), or as the page itself, in a frame that the saved notebook
        keeps. True or False says which; default: the widget where it is installed.
    progress
        Whether a bar is shown; default: where somebody watches a terminal and it takes long.

    Returns
    -------
    The file that was written, of a folder its `index.html`; or what a notebook shows.

    Raises
    ------
    SiteError
        If `sites` match nothing.
    InputError
        If no site can be shown, or none is alike in `against`; a file that is something else is in
        the way; images or names do not fit; `static=False` without the extra `widget`.

    Cost: each site is read once, and the maxima and sums of its rows are computed,
    `B·h·Nq·Nk·d` multiply-adds in float64; one site is in memory at a time. The file takes
    about 1.2 times what queries and keys take in float16, and the pictures as JPEGs.
    """
    source = _mapping(source)
    path = _target(out, folder)
    other = None if against is None else _mapping(against)
    chosen = choose(source, sites, against=other)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    contents = gather(
        source,
        chosen,
        images=images,
        points=points,
        confidence=confidence,
        cameras=cameras,
        title=title,
        names=names,
        against=other,
        near=None if path is None else path.parent,
        progress=progress,
    )
    if path is None:
        return shown(contents, static=static)
    with contents.spool:
        return write_page(contents, path) if folder is None else write_folder(contents, path.parent)


def _target(out: PathLike | None, folder: PathLike | None) -> Path | None:
    """The page's file, judged; None for a notebook."""
    if out is not None and folder is not None:
        raise InputError("explore writes to out, a file, or to folder; name one of them")
    if out is None and folder is None:
        return None
    path = page_path(out) if out is not None else checked_path(str(folder)) / "index.html"
    check_page(path)
    return path


def page_path(out: PathLike) -> Path:
    """The file of a page; InputError for a name that says something else."""
    path = checked_path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"a page's file ends in .html, got {path.name!r}")
    return path


def write_page(contents: Contents, path: Path) -> Path:
    """The page as one file, whole or not at all."""
    with atomic_file(path) as stream:
        for part in page_parts(contents):
            stream.write(part.encode())
    return path


def _mapping(source: Any) -> Mapping[str, Attention]:
    if isinstance(source, Attention):
        return {source.site.name if source.site else "attention": source}
    if isinstance(source, Mapping):
        return source
    raise InputError(
        "explore takes an Attention or a mapping of names to them, such as a Capture or a run; "
        f"for a run's folder pass open_run(folder), got {type(source).__name__}"
    )
