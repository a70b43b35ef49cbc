"""`explore`: captured or stored attention as a page to point at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistvis.attention import Attention
from vistvis.errors import CaptureError, InputError
from vistvis.files import PathLike, atomic_file, checked_path
from vistvis.images import image_tensor, to_rgb
from vistvis.views.explorer.packing import PackedSite, pack_site
from vistvis.views.explorer.page import page_parts
from vistvis.views.maps import chosen_names, last_of, layout_of

_QUALITY = 90


def explore(
    source: Mapping[str, Attention],
    out: PathLike,
    *,
    images: Any = None,
    sites: str | Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write a page on which attention is computed while one points at it."""
    if images is None:
        images = getattr(source, "images", None)
    names = chosen_names(source, sites)
    packed: list[PackedSite] = []
    omitted: list[dict[str, str]] = []
    for name in names:
        try:
            packed.append(pack_site(name, last_of(source[name])))
        except (CaptureError, InputError) as error:
            omitted.append({"name": name, "reason": str(error)})
    layout = layout_of(source, [one.header["name"] for one in packed], images)
    pictures = _pictures(images)
    manifest = {
        "version": 1,
        "title": title or getattr(source, "model", None) or "attention",
        "layout": layout.to_dict(),
        "frames": [{"name": f"frame {n}"} for n in range(layout.frames)],
        "sites": [one.header for one in packed],
        "omitted": omitted,
        "images": [list(key) for key in pictures],
    }
    path = checked_path(out)
    with atomic_file(path) as stream:
        for part in page_parts(manifest, pictures, iter(packed)):
            stream.write(part.encode())
    return path


def _pictures(images: Any) -> dict[tuple[int, int], bytes]:
    """JPEGs by (batch, frame)."""
    from PIL import Image

    if images is None:
        return {}
    tensor = image_tensor(images)
    tensor = tensor[None] if tensor.ndim == 4 else tensor
    out = {}
    for batch, scene in enumerate(to_rgb(tensor)):
        for frame, picture in enumerate(scene):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY)
            out[batch, frame] = buffer.getvalue()
    return out
