"""Two runs side by side in a real browser: both rows and their difference, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout

LAYOUT = TokenLayout(frames=2, grid=(4, 5), special=("camera",))
SITE = SiteInfo("site", kind="global", query_layout=LAYOUT, key_layout=LAYOUT)
TOKEN = LAYOUT.index(frame=1, patch=7)


def attention(seed: int, site: SiteInfo = SITE) -> Attention:
    torch.manual_seed(seed)
    shape = 1, 2, LAYOUT.num_tokens, 8
    return Attention(query=2 * torch.randn(shape), key=torch.randn(shape), site=site)


def exact_row(seed: int, head: int, token: int) -> np.ndarray[Any, Any]:
    one = attention(seed)
    query, key = one.query.half().double(), one.key.half().double()
    rounded = Attention(query=query, key=key, scale=one.scale)
    return rounded.rows([token], batch=0, heads=head)[0, 0, 0].numpy()


@pytest.fixture
def opened(page: Callable[[Path], Any], tmp_path: Path) -> Iterator[Any]:
    images = torch.rand(2, 3, 56, 70)
    given = {"images": images, "against": {"site": attention(1)}}
    browser = page(vistvis.explore({"site": attention(0)}, tmp_path / "page.html", **given))
    browser.get_log("browser")
    yield browser
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def settled(browser: Any) -> None:
    """After the other run is there and what is due was drawn."""
    code = """const done = arguments[0];
        const look = () => (vistvis.view.against.difference ? done() : setTimeout(look, 10));
        requestAnimationFrame(() => setTimeout(look, 30))"""
    browser.execute_async_script(code)


def shown(browser: Any, part: str) -> np.ndarray[Any, Any]:
    return np.array(browser.execute_script(f"return [...vistvis.view.against.{part}]"))


def choose(browser: Any, **state: Any) -> None:
    browser.execute_script("vistvis.set(arguments[0])", state)
    settled(browser)


@pytest.mark.parametrize("head", [0, 1])
def test_both_rows_and_their_difference_are_exact(opened: Any, head: int) -> None:
    choose(opened, token=TOKEN, head=head)
    one, other = exact_row(0, head, TOKEN), exact_row(1, head, TOKEN)
    assert np.abs(shown(opened, "values") - one).max() < 2e-6
    assert np.abs(shown(opened, "other") - other).max() < 2e-6
    assert np.abs(shown(opened, "difference") - (other - one)).max() < 4e-6
    said = opened.find_element("css selector", ".against-said").text
    assert f"{0.5 * np.abs(other - one).sum():.3g}"[:4] in said
    largest = (other - one)[np.abs(other - one).argmax()]
    assert ("−" if largest < 0 else "+") + f"{abs(largest):.3g}"[:4] in said


def test_more_is_orange_and_less_is_blue(opened: Any) -> None:
    choose(opened, token=TOKEN, head=0)
    difference = exact_row(1, 0, TOKEN) - exact_row(0, 0, TOKEN)
    patches = difference.reshape(2, -1)[:, 1:].reshape(2, *LAYOUT.grid)
    for frame in range(2):
        code = """const {canvas} = vistvis.view.against.maps[arguments[0]][2];
            const {width, height} = canvas;
            return [...canvas.getContext("2d").getImageData(0, 0, width, height).data]"""
        pixels = np.array(opened.execute_script(code, frame)).reshape(*LAYOUT.grid, 4)
        strong = np.abs(patches[frame]) > 0.05 * np.abs(patches).max()
        assert ((pixels[..., 0] > pixels[..., 2]) == (patches[frame] > 0))[strong].all()
        assert pixels.reshape(-1, 4)[np.abs(patches[frame]).argmin(), :3].max() < 60
    assert np.abs(patches).max() > 0.01


def test_a_patch_of_the_other_run_can_be_asked_for(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    choose(opened, token=TOKEN, head=0)
    maps = opened.find_elements("css selector", ".against .picture")
    assert len(maps) == 6
    width, height = maps[4].size["width"], maps[4].size["height"]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", maps[4])
    there = round((3.5 / 5 - 0.5) * width), round((2.5 / 4 - 0.5) * height)
    ActionChains(opened).move_to_element_with_offset(maps[4], *there).click().perform()
    settled(opened)
    wanted = LAYOUT.index(frame=1, patch=13)
    assert opened.execute_script("return vistvis.state.pins") == [wanted]
    assert np.abs(shown(opened, "other") - exact_row(1, 0, wanted)).max() < 2e-6
    mark = opened.execute_script("return vistvis.view.against.maps[1][2].mark.style.left")
    assert mark == "60%"


def test_of_folded_frames_only_the_querys_is_compared(
    page: Callable[[Path], Any], tmp_path: Path
) -> None:
    single = LAYOUT.frame_layout()
    site = SiteInfo(
        "frame", kind="frame", query_layout=single, key_layout=single, frames_in_batch=True
    )

    def folded(seed: int) -> dict[str, Attention]:
        torch.manual_seed(seed)
        shape = 2, 1, single.num_tokens, 8
        return {
            "frame": Attention(query=torch.randn(shape), key=torch.randn(shape), site=site),
            "global": attention(seed, replace(SITE, name="global", path="global")),
        }

    browser = page(vistvis.explore(folded(0), tmp_path / "page.html", against=folded(1)))
    choose(browser, site="frame", token=TOKEN, head=0)
    assert np.isnan(shown(browser, "difference").astype(float)).sum() == LAYOUT.tokens_per_frame
    lit = "return [...document.querySelectorAll('.against .picture')].map((p) => p.matches('.lit'))"
    assert browser.execute_script(lit) == [False] * 3 + [True] * 3
