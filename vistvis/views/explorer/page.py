"""The page: scripts, pictures and sites in one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from vistvis.errors import InputError
from vistvis.files import regular_file
from vistvis.views.explorer.contents import Contents

# In the order in which they are joined: each uses those before it only.
SCRIPTS = (
    "decode.js",
    "wasm.js",
    "kernel.js",
    "layout.js",
    "source.js",
    "dom.js",
    "scene.js",
    "colours.js",
    "state.js",
    "frames.js",
    "numbers.js",
    "multiples.js",
    "controls.js",
    "keys.js",
    "save.js",
    "words.js",
    "view.js",
    "cloudview.js",
    "cloud.js",
    "against.js",
    "main.js",
)
_OURS = b'<div id="vistvis-explorer"'
_CHUNK = 3 * 2**20  # a multiple of three: pieces of base64 join
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./[\w.]+";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=async |function|class|const)", re.MULTILINE)


def asset(name: str) -> bytes:
    """A file of the explorer's."""
    return files("vistvis.views").joinpath("assets", "explorer", name).read_bytes()


@cache
def script(*more: str) -> str:
    """The modules as one, because a page's policy blocks imports of what it carries."""
    kernel = base64.b64encode(asset("kernel.wasm")).decode()
    names = (*SCRIPTS, *more)
    parts = [f'const KERNEL_WASM = "{kernel}";', *(asset(name).decode() for name in names)]
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", part)) for part in parts)


def policy(text: str, *, fetches: bool = False) -> str:
    """What the page may do: run this script, show its own pictures, and reach nothing else.

    With `fetches` also ask the server that it came from, for its sites.
    """
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' 'wasm-unsafe-eval'; worker-src blob:; "
        "style-src 'unsafe-inline'; img-src data: blob:"
        + ("; connect-src 'self'" if fetches else "")
    )


def page_parts(contents: Contents, *, with_sites: bool = True) -> Iterator[str]:
    """The page in parts, in the order in which a browser reads them: what is seen comes first.

    Without its sites it fetches them from beside itself, by the names of `Contents.site_file`.
    """
    code, manifest = script(), contents.manifest
    data = _inert_json(manifest)
    rules = policy(code, fetches=not with_sites)
    yield (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(rules)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(str(manifest['title']))}</title>\n"
        f"<style>\n{asset('explorer.css').decode()}</style>\n"
        f"{_OURS.decode()}{'' if with_sites else ' data-folder'}></div>\n"
        f'<script type="application/json" id="vistvis-manifest" '
        f'data-crc32="{zlib.crc32(data.encode())}">{data}</script>\n'
    )
    for (batch, frame), jpeg in contents.pictures.items():
        url = picture_url(jpeg)
        yield f'<script type="text/plain" id="vistvis-image-{batch}-{frame}">{url}</script>\n'
    # `async`: it runs while the sites are still read. The last one, shown first, comes first.
    yield f'<script type="module" async>{code}</script>\n'
    for number in reversed(range(len(contents.places) if with_sites else 0)):
        site = contents.site(number)
        yield f'<script type="text/plain" id="vistvis-site-{number}">'
        for start in range(0, len(site), _CHUNK):
            yield base64.b64encode(site[start : start + _CHUNK]).decode()
        yield "</script>\n"
    yield "</html>\n"


def check_page(path: Path) -> None:
    """InputError where something else would be written over."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a page's file is meant")
    if path.exists():
        with regular_file(path) as file:
            if _OURS not in file.read(2**20):
                raise InputError(f"{path} is not a page of the explorer; choose another name")


def picture_url(jpeg: bytes) -> str:
    """A picture as a browser takes it from anywhere."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _inert_json(data: Any) -> str:
    """JSON that can stand in a script tag: nothing in it ends the tag or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub(r"[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
