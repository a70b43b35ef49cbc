"""`vistvis explore`: a page to point at, of photographs or of a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistvis.commands import _options, _sources
from vistvis.errors import InputError

if TYPE_CHECKING:
    from vistvis.attention import Attention
    from vistvis.models.loading import LoadedModel
    from vistvis.views.explorer.contents import Contents

HELP = "point at a patch and see where it looks: a page for the browser"

_MODEL = "vggt:tiny"
_OUT = Path("explorer.html")
_EXAMPLES = """\
examples:
  vistvis explore a.jpg b.jpg c.jpg
      your photographs of one scene through the bundled small VGGT, opened in the browser
  vistvis explore photo.jpg --model vit_small_patch14_dinov2 --sites 'blocks.1?.attn'
      some blocks of a timm model
  vistvis explore runs/fern --out fern.html
      a stored run, as one file that needs no network and can be mailed
  vistvis explore runs/a --against runs/b
      two checkpoints, or two runs of one scene: side by side, and their difference
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EXAMPLES
    text = "photographs, folders, globs, videos; or a stored run"
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help=text)
    _options.add_every(parser)
    text = f"for photographs: vggt:FILE, a timm name (default {_MODEL})"
    parser.add_argument("-m", "--model", metavar="NAME", help=text)
    _options.add_sites(parser, default="the suggested block; of a run what fits 100 MB")
    text = "another run of the same pictures: both side by side, and their difference"
    parser.add_argument("--against", metavar="RUN", help=text)
    _options.add_place(parser)
    places = parser.add_mutually_exclusive_group()
    text = f"the page's file (default {_OUT})"
    places.add_argument("-o", "--out", type=_out, default=_OUT, metavar="FILE", help=text)
    text = "index.html and one binary a site, for a host of static files"
    places.add_argument("--folder", type=_folder, metavar="DIR", help=text)
    text = "write nothing: serve it at 127.0.0.1 until Ctrl-C"
    places.add_argument("--serve", action="store_true", help=text)
    text = "don't open the browser"
    parser.add_argument("--no-open", action="store_true", help=text)


@_options.typed
def _out(text: str) -> Path:
    """The page's file."""
    path = Path(text).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"a page's file ends in .html, got {text[-40:]!r}")
    _options.folder(str(path.parent))
    return path


def _folder(text: str) -> Path:
    """A folder for a page."""
    return Path(_options.folder(text))


def run(arguments: argparse.Namespace) -> int:
    """Make the page, say where it is, and show it."""
    from vistvis.views.explorer.page import check_page

    photos = arguments.photos
    if not arguments.serve:
        folder = arguments.folder
        check_page(folder / "index.html" if folder else arguments.out)
    stored = _sources.run_among(photos, arguments.model, done="shown")
    if stored is None:
        if arguments.against:
            raise InputError("--against goes with a run; store the photographs: vistvis store")
        return _of_photos(arguments)
    return _of_run(arguments)


def _of_run(arguments: argparse.Namespace) -> int:
    from vistvis.store import open_run

    with contextlib.ExitStack() as opened:
        stored = opened.enter_context(open_run(arguments.photos[0]))
        other = opened.enter_context(open_run(arguments.against)) if arguments.against else None
        return _show(arguments, stored, against=other)


def _of_photos(arguments: argparse.Namespace) -> int:
    import torch

    from vistvis.hooks.capture import capture
    from vistvis.views.plot import model_title

    photos, model = _sources.photos_of(arguments.photos, arguments), arguments.model or _MODEL
    loaded = _sources.load(model, arguments, photos)
    _sources.say_crops(loaded.photos)
    names = loaded.sites(arguments.sites or _suggested(loaded)).names
    with (
        capture(loaded.watched, names, keep="cpu", names=loaded.names) as captured,
        torch.no_grad(),
    ):
        loaded.model(loaded.images)
    return _show(
        arguments,
        captured,
        images=_sources.sharp_pictures(loaded),
        names=[photo.name for photo in loaded.photos] or None,
        title=model_title(model),
        start=_start(loaded),
        **loaded.scene,
    )


def _suggested(loaded: LoadedModel) -> list[str]:
    """One block of each kind: the one that the model's description suggests, else the last."""
    sites = loaded.sites()
    block = getattr(loaded.model, "default", {}).get("block", -1)
    kinds: dict[str, list[str]] = {}
    for site in sites:
        if site.path in loaded.names or not loaded.names:
            kinds.setdefault(site.kind, []).append(site.name)
    return [names[block if block < len(names) else -1] for names in kinds.values()]


def _start(loaded: LoadedModel) -> dict[str, Any]:
    """The head that the model's description suggests, where it does."""
    head = getattr(loaded.model, "default", {}).get("head")
    return {} if head is None else {"head": head}


def _show(
    arguments: argparse.Namespace,
    source: Mapping[str, Attention],
    *,
    against: Mapping[str, Attention] | None = None,
    **given: Any,
) -> int:
    """Pack, write or serve, tell and open."""
    from vistvis.attention.checks import bytes_text
    from vistvis.views.explorer.contents import MOST_BYTES, choose, gather, page_bytes
    from vistvis.views.explorer.folder import write_folder
    from vistvis.views.explorer.front import write_page

    chosen = choose(source, arguments.sites, against=against)
    if (size := page_bytes(chosen)) > MOST_BYTES:
        count = len(chosen.names)
        less = f"--sites {shlex.quote(chosen.names[-1])}"
        print(f"about {bytes_text(size)} for {count} sites; fewer make it smaller: {less}")
    place = None if arguments.serve else arguments.folder or arguments.out.parent
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    contents = gather(source, chosen, near=place, against=against, **given)
    with contents.spool:
        if arguments.serve:
            return _serve(contents, arguments)
        if arguments.folder:
            path = write_folder(contents, arguments.folder)
            files = [path, *path.parent.glob("site-*.bin")]
        else:
            path = write_page(contents, arguments.out)
            files = [path]
    listed = f"{len(contents.places)} sites, {bytes_text(sum(f.stat().st_size for f in files))}"
    print(f"wrote {path}   ({listed})")
    if arguments.folder:
        print(f"next: python -m http.server -d {shlex.quote(str(arguments.folder))}   (to look)")
        return 0
    if not _opened(path.resolve().as_uri(), arguments):
        print(f"open it in a browser: {path.resolve().as_uri()}")
    words = shlex.join(arguments.photos)
    if against is not None:
        words += f" --against {shlex.quote(arguments.against)}"
    if given and not arguments.sites:
        model = f" --model {shlex.quote(arguments.model)}" if arguments.model else ""
        print(f"next: vistvis explore {words}{model} --sites '**'   (all sites)")
    else:
        print(f"next: vistvis explore {words} --serve   (the same without a file)")
    return 0


def _serve(contents: Contents, arguments: argparse.Namespace) -> int:
    """Until Ctrl-C."""
    from vistvis.views.explorer.serving import PageServer

    with PageServer(contents) as server:
        print(f"serving at {server.url}   (Ctrl-C ends it)", flush=True)
        _opened(server.url, arguments)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _opened(address: str, arguments: argparse.Namespace) -> bool:
    """Whether a browser was started: one with a window, and where somebody is there to see it."""
    window = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if arguments.no_open or not window or not sys.stdout.isatty():
        return False
    with contextlib.suppress(webbrowser.Error):
        return webbrowser.open(address)
    return False
