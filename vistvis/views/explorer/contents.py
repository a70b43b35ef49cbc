"""What a page shows: which sites, their data packed, pictures, names; the same for every host."""

from __future__ import annotations

import base64
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from vistvis.attention import Attention
from vistvis.attention.site import chosen_names
from vistvis.errors import CaptureError, InputError, LayoutError, VistvisWarning
from vistvis.images import image_tensor
from vistvis.names import few
from vistvis.progress import progress as bar
from vistvis.store import Run
from vistvis.tokens import TokenLayout
from vistvis.views.explorer.against import labels_of, shared_sites
from vistvis.views.explorer.packing import pack_site, packed_bytes
from vistvis.views.explorer.points import point_record
from vistvis.views.maps import Scene, last_of, layout_of, pictures_of

# What a page takes without being asked, of queries and keys as they are packed.
MOST_BYTES = 100_000_000
CMAPS = ("inferno", "viridis", "cividis", "magma", "gray")
_QUALITY = 90


@dataclass(frozen=True)
class Chosen:
    """The sites of a page, in the order of the model, and why others are not among them.

    `nbytes` is about what they will take.
    """

    names: tuple[str, ...]
    nbytes: int
    omitted: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Contents:
    """A manifest, JPEGs by (batch, frame), and the sites' data, which lies in a file."""

    manifest: dict[str, Any]
    pictures: dict[tuple[int, int], bytes]
    places: tuple[tuple[int, int], ...]  # of each site in the file: start and length
    spool: IO[bytes]

    def site(self, number: int) -> bytes:
        """The data of one site."""
        start, length = self.places[number]
        self.spool.seek(start)
        return self.spool.read(length)

    def site_file(self, number: int) -> str:
        """What its file is called beside a page that fetches it; source.js knows that too.

        A changed site has another name, so that no cache and no half-copied folder mixes two pages.
        """
        headers = [*self.manifest["sites"], *self.manifest.get("against", {}).get("sites", [])]
        return f"site-{number}-{headers[number]['crc32']:08x}.bin"

    def sites(self) -> Iterator[bytes]:
        """The data of one site after another."""
        return map(self.site, range(len(self.places)))


def choose(
    source: Mapping[str, Attention],
    sites: str | Sequence[str] | None,
    *,
    against: Mapping[str, Attention] | None = None,
) -> Chosen:
    """The sites that are named; by default the last ones that fit `MOST_BYTES` together.

    Those that can't be read are left out, and of several sites under one name all but the last;
    with `against` also those that it does not have alike.
    SiteError if `sites` match nothing, InputError if no site can be shown; its text says why.
    """
    names = chosen_names(source, sites)
    taken: dict[str, int] = {}
    omitted: dict[str, str] = {}
    full = False
    shared = names
    if against is not None:
        shared, left_out = shared_sites(source, against, names)
        omitted = {one["name"]: one["reason"] for one in left_out}
    for name in reversed(shared):
        if not full:
            try:
                runs = [source] if against is None else [source, against]
                nbytes = sum(packed_bytes(last_of(run[name])) for run in runs)
            except (CaptureError, InputError) as error:
                omitted[name] = str(error)
                continue
            # Not an earlier one that is smaller instead: the last blocks, one after the other.
            full = sites is None and bool(taken) and sum(taken.values()) + nbytes > MOST_BYTES
        if full:
            omitted[name] = "left out to keep the page small; name it in sites"
        else:
            taken[name] = nbytes
    if not taken:
        raise InputError(f"no site can be shown: {next(iter(omitted.values()))}")
    left = tuple({"name": name, "reason": omitted[name]} for name in names if name in omitted)
    return Chosen(tuple(reversed(taken)), sum(taken.values()), left)


def gather(
    source: Mapping[str, Attention],
    chosen: Chosen,
    *,
    images: Any = None,
    points: Any = None,
    confidence: Any = None,
    cameras: Any = None,
    title: str | None = None,
    names: Sequence[str] | None = None,
    near: Path | None = None,
    against: Mapping[str, Attention] | None = None,
    start: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Contents:
    """Pack the chosen sites one after another into a file without a name, in the folder `near`.

    `start` is what the page's state begins with (state.js), such as a head; what the other
    arguments are, `explore` says.
    """
    images = getattr(source, "images", None) if images is None else images
    layout = _layout(source, chosen.names, images)
    pictures = {} if images is None or layout is None else _pictures(images, layout)
    if points is None and isinstance(source, Run) and layout is not None:
        points, confidence, cameras = source.points, source.confidence, source.cameras
    cloud = {}
    if points is not None:
        if layout is None:
            raise InputError("points need a layout, which says whose they are, and no site has one")
        record = point_record(layout, points=points, confidence=confidence, cameras=cameras)
        cloud = {"points": record}
    omitted = list(chosen.omitted)
    headers: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []  # of the run to set against this one, after all of these
    places: list[tuple[int, int]] = []
    # Not in memory, and not yet in the page: its head needs every site's checksum.
    spool = tempfile.TemporaryFile(dir=near)  # noqa: SIM115 - lives as long as the contents
    wanted = [(source, name, headers) for name in chosen.names]
    if against is not None:
        wanted += [(against, name, others) for name in chosen.names]
    for run, name, packed_headers in bar(wanted, "packing", shown=progress, unit="site", delay=0.5):
        try:
            packed = pack_site(name, last_of(run[name]))
        except (CaptureError, InputError) as error:
            omitted.append({"name": name, "reason": str(error)})
            continue
        packed_headers.append(packed.header)
        places.append((spool.tell(), len(packed.data)))
        spool.write(packed.data)
    if not headers:
        raise InputError(f"no site can be shown: {omitted[-1]['reason']}")
    if omitted:
        told = few([one["name"] for one in omitted])
        warnings.warn(
            f"not in the page: {told}: {omitted[0]['reason']}", VistvisWarning, stacklevel=3
        )
    opened = f"vistvis.open_run({source.path!r})" if isinstance(source, Run) else "captured"
    manifest = {
        "version": 1,
        "title": title or getattr(source, "model", None) or "attention",
        "model": getattr(source, "model", None),
        "layout": None if layout is None else layout.to_dict(),
        "frames": _frames(source, layout, names),
        "images": [list(key) for key in pictures],
        "sites": headers,
        "omitted": omitted,
        "cmaps": _cmaps(),
        "python": f"run = {opened}",
        "start": dict(start or {}),
        **cloud,
    }
    if against is not None:
        manifest["against"] = {"labels": labels_of(source, against), "sites": others}
    return Contents(manifest, pictures, tuple(places), spool)


def page_bytes(chosen: Chosen) -> int:
    """About how large a page of these sites gets, pictures aside: base64 of what is packed."""
    return chosen.nbytes * 4 // 3


def _layout(
    source: Mapping[str, Attention], names: Sequence[str], images: Any
) -> TokenLayout | None:
    """The layout of all frames; None where no site says one: its tokens are a plain strip."""
    try:
        return layout_of(source, names, images)
    except LayoutError:
        return None


def _frames(
    source: Mapping[str, Attention], layout: TokenLayout | None, names: Sequence[str] | None
) -> list[dict[str, str]]:
    """What each picture is called, those of one scene after those of another."""
    count = 0 if layout is None else layout.frames
    if names is None:
        stored = source.metadata.get("photos") if isinstance(source, Run) else None
        names = _photo_names(stored) or [f"frame {number}" for number in range(count)]
    elif count and (not names or len(names) % count):
        raise InputError(f"{count} frames need as many names, got {len(names)}")
    return [{"name": str(name)} for name in names]


def _photo_names(photos: Any) -> list[str]:
    """The names in a run's metadata; none where it says something else."""
    entries = photos if isinstance(photos, list) else []
    names = [one["name"] for one in entries if isinstance(one, dict) and "name" in one]
    return names if len(names) == len(entries) else []


def _pictures(images: Any, layout: TokenLayout) -> dict[tuple[int, int], bytes]:
    """JPEGs by (batch, frame)."""
    from PIL import Image

    tensor = image_tensor(images)
    single = tensor.ndim == 4 and len(tensor) == layout.frames
    scene = Scene(layout, layout.locate(0))
    out = {}
    for batch in range(1 if single else len(tensor)):
        for frame, picture in pictures_of(images, replace(scene, batch=batch)).items():
            buffer = io.BytesIO()
            pixels = (picture * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
            out[batch, frame] = buffer.getvalue()
    return out


def _cmaps() -> dict[str, str]:
    """256 colours of each map, base64 of their bytes."""
    from matplotlib import colormaps

    steps = np.linspace(0, 1, 256)
    return {
        name: base64.b64encode(colormaps[name](steps, bytes=True)[:, :3].tobytes()).decode()
        for name in CMAPS
    }
