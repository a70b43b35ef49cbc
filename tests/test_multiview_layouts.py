"""Which token of a site is which patch of which picture, for every family: told by lighting it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from multiview import PATCH
from multiview_cases import CASES, Case, calm, captured, pictures

from vistvis.attention import SiteInfo
from vistvis.errors import IndexOutOfRange


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def place(site: SiteInfo, frame: int, row: int, col: int) -> tuple[int | None, int] | None:
    """Where in batch and keys a patch is, as the site says it; None: it is no key here.

    The batch is None where pictures are in it and nothing is said of their order.
    """
    layout = site.key_layout
    if layout is None:
        return None
    if layout.frames == 1:
        return frame if site.frames_in_batch else None, layout.index(row=row, col=col)
    token = layout.index(frame=frame, row=row, col=col)
    try:
        return 0, token if site.key_order is None else site.key_order.index(token)
    except IndexOutOfRange:
        return None


def misplaced(case: Case, lie: Callable[[SiteInfo], SiteInfo] = lambda site: site) -> list[str]:
    """Sites where a lit patch of scene 0 is not the key that answers most, and what was lit."""
    calm(case.model)
    images = pictures(case.frames, case.batch)
    before, wrong = captured(case, images, verify=True), []
    for frame, row, col in [(0, 1, 2), (case.frames - 1, 0, 1), (case.frames - 1, 1, 3)]:
        changed = images.clone()
        changed[0, frame, :, row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH] += 3
        for name, attention in captured(case, changed).items():
            expected = place(lie(attention.site), frame, row, col)
            if expected is None:
                continue
            answer = (attention.key - before[name].key).norm(dim=-1).sum(1)
            batch, token = divmod(int(answer.argmax()), answer.shape[1])
            if token != expected[1] or expected[0] not in (None, batch):
                wrong.append(f"{name}: {frame, row, col} lit, {batch, token} answers")
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_a_lit_patch_is_where_the_layout_says(name: str) -> None:
    assert misplaced(CASES[name]()) == []


def shifted(site: SiteInfo) -> SiteInfo:
    """The same site with a layout that has one special token more in front, one less behind."""
    layout = site.key_layout
    if layout is None:
        return site
    return replace(site, key_layout=replace(layout, special=("extra", *layout.special)))


@pytest.mark.parametrize("name", CASES)
def test_a_layout_shifted_by_one_token_is_found_out(name: str) -> None:
    assert misplaced(CASES[name](), shifted)
