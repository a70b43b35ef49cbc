"""`vistvis overlay`: overlays of stored attention, and PDF pages of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.errors import InputError

if TYPE_CHECKING:
    from vistvis.decorators.paths import AttentionPath
    from vistvis.store import Run

HELP = "overlay stored attention on the pictures it belongs to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("source", help="a run's folder or URL, or a folder that holds attn/ and input/")
    add("-o", "--output", "--out", required=True, metavar="FOLDER", help="for overlays")
    add(
        "-q",
        "--query",
        nargs="+",
        default=["interactive"],
        metavar="TOKEN",
        help="query tokens within their frame, special tokens counted (default: click them)",
    )
    add("--query-frame", type=int, default=0, metavar="N", help="frame of the queries (default 0)")
    add(
        "-k",
        "--key-frame",
        nargs="+",
        default=None,
        metavar="N",
        help="frames to look at, or 'all' (default: the query's frame)",
    )
    add("--head", default="mean", help="a number, 'mean' or 'all' (default mean)")
    add(
        "-l",
        "--layers",
        nargs="+",
        metavar="LAYER",
        help="layer numbers; for a run, site names or patterns such as 'global_*' (default: all)",
    )
    add("--batch", type=int, default=0, metavar="N", help="entry of the batch (default 0)")
    add("--patch-size", type=int, metavar="PIXELS", help="where the source does not say it")
    add("--special-tokens", type=int, metavar="N", help="special tokens per frame, likewise")
    add("--cross-attention", action="store_true", help="queries and keys cover one frame each")
    add("--alpha", type=float, default=0.45, help="opacity of the colours (default 0.45)")
    add("--cmap", default="jet", help="matplotlib colour map (default jet)")
    add("--attn-file", default="attn.pt", metavar="NAME", help="default attn.pt")
    add("--input-file", default="input.pt", metavar="NAME", help="default input.pt")
    add("--pdf", action="store_true", help="also gather the overlays into PDF pages")


def run(arguments: argparse.Namespace) -> int:
    """Draw, and print where."""
    from vistvis.decorators.overlays import run_overlay_for_reconstruction
    from vistvis.decorators.paths import StaticMetadata
    from vistvis.views.pdf import plot_attention_for_reconstruction

    sizes = (arguments.patch_size, arguments.special_tokens)
    if sizes.count(None) == 1:
        raise InputError("give --patch-size and --special-tokens together")
    metadata = None if None in sizes else StaticMetadata(*sizes)
    keys = arguments.key_frame or [str(arguments.query_frame)]
    written = run_overlay_for_reconstruction(
        _open(arguments),
        query_frame_idx=arguments.query_frame,
        query_idx=_numbers(arguments.query, "--query", "interactive"),
        key_frame_idx=_numbers(keys, "--key-frame", "all"),
        head=_number_or_word(arguments.head),
        output_path=arguments.output,
        metadata=metadata,
        is_cross_attention=arguments.cross_attention,
        batch_idx=arguments.batch,
        alpha=arguments.alpha,
        cmap_name=arguments.cmap,
        layers=arguments.layers and [_number_or_word(name) for name in arguments.layers],
    )
    count = sum(len(paths) for paths in written.values())
    print(f"{count} overlay{'s' if count != 1 else ''} under {arguments.output}")
    if arguments.pdf:
        print(*plot_attention_for_reconstruction(arguments.output), sep="\n")
    return 0


def _open(arguments: argparse.Namespace) -> AttentionPath | Run:
    """A run, or the paths of stored layers."""
    from vistvis.decorators.paths import AttentionPath
    from vistvis.store import open_run

    folder = Path(arguments.source).expanduser()
    if (folder / "attn").is_dir() and not (folder / "manifest.json").exists():
        full = folder.resolve()
        names = arguments.attn_file, arguments.input_file
        return AttentionPath(str(full.parent), full.name, *names)
    return open_run(arguments.source if "://" in arguments.source else str(folder))


def _numbers(texts: list[str], name: str, word: str) -> Any:
    """A list of numbers, one number, or the one word that is allowed."""
    if texts == [word]:
        return word
    try:
        numbers = [int(text) for text in texts]
    except ValueError as error:
        raise InputError(f"{name} takes numbers or {word!r}, got {' '.join(texts)!r}") from error
    return numbers[0] if len(numbers) == 1 else numbers


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdecimal() and text.isascii() else text
