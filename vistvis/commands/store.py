"""`vistvis store`: run a model over pictures and keep the attention of its sites as a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vistvis.commands import _options, _sources

HELP = "run a model over pictures and store the queries and keys of its attention"

_EXAMPLES = """\
examples:
  vistvis store a.jpg b.jpg c.jpg --model vggt:tiny --out runs/scene
      every block of the bundled small VGGT
  vistvis store clip.mp4 --every 1s -m vggt:facebook/VGGT-1B --sites 'global_*' --out runs/clip
      the global blocks of the published model, a frame each second
  vistvis store photo.jpg --model vit_small_patch14_dinov2 --out s3://bucket/photo
      a model of timm, to an fsspec URL

A run that was cut short goes on when the same command is given again; a finished one is replaced
at the end, at once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vistvis store`."""
    parser.epilog = _EXAMPLES
    text = "what the model is to see: photographs, folders, globs, videos"
    parser.add_argument("images", nargs="+", metavar="PHOTO", help=text)
    _options.add_every(parser)
    parser.add_argument(
        *("-m", "--model"),
        required=True,
        metavar="NAME",
        help="a timm name (NAME@random: untrained, NAME@FILE: a checkpoint), or vggt:tiny, "
        "vggt:facebook/VGGT-1B, vggt:FILE",
    )
    text = "a folder or fsspec URL"
    parser.add_argument("-o", "--out", type=_out, required=True, metavar="RUN", help=text)
    _options.add_sites(parser)
    _options.add_place(parser)
    parser.add_argument("--anew", action="store_true", help="don't go on with an unfinished run")


def _out(text: str) -> str | Path:
    """A run's folder, judged, or its URL."""
    return text if "://" in text else _options.folder(text)


def run(arguments: argparse.Namespace) -> int:
    """Run `vistvis store`; prints what was stored."""
    import torch

    from vistvis.attention import Attention
    from vistvis.hooks.capture import capture
    from vistvis.names import harmless
    from vistvis.photos.records import photos_metadata
    from vistvis.progress import progress
    from vistvis.store import RunWriter, check_target, open_run, pass_id_of

    check_target(arguments.out)  # before a model is loaded for nothing
    photos = _sources.photos_of(arguments.images, arguments)
    loaded = _sources.load(arguments.model, arguments, photos)
    _sources.say_crops(loaded.photos)
    names = loaded.sites(arguments.sites).names
    pass_id = pass_id_of(
        loaded.model,
        loaded.images,
        name=arguments.model,
        size=arguments.size,
        dtype=arguments.dtype,
    )
    with RunWriter(
        arguments.out,
        expected=names,
        images=loaded.pictures,
        model=arguments.model,
        metadata={"dtype": arguments.dtype, **photos_metadata(loaded.photos)},
        pass_id=pass_id,
        resume=not arguments.anew,
        **loaded.scene,
    ) as writer:
        had = len(writer.finished)
        bar = progress(None, "storing", unit="site", total=len(names), shown=None)

        def sink(name: str, attention: Attention) -> None:
            writer(name, attention)
            bar.update()

        with bar, capture(loaded.watched, names, sink=sink, names=loaded.names), torch.no_grad():
            loaded.model(loaded.images)
    stored = open_run(arguments.out)
    went_on = f", {had} of them before" if had else ""
    print(harmless(f"{stored!r}{went_on}"))
    return 0
