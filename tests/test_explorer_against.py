"""Two runs side by side: at which sites, and why not at others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.attention.order import TokenOrder
from vistvis.errors import InputError, VistvisWarning
from vistvis.views.explorer.against import shared_sites

LAYOUT = TokenLayout(frames=2, grid=(2, 3), special=("camera",))
SITE = SiteInfo("a", query_layout=LAYOUT, key_layout=LAYOUT)


def attention(site: SiteInfo | None = SITE, *, heads: int = 2, seed: int = 0) -> Attention:
    shape = 1, heads, LAYOUT.num_tokens, 4
    torch.manual_seed(seed)
    return Attention(query=torch.randn(shape), key=torch.randn(shape), site=site)


def test_sites_that_both_have_are_shared_and_the_rest_is_named() -> None:
    one = {"a": attention(), "b": attention(), "c": attention()}
    other = {"c": attention(seed=1), "a": attention(heads=3)}
    shared, left = shared_sites(one, other, ["a", "b", "c"])
    assert shared == ["c"]
    assert left == [
        {
            "name": "a",
            "reason": "batch, heads, queries and keys are 1 × 2 × 14 × 14, the other's "
            "1 × 3 × 14 × 14",
        },
        {"name": "b", "reason": "the other has no site of that name"},
    ]


def test_names_of_modules_do_not_matter() -> None:
    other = attention(replace(SITE, module="Other", path="x.y", source="kernel"))
    assert shared_sites({"a": attention()}, {"a": other}, ["a"]) == (["a"], [])
    assert shared_sites({"a": attention(None)}, {"a": attention(None)}, ["a"]) == (["a"], [])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"key_layout": replace(LAYOUT, grid=(3, 2))}, "lie elsewhere"),
        ({"frames_in_batch": True}, "lie elsewhere"),
        ({"key_order": TokenOrder(torch.arange(14).flip(0))}, "in another order"),
        ({"frame_order": torch.tensor([[1, 0]])}, "frames in another order"),
    ],
)
def test_tokens_in_other_places_are_told_apart(change: dict[str, Any], told: str) -> None:
    other = attention(replace(SITE, **change))
    with pytest.raises(InputError, match=f"none is: a: .*{told}.*give runs of the same pictures"):
        shared_sites({"a": attention()}, {"a": other}, ["a"])


def test_only_one_with_a_layout() -> None:
    with pytest.raises(InputError, match="only one of them says"):
        shared_sites({"a": attention()}, {"a": attention(None)}, ["a"])


def manifest_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="vistvis-manifest"[^>]*>([^<]*)<', page.read_text(encoding="utf-8"))
    assert found is not None
    manifest: dict[str, Any] = json.loads(found[1])
    return manifest


def test_a_page_carries_both_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    one, other = {"a": attention(), "b": attention()}, {"a": attention(seed=1)}
    with pytest.warns(VistvisWarning, match="'b': the other has no site of that name"):
        page = vistvis.explore(one, tmp_path / "page.html", against=other)
    manifest = manifest_of(page)
    assert [site["name"] for site in manifest["sites"]] == ["a"]
    assert [site["name"] for site in manifest["against"]["sites"]] == ["a"]
    assert manifest["against"]["labels"] == ["run 1", "run 2"]
    assert manifest["sites"][0]["crc32"] != manifest["against"]["sites"][0]["crc32"]
    assert "vistvis-site-1" in page.read_text(encoding="utf-8")


def test_the_folder_has_a_file_of_each(tmp_path: Path) -> None:
    given = {"against": {"a": attention(seed=1)}, "folder": tmp_path / "site"}
    index = vistvis.explore({"a": attention()}, **given)
    manifest = manifest_of(index)
    headers = [*manifest["sites"], *manifest["against"]["sites"]]
    for number, header in enumerate(headers):
        assert (tmp_path / "site" / f"site-{number}-{header['crc32']:08x}.bin").is_file()


def test_the_command_sets_two_runs_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vistvis.cli import main

    runs = [str(tmp_path / name) for name in "ab"]
    for seed, run in enumerate(runs):
        vistvis.save_run({"a": attention(seed=seed)}, run)
    out = tmp_path / "page.html"
    assert main(["explore", runs[0], "--against", runs[1], "--out", str(out), "--no-open"]) == 0
    assert manifest_of(out)["against"]["labels"] == ["a", "b"]
    assert f"--against {runs[1]}" in capsys.readouterr().out
    assert main(["explore", "x.jpg", "--against", runs[1], "--out", str(out)]) != 0
    assert "--against goes with a run" in capsys.readouterr().err
