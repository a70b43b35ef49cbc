"""`vistvis vit`: one picture through a vision transformer, one query's attention head by head."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.commands import _options
from vistvis.errors import InputError, LayoutError, SiteError
from vistvis.queries import TokenQuery, parse_query

if TYPE_CHECKING:
    from vistvis import Attention, TokenLayout
    from vistvis.models.loading import LoadedModel
    from vistvis.models.sites import SiteList

HELP = "draw every head's attention of one query of a vision transformer (timm) over a photo"
DEFAULT = "vit_small_patch14_dinov2"

_EXAMPLES = """\
examples:
  vistvis vit photo.jpg
      what the class token of DINOv2 looks at in its last block
  vistvis vit photo.jpg --query r3,c5 --block 8 --head 0 2 mean --out maps
      a patch by its row and column, two heads and the mean of all
  vistvis vit photo.jpg --model vit_base_patch16_224@random --sites 'blocks.1*.attn'
      untrained weights, several attention modules; --sites alone lists them
  vistvis vit photo.jpg --model deit_tiny_patch16_224@deit.safetensors
      weights of a file
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("photo", metavar="PHOTO", help="a picture; or a video, of which --every takes one frame")
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
    add("--sites", nargs="*", metavar="GLOB", help="attention modules by name; none: list them")
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
    _options.add_look(parser)
    _options.add_format(parser)
    _options.add_out(parser, default="vit")


def run(arguments: argparse.Namespace) -> int:
    """Run the model, draw, print what was found."""
    from vistvis.models.sites import find_sites

    photos = _options.photos_of([arguments.photo], arguments)
    if len(photos) > 1:
        raise InputError(
            f"{arguments.photo} has {len(photos)} pictures, and this command shows one: name it; "
            "of several, vistvis grid shows each with --batch"
        )
    name = _model(arguments)
    loaded = _options.load(name, arguments, photos)
    sites = find_sites(loaded.model)
    if arguments.sites == []:
        print(sites)
        return 0
    names = loaded.sites(arguments.sites).names if arguments.sites else [_last(sites, arguments)]
    layout = _layout(loaded, arguments.size)
    _options.say_crops(loaded.photos)
    asked = arguments.query or parse_query("cls")
    token = asked.index(layout, to_model=loaded.to_model())
    for site in (site for site in sites if site.name in names):
        for head in arguments.head:
            _options.check_head(head, site.heads)
    captured = _run_model(loaded, names, layout)
    written: list[Path] = []
    for site_name in names:
        written += _draw(captured[site_name], site_name, token, layout, loaded, name, arguments)
    if name.endswith("@random"):
        print("these weights are untrained: the maps show the mechanism, not what was learned")
    print("wrote " + "\n      ".join(map(str, written)))
    print(f"next: vistvis vit {arguments.photo} -m {name} --query middle --sites '**'")
    return 0


def _run_model(loaded: LoadedModel, names: list[str], layout: TokenLayout) -> Any:
    import torch

    from vistvis.hooks.capture import capture
    from vistvis.progress import progress

    bar = progress(None, "running the model", unit="site", total=len(names), delay=2)
    with torch.inference_mode(), bar, capture(loaded.model, names, layout=layout) as captured:
        loaded.model(loaded.images)
    return captured


def _draw(
    attention: Attention,
    site: str,
    token: int,
    layout: TokenLayout,
    loaded: LoadedModel,
    model: str,
    arguments: argparse.Namespace,
) -> list[Path]:
    """The picture and the numbers of one site; prints what each head looks at."""
    import numpy as np
    import torch

    from vistvis.files import atomic_file
    from vistvis.images import to_rgb
    from vistvis.views.heads import head_grid
    from vistvis.views.painting import dark_maps, normalizer

    if attention.shape[3] != layout.num_tokens:
        raise LayoutError(
            f"site {site!r} has {attention.shape[3]} keys where the picture has "
            f"{layout.num_tokens} tokens ({layout}); choose another with --sites"
        )
    rows = attention.rows([token], batch=0)[0, :, 0].cpu()
    heads = _heads(arguments.head, len(rows))
    rows = torch.stack([rows[h] if isinstance(h, int) else rows.mean(0) for h in heads])
    maps = layout.maps(rows)[:, 0]
    place = layout.locate(token)
    labels = ["mean of heads" if head == "mean" else f"head {head}" for head in heads]
    look = _options.look_of(arguments)
    figure = head_grid(
        to_rgb(loaded.pictures)[0, 0],
        maps,
        title=f"{model.partition('@')[0]}, {site}, query: {place.kind} (token {token})",
        names=labels,
        photo=loaded.photos[0].name,
        box=place.box,
        untrained=model.endswith("@random"),
        **look,
    )
    stem = arguments.out / _stem(arguments, model, site)
    files = figure.save_as(stem, arguments.format)
    values = Path(f"{stem}.npz")
    with atomic_file(values, sync=False) as file:
        np.savez(file, rows=rows.numpy(), maps=maps.numpy(), token=token, grid=layout.grid)
    print(f"{site}: {attention.shape[1]} heads, {layout}")
    for label, row, patches in zip(labels, rows, maps.sum((1, 2)), strict=True):
        best = layout.locate(int(row.argmax()))
        print(f"  {label}: strongest {best} {float(row.max()):.4f}, on patches {patches:.3f}")
    norm = arguments.norm or _options.NORMS[0]
    own = None
    if place.row is not None and place.col is not None:
        own = slice(None), place.row, place.col
    if dark := dark_maps(maps, normalizer(maps, norm=norm, own=own)):
        print("  " + _options.dark_text([labels[number] for number in dark], norm))
    return [*files, values]


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
        _options.check_size(size, int(patch[0]))
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
