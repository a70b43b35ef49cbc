"""`vistvis vit`: one picture through a vision transformer, one query's attention head by head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vistvis.errors import InputError, LayoutError, SiteError

HELP = "draw every head's attention of one query of a vision transformer (timm) over a photo"
DEFAULT = "vit_small_patch14_dinov2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("photo", help="a picture")
    add("-m", "--model", default=DEFAULT, metavar="NAME", help=f"a timm model (default {DEFAULT})")
    add(
        "-w",
        "--weights",
        metavar="FILE",
        help="a local checkpoint, or 'random' for untrained weights (default: timm's, downloaded)",
    )
    add("-b", "--block", type=int, metavar="N", help="block, negative from the end (default: last)")
    add(
        "--site", metavar="NAME", help="an attention module by its dotted name, in place of --block"
    )
    add(
        "-q",
        "--query",
        default="cls",
        metavar="TOKEN",
        help="cls (or another special token's kind), ROW,COL of a patch, or pixel:X,Y",
    )
    add("--size", type=int, metavar="PIXELS", help="side of the model's input, a multiple of 14, …")
    add("--norm", default="linear", choices=("linear", "log", "percentile"), help="colour scale")
    add("--device", metavar="NAME", help="cpu, cuda, … (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32")
    add("--sites", action="store_true", help="list the model's attention modules and stop")
    add("-o", "--out", default="vit", metavar="FOLDER", help="default ./vit")
    parser.epilog = (
        "examples:\n"
        "  vistvis vit photo.jpg --block 11 --query cls --out maps\n"
        "  vistvis vit photo.jpg --model vit_base_patch16_224 --weights random --query 3,5\n"
        "  vistvis vit photo.jpg --model deit_tiny_patch16_224 --weights deit.safetensors --sites"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the model, draw, print what was found."""
    import numpy as np
    import torch

    from vistvis.files import atomic_file
    from vistvis.hooks.capture import capture
    from vistvis.images import to_rgb
    from vistvis.models import loading
    from vistvis.models.sites import find_sites
    from vistvis.tokens import TokenLayout
    from vistvis.views.heads import head_grid

    name = arguments.model + (f"@{arguments.weights}" if arguments.weights else "")
    loaded = loading.load(
        name,
        images=[arguments.photo],
        device=arguments.device,
        dtype=arguments.dtype,
        size=arguments.size,
    )
    sites = find_sites(loaded.model)
    if arguments.sites:
        print(sites)
        return 0
    site = arguments.site or _site_of_block(sites, arguments.block)
    layout = TokenLayout.from_model(loaded.model, loaded.images)
    with torch.inference_mode(), capture(loaded.model, site, layout=layout) as captured:
        loaded.model(loaded.images)
    attention = captured[site]
    if attention.shape[3] != layout.num_tokens:
        raise LayoutError(
            f"site {site!r} has {attention.shape[3]} keys where the picture has "
            f"{layout.num_tokens} tokens ({layout}); choose another with --site"
        )
    token = _query(layout, arguments.query)
    place = layout.locate(token)
    rows = attention.rows([token], batch=0)[0, :, 0].cpu()
    maps = layout.maps(rows)[:, 0]
    picture = to_rgb(loaded.pictures)[0, 0]
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(arguments.photo).stem}_{site}_{arguments.query}"
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem)
    title = f"{arguments.model}, {site}, query: {place.kind} (token {token})"
    figure = head_grid(picture, maps, title=title, box=place.box, norm=arguments.norm)
    written = figure.save(folder / f"{stem}.png", dpi=110)
    values = folder / f"{stem}.npz"
    with atomic_file(values, sync=False) as file:
        np.savez(file, rows=rows.numpy(), maps=maps.numpy(), token=token, grid=layout.grid)
    if arguments.weights == "random":
        print("these weights are untrained: the maps show the mechanism, not what was learned")
    print(f"{site}: {attention.shape[1]} heads, {layout}")
    for head, row in enumerate(rows):
        best = layout.locate(int(row.argmax()))
        patches = float(maps[head].sum())
        print(f"  head {head}: strongest {best} {float(row.max()):.4f}, on patches {patches:.3f}")
    print(f"wrote {written}\n      {values}")
    return 0


def _site_of_block(sites: Any, block: int | None) -> str:
    numbered = {site.block: site.name for site in sites if site.block is not None}
    if not numbered:
        raise SiteError("this model's sites have no block numbers; name one with --site")
    last = max(numbered)
    number = last if block is None else (block + last + 1 if block < 0 else block)
    if number not in numbered:
        raise SiteError(f"no block {block}: the model has blocks 0…{last}; see --sites")
    return str(numbered[number])


def _query(layout: Any, text: str) -> int:
    """The token that `text` names: a special token's kind, `ROW,COL`, or `pixel:X,Y`."""
    pixel = text.startswith("pixel:")
    numbers = text.removeprefix("pixel:").split(",")
    if len(numbers) == 2:
        try:
            first, second = (float(number) for number in numbers)
        except ValueError:
            raise InputError(f"a query is ROW,COL in numbers, got {text!r}") from None
        if pixel:
            return int(layout.token_at(0, first, second))
        return int(layout.index(row=int(first), col=int(second)))
    return int(layout.index(kind=text))
