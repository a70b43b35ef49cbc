"""Two runs side by side: at which sites, and why not at others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.attention.order import TokenOrder
from vistvis.errors import InputError
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
