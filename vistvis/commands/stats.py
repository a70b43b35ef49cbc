"""`vistvis stats`: the numbers of every site and head, as tables and pictures."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.commands import _options, _sources
from vistvis.errors import InputError, LayoutError

if TYPE_CHECKING:
    from vistvis.analysis import Summary, Table
    from vistvis.analysis.matching import Correspondence
    from vistvis.attention import Attention
    from vistvis.views.figures import NotebookFigure

HELP = "numbers of every site and head: entropy, masses, distance, sinks; as tables and pictures"

_MODEL = "vggt:tiny"
_TABLES = ("csv", "parquet", "npz")
# What is printed of every site: column, words above it, digits, and what it is multiplied with.
_COLUMNS = (
    ("entropy", "entropy", "nats", 2, 1),
    ("effective_rank", "rank", "keys", 1, 1),
    ("special_mass", "special", "%", 1, 100),
    ("own_frame_mass", "own frame", "%", 1, 100),
    ("distance", "distance", "patches", 2, 1),
    ("sinks", "sinks", "keys", 1, 1),
)
_DRAWN = {"entropy": "entropy", "distance": "distance", "sink_mass": "sinks"}
# Sites that mix frames, of which matrices are drawn; more are in the table.
_MOST_FRAMED = 6
# A match counts as pointing back within so many patches.
_BACK = 1.0
_EXAMPLES = """\
examples:
  vistvis stats a.jpg b.jpg c.jpg --out stats
      your photographs of one scene through the bundled small VGGT
  vistvis stats photo.jpg --model vit_small_patch14_dinov2 --table parquet
      a model of timm
  vistvis stats runs/fern --sites 'global_*' --queries
      some sites of a stored run, and a line for each of their queries
  vistvis stats runs/a --against runs/b
      two checkpoints, or two runs: and how the second differs

Photographs keep the queries and keys of all sites in memory; for large models store a run first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EXAMPLES
    text = "photographs, folders, globs, videos; or a stored run"
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help=text)
    _options.add_every(parser)
    text = f"for photographs: vggt:FILE, a timm name (default {_MODEL})"
    parser.add_argument("-m", "--model", metavar="NAME", help=text)
    _options.add_sites(parser)
    text = "another run: the change of every number as well"
    parser.add_argument("--against", metavar="RUN", help=text)
    _options.add_place(parser)
    text = f"{', '.join(_TABLES)} (default csv)"
    parser.add_argument("--table", type=_table, default="csv", metavar="KIND", help=text)
    text = "write the numbers of every query too; large"
    parser.add_argument("--queries", action="store_true", help=text)
    _options.add_format(parser)
    _options.add_out(parser, default="stats")


@_options.typed
def _table(text: str) -> str:
    """A form of tables that can be written here."""
    kind = text.lower().lstrip(".")
    if kind not in _TABLES:
        raise InputError(f"one of {', '.join(_TABLES)} is meant, got {text[:40]!r}")
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError("parquet needs pyarrow: pip install pyarrow, or take csv")
    return kind


@dataclass(frozen=True)
class _Source:
    """Attention by site, and the pictures it belongs to, where there are any."""

    attention: Mapping[str, Attention]
    images: Any
    names: Sequence[str]


def run(arguments: argparse.Namespace) -> int:
    """Compute, write and print."""
    from vistvis.analysis import summarize
    from vistvis.store import open_run

    stored = _sources.run_among(arguments.photos, arguments.model, done="summarized")
    with contextlib.ExitStack() as opened:
        other = opened.enter_context(open_run(arguments.against)) if arguments.against else None
        source = _of_photos(arguments) if stored is None else _of_run(stored, opened)
        sites = arguments.sites
        summary = summarize(source.attention, sites=sites, queries=arguments.queries)
        change = None
        if other is not None:
            change = summary.compare(summarize(other, sites=sites))
        print("\n".join(lines_of(summary)))
        if change is not None:
            print(f"\nchange, {arguments.against} less {' '.join(arguments.photos)}:")
            print("\n".join(lines_of(change, "_change")))
        pointing = _pointing(source.attention, _framed(summary))
        _write(arguments, source, summary, change, pointing)
    if (arguments.model or "").endswith("@random"):
        print("these weights are untrained: the numbers show the mechanism, not what was learned")
    site = pointing.site if pointing else str(summary["site"][-1])
    model = f" --model {shlex.quote(arguments.model)}" if arguments.model else ""
    words = f"{shlex.join(arguments.photos)}{model} --sites {shlex.quote(site)}"
    print(f"next: vistvis explore {words}   (point at a patch of it)")
    return 0


def _of_run(stored: str, opened: contextlib.ExitStack) -> _Source:
    from vistvis.photos.records import photos_of
    from vistvis.store import open_run

    run = opened.enter_context(open_run(stored))
    return _Source(run, run.images, [photo.name for photo in photos_of(run.metadata)])


def _of_photos(arguments: argparse.Namespace) -> _Source:
    import torch

    from vistvis.hooks.capture import capture

    photos, model = _sources.photos_of(arguments.photos, arguments), arguments.model or _MODEL
    loaded = _sources.load(model, arguments, photos)
    _sources.say_crops(loaded.photos)
    names = loaded.sites(arguments.sites).names
    with (
        capture(loaded.watched, names, keep="cpu", names=loaded.names) as captured,
        torch.no_grad(),
    ):
        loaded.model(loaded.images)
    images = _sources.sharp_pictures(loaded)
    return _Source(captured, images, [photo.name for photo in loaded.photos])


# -- numbers ---------------------------------------------------------------------------------------


def lines_of(table: Table, suffix: str = "") -> list[str]:
    """A line for each site, mean over heads and batch, under two lines that say what and in what.

    `suffix` "_change" takes the columns of a comparison.
    """
    import numpy as np

    shown = [one for one in _COLUMNS if one[0] + suffix in table.columns]
    names = list(dict.fromkeys(table["site"].tolist()))
    cells = [["", *(words for _, words, *_ in shown)], ["", *(unit for _, _, unit, *_ in shown)]]
    for name in names:
        of = table.where(site=name)
        cells.append([name])
        for column, _, _, digits, times in shown:
            values = of[column + suffix].astype(float)
            values = values[np.isfinite(values)]
            form = "+.2g" if suffix else f".{digits}f"
            cells[-1].append(f"{times * values.mean():{form}}" if len(values) else "–")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in cells
    ]


def _framed(summary: Summary) -> list[str]:
    """Sites whose queries see keys of several frames, in the order of the model."""
    frames = summary.frames
    return list(dict.fromkeys(frames["site"][frames["key_frame"] > 0].tolist()))


@dataclass(frozen=True)
class _Pointing:
    """The head that points most surely from frame 0 to frame 1."""

    site: str
    head: int
    found: Correspondence


def _pointing(attention: Mapping[str, Attention], framed: Sequence[str]) -> _Pointing | None:
    """By the weight on matches that point back, mean over patches; None where no head has any."""
    from vistvis.analysis import correspondence
    from vistvis.progress import progress

    best, most = None, 0.0
    for name in progress(framed, "matching", unit="site", shown=None, delay=2):
        a = attention[name]
        # With cached keys, frame 0 of the queries is another picture than that of the keys.
        if a.site is None or a.site.first_frame:
            continue
        try:
            found = correspondence(a, 0, 1, batch=0)
        except (LayoutError, InputError):  # not these frames, or negative weights
            continue
        sure = (found.confidence * found.mass * (found.cycle <= _BACK)).nan_to_num()
        scores = sure.mean(-1)[0]
        if float(scores.max()) > most:
            most, best = float(scores.max()), _Pointing(name, int(scores.argmax()), found)
    return best


# -- files -----------------------------------------------------------------------------------------


def _write(
    arguments: argparse.Namespace,
    source: _Source,
    summary: Summary,
    change: Table | None,
    pointing: _Pointing | None,
) -> None:
    """Tables and pictures; prints what was written."""
    from vistvis.progress import progress

    out, ending = Path(arguments.out), arguments.table
    there = _options.files_in(out)
    out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Table] = {"stats": summary}
    if len(summary.frames):
        tables["frames"] = summary.frames
    if summary.queries is not None:
        tables["queries"] = summary.queries
    if change is not None:
        tables["change"] = change
    written = [table.save(out / f"{name}.{ending}") for name, table in tables.items()]
    figures = _figures(source, summary, change, pointing)
    for stem, figure in progress(figures, "drawing", unit="picture", shown=None, delay=2):
        written += figure.save_as(out / stem, arguments.format)
    told = [f"{path}{_options.REPLACED * (path in there)}" for path in written]
    print("wrote " + "\n      ".join(told))


def _figures(
    source: _Source, summary: Summary, change: Table | None, pointing: _Pointing | None
) -> Iterator[tuple[str, NotebookFigure]]:
    """Each picture under the name of its file; what could not be drawn is told."""
    from vistvis.views.numbers import frame_matrices, over_depth, site_head_map

    known = [name for name in _DRAWN if _has_numbers(summary, name)]
    for name in known:
        yield _DRAWN[name], site_head_map(summary, name)
    yield "depth", over_depth(summary, known)
    framed = _framed(summary)
    for name in (shown := _spread(framed, _MOST_FRAMED)):
        yield f"frames_{_stem(name)}", frame_matrices(summary, site=name)
    if len(shown) < len(framed):
        print(f"matrices of frames: {len(shown)} of {len(framed)} sites; --sites chooses others")
    if pointing is not None and (figure := _matches(source, pointing)):
        yield f"matches_{_stem(pointing.site)}", figure
    if change is not None:
        for name in known:
            if _has_numbers(change, f"{name}_change"):
                yield f"{_DRAWN[name]}_change", site_head_map(change, f"{name}_change")


def _matches(source: _Source, pointing: _Pointing) -> NotebookFigure | None:
    """The matches of the head that points; None, and why, where there are no pictures for it."""
    from vistvis.views.maps import pictures_of, scene_of
    from vistvis.views.matches import match_lines

    site = source.attention[pointing.site].site
    assert site is not None
    layout = site.query_layout
    assert layout is not None
    if source.images is None:
        print("no matches drawn: the run has no pictures; store it with images=")
        return None
    try:
        pictures = pictures_of(source.images, scene_of(layout, None))
    except InputError as error:
        print(f"no matches drawn: {error}")
        return None
    first, second = (pictures[frame].transpose(2, 0, 1) for frame in (0, 1))
    return match_lines(
        first,
        second,
        pointing.found,
        layout,
        head=pointing.head,
        cycle=_BACK,
        key_layout=site.key_layout,
        names=source.names[:2] or None,
        title=f"{pointing.site}, head {pointing.head}: where patches point most surely",
    )


def _has_numbers(table: Table, column: str) -> bool:
    import numpy as np

    return column in table.columns and bool(np.isfinite(table[column].astype(float)).any())


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many, spread evenly from the first to the last."""
    if len(names) <= most:
        return list(names)
    return [names[round(n * (len(names) - 1) / max(most - 1, 1))] for n in range(most)]


def _stem(site: str) -> str:
    """A site's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in site)[:120]
