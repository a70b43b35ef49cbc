"""`vistvis knockout`: what becomes of matching when each head of a VGGT is knocked out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.commands import _options, _sources
from vistvis.errors import InputError

if TYPE_CHECKING:
    from vistvis.intervention import KnockoutTable, Truth

HELP = "knock out every head of a VGGT in turn, and see how much worse its tokens match"
MODES = ("uniform", "zero", "mean")

_EXAMPLES = """\
examples:
  vistvis knockout view_1.jpg view_2.jpg view_3.jpg
      all heads of the bundled small VGGT; in its own sample views true matches are known
  vistvis knockout 'scene/*.jpg' --mode zero --sites 'global_*' --out DIR
      heads of the global blocks alone, their output set to 0
  vistvis knockout *.jpg --model vggt:facebook/VGGT-1B --sites global_block_11
      the published model (5 GB, fetched once): one forward for each head

A patch's match is the nearest patch of another view, by the cosine similarity of the last global
block's tokens. Where true places are not known, the matches of the undisturbed model take theirs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    text = "two photographs of one scene or more; folders, globs, videos"
    add("images", nargs="+", metavar="PHOTO", help=text)
    _options.add_every(parser)
    names = "vggt:tiny (bundled), vggt:facebook/VGGT-1B or another of the hub, vggt:FILE"
    _options.add_model(parser, default="vggt:tiny", what=names)
    text = "the head's output becomes the mean of its values, 0, or its own mean (default uniform)"
    add("--mode", choices=MODES, default=MODES[0], metavar="HOW", help=f"{'|'.join(MODES)}: {text}")
    _options.add_sites(parser, default="all frame and global blocks")
    _options.add_place(parser)
    _options.add_format(parser)
    _options.add_out(parser, default="knockout")


def run(arguments: argparse.Namespace) -> int:
    """Run the model once for each head, print and draw the table."""
    photos = _sources.photos_of(arguments.images, arguments)
    if len(photos) < 2:
        raise InputError(f"matching needs two photographs of one scene, got {len(photos)}")

    from vistvis.files import atomic_file

    loaded = _sources.load(arguments.model, arguments, photos)
    _sources.say_crops(loaded.photos)
    if loaded.images.ndim != 5:
        raise InputError(
            f"--model {arguments.model}: this command needs a model of several views, as vggt:tiny"
        )

    from vistvis.intervention import knockout_table
    from vistvis.recipes.vggt_geometry import knockout_figure

    table = knockout_table(
        loaded.model,
        loaded.images,
        mode=arguments.mode,
        sites=arguments.sites,
        truth=_truth(loaded.scene),
        progress=None,
    )
    print("\n".join(_report(table)))
    folder = Path(arguments.out)
    there = _options.files_in(folder)
    stem = folder / f"knockout_{table.mode}"
    figure = knockout_figure(
        table,
        title=f"Knock-outs ({table.mode}), {arguments.model}, {len(photos)} views",
        note=f"{table.counted} matches within one patch, {_source(table)}.",
    )
    written = figure.save_as(stem, arguments.format)
    with atomic_file(Path(f"{stem}.csv"), sync=False) as file:
        file.write(table.to_csv().encode())
    written.append(Path(f"{stem}.csv"))
    told = [f"{path}{_options.REPLACED * (path in there)}" for path in written]
    print("wrote " + "\n      ".join(told))
    return 0


def _truth(scene: Mapping[str, Any]) -> Truth | None:
    """True matches, where the pictures are of a scene that is known."""
    if not scene:
        return None
    from vistvis.intervention import truth_of_scene

    return truth_of_scene(scene["points"], scene["cameras"])


def _report(table: KnockoutTable) -> list[str]:
    """What the command prints."""
    site, head = table.pointing
    plain = table.undisturbed
    lines = [
        f"{table.counted} matches, {_source(table)}; the head that points best is head {head} of "
        f"{site}",
        f"{'':24}{'tokens':>9}{'change':>9}{'pointing':>10}{'change':>9}{'own':>8}",
        _line("undisturbed", plain, plain),
        _line("within frames", table.within_frames, plain),
    ]
    for one in table.knockouts:
        own = "" if one.own != one.own else f"{100 * one.own:7.1f}%"
        lines.append(_line(f"{one.site} head {one.head}", one.rates, plain) + own)
    return lines


def _line(name: str, rates: Any, plain: Any) -> str:
    tokens, pointing = ((100 * a, 100 * (a - b)) for a, b in zip(rates, plain, strict=True))
    return f"{name:<24}{tokens[0]:8.1f}%{tokens[1]:+9.1f}{pointing[0]:9.1f}%{pointing[1]:+9.1f}"


def _source(table: KnockoutTable) -> str:
    return "true ones" if table.truth else "those of the undisturbed tokens"
