"""Every block of the README and of the guides runs, in order, as written but for a table."""

from __future__ import annotations

import os
import re
from pathlib import Path

import guides
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch


@pytest.mark.parametrize("name", guides.PAGES)
def test_pages_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    text = (guides.ROOT / name).read_text(encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert guides.walk(text, guides.PAGES[name], name) == len(guides.blocks(text))
    plt.close("all")


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("```python\n1 / 0\n```", guides.Page()),
        ("```python\nx = 1\n```", guides.Page(replaced={"gone": "x"})),
        ("```python\nx = 1\n```", guides.Page(skipped={"gone": "no code"})),
        ("1. a list\n\n   ```python\n   assert False\n   ```", guides.Page()),
    ],
)
def test_a_page_that_does_not_run_goes_red(text: str, page: guides.Page) -> None:
    with pytest.raises((ArithmeticError, AssertionError)):
        guides.walk(text, page, "page")


def test_links_between_pages() -> None:
    for page in [guides.ROOT / "README.md", *(guides.ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert os.path.exists(page.parent / target), f"{page.name}: {target}"
