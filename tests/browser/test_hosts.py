"""The explorer at its hosts: a file, a folder over HTTP, `--serve`, a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from zoo import VGGTLike

import vistvis
from vistvis.views.explorer.front import explore


def test_a_file(tmp_path: Path, page: Any) -> None:
    model, images = VGGTLike().eval(), torch.rand(1, 2, 3, 28, 42)
    with vistvis.capture(model) as captured, torch.no_grad():
        model(images)
    browser = page(explore(captured, tmp_path / "page.html", images=images))
    assert browser.get_log("browser") == []
    names = [site["name"] for site in browser.execute_script("return vistvis.sites")]
    assert names == list(captured)
