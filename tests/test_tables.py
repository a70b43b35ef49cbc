"""What notebooks show of things: small tables, in which nothing but the table is markup."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

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
