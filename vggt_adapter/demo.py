"""From photographs to pictures of attention in one call, in Python and as `vistvis demo`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import nn

from vggt_adapter.geometry import MODES
from vggt_adapter.inputs import ATTENTION_TYPES, HEAD_REDUCTIONS, Head, Query
from vggt_adapter.preprocess import LoadedImages
from vggt_adapter.steps import TINY, Answer, ask, choose_token, load_model, load_pictures, suggested
from vistvis import TokenPlace
from vistvis.devices import DTYPES
from vistvis.files import PathLike
from vistvis.views.painting import NORMS

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure


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
    norm: str = "linear",
    renormalize: bool = False,
    allow_special: bool = False,
    output_dir: PathLike | None = None,
) -> tuple[dict[str, NotebookFigure], dict[str, Any]]:
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
        Write the figures (PNG) and `values.npz` there.

    Returns
    -------
    `{"frame": figure, "global": figure}`, those that were asked for, and what
    `extract_both_attentions` returns.

    InputError if pictures can't be read, a block does not exist, or arguments contradict each
    other; IndexOutOfRange if the head does not exist. Cost: one forward pass.
    """
    ready = load_model(model, device=device, dtype=dtype)
    loaded = load_pictures(image_paths, ready, size=size, mode=mode)
    place, requested = choose_token(ready, loaded, token_idx, allow_special=allow_special)
    query = Query(requested, head_idx, renormalize=renormalize)
    answer = ask(ready, loaded, place, query, block_idx=block_idx, attention_types=attention_types)
    figures = answer.draw(norm=norm, pictures=loaded.sharp())
    if output_dir is not None:
        answer.write(figures, output_dir)
    return figures, answer.result


# -- the command ---------------------------------------------------------------------------------

HELP = "frame and global attention of one patch: photographs in, pictures and numbers out"

_EXAMPLES = """\
examples:
  vistvis demo
      three sample views through the bundled small VGGT
  vistvis demo a.jpg b.jpg c.jpg --block 3 --head 0 --pixel 0:120,80 --out DIR
      your photographs of one scene; the pixel counts in the original photo
  vistvis demo *.jpg --model facebook/VGGT-1B --block 23 --head mean --token 1750
      the published model (5 GB, fetched once); the token counts over all frames
  vistvis demo *.jpg --model ./VGGT-1B --types global --norm percentile --device cuda
      weights from a local folder or file; only global attention; a scale that ignores sinks

the bundled model:
  Head 0 of its last global block was trained to point at the same place in the other views (a
  matching loss on its attention); all its other heads are free. What it was trained on and how
  well it does: MODEL_CARD.md in the folder vggt_adapter/weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vistvis demo`."""
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("images", nargs="*", metavar="PHOTO", help="photographs of one scene (default: samples)")
    add(
        *("-m", "--model"),
        default=TINY,
        help="'tiny' (bundled, default), a name on the hub, a local folder or file",
    )
    add(
        *("-b", "--block"),
        type=int,
        help="pair of blocks, from 0; negative from the end (default: the last)",
    )
    add("--head", type=_head, help="a head, 'mean' or 'max' over all heads (default: 0)")
    query = parser.add_mutually_exclusive_group()
    query.add_argument(
        "--pixel",
        type=_pixel,
        metavar="FRAME:X,Y",
        help="the query: a pixel of an original photo (default: the middle of frame 0)",
    )
    query.add_argument(
        "--token", type=int, help="the query: a token, counted over all frames, special ones too"
    )
    add("--allow-special", action="store_true", help="--token may be a camera or register token")
    add("--types", type=_types, default=ATTENTION_TYPES, help="frame,global (default), or one")
    add("--norm", choices=NORMS, default="linear", help="colour scale (default: linear)")
    add("--renormalize", action="store_true", help="weights over patches only, summing to 1")
    add("--size", type=int, help="pixels of the pictures' width (default: model's)")
    add("--mode", choices=MODES, default="crop", help="how they are cut")
    add("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="default: that of the weights")
    files = "where files go (default: %(default)s)"
    add("-o", "--out", default="vistvis-demo", metavar="DIR", help=files)


def run(arguments: argparse.Namespace) -> int:
    """Run `vistvis demo`; prints the strongest match in every frame and where the files are."""
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    loaded = load_pictures(
        arguments.images or None, model, size=arguments.size, mode=arguments.mode
    )
    place, requested = choose_token(
        model, loaded, arguments.token, pixel=arguments.pixel, allow_special=arguments.allow_special
    )
    head = suggested(model, "head", 0) if arguments.head is None else arguments.head
    block = suggested(model, "block", -1) if arguments.block is None else arguments.block
    query = Query(requested, head, renormalize=arguments.renormalize)
    answer = ask(model, loaded, place, query, block_idx=block, attention_types=arguments.types)
    figures = answer.draw(norm=arguments.norm, pictures=loaded.sharp())
    written = answer.write(figures, arguments.out)
    trained = getattr(model, "trained", True)
    print("\n".join(report(answer, loaded, arguments.model, trained=trained)))
    print(f"\nwritten to {Path(arguments.out).resolve()}:")
    for path in written:
        print(f"  {path.name}")
    return 0


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
        f"query     {first.query}, in {Path(loaded.paths[first.query.frame_idx]).name}",
    ]
    for kind, values in answer.values.items():
        block = answer.result["block_idx"]
        mass = f": {100 * values.patch_mass:.1f} % of the weight lies on patches"
        lines += ["", f"{kind} attention, block {block}, {values.head_text}"]
        lines[-1] += mass if values.head != "max" else ""
        lines.append("  frame  strongest match                       weight   frame's share")
        for match in values.matches:
            lines.append(
                f"  {match.place.frame:>5}  {_where(match.place, loaded):<36}"
                f"{match.weight:>8.3g}   {100 * match.share:>11.1f} %"
            )
    return lines


def _where(place: TokenPlace, loaded: LoadedImages) -> str:
    assert place.box is not None
    x0, y0, x1, y1 = loaded.geometries[place.frame_idx].box_to_original(place.box)
    x, y = (x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2
    return f"row {place.row}, col {place.col}, photo pixel {x:.0f},{y:.0f}"


def _pixel(text: str) -> tuple[int, float, float]:
    number = r"\s*(-?\d+(?:\.\d+)?)\s*"
    parts = re.fullmatch(rf"\s*(\d+)\s*:{number},{number}", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"FRAME:X,Y is meant, for example 0:120,80; got {text!r}")
    return int(parts[1]), float(parts[2]), float(parts[3])


def _head(text: str) -> int | str:
    if text in HEAD_REDUCTIONS:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a head's number, 'mean' or 'max' is meant, got {text!r}"
        ) from None


def _types(text: str) -> tuple[str, ...]:
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    if not kinds or any(kind not in ATTENTION_TYPES for kind in kinds):
        raise argparse.ArgumentTypeError(f"frame, global or frame,global is meant, got {text!r}")
    return kinds


if __name__ == "__main__":
    from vistvis.cli import guarded
    from vistvis.cli import run as run_command

    module = sys.modules["__main__"]
    sys.exit(guarded("vistvis demo", lambda: run_command("vistvis demo", module, sys.argv[1:])))
