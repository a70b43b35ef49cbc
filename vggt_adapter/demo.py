"""From photographs to pictures of attention in one call, in Python and as `vistvis demo`."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from vistvis.commands import _options, _sources
from vistvis.commands._wholes import whole_photos
from vistvis.errors import InputError
from vistvis.queries import TokenQuery, parse_query

# What follows is imported where it is used: `vistvis --help` reads this module and loads no torch.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from vggt_adapter.inputs import Head
    from vggt_adapter.preprocess import LoadedImages
    from vggt_adapter.steps import Answer
    from vistvis import TokenPlace
    from vistvis.files import PathLike
    from vistvis.views.figures import NotebookFigure

TINY = "vggt:tiny"
MODES = ("crop", "pad")
ATTENTION_TYPES = ("frame", "global")


class Figures(list[tuple[str, "NotebookFigure"]]):
    """Figures with their attention types, in order; a type is a key too."""

    def __getitem__(self, key: Any) -> Any:
        return dict(self)[key] if isinstance(key, str) else super().__getitem__(key)


def demo_visualize_token_attention(
    image_paths: Sequence[PathLike] | None = None,
    block_idx: SupportsIndex = 23,
    token_idx: SupportsIndex = 500,
    head_idx: Head = 0,
    attention_types: Sequence[str] | str = ATTENTION_TYPES,
    *,
    model: PathLike | nn.Module = "facebook/VGGT-1B",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    size: int | None = None,
    mode: str = "crop",
    norm: str = "auto",
    renormalize: bool = False,
    allow_special: bool = False,
    output_dir: PathLike | None = None,
) -> tuple[Figures, dict[str, Any]]:
    """Load pictures and a model, look at one token, draw it.

    Parameters
    ----------
    image_paths
        Photographs of one scene. None: the three sample views of the package.
    block_idx
        The pair of blocks, as in `extract_both_attentions`; negative from the end.
    token_idx
        One absolute index over all frames, for both kinds of attention: frame attention shows the
        frame in which it lies. Moved to a patch as in `get_attention_values`.
    attention_types
        "frame", "global" or both: which figures are drawn.
    model
        A name on the hub, a folder or file, "tiny" for the small VGGT of the package, or a model
        that is loaded already: ours, the official one, or a relative that takes pictures
        `(B, S, 3, H, W)` in [0, 1] (docs/relatives.md has the others).
    device, dtype
        Where and in what to run. Default: CUDA where there is one, else CPU; the dtype of the
        weights.
    size, mode
        As in `load_and_preprocess_images`. Default size: the model's own.
    head_idx, norm, renormalize, allow_special
        As in `visualize_attention_on_image`.
    output_dir
        Write the figures (PNG) and their numbers (`values.npz`, see `Answer.write`) there.

    Returns
    -------
    `[("frame", figure), ("global", figure)]` in the order of `attention_types`, where a type is a
    key too (`figures["global"]`), and what `extract_both_attentions` returns.

    InputError if pictures can't be read, a block does not exist, or arguments contradict each
    other; IndexOutOfRange if the head does not exist. Cost: one forward pass.
    """
    from vggt_adapter.inputs import Query
    from vggt_adapter.steps import ask, choose_token, load_model, load_pictures

    ready = load_model(model, device=device, dtype=dtype)
    loaded = load_pictures(image_paths, ready, size=size, mode=mode)
    place, requested = choose_token(ready, loaded, token_idx, allow_special=allow_special)
    query = Query(requested, head_idx, renormalize=renormalize)
    answer = ask(ready, loaded, place, query, block_idx=block_idx, attention_types=attention_types)
    figures = answer.draw(
        norm=norm,
        pictures=loaded.sharp(),
        wholes=whole_photos(loaded.photos, loaded.seen),
        names=[photo.name for photo in loaded.photos],
        untrained=not getattr(ready, "trained", True),
    )
    if output_dir is not None:
        answer.write(figures, output_dir)
    return Figures(figures.items()), answer.result


# -- the command ---------------------------------------------------------------------------------

HELP = "frame and global attention of one patch: photographs in, pictures and numbers out"

_EXAMPLES = """\
examples:
  vistvis demo
      three sample views through the bundled small VGGT
  vistvis demo a.jpg b.jpg c.jpg --query 0:120,80px --out DIR
      your photographs of one scene; the pixel counts in the original photo
  vistvis demo *.jpg --model vggt:facebook/VGGT-1B --block 23 --head mean --query token1750
      the published model (5 GB, fetched once)

Head 0 of the bundled model's last global block was trained to point at the same place in the other
views; its other heads are free: MODEL_CARD.md in the folder vggt_adapter/weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vistvis demo`."""
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    text = "photographs of one scene, folders, globs, videos (default: samples)"
    add("images", nargs="*", metavar="PHOTO", help=text)
    _options.add_every(parser)
    names = "vggt:tiny (bundled), vggt:facebook/VGGT-1B or another of the hub, vggt:FILE"
    _options.add_model(parser, default=TINY, what=names)
    queries = parser.add_mutually_exclusive_group()
    _options.add_query(queries, default="a token (default 0:middle)")
    _options.add_alias(queries, "--pixel", dest="query", type=_pixel)
    queries.add_argument("--token", type=_options.count, help=argparse.SUPPRESS)
    add("--allow-special", action="store_true", help=argparse.SUPPRESS)
    blocks = parser.add_mutually_exclusive_group()
    blocks.add_argument(
        *("-b", "--block"),
        type=_options.block,
        metavar="N",
        help="pair of blocks, from 0; negative from the end (default: the last)",
    )
    _options.add_sites(blocks, default="those of --block")
    add(
        "--head",
        type=_options.head("mean", "max"),
        metavar="HEAD",
        help="a head, 'mean' or 'max' over all heads (default 0)",
    )
    add(
        "--types",
        type=_types,
        default=ATTENTION_TYPES,
        metavar="KINDS",
        help="frame,global (default), or one",
    )
    add("--renormalize", action="store_true", help="weights over patches only, summing to 1")
    add("--mode", choices=MODES, default="crop", metavar="HOW", help="crop (default) or pad")
    _options.add_place(parser)
    _options.add_look(parser)
    _options.add_format(parser)
    _options.add_out(parser, default="vistvis-demo")


def run(arguments: argparse.Namespace) -> int:
    """Run `vistvis demo`; prints the strongest patch in every frame and where the files are."""
    photos = _sources.photos_of(arguments.images, arguments) if arguments.images else None
    model = _load(arguments)

    from vggt_adapter.inputs import Query
    from vggt_adapter.steps import ask, load_pictures, patch_size_of, suggested

    _sources.check_size(arguments.size, patch_size_of(model))
    loaded = load_pictures(photos, model, size=arguments.size, mode=arguments.mode)
    _sources.say_crops(loaded.seen)
    place, requested = _place(arguments, model, loaded)
    head = suggested(model, "head", 0) if arguments.head is None else arguments.head
    blocks = _blocks(model, arguments, head)
    query = Query(requested, head, renormalize=arguments.renormalize)
    trained = getattr(model, "trained", True)
    look: dict[str, Any] = _options.look_of(arguments)
    look |= {
        "pictures": loaded.sharp(),
        "wholes": whole_photos(loaded.photos, loaded.seen),
        "names": [photo.name for photo in loaded.photos],
        "untrained": not trained,
    }
    there = _options.files_in(Path(arguments.out))
    written: list[Path] = []
    for block, kinds in blocks.items():
        answer = ask(model, loaded, place, query, block_idx=block, attention_types=kinds)
        written += answer.write(answer.draw(**look), arguments.out, formats=arguments.format)
        print("\n".join(report(answer, loaded, arguments.model, trained=trained)))
        norm = arguments.norm or _options.NORMS[0]
        for kind, values in answer.values.items():
            if dark := [f"frame {frame}" for frame in values.dark_frames(norm=norm)]:
                print(f"\n{kind} attention: {_options.dark_text(dark, norm)}")
        print()
    print(f"written to {Path(arguments.out).resolve()}:")
    for path in written:
        print(f"  {path.name}{_options.REPLACED * (path in there)}")
    print(f"\nnext: {_next(answer, arguments)}")
    return 0


def _load(arguments: argparse.Namespace) -> nn.Module:
    from vggt_adapter.checkpoint import HUB_NAME
    from vggt_adapter.steps import load_model

    front, colon, rest = arguments.model.partition(":")
    name = rest if colon and front == "vggt" else arguments.model
    if (colon and front != "vggt" and not Path(name).exists()) or not name:
        raise InputError(
            f"--model {arguments.model}: this command shows VGGT and takes vggt:NAME; for other "
            "models see vistvis vit --help"
        )
    file = Path(name).expanduser()
    if name != "tiny" and not file.exists() and not HUB_NAME.fullmatch(name):
        raise InputError(
            f"--model {arguments.model}: no such file, and no name as the hub has them; take "
            "vggt:tiny, vggt:facebook/VGGT-1B or vggt:FILE"
        )
    with _sources.from_hub(arguments.model):
        return load_model(name, device=arguments.device, dtype=arguments.dtype)


def _place(
    arguments: argparse.Namespace, model: nn.Module, loaded: LoadedImages
) -> tuple[TokenPlace, int]:
    """The token that is meant, and the index that was asked for."""
    from vggt_adapter.steps import choose_token, layout_of
    from vistvis.photos.photo import model_pixels

    if arguments.query is None:
        special = arguments.allow_special
        return choose_token(model, loaded, arguments.token, allow_special=special)
    token = arguments.query.index(
        layout_of(model, loaded),
        to_model=model_pixels(loaded.seen),
    )
    return choose_token(model, loaded, token, allow_special=True)


def _blocks(
    model: nn.Module, arguments: argparse.Namespace, head: int | str
) -> dict[int, tuple[str, ...]]:
    """The pairs of blocks to show and the types of attention of each, in words of the command."""
    from vggt_adapter.blocks import find_blocks, pair_of, watched_part
    from vggt_adapter.steps import suggested
    from vistvis.models.sites import SiteList, choose_sites, find_sites

    part = watched_part(model)
    blocks = find_blocks(part)
    numbers = [one.number for one in blocks if one.kind == "global"]
    pairs = {number: pair_of(blocks, number) for number in numbers}
    named = {one.path: one.name for pair in pairs.values() for one in pair}
    sites = SiteList(site for site in find_sites(part).named(named) if site.path in named)
    if arguments.sites:
        chosen = choose_sites(sites, arguments.sites).names
    else:
        block = suggested(model, "block", -1) if arguments.block is None else arguments.block
        depth = len(numbers)
        if not -depth <= block < depth:
            raise InputError(f"--block {block}: the model has blocks 0…{depth - 1}")
        pairs = {block: pair_of(blocks, block)}
        chosen = [one.name for one in pairs[block]]
    for site in sites:
        if site.name in chosen and site.heads is not None:
            _options.check_head(head, site.heads)
    wanted = {site.name for site in sites if site.name in chosen and site.kind in arguments.types}
    kinds = {
        number: tuple(one.kind for one in pair if one.name in wanted)
        for number, pair in pairs.items()
    }
    if not any(kinds.values()):
        raise InputError(f"--types {','.join(arguments.types)}: none of --sites is of these")
    return {number: some for number, some in kinds.items() if some}


def _next(answer: Answer, arguments: argparse.Namespace) -> str:
    """The same query, seen another way."""
    query = "" if arguments.query is None else f"--query '{arguments.query.text}'"
    (head,) = {values.head for values in answer.values.values()}
    other = "--norm log" if head == "mean" else "--head mean"
    model = "" if arguments.model == TINY else f"--model {arguments.model}"
    every = f"--every {arguments.every}" if arguments.every else ""
    words = ["vistvis demo", *map(shlex.quote, arguments.images), every, model, query, other]
    return " ".join(filter(None, words))


def report(answer: Answer, loaded: LoadedImages, name: str, *, trained: bool) -> list[str]:
    """What the command prints."""
    first = next(iter(answer.values.values()))
    layout, (height, width) = first.layout, first.layout.image_size
    lines = [f"model     {name}"]
    if not trained:
        lines.append(
            "          its weights are untrained (random): this shows how it works, not what a "
            "trained model sees"
        )
    lines += [
        f"pictures  {layout.frames} of {width}×{height} pixels: {layout.grid[0]}×"
        f"{layout.grid[1]} patches + {layout.num_special} special tokens each",
        f"query     {first.query}, in {loaded.photos[first.query.frame_idx].name}",
    ]
    for kind, values in answer.values.items():
        block = answer.result["block_idx"]
        mass = f": {100 * values.patch_mass:.1f} % of the weight lies on patches"
        lines += ["", f"{kind} attention, block {block}, {values.head_text}"]
        lines[-1] += mass if values.head != "max" else ""
        lines.append("  frame  strongest patch                       weight   frame's share")
        for match in values.matches:
            share = "" if math.isnan(match.share) else f"{100 * match.share:>11.1f} %"
            lines.append(
                f"  {match.place.frame:>5}  {_where(match.place, loaded):<36}"
                f"{match.weight:>8.3g}   {share}{'  weak' * match.weak}".rstrip()
            )
        if any(match.weak for match in values.matches):
            lines.append("  weak: hardly more than if the query looked nowhere in particular")
    return lines


def _where(place: TokenPlace, loaded: LoadedImages) -> str:
    assert place.box is not None
    x0, y0, x1, y1 = loaded.geometries[place.frame_idx].box_to_original(place.box)
    x, y = (x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2
    return f"row {place.row}, col {place.col}, photo pixel {x:.0f},{y:.0f}"


@_options.typed
def _pixel(text: str) -> TokenQuery:
    """`--pixel FRAME:X,Y`, as queries were named before there was a grammar."""
    frame, colon, _ = text.partition(":")
    if not colon or not frame.strip():
        raise InputError(f"FRAME:X,Y is meant, or --query FRAME:X,Ypx; got {text[:40]!r}")
    return parse_query(f"{text}px")


def _types(text: str) -> tuple[str, ...]:
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    if not kinds or any(kind not in ATTENTION_TYPES for kind in kinds):
        raise argparse.ArgumentTypeError(
            f"frame, global or frame,global is meant, got {text[:40]!r}"
        )
    return kinds


if __name__ == "__main__":
    from vistvis.cli import guarded
    from vistvis.cli import run as run_command

    module = sys.modules["__main__"]
    sys.exit(guarded("vistvis demo", lambda: run_command("vistvis demo", module, sys.argv[1:])))
