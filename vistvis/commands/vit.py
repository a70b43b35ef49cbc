"""`vistvis vit`: one picture through a vision transformer, one query's attention head by head."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vistvis.commands import _options, _sources
from vistvis.commands._wholes import whole_photos
from vistvis.errors import InputError, LayoutError, SiteError
from vistvis.queries import TokenQuery, parse_query

if TYPE_CHECKING:
    from torch import Tensor

    from vistvis import Attention, Capture, TokenLayout
    from vistvis.models.loading import LoadedModel
    from vistvis.models.sites import SiteList
    from vistvis.photos.photo import Photo
    from vistvis.views.figures import NotebookFigure
    from vistvis.views.wholes import WholePhoto

HELP = "draw every head's attention of one query of a vision transformer (timm) over a photo"
DEFAULT = "vit_small_patch14_dinov2"

_EXAMPLES = """\
examples:
  vistvis vit photo.jpg
      what the class token of DINOv2 looks at in its last block
  vistvis vit photo.jpg --query r3,c5 --block 8 --head 0 2 mean --out maps
      a patch by its row and column, two heads and the mean of all
  vistvis vit photo.jpg --model vit_base_patch16_224@random --sites 'blocks.1*.attn'
      untrained weights (@FILE: a checkpoint's), several modules; --sites alone lists them
  vistvis vit clip.mp4 --every 0.2s --movie clip.gif
      what the middle patch looks at while the video plays; in a photo it moves
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("photo", metavar="PHOTO", help="a picture; or several or a video, of which --batch is one")
    _options.add_every(parser)
    names = "of timm; NAME@random: untrained, NAME@FILE: a checkpoint"
    _options.add_model(parser, default=DEFAULT, what=names)
    add("-w", "--weights", help=argparse.SUPPRESS)
    _options.add_query(parser, default="a token (default cls)", read=_query)
    add(
        *("-b", "--block"),
        type=_options.block,
        metavar="N",
        help="block, negative from the end (default: the last)",
    )
    _options.add_sites(parser, default="the last; without a GLOB they are listed", nargs="*")
    _options.add_alias(parser, "--site", dest="sites", nargs=1)
    add(
        "--head",
        nargs="+",
        type=_options.head("mean", "all"),
        default=["all"],
        metavar="HEAD",
        help="numbers, 'mean', 'all' (default)",
    )
    _options.add_place(parser, default="float32")
    text = "which picture, where there are several"
    _options.add_batch(parser, what=text, default=None)
    _options.add_look(parser)
    _options.add_format(parser)
    _options.add_out(parser, default="vit")
    _options.add_movie(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the model, draw, print what was found."""
    from vistvis.models.sites import find_sites

    photos = _photos(arguments)
    name = _model(arguments)
    loaded = _sources.load(name, arguments, photos)
    sites = find_sites(loaded.model)
    if arguments.sites == []:
        print(sites)
        return 0
    names = loaded.sites(arguments.sites).names if arguments.sites else [_last(sites, arguments)]
    layout = _layout(loaded, arguments.size)
    _sources.say_crops(loaded.photos)
    asked = arguments.query or parse_query("cls" if arguments.movie is None else "middle")
    token = asked.index(layout, to_model=loaded.to_model())
    for site in (site for site in sites if site.name in names):
        for head in arguments.head:
            _options.check_head(head, site.heads)
    draw = _Drawing(arguments, name, loaded, layout, whole_photos(photos, loaded.photos))
    if arguments.movie is not None:
        _movie(draw, photos, names, token)
    else:
        _pictures(draw, names, token)
    if name.endswith("@random"):
        print("these weights are untrained: the maps show the mechanism, not what was learned")
    print(f"next: {_next(name, arguments)}")
    return 0


def _pictures(draw: _Drawing, names: list[str], token: int) -> None:
    """The pictures and numbers of each site."""
    from vistvis.progress import progress

    captured = draw.run_model(names)
    there = _options.files_in(draw.arguments.out)
    written: list[Path] = []
    for site in progress(names, "drawing", unit="site", shown=None, delay=2):
        written += draw.save(captured[site], site, token)
    told = [f"{path}{_options.REPLACED * (path in there)}" for path in written]
    print("wrote " + "\n      ".join(told))


def _movie(draw: _Drawing, photos: Sequence[Photo], names: list[str], token: int) -> None:
    """A query that moves over the picture, or stays while a video plays; of one site."""
    from vistvis.views.movie import path_of

    if len(names) > 1:
        raise InputError(f"--movie shows one site, got {len(names)}; name one with --sites")
    (site,) = names
    plays = _sources.plays(photos)
    tokens = [token] * len(photos) if plays else path_of(draw.layout, token)
    steps = [(one, number if plays else 0) for number, one in enumerate(tokens)]
    attention = draw.run_model(names)[site]

    def figure(step: tuple[int, int]) -> NotebookFigure:
        token, batch = step
        labels, _, maps = draw.maps(attention, site, token, batch=batch)
        return draw.figure(labels, maps, site, token, batch=batch)

    _options.write_movie(draw.arguments.movie, steps, figure, photos)


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What pictures of one call have in common."""

    arguments: argparse.Namespace
    model: str
    loaded: LoadedModel
    layout: TokenLayout
    wholes: list[WholePhoto]

    def run_model(self, names: list[str]) -> Capture:
        """The attention of some sites; a bar counts all up to the last."""
        import torch

        from vistvis.hooks.capture import capture
        from vistvis.models.sites import find_sites
        from vistvis.progress import run_progress

        model = self.loaded.model
        paths = find_sites(model).names
        paths = paths[: 1 + max(map(paths.index, names))]
        with (
            run_progress(model, paths, unit="site", shown=None),
            torch.inference_mode(),
            capture(model, names, layout=self.layout) as captured,
        ):
            model(self.loaded.images)
        return captured

    def maps(
        self, attention: Attention, site: str, token: int, *, batch: int = 0
    ) -> tuple[list[str], Tensor, Tensor]:
        """What the heads are called, their rows `(h, N)` and maps `(h, rows, cols)`."""
        import torch

        if attention.shape[3] != self.layout.num_tokens:
            raise LayoutError(
                f"site {site!r} has {attention.shape[3]} keys where the picture has "
                f"{self.layout.num_tokens} tokens ({self.layout}); choose another with --sites"
            )
        rows = attention.rows([token], batch=batch)[0, :, 0].cpu()
        heads = _heads(self.arguments.head, len(rows))
        rows = torch.stack([rows[h] if isinstance(h, int) else rows.mean(0) for h in heads])
        labels = ["mean of heads" if head == "mean" else f"head {head}" for head in heads]
        return labels, rows, self.layout.maps(rows)[:, 0]

    def figure(
        self, labels: list[str], maps: Tensor, site: str, token: int, *, batch: int = 0
    ) -> NotebookFigure:
        """The maps of one site, over one of the pictures."""
        from vistvis.images import to_rgb
        from vistvis.views.heads import head_grid

        place, sharp = self.layout.locate(token), self.loaded.sharp_pixels
        where = f"patch r{place.row},c{place.col}" if place.is_patch else place.kind
        return head_grid(
            to_rgb(self.loaded.pictures)[batch, 0] if sharp is None else sharp[batch],
            maps,
            title=f"{self.model.partition('@')[0]}, {site}, query: {where} (token {token})",
            names=labels,
            photo=self.loaded.photos[batch].name,
            box=place.box,
            size=self.layout.image_size,
            whole=self.wholes[batch] if self.wholes else None,
            untrained=self.model.endswith("@random"),
            **_options.look_of(self.arguments),
        )

    def save(self, attention: Attention, site: str, token: int) -> list[Path]:
        """The picture and the numbers of one site; prints what each head looks at."""
        import numpy as np

        from vistvis.files import atomic_file
        from vistvis.views.painting import dark_maps, normalizer

        labels, rows, maps = self.maps(attention, site, token)
        stem = self.arguments.out / _stem(self.arguments, self.model, site)
        figure = self.figure(labels, maps, site, token)
        files = figure.save_as(stem, self.arguments.format)
        values = Path(f"{stem}.npz")
        with atomic_file(values, sync=False) as file:
            np.savez(file, rows=rows.numpy(), maps=maps.numpy(), token=token, grid=self.layout.grid)
        print(f"{site}: {attention.shape[1]} heads, {self.layout}")
        for label, row, patches in zip(labels, rows, maps.sum((1, 2)), strict=True):
            best = self.layout.locate(int(row.argmax()))
            print(f"  {label}: strongest {best} {float(row.max()):.4f}, on patches {patches:.3f}")
        norm = self.arguments.norm or _options.NORMS[0]
        place, own = self.layout.locate(token), None
        if place.row is not None and place.col is not None:
            own = slice(None), place.row, place.col
        if dark := dark_maps(maps, normalizer(maps, norm=norm, own=own)):
            print("  " + _options.dark_text([labels[number] for number in dark], norm))
        return [*files, values]


def _photos(arguments: argparse.Namespace) -> list[Photo]:
    """The one picture that is meant; with `--movie`, all frames of a video."""
    photos = _sources.photos_of([arguments.photo], arguments)
    if arguments.batch is not None:
        if not arguments.batch < len(photos):
            raise InputError(f"--batch {arguments.batch} is outside 0…{len(photos) - 1}")
        return [photos[arguments.batch]]
    if len(photos) > 1 and not (arguments.movie is not None and _sources.plays(photos)):
        raise InputError(
            f"{arguments.photo} has {len(photos)} pictures, and this command shows one: name it, "
            f"or choose with --batch 0…{len(photos) - 1}; vistvis grid shows all their heads"
        )
    return photos


def _next(model: str, arguments: argparse.Namespace) -> str:
    """The same picture seen otherwise, as it can be pasted."""
    words = ["vistvis", "vit", arguments.photo, "-m", model]
    for name in ("every", "batch", "size", "device", "dtype"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", str(getattr(arguments, name))]
    return shlex.join([*words, "--query", "middle", "--sites", "**"])


def _model(arguments: argparse.Namespace) -> str:
    """The model's name with its weights, as `models.loading` takes it."""
    name: str = arguments.model
    if ":" in name and not name.startswith("timm:"):
        raise InputError(
            f"--model {name}: this command shows models of timm; for VGGT see vistvis demo --help"
        )
    if arguments.weights and "@" in name:
        raise InputError(f"--model {name} says its weights already; leave --weights out")
    name = name.removeprefix("timm:")
    return f"{name}@{arguments.weights}" if arguments.weights else name


@_options.typed
def _query(text: str) -> TokenQuery:
    """A query, also as they were named before there was a grammar: ROW,COL and pixel:X,Y."""
    if cell := re.fullmatch(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*", text):
        return parse_query(f"r{cell[1]},c{cell[2]}")
    if text.startswith("pixel:"):
        return parse_query(f"{text.removeprefix('pixel:')}px")
    return parse_query(text)


def _last(sites: SiteList, arguments: argparse.Namespace) -> str:
    """The site of the block that is asked for."""
    numbered = {site.block: site.name for site in sites if site.block is not None}
    if not numbered:
        raise SiteError("this model's sites have no block numbers; name one with --sites")
    last, block = max(numbered), arguments.block
    number = last if block is None else (block + last + 1 if block < 0 else block)
    if number not in numbered:
        raise SiteError(f"--block {block}: the model has blocks 0…{last}; see --sites")
    return str(numbered[number])


def _layout(loaded: LoadedModel, size: int | None) -> TokenLayout:
    from vistvis.tokens import TokenLayout

    patch = getattr(getattr(loaded.model, "patch_embed", None), "patch_size", None)
    if patch is not None:
        _sources.check_size(size, int(patch[0]))
    return TokenLayout.from_model(loaded.model, loaded.images)


def _heads(asked: list[int | str], count: int) -> list[int | str]:
    """Each head once, "all" as numbers."""
    heads = [*range(count)] if "all" in asked else []
    return list(dict.fromkeys([*heads, *(head for head in asked if head != "all")]))


def _stem(arguments: argparse.Namespace, model: str, site: str) -> str:
    """A name that tells photo, model, site and query apart."""
    asked = arguments.query.text if arguments.query else "cls"
    stem = f"{Path(arguments.photo).stem}_{Path(model).name}_{site}_{asked}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in stem)
