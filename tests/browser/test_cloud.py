"""The 3-D pane in a real browser: it draws, shows heat at the true place, and asks for patches."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import vistvis
from vggt_adapter.sample_scene import sample_points
from vistvis import Attention, SiteInfo, TokenLayout

LAYOUT = TokenLayout(frames=3, grid=(6, 8), special=("camera", "register"))
SITE = SiteInfo("site", kind="global", query_layout=LAYOUT, key_layout=LAYOUT)
HOT = LAYOUT.index(frame=2, patch=27)
ASKED = LAYOUT.index(frame=0, patch=20)


def captured() -> dict[str, Attention]:
    """Attention of which each query sees its own place, and `ASKED` the patch `HOT` alone."""
    key = torch.eye(LAYOUT.num_tokens)[None, None]
    query = key.clone()
    query[0, 0, ASKED] = key[0, 0, HOT]
    strip = Attention(query=query, key=key)  # nobody says what its tokens are
    return {"strip": strip, "site": Attention(query=8 * query, key=8 * key, scale=1.0, site=SITE)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points, cameras = sample_points(LAYOUT.grid)
    points[1, 0, 0] = np.nan
    sure = np.linspace(0, 1, points[..., 0].size, dtype=np.float32).reshape(points.shape[:3])
    images = torch.full((3, 3, 84, 112), 0.5)
    path = tmp_path_factory.mktemp("cloud") / "page.html"
    given = {"points": points, "confidence": sure, "cameras": cameras}
    return vistvis.explore(captured(), path, images=images, **given)


@pytest.fixture
def opened(page: Callable[[Path], Any], written: Path) -> Any:
    browser = page(written)
    browser.get_log("browser")
    wait(browser, "vistvis.view.cloud.ready")
    browser.execute_script(
        "vistvis.set({site: 'site', token: arguments[0], head: 0, norm: 'linear', pins: []})", ASKED
    )
    run(browser, "document.querySelector('.cloud').scrollIntoView()")
    painted(browser)
    yield browser
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def run(browser: Any, code: str) -> Any:
    return browser.execute_script(f"return {code}")


def wait(browser: Any, promise: str) -> None:
    browser.execute_async_script(f"const done = arguments[0]; ({promise}).then(done, done)")


def painted(browser: Any) -> NDArray[Any]:
    """The canvas, `(H, W, 4)`, after what is due was drawn."""
    frame = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 20)))"
    wait(browser, f"{frame}.then(() => {frame})")
    url = run(browser, "document.querySelector('.cloud canvas').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))


def place_of(browser: Any, token: int) -> tuple[float, float]:
    """Where a patch lies on the canvas, in pixels, by the page's own projection."""
    code = """const {cloud, eye} = vistvis.view.cloud;
        return eye.project(cloud.at(cloud.point(arguments[0])))"""
    x, y, depth = browser.execute_script(code, token)
    assert depth > 0
    return x, y


def seen_from(browser: Any, frame: int) -> None:
    """Puts the eye where a camera is, so that nothing hides a patch of its frame."""
    code = """const {cloud, eye, redraw} = vistvis.view.cloud;
        const {turn, place} = cloud.cameras[arguments[0]];
        eye.base = turn;
        eye.yaw = eye.pitch = 0;
        eye.distance = 4;
        eye.target = place.map((value, i) => value + 4 * turn[6 + i]);
        eye.place();
        redraw()"""
    browser.execute_script(code, frame)


def test_heat_lies_at_the_true_point(opened: Any) -> None:
    seen_from(opened, 2)
    shown = painted(opened).astype(int)
    x, y = place_of(opened, HOT)
    hot = shown[round(y), round(x), :3]
    assert hot[0] > 220  # the last colour of inferno
    assert hot[1] > 220
    x, y = place_of(opened, LAYOUT.index(frame=2, patch=12))
    cold = shown[round(y), round(x), :3]
    assert cold.max() - cold.min() <= 2  # a grey picture, dimmed
    assert 50 < cold[0] < 110
    bright = (shown[..., 0] > 220) & (shown[..., 1] > 220) & (shown[..., 3] > 250)
    rows, cols = np.nonzero(bright)
    x, y = place_of(opened, HOT)
    assert abs(np.median(cols) - x) < 3
    assert abs(np.median(rows) - y) < 3


def test_another_colour_map_colours_the_points(opened: Any) -> None:
    before = painted(opened)
    opened.execute_script("vistvis.set({cmap: 'viridis'})")
    assert not np.array_equal(painted(opened), before)
    opened.execute_script("vistvis.set({cmap: 'inferno'})")
    assert np.array_equal(painted(opened), before)


def test_the_eye_projects_as_the_camera_does(opened: Any) -> None:
    seen_from(opened, 1)
    painted(opened)
    width, height = run(opened, "[vistvis.view.cloud.eye.width, vistvis.view.cloud.eye.height]")
    focal = run(opened, "vistvis.view.cloud.eye.focal")
    rows, cols = LAYOUT.grid
    for row, col in ((1, 1), (2, 6), (5, 0)):
        x, y = place_of(opened, LAYOUT.index(frame=1, patch=row * cols + col))
        true_x = ((col + 0.5) / cols - 0.5) * 560 / 520 * focal + width / 2
        true_y = ((row + 0.5) / rows - 0.5) * 420 / 520 * focal + height / 2
        assert abs(x - true_x) < 0.1
        assert abs(y - true_y) < 0.1


def test_pointing_asks_and_clicking_pins(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    canvas = opened.find_element("css selector", ".cloud canvas")
    seen_from(opened, 0)
    painted(opened)
    width, height = run(opened, "[vistvis.view.cloud.eye.width, vistvis.view.cloud.eye.height]")
    wanted = LAYOUT.index(frame=0, patch=19)
    x, y = place_of(opened, wanted)
    there = round(x - width / 2), round(y - height / 2)
    ActionChains(opened).move_to_element_with_offset(canvas, *there).perform()
    painted(opened)
    assert run(opened, "document.querySelector('.where').textContent").find(str(wanted)) >= 0
    assert run(opened, "vistvis.state.pins") == []
    ActionChains(opened).click().perform()
    painted(opened)
    assert run(opened, "vistvis.state.pins") == [wanted]
    assert run(opened, "vistvis.state.token") == wanted
    ring = run(opened, "document.querySelector('.cloud-query').style.translate")
    assert [float(part.removesuffix("px")) for part in ring.split()] == pytest.approx([x, y], abs=1)


def test_keys_and_dragging_turn_the_view_and_not_the_query(opened: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    canvas = opened.find_element("css selector", ".cloud canvas")
    run(opened, "document.querySelector('.cloud button').click()")
    start = painted(opened)
    token = run(opened, "vistvis.state.token")
    angle = "vistvis.view.cloud.eye.yaw"
    before = run(opened, angle)
    run(opened, "document.querySelector('.cloud canvas').focus()")
    ActionChains(opened).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP, "+").perform()
    assert not np.array_equal(painted(opened), start)
    turned = run(opened, angle)
    assert turned > before
    ActionChains(opened).click_and_hold(canvas).move_by_offset(60, 20).release().perform()
    assert run(opened, angle) > turned
    assert run(opened, "vistvis.state.token") == token
    assert run(opened, "vistvis.state.pins") == []
    run(opened, "document.querySelector('.cloud button').click()")
    # What is hovered now is another patch: the same places, in other colours.
    assert np.array_equal(painted(opened)[..., 3], start[..., 3])


def test_confidence_hides_points_and_what_is_left_out_is_said(opened: Any) -> None:
    assert "1 of 144 patches have no finite point" in run(
        opened, "document.querySelector('.cloud-tools').textContent"
    )
    full = (painted(opened)[..., 3] > 0).sum()
    slide = """const slider = document.querySelector('.cloud input');
        slider.value = arguments[0];
        slider.dispatchEvent(new Event('input'))"""
    opened.execute_script(slide, 90)
    assert (painted(opened)[..., 3] > 0).sum() < 0.7 * full
    opened.execute_script(slide, 0)
    assert (painted(opened)[..., 3] > 0).sum() == full


def test_without_points_there_is_no_pane(page: Callable[[Path], Any], tmp_path: Path) -> None:
    browser = page(vistvis.explore(captured(), tmp_path / "page.html"))
    assert run(browser, "document.querySelector('.cloud') === null")


def test_without_webgl2_there_is_a_message_and_the_rest_works(
    chromium: Any, page: Callable[[Path], Any], written: Path
) -> None:
    code = """const given = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
          return kind === "webgl2" ? null : given.call(this, kind, ...more);
        }"""
    command = "Page.addScriptToEvaluateOnNewDocument"
    made = chromium.execute_cdp_cmd(command, {"source": code})
    try:
        browser = page(written)
        browser.get_log("browser")
        assert "needs WebGL2" in run(browser, "document.querySelector('.cloud').textContent")
        run(browser, "vistvis.set({token: 5})")
        assert run(browser, "vistvis.state.token") == 5
        assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", made)


def test_where_a_site_says_nothing_no_heat_stays(opened: Any) -> None:
    hot = "vistvis.view.cloud.painter.texels.some((value) => value > 0)"
    assert run(opened, hot)
    run(opened, "vistvis.set({site: 'strip'})")
    painted(opened)
    assert not run(opened, hot)
    assert run(opened, "document.querySelector('.cloud-query').hidden")
