"""Odd and hostile input in the browser: it is shown as it is, or a message says why not."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout, VistvisWarning

HOSTILE = '</script><!--<img src=x onerror="alert(1)">\'&amp;\u202eevil\u2066\u2028\\'
ROW = """
const [options, done] = arguments;
const finish = (found) => done(Array.from(found));
vistvis.row(options).then(finish, (error) => done(String(error)));
"""


def site(
    layout: TokenLayout | None = None,
    *,
    name: str = "site",
    kind: str = "self",
    keys: TokenLayout | None = None,
    tokens: tuple[int, int] | None = None,
    batch: int = 1,
    depth: int = 8,
    **more: Any,
) -> Attention:
    generator = torch.Generator().manual_seed(3)
    info = None
    if layout is not None:
        keys = keys or layout
        tokens = layout.num_tokens, keys.num_tokens
        info = SiteInfo(name, kind, query_layout=layout, key_layout=keys, **more)
    assert tokens is not None
    query, key = (2 * torch.randn(batch, 2, n, depth, generator=generator) for n in tokens)
    return Attention(query=query.half().float(), key=key.half().float(), site=info)


def check(browser: Any, sites: dict[str, Attention]) -> None:
    """Rows of every site, and that the page says nothing is wrong."""
    for name, attention in sites.items():
        browser.execute_script("return vistvis.set({ site: arguments[0] })", name)
        exact = attention.to(torch.float64)
        for token in (0, attention.shape[2] - 1):
            row = browser.execute_async_script(ROW, {"site": name, "head": 1, "token": token})
            assert isinstance(row, list), row
            expected = exact.rows([token], batch=0, heads=1)[0, 0, 0].numpy()
            assert np.abs(np.array(row) - expected).max() < 2e-6
    assert [one for one in browser.get_log("browser") if one["level"] == "SEVERE"] == []


def test_names_and_titles_are_text(tmp_path: Path, page: Any) -> None:
    layout = TokenLayout(2, (2, 3), patch_size=8)
    sites = {HOSTILE: site(layout, name=HOSTILE)}
    images = torch.rand(2, 3, 16, 24)
    path = tmp_path / "page.html"
    vistvis.explore(sites, path, images=images, title=HOSTILE, names=[HOSTILE, "b"])
    browser = page(path)
    check(browser, sites)
    assert browser.execute_script("return document.querySelectorAll('img[onerror]').length") == 0
    assert browser.execute_script("return vistvis.sites[0].name") == HOSTILE
    assert browser.title.replace("\u2028", " ") == HOSTILE.replace("\u2028", " ")
    assert browser.execute_script("return document.getElementById('vistvis-explorer') !== null")


SHAPES = {
    "one patch": {"a": site(TokenLayout(1, (1, 1), patch_size=8))},
    "17 special tokens": {
        "a": site(TokenLayout(2, (3, 2), ("camera", *("register",) * 16), patch_size=8))
    },
    "64 frames": {"a": site(TokenLayout(64, (2, 2), ("cls",), patch_size=8), kind="global")},
    "no layout": {"a": site(tokens=(7, 5))},
    "d = 128": {"a": site(TokenLayout(1, (4, 4), patch_size=8), depth=128)},
    "two layouts": {
        "a": site(
            TokenLayout(1, (2, 3), patch_size=8),
            keys=TokenLayout(1, (4, 2), ("cls",), patch_size=8),
            kind="cross",
        )
    },
    "some with a layout": {
        "a": site(TokenLayout(2, (2, 2), patch_size=8)),
        "b": site(tokens=(3, 9)),
    },
}


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("pictures", [True, False])
def test_odd_shapes(name: str, pictures: bool, tmp_path: Path, page: Any) -> None:
    sites = SHAPES[name]
    info, images = sites["a"].site, None
    if pictures:
        keys = None if info is None else info.key_layout
        frames, size = (1, (16, 24)) if keys is None else (keys.frames, keys.image_size)
        images = torch.rand(frames, 3, *size)  # without a layout nobody knows where they lie
    browser = page(vistvis.explore(sites, tmp_path / "page.html", images=images))
    check(browser, sites)


def test_numbers_that_are_none(tmp_path: Path, page: Any) -> None:
    """Of NaN no weight can be said: the site is left out, by name. Large numbers are exact."""
    layout = TokenLayout(1, (2, 3), patch_size=8)
    whole = site(layout)
    assert whole.query is not None
    broken, large = whole.query.clone(), whole.query.clone()
    broken[0, 1, 2] = float("nan")
    large[0, 0, 1, 0] = 1e6  # out of float16's range
    sites = {"whole": whole}
    sites["broken"] = Attention(query=broken, key=whole.key, site=whole.site)
    sites["large"] = Attention(query=large, key=whole.key, site=whole.site)
    with pytest.warns(VistvisWarning, match="not in the page: 'broken': .* has NaN or inf"):
        path = vistvis.explore(sites, tmp_path / "page.html", images=torch.rand(1, 3, 16, 24))
    browser = page(path)
    del sites["broken"]
    check(browser, sites)
    told = browser.execute_async_script(ROW, {"site": "broken", "head": 1, "token": 1})
    assert "has no site broken" in told


def changed(page: Path, pattern: str, change: Any) -> None:
    text, count = re.subn(pattern, change, page.read_text(encoding="utf-8"), count=1)
    assert count == 1
    page.write_text(text, encoding="utf-8")


def test_a_tampered_site_is_a_message(tmp_path: Path, page: Any) -> None:
    layout = TokenLayout(1, (2, 3), patch_size=8)
    sites = {"a": site(layout), "b": site(layout)}
    path = vistvis.explore(sites, tmp_path / "page.html")

    def flip(found: re.Match[str]) -> str:
        data = bytearray(base64.b64decode(found[2]))
        data[len(data) // 2] ^= 1
        return found[1] + base64.b64encode(data).decode()

    changed(path, r'(id="vistvis-site-1">)([^<]*)', flip)
    browser = page(path)
    told = browser.execute_async_script(ROW, {"site": "b", "head": 0, "token": 0})
    assert "b can't be read: its data was changed or cut short" in told
    row = browser.execute_async_script(ROW, {"site": "a", "head": 0, "token": 0})
    assert isinstance(row, list)
    browser.get_log("browser")


def test_a_page_that_was_cut_or_changed_is_a_message(tmp_path: Path, page: Any) -> None:
    layout = TokenLayout(1, (2, 3), patch_size=8)
    path = vistvis.explore({"a": site(layout)}, tmp_path / "page.html")
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[: whole.index('<script type="text/plain" id="vistvis-site-0"')])
    browser = page(path)
    told = browser.execute_async_script(ROW, {"site": "a", "head": 0, "token": 0})
    assert "this page was cut short; make it again" in told
    path.write_text(whole.replace('"causal":false', '"causal":true ', 1), encoding="utf-8")
    browser = page(path)
    shown = browser.execute_script("return document.body.innerText")
    assert "this page was changed or cut short; make it again" in shown
    # A script that was changed does not run at all.
    path.write_text(whole.replace("sum += ", "sum -= ", 1), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.execute_script("return window.vistvis === undefined")
    browser.get_log("browser")


def test_each_scene_has_its_names(tmp_path: Path, page: Any) -> None:
    layout = TokenLayout(1, (2, 3), patch_size=8)
    sites = {"a": site(layout, batch=2)}
    images, names = torch.rand(2, 3, 16, 24), ["first.jpg", "second.jpg"]
    browser = page(vistvis.explore(sites, tmp_path / "page.html", images=images, names=names))
    for batch, name in enumerate(names):
        script = "vistvis.set({ batch: arguments[0] }); return document.body.innerText"
        browser.execute_script(script, batch)
        assert name in browser.execute_script("return document.body.innerText")
