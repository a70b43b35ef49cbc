"""Small runs, everything that can be read of one, and manifests put right after a change."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.store import Run, open_run, save_run

LAYOUT = TokenLayout(1, (2, 2), special=("camera",), patch_size=2)
TAIL = re.compile(rb',\n "crc32": "([0-9a-f]{8})"\n\}\n')


def contents(seed: int, count: int = 3, *, tokens: int = 5) -> dict[str, Attention]:
    """Sites of one pass: each number tells the seed and the site."""

    def one(number: int) -> Attention:
        query = torch.full((1, 2, tokens, 4), float(1000 * seed + number))
        site = SiteInfo(f"site_{number}", block=number, key_layout=LAYOUT, query_layout=LAYOUT)
        return Attention(query=query, key=query / 7, site=site if tokens == 5 else None)

    return {f"site_{number}": one(number) for number in range(count)}


def sound(run: Run, seeds: set[int] | None = None) -> int | None:
    """Check all of a run; the seed of its sites, which must be one (None where there is none)."""
    run.check()
    found = set()
    for name in run:
        query = run[name].query
        seed, number = divmod(int(query[0, 0, 0, 0]), 1000)
        assert bool((query == query[0, 0, 0, 0]).all()), f"{name} is torn"
        assert bool((run[name].key == query / 7).all()), f"{name} has keys of another site"
        assert name == f"site_{number}", f"{name} holds site_{number}"
        found.add(seed)
    images = run.images
    if images is not None:
        found.add(int(images.flatten()[0]))
    assert len(found) <= 1, f"what is there is of several passes: {found}"
    assert seeds is None or found <= seeds, f"of pass {found}, not one of {seeds}"
    return found.pop() if found else None


def pictures(seed: int) -> torch.Tensor:
    return torch.full((1, 3, 4, 4), float(seed))


def stored(folder: Path, seed: int = 1, **more: Any) -> Path:
    """A finished run with a bit of everything."""
    options = {
        "images": pictures(seed),
        "layout": LAYOUT,
        "model": "a model",
        "metadata": {"dtype": None, "pictures": ["a.jpg"], "n": 3},
    }
    save_run(contents(seed), folder, **{**options, **more})
    return folder


def reading(folder: Path) -> dict[str, Any]:
    """All that can be read of a run, as plain data."""
    with open_run(folder) as run:
        return {
            "says": [run.model, run.metadata, run.complete, run.image_shape, run.layout],
            "names": [run.expected, run.sites, run.missing, dict(run.damaged)],
            "nbytes": run.nbytes,
            "images": None if run.images is None else run.images.tolist(),
            "sites": {name: of_site(run, name) for name in run},
        }


def of_site(run: Run, name: str) -> list[Any]:
    one = run[name]
    parts = [one.query, one.key, one.weights, one.mask, one.scale, one.segments]
    plain = [part.tolist() if isinstance(part, torch.Tensor) else part for part in parts]
    return [*plain, one.causal, one.shape, one.dtype, one.site]


def signed(data: Mapping[str, Any], like: bytes) -> bytes:
    """A manifest of this content; with a right checksum at its end, where `like` has one."""
    text = json.dumps({k: v for k, v in data.items() if k != "crc32"}, indent=1).encode()
    if not TAIL.search(like):
        return text + b"\n"
    body = text[: -len(b"\n}")]
    return body + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body)


def edited(path: Path, change: Callable[[Any], object]) -> None:
    """Let a function change a manifest; what it returns takes the place of the whole, if not None.

    Bytes are written as they are, anything else as JSON with its checksum.
    """
    before = path.read_bytes()
    data = json.loads(before)
    made = change(data)
    data = data if made is None else made
    path.write_bytes(data if isinstance(data, bytes) else signed(data, before))
