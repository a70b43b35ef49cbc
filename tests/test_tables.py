"""What notebooks show of things: small tables, in which nothing but the table is markup."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from zoo import VGGTLike

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.names import html_table

HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'\x1b[31m\u202e"


class Reader(HTMLParser):
    """The tags and the texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def test_rows_of_words_are_a_table() -> None:
    read = Reader(html_table([("site", "heads"), ("a", 3), ("b", None)], caption="two"))
    assert [tag for tag, _ in read.tags] == [
        *("div", "table", "tr", "th", "th"),
        *("tr", "td", "td") * 2,
    ]
    assert read.texts == ["two", "site", "heads", "a", "3", "b", "None"]


def test_texts_stay_texts() -> None:
    page = html_table([("site",), (HOSTILE,)], caption=HOSTILE)
    read = Reader(page)
    assert read.names == {"div", "table", "tr", "th", "td"}
    assert "".join(read.texts).count("<img src=x onerror=alert(1)>&amp;\"'") == 2
    assert not {"\x1b", "\u202e"} & set(page)


def test_long_tables_are_cut() -> None:
    read = Reader(html_table([("site",), *[(n,) for n in range(300)]], most=50))
    assert [tag for tag, _ in read.tags].count("tr") == 52
    assert read.texts[-1] == "… and 250 more"


def sites_of(name: str) -> dict[str, Attention]:
    query, key = torch.randn(2, 1, 2, 26, 8).unbind()
    layout = TokenLayout(1, (4, 6), ("camera", "register"), 8)
    site = SiteInfo(name, kind="frame", query_layout=layout, key_layout=layout)
    return {name: Attention(query=query, key=key, site=site)}


@pytest.mark.parametrize(
    "name", ["blocks.0.attn", HOSTILE.replace("\x1b", "").replace("\u202e", "")]
)
def test_attention_and_runs_show_tables(name: str, tmp_path: Path) -> None:
    (attention,) = sites_of(name).values()
    read = Reader(attention._repr_html_())
    assert read.names == {"table", "tr", "th", "td"}
    assert name in "".join(read.texts)
    assert {"1 × 2 × 26 × 26 (batch, heads, queries, keys)", "frame"} <= set(read.texts)

    images = torch.rand(1, 11, 3, 32, 48)
    vistvis.save_run(sites_of(name), tmp_path / "run", images=images, model=name)
    run = vistvis.open_run(tmp_path / "run")
    read = Reader(run._repr_html_())
    assert read.names == {"div", "table", "tr", "th", "td", "img"}
    assert name in "".join(read.texts)
    assert "1 × 2 × 26 × 26" in read.texts
    pictures = [attrs["src"] for tag, attrs in read.tags if tag == "img"]
    assert len(pictures) == 8
    assert all(len(source) < 20_000 for source in pictures)
    kind, data = pictures[0].split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (96, 64)
    run.close()
    closed = Reader(run._repr_html_())
    assert closed.names == {"div", "table", "tr", "th", "td"}
    assert closed.texts == read.texts


def test_captures_and_lists_of_sites_show_what_they_print() -> None:
    model, images = VGGTLike().eval(), torch.rand(1, 2, 3, 28, 42)
    sites = vistvis.find_sites(model)
    read = Reader(sites._repr_html_())
    assert read.names == {"div", "table", "tr", "th", "td"}
    assert set(sites.names) <= set(read.texts)
    with vistvis.capture(model) as captured, torch.no_grad():
        assert "nothing: " in captured._repr_html_()
        model(images)
    read = Reader(captured._repr_html_())
    assert set(sites.names) <= set(read.texts)
    assert "1×4×22×22" in read.texts or "2×4×11×11" in read.texts
