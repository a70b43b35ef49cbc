"""The options that commands share, each defined once, and what can be judged before any work.

Words are judged while they are parsed, so that an error names the option; torch and matplotlib are
loaded only to judge a word that needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vistvis.commands._sources import plays
from vistvis.errors import InputError, VistvisError
from vistvis.queries import TokenQuery, parse_query

if TYPE_CHECKING:
    from vistvis.photos.photo import Photo
    from vistvis.views.figures import NotebookFigure

# As `views.painting`, `devices` and `views.figures` have them, which are slow to import.
NORMS = ("auto", "linear", "log", "percentile")
DTYPES = ("float32", "bfloat16", "float16", "float64")
FORMATS = ("png", "svg", "pdf")
# Behind the name of a file that was written.
REPLACED = ", replaced what was there"

_T = TypeVar("_T")
_SHOWN = 40


def typed(read: Callable[[str], _T]) -> Callable[[str], _T]:
    """For `type=` of argparse, which prints the words of its own error only."""

    @functools.wraps(read)
    def judged(text: str) -> _T:
        try:
            return read(text)
        except VistvisError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return judged


# -- words -----------------------------------------------------------------------------------------


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


@typed
def count(text: str) -> int:
    """A whole number from 0, of at most nine digits."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"a whole number from 0 is meant, for example 5; got {_shown(text)}")
    return int(text)


@typed
def size(text: str) -> int:
    """A number of pixels."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,4}", text):
        raise InputError(f"pixels from 1 to 99999 are meant, for example 518; got {_shown(text)}")
    return int(text)


@typed
def block(text: str) -> int:
    """The number of a block, negative from the end."""
    if not re.fullmatch(r"-?[0-9]{1,6}", text):
        raise InputError(f"a block's number is meant, -1 for the last; got {_shown(text)}")
    return int(text)


@typed
def alpha(text: str) -> float:
    """An opacity."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise InputError(f"a number from 0 to 1 is meant, for example 0.55; got {_shown(text)}")


@typed
def cmap(text: str) -> str:
    """A colour map of matplotlib."""
    from vistvis.views.painting import colour_map

    colour_map(text)
    return text


@typed
def query(text: str) -> TokenQuery:
    """A token, in the grammar of queries."""
    return parse_query(text)


def head(*words: str) -> Callable[[str], int | str]:
    """A head's number, or one of the words."""

    def read(text: str) -> int | str:
        if text in words:
            return text
        if not re.fullmatch(r"[0-9]{1,6}", text):
            listed = " or ".join(map(repr, words))
            raise InputError(f"a head's number from 0, {listed} is meant, got {_shown(text)}")
        return int(text)

    return typed(read)


@typed
def device(text: str) -> str:
    """A device of this machine that holds numbers."""
    import torch

    from vistvis.devices import device_of

    place = device_of(text)
    try:
        torch.zeros(1, device=place).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(f"{_shown(text)} can't be computed on here; use cpu") from error
    return text


@typed
def every(text: str) -> str:
    """How often a frame of a video is taken."""
    from vistvis.photos.video import Every

    Every.read(text)
    return text


@typed
def formats(text: str) -> tuple[str, ...]:
    """Formats of files, separated by commas, each once."""
    chosen = tuple(dict.fromkeys(part.strip().lower().lstrip(".") for part in text.split(",")))
    if any(part not in FORMATS for part in chosen):
        raise InputError(f"some of {','.join(FORMATS)} are meant, got {_shown(text)}")
    return chosen


@typed
def folder(text: str) -> Path:
    """A folder that is there and can be written, or can be made."""
    if not text:
        raise InputError("a folder is meant, got an empty name; '.' is this one")
    chosen = Path(text).expanduser()
    there = chosen
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise InputError(f"{_shown(text)} can't be a folder's name; choose another") from error
    if not there.is_dir():
        raise InputError(f"{there} is a file, and a folder is meant; choose another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"nothing can be written in {there}; choose another folder")
    return chosen


@typed
def movie(text: str) -> Path:
    """A movie's file, in a folder that can be written."""
    from vistvis.views.movie import check_movie

    path = check_movie(Path(text).expanduser())
    folder(str(path.parent))
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file is meant; choose another name")
    return path


# -- options ---------------------------------------------------------------------------------------


def add_alias(parser: Any, *names: str, dest: str, **options: Any) -> None:
    """An earlier name of an option, which help does not list."""
    parser.add_argument(
        *names, dest=dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **options
    )


def add_every(parser: Any) -> None:
    """`--every`, of videos; beside pictures that `photos_of` reads."""
    text = "frames of a video: each 0.5s or each 10f (default: 8, spread evenly)"
    parser.add_argument("--every", type=every, metavar="STEP", help=text)


def add_model(parser: Any, *, default: str, what: str) -> None:
    """`--model`; which names there are depends on the command."""
    text = f"{what} (default {default})"
    parser.add_argument("-m", "--model", default=default, metavar="NAME", help=text)


def add_query(
    parser: Any, *, default: str, read: Callable[[str], TokenQuery | str] = query, **options: Any
) -> None:
    """`--query`, a token; `read` takes what the command understood before there was a grammar."""
    text = f"{default}; 0:120,80px 0:r13,c15 0:middle cls …: vistvis help queries"
    parser.add_argument("-q", "--query", type=read, metavar="QUERY", help=text, **options)


def add_sites(parser: Any, *, default: str = "all that can be read", nargs: str = "+") -> None:
    """`--sites`, by names and patterns."""
    text = f"attention modules by name or pattern (default: {default})"
    parser.add_argument("--sites", nargs=nargs, metavar="GLOB", help=text)


def add_batch(parser: Any, *, what: str = "entry of the batch", default: int | None = 0) -> None:
    """`--batch`, one of several pictures that a model sees each by itself."""
    text = what if default is None else f"{what} (default {default})"
    parser.add_argument("--batch", type=count, default=default, metavar="N", help=text)


def add_look(parser: Any, *, norms: Sequence[str] = NORMS) -> None:
    """`--norm`, `--cmap` and `--alpha`, without a default: that is the view's."""
    add = parser.add_argument
    listed = ", ".join(norms)
    add("--norm", choices=norms, metavar="SCALE", help=f"{listed} (default {norms[0]})")
    add("--cmap", type=cmap, metavar="NAME", help="matplotlib colour map (default inferno)")
    add("--alpha", type=alpha, metavar="N", help="opacity of the colours, 0 to 1 (default 0.55)")


def look_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said of `add_look`, as keywords of a view."""
    said = {name: getattr(arguments, name) for name in ("norm", "cmap", "alpha")}
    return {name: value for name, value in said.items() if value is not None}


def dark_text(names: Sequence[str], norm: str) -> str:
    """What to try where pictures are dark, though there is something in them."""
    other = "log" if norm != "log" else "percentile"
    return f"dark on this scale: {', '.join(names)}; --norm {other} shows what is there"


def add_place(parser: Any, *, default: str = "that of the weights") -> None:
    """`--size`, `--device` and `--dtype`: how a model runs."""
    add = parser.add_argument
    add("--size", type=size, metavar="PIXELS", help="width of the model's pictures")
    text = "cpu, cuda, cuda:1, … (default: cuda where there is one)"
    add("--device", type=device, metavar="NAME", help=text)
    text = f"{', '.join(DTYPES)} (default: {default})"
    add("--dtype", choices=DTYPES, metavar="NAME", help=text)


def add_out(parser: Any, *, default: str) -> None:
    """`--out`, a folder."""
    text = "where files go (default %(default)s)"
    parser.add_argument("-o", "--out", type=folder, default=default, metavar="DIR", help=text)


def add_format(parser: Any) -> None:
    """`--format` of pictures."""
    text = f"some of {','.join(FORMATS)} (default png)"
    parser.add_argument("--format", type=formats, default=("png",), metavar="KINDS", help=text)


def add_movie(parser: Any) -> None:
    """`--movie`, in place of pictures; see `write_movie`."""
    text = "write a .gif or .mp4 instead: the query moves along its row, or a video plays"
    parser.add_argument("--movie", type=movie, metavar="FILE", help=text)


# -- what commands write ---------------------------------------------------------------------------


def write_movie(
    path: Path, steps: Sequence[_T], draw: Callable[[_T], NotebookFigure], photos: Sequence[Photo]
) -> None:
    """A figure for each step; where a video plays, in its own time, but none for over a second."""
    from vistvis.attention.checks import bytes_text
    from vistvis.views.movie import write_query_movie

    fps = 4.0
    if plays(photos) and len(photos) > 1:
        first, last = photos[0].time, photos[-1].time
        assert first is not None is not last
        fps = min(max((len(photos) - 1) / max(last - first, 1e-3), 1.0), 50.0)
    before = path.exists()
    write_query_movie(steps, draw, path, fps=fps)
    told = f"{len(steps)} pictures, {fps:.3g} a second, {bytes_text(path.stat().st_size)}"
    print(f"wrote {path} ({told}){REPLACED * before}")


def files_in(folder: Path) -> set[Path]:
    """What a folder holds, which pictures of the same names replace."""
    return set(folder.iterdir()) if folder.is_dir() else set()


def check_head(head: int | str, heads: int | None) -> None:
    """InputError for a number that the model has no head of, where it says how many it has."""
    if heads is not None and isinstance(head, int) and not 0 <= head < heads:
        raise InputError(f"--head {head}: the model has heads 0…{heads - 1}")
