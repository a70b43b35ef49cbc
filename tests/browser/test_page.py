"""The explorer's page in a real browser: what is pointed at, pressed, shown, said and saved."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vistvis import Attention, SiteInfo, TokenLayout, explore
from vistvis.attention.order import TokenOrder

Page = Callable[[Path], Any]

LAYOUT = TokenLayout(3, (4, 6), special=("camera", "register", "register"), patch_size=(8, 8))
HOSTILE = '</script><b onclick="x">\u202e\'&amp; & "q"'
HOSTILE_SITE = "block</script>.\"'<img src=x onerror=alert(1)>"


def attention(
    layout: TokenLayout = LAYOUT, *, name: str, kind: str, batch: int = 1, **more: Any
) -> Attention:
    generator = torch.Generator().manual_seed(len(name))
    count = more.pop("count", layout.num_tokens)
    query, key = (3 * torch.randn(batch, 2, count, 8, generator=generator) for _ in range(2))
    info = SiteInfo(name, kind, query_layout=layout, key_layout=layout, **more)
    return Attention(query=query.half().float(), key=key.half().float(), scale=0.3, site=info)


def source() -> dict[str, Attention]:
    order = TokenOrder(torch.arange(LAYOUT.num_tokens - 1, 4, -1))
    plain = attention(name="plain", kind="self")
    bare = Attention(query=plain.query, key=plain.key, scale=0.3)
    single = replace(LAYOUT, frames=1)
    sites = [
        attention(single, name="frame", kind="frame", batch=3, frames_in_batch=True),
        attention(name=HOSTILE_SITE, kind="self"),
        attention(name="reversed", kind="self", count=len(order.tokens), query_order=order,
                  key_order=order),
        bare,
        attention(name="global", kind="global"),
    ]  # fmt: skip
    names = ["frame", HOSTILE_SITE, "reversed", "plain", "global"]
    return dict(zip(names, sites, strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Attention], Path]:
    sites = source()
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    explore(sites, path, images=images, title=HOSTILE)
    return sites, path


@pytest.fixture
def shown(made: tuple[dict[str, Attention], Path], page: Page) -> Any:
    browser = opened(page, made[1])
    yield browser
    assert [one for one in browser.get_log("browser") if one["level"] == "SEVERE"] == []
    assert requests(browser) == []


def opened(page: Page, path: Path) -> Any:
    """The page, fresh: a change of the hash alone would not load it."""
    browser = page(path)
    browser.get_log("browser")
    return browser


def requests(browser: Any) -> list[str]:
    """What was asked of a network; the page itself, its pictures and its blobs are not."""
    messages = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    urls = [
        one["params"]["request"]["url"]
        for one in messages
        if one["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))]


def settled(browser: Any, script: str = "return null", *values: Any) -> Any:
    """A script's answer, when two frames were painted since."""
    return browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        f"Promise.resolve((function () {{ {script} }}).apply(null, arguments)).then((out) =>"
        "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 60, out))))",
        *values,
    )


def state(browser: Any) -> dict[str, Any]:
    found: dict[str, Any] = settled(browser, "return window.vistvis.state")
    return found


def put(browser: Any, **change: Any) -> dict[str, Any]:
    settled(browser, "window.vistvis.set(arguments[0])", change)
    return state(browser)


def press(browser: Any, *keys: str) -> dict[str, Any]:
    from selenium.webdriver.common.by import By

    browser.find_element(By.CSS_SELECTOR, ".frames").send_keys(*keys)
    return state(browser)


def point(browser: Any, frame: int, row: int, col: int, *, click: bool = False) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    picture = browser.find_elements(By.CSS_SELECTOR, ".picture")[frame]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    size = picture.size
    x = (col + 0.5) / 6 * size["width"] - size["width"] / 2
    y = (row + 0.5) / 4 * size["height"] - size["height"] / 2
    chain = ActionChains(browser).move_to_element_with_offset(picture, round(x), round(y))
    (chain.click() if click else chain).perform()
    settled(browser)


def text(browser: Any, selector: str) -> str:
    found: str = browser.execute_script(
        "return document.querySelector(arguments[0]).textContent", selector
    )
    return found


def reading(browser: Any) -> dict[str, Any]:
    """What «Copy as JSON» copies."""
    found: dict[str, Any] = json.loads(settled(browser, "return window.vistvis.text('json')"))
    return found


def heat(browser: Any, frame: int) -> Any:
    """The pixels of a frame's canvas, `(rows, cols, 3)`; None where nothing is lit."""
    pixels = settled(
        browser,
        "const p = document.querySelectorAll('.picture')[arguments[0]];"
        "if (!p.classList.contains('lit')) return null; const c = p.querySelector('canvas');"
        "return [c.height, c.width, Array.from(c.getContext('2d').getImageData(0, 0, c.width,"
        " c.height).data)]",
        frame,
    )
    if pixels is None:
        return None
    rows, cols, data = pixels
    return np.array(data).reshape(rows, cols, 4)[..., :3]


def expected_heat(row: Any, own: tuple[int, int, int] | None, cmap: str = "inferno") -> Any:
    """The same in Python, by the house's own scale."""
    from vistvis.views.painting import colour_map, normalizer

    maps = LAYOUT.maps(row).float()
    scale = normalizer(maps, norm="auto", own=own)
    return np.rint(255 * np.asarray(colour_map(cmap)(scale(maps.numpy())))[..., :3])


def test_heat_is_where_the_row_says(shown: Any, made: tuple[dict[str, Attention], Path]) -> None:
    token = LAYOUT.index(frame=1, row=2, col=3)
    assert put(shown, site="global", head=1, token=token)["token"] == token
    row = made[0]["global"].rows(token, batch=0, heads=1)[0, 0, 0]
    wanted = expected_heat(row, (1, 2, 3))
    for frame in range(3):
        assert np.abs(heat(shown, frame) - wanted[frame]).max() <= 4  # a step of the table
    assert reading(shown)["strongest"][0]["token"] == int(row.argmax())
    assert reading(shown)["strongest"][0]["weight"] == pytest.approx(float(row.max()), abs=2e-6)


def test_mean_max_and_columns(shown: Any, made: tuple[dict[str, Attention], Path]) -> None:
    rows = made[0]["global"].rows(40, batch=0)[0, :, 0]
    for head, values in (("mean", rows.mean(0)), ("max", rows.amax(0))):
        put(shown, site="global", head=head, token=40)
        top = reading(shown)["strongest"][0]
        assert top["token"] == int(values.argmax())
        assert top["weight"] == pytest.approx(float(values.max()), abs=2e-6)
    column = made[0]["global"].columns(40, batch=0, heads=0)[0, 0, :, 0]
    put(shown, head=0, direction="column")
    assert reading(shown)["strongest"][0]["token"] == int(column.argmax())
    assert "columns(40, batch=0, heads=0)" in settled(shown, "return vistvis.text('python')")
    put(shown, direction="row")


def test_hover_previews_and_clicks_pin(shown: Any) -> None:
    put(shown, site="global", head=0, pins=[], token=LAYOUT.index(frame=0, row=0, col=0))
    point(shown, 2, 1, 4)
    assert text(shown, ".numbers h2") == "frame 2 · r1 c4"
    point(shown, 2, 1, 4, click=True)
    point(shown, 0, 3, 1)
    assert text(shown, ".numbers h2") == "frame 2 · r1 c4"  # pinned: the mouse reads its weights
    query = LAYOUT.index(frame=2, row=1, col=4)
    weights = shown.execute_async_script(
        "const done = arguments[1]; vistvis.row({site: 'global', head: 0, token: arguments[0]})"
        ".then((row) => done(Array.from(row)))",
        query,
    )
    weight = weights[LAYOUT.index(frame=0, row=3, col=1)]
    told = text(shown, ".under")
    assert told.startswith("frame 0 · r3 c1 gets ")
    assert float(told.split()[-1]) == pytest.approx(weight, rel=6e-3)
    box = settled(
        shown,
        "const m = document.querySelector('.mark.query').getBoundingClientRect();"
        "const p = document.querySelectorAll('.picture')[2].getBoundingClientRect();"
        "return [(m.x - p.x) / p.width * 6, (m.y - p.y) / p.height * 4, m.width / p.width * 6,"
        " m.height / p.height * 4]",
    )
    assert box == pytest.approx([4, 1, 1, 1], abs=0.02)  # exactly its patch
    point(shown, 0, 3, 1, click=True)
    assert state(shown)["pins"] == [query, LAYOUT.index(frame=0, row=3, col=1)]
    assert press(shown, "\ue00c")["pins"] == []  # Escape


def test_a_strong_key_is_outlined_where_it_is_pointed_at(shown: Any) -> None:
    from selenium.webdriver.common.by import By

    put(shown, site="global", head=0, token=40, pins=[40])
    top = reading(shown)["strongest"][1]
    settled(shown, "return new Promise((done) => setTimeout(done, 200))")
    # Asked only when what it changes was painted.
    settled(shown, "document.querySelectorAll('.strongest button')[1].focus()")
    marks = "return document.querySelectorAll('.mark.key, .chip.marked').length"
    assert shown.execute_script(marks) == 1
    place = LAYOUT.locate(top["token"])
    assert text(shown, ".under").startswith(f"frame {place.frame} ")
    shown.switch_to.active_element.click()
    assert state(shown)["token"] == top["token"]
    assert shown.find_elements(By.CSS_SELECTOR, ".pins li button[aria-pressed=true]") == []


def test_special_tokens_ask_and_show_their_weight(
    shown: Any, made: tuple[dict[str, Attention], Path]
) -> None:
    from selenium.webdriver.common.by import By

    put(shown, site="global", head=0, pins=[], token=30)
    row = made[0]["global"].rows(30, batch=0, heads=0)[0, 0, 0]
    chips = shown.find_elements(By.CSS_SELECTOR, "figure .chip .value")
    tokens = [27 * frame + nth for frame in range(3) for nth in range(3)]
    for chip, token in zip(chips, tokens, strict=True):
        assert float(chip.text) == pytest.approx(float(row[token]), rel=6e-3)
    shown.find_elements(By.CSS_SELECTOR, "figure .chip")[3].click()
    assert state(shown)["token"] == 27
    assert text(shown, ".numbers h2") == "frame 1 · camera"
    put(shown, pins=[])


def test_frames_in_the_batch_and_reordered_tokens(
    shown: Any, made: tuple[dict[str, Attention], Path]
) -> None:
    token = LAYOUT.index(frame=2, row=1, col=1)
    put(shown, site="frame", head=1, token=token)
    own = token - 2 * 27
    row = made[0]["frame"].rows(own, batch=2, heads=1)[0, 0, 0]
    assert reading(shown)["strongest"][0]["weight"] == pytest.approx(float(row.max()), abs=2e-6)
    assert f"rows({own}, batch=2, heads=1)" in settled(shown, "return vistvis.text('python')")
    assert heat(shown, 0) is None
    assert heat(shown, 2) is not None
    put(shown, site="reversed")
    row = made[0]["reversed"].token_rows([token], heads=1)[0, 0]
    assert reading(shown)["strongest"][0]["token"] == int(row.argmax())
    put(shown, token=1)  # the model dropped it: a message, and no picture of something else
    assert "token 1 is not among" in text(shown, ".message")
    assert heat(shown, 0) is None


def test_a_site_without_a_layout_is_a_strip(
    shown: Any, made: tuple[dict[str, Attention], Path]
) -> None:
    put(shown, site="plain", head=0, token=17)
    row = made[0]["plain"].rows(17, batch=0, heads=0)[0, 0, 0]
    assert reading(shown)["strongest"][0]["token"] == int(row.argmax())
    assert text(shown, "figcaption") == "81 tokens"


def test_listeners_hear_the_weights_over_the_scene(
    shown: Any, made: tuple[dict[str, Attention], Path]
) -> None:
    put(shown, site="frame", head=0, token=30, pins=[])
    settled(shown, "vistvis.view.onRow((values, query) => { window.heard = [values, query] })")
    put(shown, token=31)
    values, query = settled(shown, "return [Array.from(window.heard[0]), window.heard[1]]")
    assert (query["token"], query["frame"]) == (31, 1)
    row = made[0]["frame"].rows(4, batch=1, heads=0)[0, 0, 0]
    assert np.allclose(np.array(values[27:54], float), row.numpy(), atol=2e-6)
    assert np.isnan(np.array([one if one is not None else np.nan for one in values[:27]])).all()


def test_keyboard(shown: Any) -> None:
    put(shown, site="global", head="mean", pins=[], token=LAYOUT.index(frame=0, row=1, col=1))
    assert press(shown, "\ue014")["token"] == LAYOUT.index(frame=0, row=1, col=2)  # right
    assert press(shown, "\ue015", ".")["token"] == LAYOUT.index(frame=1, row=2, col=2)  # down
    assert press(shown, "]")["head"] == "max"
    assert press(shown, "]", "]")["head"] == 1
    assert press(shown, "[")["head"] == 0
    assert press(shown, "}")["site"] == "frame"
    assert press(shown, "{")["site"] == "global"
    assert press(shown, "p")["pins"] == [LAYOUT.index(frame=1, row=2, col=2)]
    assert press(shown, "d")["direction"] == "column"
    assert press(shown, "d", "s")["smooth"] is True
    assert press(shown, "s", "n")["norm"] == "linear"
    assert press(shown, "t")["token"] == 27  # the camera of frame 1
    assert press(shown, "t", "t", "t")["token"] == LAYOUT.index(frame=1, row=2, col=3)  # its middle
    press(shown, "?")
    assert shown.execute_script("return document.querySelector('dialog').open")
    shown.execute_script("document.querySelector('dialog').close()")
    put(shown, norm="auto", pins=[])


def test_the_hash_reopens_the_view(shown: Any, page: Page) -> None:
    wanted = put(shown, site=HOSTILE_SITE, head=1, token=33, pins=[33, 60], alpha=0.3, norm="log")
    settled(shown, "return new Promise((done) => setTimeout(done, 200))")
    link = shown.current_url
    shown.get("about:blank")
    shown.get(link)
    shown.execute_async_script("const done = arguments[0]; vistvis.ready.then(done, done)")
    assert state(shown) == wanted
    shown.get("about:blank")
    shown.get(link.split("#")[0] + "#site=none&head=99&token=-1&pins=1,x,9999&norm=odd&alpha=7")
    shown.execute_async_script("const done = arguments[0]; vistvis.ready.then(done, done)")
    again = state(shown)
    assert (again["site"], again["head"], again["pins"], again["norm"]) == (
        "global",
        "mean",
        [1],
        "auto",
    )


def test_small_maps_choose(shown: Any) -> None:
    from selenium.webdriver.common.by import By

    put(shown, site="global", head=0, token=40, multiples="heads", pins=[])
    settled(shown, "return new Promise((done) => setTimeout(done, 300))")
    assert len(shown.find_elements(By.CSS_SELECTOR, ".cell canvas")) == 2
    shown.find_elements(By.CSS_SELECTOR, ".cell")[1].click()
    assert state(shown)["head"] == 1
    put(shown, multiples="sites")
    settled(shown, "return new Promise((done) => setTimeout(done, 500))")
    assert len(shown.find_elements(By.CSS_SELECTOR, ".cell canvas")) == 5
    shown.find_elements(By.CSS_SELECTOR, ".cell")[0].click()
    assert state(shown)["site"] == "frame"
    put(shown, multiples="none")


def test_names_are_text(shown: Any) -> None:
    assert text(shown, "h1") == HOSTILE
    assert HOSTILE_SITE in text(shown, "select")
    assert shown.execute_script("return document.querySelectorAll('img[onerror], b').length") == 0


def test_png_and_svg(shown: Any) -> None:
    put(shown, site="global", head=0, token=40, pins=[40])
    read = (
        "const done = arguments[1]; vistvis.picture(arguments[0]).then((blob) => {"
        "const reader = new FileReader(); reader.onload = () => done(reader.result.split(',')[1]);"
        "reader.readAsDataURL(blob) })"
    )
    png = Image.open(io.BytesIO(base64.b64decode(shown.execute_async_script(read, "png"))))
    assert png.format == "PNG"
    assert png.width > png.height > 100
    assert len(png.getcolors(2**24) or []) > 50
    svg = base64.b64decode(shown.execute_async_script(read, "svg")).decode()
    assert svg.startswith("<svg")
    assert svg.count("<image") == 3
    assert "global" in svg


def test_phone_width(shown: Any) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        settled(shown)
        wide = shown.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 360  # nothing sticks out
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_tampered_site_is_a_message(
    made: tuple[dict[str, Attention], Path], page: Page, tmp_path: Path
) -> None:
    whole = made[1].read_text()
    at = whole.index('id="vistvis-site-4">') + 200
    letter = "A" if whole[at] != "A" else "B"
    broken = tmp_path / "broken.html"
    broken.write_text(whole[:at] + letter + whole[at + 1 :])
    browser = opened(page, broken)
    assert "was changed or cut short" in text(browser, ".message")
    assert heat(browser, 0) is None
    put(browser, site="frame")
    assert text(browser, ".message") == ""
    assert heat(browser, 0) is not None


def odd_sites() -> dict[str, tuple[dict[str, Attention], TokenLayout]]:
    """What no page is made for, and every page must bear."""
    one = TokenLayout(1, (1, 1), special=(), patch_size=(8, 8))
    many = TokenLayout(64, (2, 3), special=("camera",), patch_size=(8, 8))
    crowd = TokenLayout(1, (2, 2), special=tuple(["register"] * 17), patch_size=(8, 8))
    coarse = replace(LAYOUT, grid=(2, 3), patch_size=(16, 16))
    cross = attention(name="cross", kind="cross")
    key = cross.key[:, :, : coarse.num_tokens]
    info = SiteInfo("cross", "cross", query_layout=LAYOUT, key_layout=coarse)
    bare = Attention(query=cross.query, key=key, scale=0.3)
    return {
        "one patch": ({"a": attention(one, name="a", kind="self")}, one),
        "64 frames": ({"a": attention(many, name="a", kind="global")}, many),
        "17 special": ({"a": attention(crowd, name="a", kind="self")}, crowd),
        "two layouts": (
            {"a": Attention(query=cross.query, key=key, scale=0.3, site=info)},
            LAYOUT,
        ),
        "no layout": ({"a": bare}, LAYOUT),
    }


@pytest.mark.parametrize("name", odd_sites())
def test_odd_sites(name: str, page: Page, tmp_path: Path) -> None:
    sites, layout = odd_sites()[name]
    explore(sites, tmp_path / "odd.html")
    browser = opened(page, tmp_path / "odd.html")
    last = layout.num_tokens - 1
    assert put(browser, head=1, token=last)["token"] == last
    row = sites["a"].rows(last, batch=0, heads=1)[0, 0, 0]
    top = reading(browser)["strongest"][0]
    assert (top["token"], text(browser, ".message")) == (int(row.argmax()), "")
    assert top["weight"] == pytest.approx(float(row.max()), abs=2e-6)
    grid = heat(browser, 1 if name == "no layout" else layout.frames - 1)
    if sites["a"].site is not None:
        assert grid.shape[:2] == sites["a"].site.key_layout.grid
    put(browser, direction="column", token=last)
    said = text(browser, ".message")
    assert ("grid of 2×3" in said) if name == "two layouts" else (said == "")
    assert browser.get_log("browser") == []


def test_weights_that_are_no_numbers_are_a_message(page: Page, tmp_path: Path) -> None:
    rows = torch.full((1, 1, 4, 4), float("nan"))
    explore({"a": Attention.from_weights(rows)}, tmp_path / "nan.html")
    browser = opened(page, tmp_path / "nan.html")
    assert "NaN or infinite weights" in text(browser, ".message")
