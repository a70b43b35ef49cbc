"""`explore`: what goes into a page, what is left out, and how large it gets."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo import VGGTLike

import vistvis
from vistvis import SiteInfo, TokenLayout
from vistvis.errors import InputError, SiteError, VistvisWarning
from vistvis.views.explorer import contents
from vistvis.views.explorer.packing import packed_bytes

SAMPLES = sorted((Path(__file__).parents[1] / "vggt_adapter" / "samples").glob("view_*.jpg"))


@pytest.fixture(scope="module")
def captured() -> Any:
    torch.manual_seed(0)
    model, images = VGGTLike().eval(), torch.rand(1, 2, 3, 28, 42)
    with vistvis.capture(model) as captured, torch.no_grad():
        model(images)
    return captured


def scripts(page: Path) -> dict[str, str]:
    """The inert tags of a page by their names."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r'<script type="[a-z/]+" id="([\w-]+)"[^>]*>([^<]*)</script>', text))


def manifest_of(page: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(scripts(page)["vistvis-manifest"])
    return manifest


def attention(batch: int = 1, heads: int = 2, tokens: int = 6, **more: Any) -> vistvis.Attention:
    shape = batch, heads, tokens, 4
    return vistvis.Attention(query=torch.randn(shape), key=torch.randn(shape), **more)


def test_what_a_page_carries(captured: Any, tmp_path: Path) -> None:
    images = torch.rand(1, 2, 3, 28, 42)
    page = vistvis.explore(captured, tmp_path / "deep" / "page.html", images=images, names="ab")
    tags, manifest = scripts(page), manifest_of(page)
    assert manifest["frames"] == [{"name": "a"}, {"name": "b"}]
    assert manifest["images"] == [[0, 0], [0, 1]]
    assert TokenLayout.from_dict(manifest["layout"]).frames == 2
    assert [site["name"] for site in manifest["sites"]] == list(captured)
    for number, header in enumerate(manifest["sites"]):
        data = base64.b64decode(tags[f"vistvis-site-{number}"])
        assert zlib.crc32(data) == header["crc32"]
    colours = np.frombuffer(base64.b64decode(manifest["cmaps"]["gray"]), np.uint8)
    grays = np.arange(256).repeat(3).astype(int)
    assert abs(colours.astype(int) - grays).max() <= 1
    # What is seen comes before what is computed with, and nothing is left beside the page.
    tags_in_order = ('id="vistvis-image-0-1"', 'type="module" async', 'id="vistvis-site-0"')
    order = [page.read_text().index(tag) for tag in tags_in_order]
    assert order == sorted(order)
    assert [file.name for file in page.parent.iterdir()] == ["page.html"]


def test_a_run_brings_its_own(captured: Any, tmp_path: Path) -> None:
    photos = [{"name": "one.jpg"}, {"name": "two.jpg"}]
    vistvis.save_run(
        captured,
        tmp_path / "run",
        images=torch.rand(1, 2, 3, 28, 42),
        model="small@random",
        metadata={"photos": photos},
    )
    with vistvis.open_run(tmp_path / "run") as run:
        manifest = manifest_of(vistvis.explore(run, tmp_path / "page.html"))
        assert manifest["python"] == f"run = vistvis.open_run({run.path!r})"
    assert manifest["frames"] == photos
    assert (manifest["title"], len(manifest["images"])) == ("small@random", 2)


def test_points(captured: Any, tmp_path: Path) -> None:
    """Given, or of the run; without a layout nobody could say whose they are."""
    page = tmp_path / "page.html"
    points, cameras = torch.rand(1, 2, 2, 3, 3), torch.rand(2, 3, 4)
    given = manifest_of(vistvis.explore(captured, page, points=points, cameras=cameras))
    vistvis.save_run(captured, tmp_path / "run", points=points, cameras=cameras)
    with vistvis.open_run(tmp_path / "run") as run:
        assert manifest_of(vistvis.explore(run, page))["points"] == given["points"]
    assert "points" not in manifest_of(vistvis.explore(captured, page))
    with pytest.raises(InputError, match="points need a layout"):
        vistvis.explore(attention(), page, points=points)


def test_the_last_sites_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {f"block.{n}": attention(tokens=n % 2 + 6) for n in range(5)}
    sizes = [packed_bytes(one) for one in source.values()]
    monkeypatch.setattr(contents, "MOST_BYTES", sum(sizes[3:]))
    with pytest.warns(VistvisWarning, match=r"not in the page: 'block.0', 'block.1', 'block.2'"):
        page = vistvis.explore(source, tmp_path / "page.html")
    manifest = manifest_of(page)
    assert [site["name"] for site in manifest["sites"]] == ["block.3", "block.4"]
    assert [one["name"] for one in manifest["omitted"]] == ["block.0", "block.1", "block.2"]
    # One that alone is too large is shown all the same, and so is what was asked for.
    monkeypatch.setattr(contents, "MOST_BYTES", 1)
    assert contents.choose(source, None).names == ("block.4",)
    assert contents.choose(source, "**").names == tuple(source)


def test_what_no_page_can_carry(tmp_path: Path) -> None:
    def bias(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + q

    source = {"a": attention(), "b": attention(score_mod=bias)}
    with pytest.warns(VistvisWarning, match="not in the page: 'b'"):
        page = vistvis.explore(source, tmp_path / "page.html")
    assert [one["name"] for one in manifest_of(page)["omitted"]] == ["b"]
    with pytest.raises(InputError, match="no site can be shown: b: "):
        vistvis.explore({"b": source["b"]}, tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_one_attention_without_a_layout(tmp_path: Path) -> None:
    manifest = manifest_of(vistvis.explore(attention(), tmp_path / "page.html"))
    assert (manifest["layout"], manifest["frames"], manifest["images"]) == (None, [], [])
    assert [site["name"] for site in manifest["sites"]] == ["attention"]


def test_a_batch_of_single_pictures(tmp_path: Path) -> None:
    layout = TokenLayout(1, (2, 3), patch_size=4)
    site = SiteInfo("blocks.0.attn", kind="self", query_layout=layout, key_layout=layout)
    source = attention(batch=3, site=site)
    page = vistvis.explore(source, tmp_path / "page.html", images=torch.rand(3, 3, 8, 12))
    assert manifest_of(page)["images"] == [[0, 0], [1, 0], [2, 0]]
    with pytest.raises(InputError, match="of another shape"):
        vistvis.explore(source, tmp_path / "page.html", images=torch.rand(3, 3, 12, 8))


def test_the_size_of_a_page(tmp_path: Path) -> None:
    """At most 1.2 of what real queries and keys take in float16, the pictures, and 150 KB."""
    from vistvis.models.loading import load

    loaded = load("vggt:tiny", images=SAMPLES, device="cpu")
    with vistvis.capture(loaded.watched, names=loaded.names) as captured, torch.no_grad():
        loaded.model(loaded.images)
    page = vistvis.explore(captured, tmp_path / "page.html", images=loaded.images)
    halves = sum(2 * (a.query.numel() + a.key.numel()) for a in captured.values())
    pictures = sum(len(text) for name, text in scripts(page).items() if "-image-" in name)
    assert page.stat().st_size < 1.2 * halves + pictures + 150_000


def test_wrong_arguments(captured: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(InputError, match=r"pass open_run\(folder\), got str"):
        vistvis.explore("runs/scene", page)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="no site 'globl"):
        vistvis.explore(captured, page, sites="globl*")
    with pytest.raises(InputError, match="2 frames need as many names, got 3"):
        vistvis.explore(captured, page, names="abc")
    with pytest.raises(InputError, match="the sites saw 2 frames, images have 3"):
        vistvis.explore(captured, page, images=torch.rand(1, 3, 3, 28, 42))
    assert not list(tmp_path.iterdir())
