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
from typing import Any

from vistvis.views.explorer.packing import PackedSite

# In the order in which they are joined: each uses those before it only.
SCRIPTS = ("decode.js", "wasm.js", "kernel.js", "layout.js", "source.js", "main.js")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./[\w.]+";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=async |function|class|const)", re.MULTILINE)


def asset(name: str) -> bytes:
    """A file of the explorer's."""
    return files("vistvis.views").joinpath("assets", "explorer", name).read_bytes()


@cache
def script() -> str:
    """The modules as one, because a page's policy blocks imports of what it carries."""
    kernel = base64.b64encode(asset("kernel.wasm")).decode()
    parts = [f'const KERNEL_WASM = "{kernel}";', *(asset(name).decode() for name in SCRIPTS)]
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", part)) for part in parts)


def policy(text: str) -> str:
    """What the page may do: run this script, show its own pictures, and reach nothing else."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' 'wasm-unsafe-eval'; worker-src blob:; "
        "style-src 'unsafe-inline'; img-src data: blob:"
    )


def page_parts(
    manifest: dict[str, Any], pictures: dict[tuple[int, int], bytes], sites: Iterator[PackedSite]
) -> Iterator[str]:
    """The page in parts, in the order in which a browser reads them: what is seen comes first.

    `manifest` has the headers of the sites; `pictures` are JPEGs by (batch, frame).
    """
    code = script()
    data = _inert_json(manifest)
    yield (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy(code))}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(str(manifest['title']))}</title>\n"
        f"<style>\n{asset('explorer.css').decode()}</style>\n"
        '<div id="vistvis-explorer"></div>\n'
        f'<script type="application/json" id="vistvis-manifest" '
        f'data-crc32="{zlib.crc32(data.encode())}">{data}</script>\n'
    )
    for (batch, frame), jpeg in pictures.items():
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        yield f'<script type="text/plain" id="vistvis-image-{batch}-{frame}">{url}</script>\n'
    yield f'<script type="module">{code}</script>\n'
    for number, packed in enumerate(sites):
        text = base64.b64encode(packed.data).decode()
        yield f'<script type="text/plain" id="vistvis-site-{number}">{text}</script>\n'
    yield "</html>\n"


def _inert_json(data: Any) -> str:
    """JSON that can stand in a script tag: nothing in it ends the tag or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub(r"[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
