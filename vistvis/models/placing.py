"""What a site's attention carries: its kind, and where its tokens lie."""

from __future__ import annotations

from collections.abc import Sequence

from vistvis.attention import SiteInfo, WindowInfo
from vistvis.models.places import UNKNOWN, Place, Sizes, by_count, one_frame
from vistvis.models.sites import Site
from vistvis.tokens import TokenLayout


def site_info(
    site: Site,
    shape: Sequence[int],
    *,
    source: str,
    rope: bool | None,
    layout: TokenLayout | None,
    window: WindowInfo | None,
) -> SiteInfo:
    """What attention `(B, h, Nq, Nk)` carries; `layout` is that of all pictures of the pass."""
    placed = UNKNOWN
    if layout is not None:
        placed = _place_of(site)(layout, Sizes(shape[0], *shape[2:]))
    return SiteInfo(
        name=site.name,
        path=site.path,
        kind="window" if window else site.kind,
        block=site.block,
        module=site.type,
        query_layout=placed.query_layout,
        key_layout=placed.key_layout,
        frames_in_batch=placed.frames_in_batch,
        rope=rope,
        source=source,
        window=window,
        query_order=placed.query_order,
        key_order=placed.key_order,
        first_frame=placed.first_frame,
    )


def _place_of(site: Site) -> Place:
    if site.role is not None:
        return site.role.place
    return one_frame if site.kind == "frame" else by_count
