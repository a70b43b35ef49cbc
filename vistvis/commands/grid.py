"""`vistvis grid`: one query at every head of every site, in one picture."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.commands import _options, _sources
from vistvis.errors import InputError

if TYPE_CHECKING:
    from vistvis.photos.photo import SeenPhoto
    from vistvis.tokens import TokenLayout
    from vistvis.views.figures import NotebookFigure

HELP = "draw one query's attention at all heads and sites of a model in one picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    text = "photographs, folders, globs, videos; or a stored run"
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help=text)
    _options.add_every(parser)
    text = "for photographs: vggt:tiny, vggt:FILE, a timm name"
    parser.add_argument("-m", "--model", metavar="NAME", help=text)
    _options.add_sites(parser)
    _options.add_query(parser, default="default: the middle of frame 0")
    head = _options.head("mean", "all")
    text = "heads by number, mean, or all (default)"
    parser.add_argument("--head", nargs="+", type=head, default=["all"], metavar="HEAD", help=text)
    _options.add_batch(parser, what="which photograph of a model that takes one at a time")
    _options.add_look(parser)
    text = "inches, column (3.35) or double (6.9) (default: what it needs)"
    parser.add_argument("--width", type=_width, metavar="WIDTH", help=text)
    _options.add_place(parser)
    text = "a .png, .svg or .pdf, or a folder for files named by what they show (default grid)"
    parser.add_argument("-o", "--out", type=_out, default=Path("grid"), metavar="FILE", help=text)
    _options.add_format(parser)
    parser.epilog = (
        "examples:\n"
        "  vistvis grid a.jpg b.jpg c.jpg --model vggt:tiny --query 0:120,80px\n"
        "  vistvis grid runs/scene --sites 'global_*' --head mean --out scene.pdf\n"
        "  vistvis grid photo.jpg --model vit_small_patch14_dinov2 --query cls --norm percentile"
    )


@_options.typed
def _width(text: str) -> float:
    """The width of a picture in inches."""
    from vistvis.views.figures import inches_of

    return inches_of(text)


@_options.typed
def _out(text: str) -> Path:
    """A picture's file, or a folder."""
    path = Path(text).expanduser()
    if path.suffix[1:].lower() not in _options.FORMATS or path.is_dir():
        return Path(_options.folder(text))
    _options.folder(str(path.parent))
    return path


def run(arguments: argparse.Namespace) -> int:
    """Draw, and print where."""
    query = arguments.query
    arguments.heads = "all" if "all" in arguments.head else arguments.head
    stored = _sources.run_among(arguments.photos, arguments.model, done="drawn")
    figure, more = _of_photos(arguments) if stored is None else _of_run(arguments)
    for path in _paths(arguments, query.text if query else "middle"):
        print(f"wrote {figure.save(path)}")
    print(f"next: {more}")
    return 0


def _of_run(arguments: argparse.Namespace) -> tuple[NotebookFigure, str]:
    """The picture of a stored run, and what to type next."""
    from vistvis.photos.records import photos_of
    from vistvis.store import open_run
    from vistvis.views.plot import plot

    with open_run(arguments.photos[0]) as stored:
        _check_heads(arguments, [stored.record(name).shape[1] for name in stored])
        seen: Sequence[SeenPhoto] = ()
        if stored.layout:
            seen = _scene(photos_of(stored.metadata), stored.layout, arguments.batch)
        figure = plot(
            stored,
            _asked(arguments, stored.layout, seen),
            sites=arguments.sites,
            heads=arguments.heads,
            batch=arguments.batch,
            names=[photo.name for photo in seen] or None,
            width=arguments.width,
            **_options.look_of(arguments),
        )
        more = f"vistvis grid {stored.path} --sites {stored.sites[len(stored) // 2]}"
    return figure, f"{more}   (one site, larger)"


def _of_photos(arguments: argparse.Namespace) -> tuple[NotebookFigure, str]:
    """The picture of photographs that a model sees, and what to type next.

    Of each site one row a head is computed as it runs: queries and keys are not kept.
    """
    import torch

    from vistvis.attention import Attention
    from vistvis.hooks.capture import capture
    from vistvis.progress import progress
    from vistvis.tokens import TokenLayout
    from vistvis.views.maps import pictures_of, scene_of
    from vistvis.views.plot import Gathered, Look, model_title

    photos, model = _sources.photos_of(arguments.photos, arguments), arguments.model
    if not model:
        raise InputError("photographs need a model that sees them: --model vggt:tiny, or a run")
    loaded = _sources.load(model, arguments, photos)
    sites = loaded.sites(arguments.sites)
    _check_heads(arguments, [site.heads for site in sites])
    layout = TokenLayout.from_model(loaded.model, loaded.images)
    seen = _scene(loaded.photos, layout, arguments.batch)
    _sources.say_crops(seen)
    query = _asked(arguments, layout, seen)
    gathered = Gathered(scene_of(layout, query, batch=arguments.batch))
    pictures = pictures_of(loaded.pictures, gathered.scene)
    bar = progress(None, "attention", unit="site", total=len(sites), shown=None)

    def sink(name: str, attention: Attention) -> None:
        gathered.take(name, lambda: attention)
        bar.update()

    watching = capture(loaded.watched, sites.names, sink=sink, names=loaded.names)
    with bar, watching, torch.no_grad():
        loaded.model(loaded.images)
    look: dict[str, Any] = _options.look_of(arguments)
    names = [photo.name for photo in seen] or None
    title = model_title(model)
    look |= {"heads": arguments.heads, "names": names, "width": arguments.width, "title": title}
    figure = gathered.draw(pictures, Look(**look))
    more = f"vistvis store PHOTO … --model {model} --out RUN; then vistvis grid RUN"
    return figure, f"{more}   (other queries without the model)"


def _scene(photos: Sequence[SeenPhoto], layout: TokenLayout, batch: int) -> Sequence[SeenPhoto]:
    """The photos of one scene, of those of all; none where they are not said."""
    if photos and not batch < len(photos) // layout.frames:
        raise InputError(f"--batch {batch} is outside 0…{len(photos) // layout.frames - 1}")
    return photos[batch * layout.frames : (batch + 1) * layout.frames]


def _asked(
    arguments: argparse.Namespace, layout: TokenLayout | None, seen: Sequence[SeenPhoto]
) -> int | str | None:
    """The query as views take it, whose pixels count in the model's picture: these in a photo."""
    from vistvis.photos.photo import model_pixels

    query = arguments.query
    if query is None or query.pixel is None or layout is None:
        return query and str(query.text)
    return int(query.index(layout, to_model=model_pixels(seen)))


def _check_heads(arguments: argparse.Namespace, counts: Sequence[int | None]) -> None:
    """InputError for a head that no site has, where all say how many they have."""
    known = [count for count in counts if count is not None]
    for head in arguments.head:
        _options.check_head(head, max(known) if len(known) == len(counts) > 0 else None)


def _paths(arguments: argparse.Namespace, query: str) -> list[Path]:
    """The files to write: the one that was named, or one of each format named by what it shows."""
    out: Path = arguments.out
    formats, ending = arguments.format, out.suffix[1:].lower()
    if ending in _options.FORMATS and not out.is_dir():
        # The file as it was named, and beside it those of the other formats, where several were.
        others = [kind for kind in formats if kind != ending] if len(formats) > 1 else []
        return [out, *(out.with_suffix(f".{kind}") for kind in others)]
    source = Path(arguments.photos[0].rstrip("/"))
    words = [source.stem if source.is_file() else source.name, arguments.model, query]
    words += [*(arguments.sites or []), f"batch {arguments.batch}" if arguments.batch else ""]
    words += [] if arguments.heads == "all" else [f"head {head}" for head in arguments.heads]
    stem = re.sub(r"[^\w.-]+", "-", "_".join(filter(None, words)))[:120]
    return [out / f"{stem}.{kind}" for kind in formats]
