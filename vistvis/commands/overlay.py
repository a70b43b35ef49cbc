"""`vistvis overlay`: overlays of stored attention, and PDF pages of them."""

from __future__ import annotations

import argparse
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.commands import _options, _sources
from vistvis.errors import DisplayError, IndexOutOfRange, InputError
from vistvis.queries import Pixel, TokenQuery, parse_query

if TYPE_CHECKING:
    from vistvis.decorators.layers import Layers
    from vistvis.decorators.paths import AttentionPath, StaticMetadata
    from vistvis.store import Run

HELP = "overlay stored attention on the pictures it belongs to"
CLICKED = "interactive"

_EXAMPLES = """\
examples:
  vistvis overlay runs/scene --query 0:r13,c15 --key-frame all --out overlays
      a patch of frame 0, its weights in every frame, for every site and the mean of its heads
  vistvis overlay runs/scene --query 2:40 cls@2 --sites 'global_*' --head 0 2 mean --pdf
      two tokens of frame 2, some sites and heads, and PDF pages of them
  vistvis overlay runs/demo --query 0 --patch-size 16 --special-tokens 0
      attn/ and input/ of the decorators, which don't say what their tokens are
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("source", metavar="RUN", help="a run's folder or URL, or a folder of attn/ and input/")
    text = "tokens (default: click them)"
    _options.add_query(parser, default=text, read=_query, nargs="+")
    _options.add_alias(parser, "--query-frame", dest="query_frame", type=_options.count)
    add(
        *("-k", "--key-frame"),
        nargs="+",
        type=_frame,
        metavar="N",
        help="frames to look at, or 'all' (default: the query's)",
    )
    add(
        "--head",
        nargs="+",
        type=_options.head("mean", "all"),
        default=["mean"],
        metavar="HEAD",
        help="numbers, or 'mean' (default) or 'all'",
    )
    _options.add_sites(parser, default="all; of a folder the numbers of layers")
    _options.add_alias(parser, "-l", "--layers", dest="sites", nargs="+")
    _options.add_batch(parser)
    add("--patch-size", type=_options.size, metavar="PIXELS", help="where the source says it not")
    add("--special-tokens", type=_options.count, metavar="N", help="in a frame, likewise")
    add("--cross-attention", action="store_true", help="queries and keys cover one frame each")
    _options.add_look(parser, norms=("own", *_options.NORMS))
    add("--attn-file", default="attn.pt", metavar="NAME", help="default attn.pt")
    add("--input-file", default="input.pt", metavar="NAME", help="default input.pt")
    add("--pdf", action="store_true", help="also gather the overlays into PDF pages")
    _options.add_out(parser, default="overlays")
    _options.add_alias(parser, "--output", dest="out", type=_options.folder)
    parser.set_defaults(query_frame=None)


def run(arguments: argparse.Namespace) -> int:
    """Draw, and print where."""
    from vistvis.decorators.overlays import run_overlay_for_reconstruction
    from vistvis.views.pdf import plot_attention_for_reconstruction

    asked = arguments.query or [CLICKED]
    if CLICKED in asked and len(asked) > 1:
        raise InputError(f"--query takes tokens or {CLICKED!r}, not both")
    metadata = _metadata(arguments)
    source = _open(arguments)
    layers = _layers(source, metadata, arguments)
    sites = arguments.sites and [
        int(s) if re.fullmatch(r"[0-9]{1,9}", s) else s for s in arguments.sites
    ]
    _check(layers, arguments, sites)
    look = _options.look_of(arguments)
    if "cmap" in look:
        look["cmap_name"] = look.pop("cmap")
    count = 0
    frames = _by_frame(asked, layers, arguments.query_frame)
    draw = partial(
        run_overlay_for_reconstruction,
        source,
        output_path=arguments.out,
        metadata=metadata,
        is_cross_attention=arguments.cross_attention,
        batch_idx=arguments.batch,
        layers=sites,
        **look,
    )
    for (frame, tokens), head in product(frames.items(), _heads(arguments.head)):
        keys = _key_frames(arguments.key_frame, frame)
        written = draw(query_frame_idx=frame, query_idx=tokens, key_frame_idx=keys, head=head)
        count += sum(len(paths) for paths in written.values())
    print(f"{count} overlay{'s' if count != 1 else ''} under {arguments.out}")
    if arguments.pdf:
        print(*plot_attention_for_reconstruction(str(arguments.out)), sep="\n")
    else:
        print(f"next: vistvis pdf {arguments.out}")
    return 0


@_options.typed
def _query(text: str) -> TokenQuery | str:
    return CLICKED if text == CLICKED else parse_query(text)


@_options.typed
def _frame(text: str) -> int | str:
    if text != "all" and not re.fullmatch(r"[0-9]{1,6}", text):
        raise InputError(f"a frame's number or 'all' is meant, got {text[:40]!r}")
    return text if text == "all" else int(text)


def _metadata(arguments: argparse.Namespace) -> StaticMetadata | None:
    from vistvis.decorators.paths import StaticMetadata

    sizes = (arguments.patch_size, arguments.special_tokens)
    if sizes.count(None) == 1:
        raise InputError("give --patch-size and --special-tokens together")
    return None if None in sizes else StaticMetadata(*sizes)


def _open(arguments: argparse.Namespace) -> AttentionPath | Run:
    """A run, or the paths of stored layers."""
    from vistvis.decorators.paths import AttentionPath
    from vistvis.store import open_run

    folder = Path(arguments.source).expanduser()
    if (folder / "attn").is_dir() and not _sources.is_run(arguments.source):
        full = folder.resolve()
        names = arguments.attn_file, arguments.input_file
        return AttentionPath(str(full.parent), full.name, *names)
    return open_run(arguments.source if "://" in arguments.source else str(folder))


def _layers(
    source: AttentionPath | Run, metadata: StaticMetadata | None, arguments: argparse.Namespace
) -> Layers:
    """What the source holds; nothing of it is drawn yet."""
    from vistvis.decorators.layers import open_layers
    from vistvis.decorators.requests import OverlayRequest

    cross, batch = arguments.cross_attention, arguments.batch
    try:
        return open_layers(source, OverlayRequest(0, 0, 0, "mean", metadata, cross, batch))
    except IndexOutOfRange as error:
        raise InputError(str(error).replace("batch_idx", "--batch")) from error


def _check(layers: Layers, arguments: argparse.Namespace, sites: Any) -> None:
    """Frames, sites and heads, in words of the command."""
    frames = layers.layout.frames
    for name, said in (
        ("--query-frame", [arguments.query_frame]),
        ("--key-frame", arguments.key_frame or []),
    ):
        for frame in said:
            if isinstance(frame, int) and frame >= frames:
                raise InputError(f"{name} {frame}: the pictures are frames 0…{frames - 1}")
    try:
        chosen = layers.chosen(sites)
    except InputError as error:
        raise InputError(f"--sites: {error}") from error
    for head in arguments.head if chosen else ():
        _options.check_head(head, layers.attention(chosen[0]).num_heads)


def _by_frame(
    asked: list[TokenQuery | str], layers: Layers, default: int | None
) -> dict[int, list[int]]:
    """The tokens of each frame, counted within it."""
    frames: dict[int, list[int]] = {}
    for query in asked:
        if isinstance(query, str):
            return {default or 0: _clicked(layers, default or 0)}
        token = query.within(default or 0).index(layers.layout, to_model=_no_pixels)
        place = layers.layout.locate(token)
        frames.setdefault(place.frame_idx, []).append(place.token_in_frame)
    return frames


def _clicked(layers: Layers, frame: int) -> list[int]:
    from vistvis.views.pick import pick_patches

    fix = f"name a token, as in --query {frame}:r13,c15"
    try:
        tokens = pick_patches(layers.images[frame], layers.layout, title=f"frame {frame}")
    except DisplayError as error:
        raise DisplayError(f"no window to click in can be opened here; {fix}") from error
    if not tokens:
        raise InputError(f"no patch was clicked, so there is no query to draw; {fix}")
    return tokens


def _no_pixels(frame: int, x: float, y: float) -> Pixel:
    raise InputError(
        f"how the photo of frame {frame} was cut is not stored, so which patch shows pixel "
        f"{x:g},{y:g} is not known; name its grid cell, as in {frame}:r13,c15"
    )


def _key_frames(asked: list[int | str] | None, frame: int) -> Any:
    if asked is None:
        return frame
    return "all" if "all" in asked else asked


def _heads(asked: list[int | str]) -> list[Any]:
    """As the overlays take them, one after the other: a word, or a list of numbers."""
    if "all" in asked:
        return ["all"]
    numbers = [head for head in asked if isinstance(head, int)]
    return [*([numbers] if numbers else []), *(["mean"] if "mean" in asked else [])]
