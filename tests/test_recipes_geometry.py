"""Heads that match, and what knock-outs cost: against known truths and single knock-outs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vggt_adapter import VGGT
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.errors import InputError, SiteError
from vistvis.intervention import Truth, intervene, knockout_table
from vistvis.recipes import vggt_geometry

LAYOUT = TokenLayout(3, (4, 5), ("camera", *["register"] * 4), 14)
P = LAYOUT.tokens_per_frame


def attention(query: Tensor, key: Tensor, block: int) -> Attention:
    site = SiteInfo(f"b{block}", "global", block=block, query_layout=LAYOUT, key_layout=LAYOUT)
    return Attention(query=query, key=key, site=site)


def matches(to: Tensor) -> Tensor:
    """Patch n of frame 0 matches patch `to[n]` of another one, in pixels."""
    n = torch.arange(20)
    return torch.stack([n % 5, n // 5, to % 5, to // 5], -1) * 14.0 + 7


def test_a_planted_permutation_is_found_by_its_head() -> None:
    generator = torch.Generator().manual_seed(1)
    to = torch.randperm(20, generator=generator)
    key = torch.randn(1, 2, 3 * P, 16, generator=generator)
    query = torch.randn(1, 2, 3 * P, 16, generator=generator)
    target = 2 * P + 5 + to
    query[0, 1, 5:P] = 1.5 * key[0, 1, target]  # head 1 of block 4 asks for its true match
    captured = {"b4": attention(query, key, 4), "b0": attention(query.flip(1), key.flip(1), 0)}
    result = vggt_geometry.match_rate(captured, 0, 2, matches(to))
    assert captured["b4"].dense()[0, 1, 5:P].max() > 0.5
    assert result.blocks == (0, 4)
    assert result.rate.shape == (2, 1, 2)
    assert result.rate[1, 0, 1] == result.rate[0, 0, 0] == 1
    assert result.rate[1, 0, 0] < 0.3
    assert result.counted.tolist() == [[20], [20]]
    # Another view, a shifted truth, or the other head's number: nothing.
    assert vggt_geometry.match_rate(captured, 0, 1, matches(to)).rate.max() < 0.3
    shifted = vggt_geometry.match_rate(captured, 0, 2, matches(to.roll(1)))
    assert shifted.rate.max() < 0.3
    assert result.label.endswith("share within 0 patches of the true one")


def test_match_rates_equal_a_dense_count() -> None:
    golden = load_file(Path(__file__).parent / "data" / "recipes_golden.safetensors")
    a = attention(golden["q"], golden["k"], 3)
    to = torch.arange(20).roll(3)
    p = torch.softmax(a.query.double() @ a.key.double().mT * a.scale, -1)
    best = p[0, :, P + 5 : 2 * P, 5:P].argmax(-1)
    off = torch.maximum((best % 5 - to % 5).abs(), (best // 5 - to // 5).abs())
    for within in (0, 1, 2):
        result = vggt_geometry.match_rate(a, 1, 0, matches(to), within=within)
        expected = (off <= within).double().mean(-1)
        torch.testing.assert_close(result.rate[0, 0], expected)
    assert 0 < expected.min() < 1
    with pytest.raises(SiteError, match="needs global blocks"):
        vggt_geometry.match_rate({"x": a.with_site(SiteInfo("x", "frame"))}, 0, 1, matches(to))


def test_groups_are_the_best_heads_and_others() -> None:
    own = {(f"g{block}", head): 0.0 for block in range(24) for head in range(16)}
    for number, head in enumerate([("g12", 3), ("g12", 9), ("g13", 0), ("g12", 5), ("g14", 7)]):
        own[head] = 0.9 - 0.1 * number
    groups = vggt_geometry._groups(own, 3, seed=4)
    assert groups["best of one block"] == (("g12", 3), ("g12", 9), ("g12", 5))
    assert groups["best of all"] == (("g12", 3), ("g12", 9), ("g13", 0))
    early, late = groups["random early"], groups["random late"]
    assert len(set(early)) == len(set(late)) == 3
    assert {name for name, _ in early} <= {f"g{n}" for n in range(6)}
    assert {name for name, _ in late} <= {f"g{n}" for n in range(18, 24)}
    assert vggt_geometry._groups(own, 3, seed=4) == groups
    assert vggt_geometry._groups(own, 3, seed=5)["random early"] != early
    # Where all heads are among the best, there are no others.
    assert list(vggt_geometry._groups({("g0", 0): 1.0}, 4, seed=0)) == [
        "best of one block",
        "best of all",
    ]


@pytest.fixture(scope="module")
def small() -> tuple[VGGT, Tensor, Truth]:
    torch.manual_seed(3)
    model = VGGT.from_config(
        embed_dim=32, depth=2, num_heads=4, patch_embed="conv", init_values=1.0
    ).eval()
    images = torch.rand(1, 2, 3, 70, 98)
    # What the undisturbed tokens match is the truth: every change of theirs shows.
    with torch.no_grad():
        tokens = model(images)[0][-1][0, :, 5:, 32:]
    units = torch.nn.functional.normalize(tokens.double(), dim=-1)
    nearest = torch.einsum("inc,jmc->ijnm", units, units).argmax(-1)
    places = torch.stack([nearest // 7, nearest % 7], -1)[None].double()
    visible = ~torch.eye(2, dtype=torch.bool)[None, :, :, None].expand(1, 2, 2, 35)
    return model, images, Truth(places, visible)


def test_a_group_of_one_head_is_that_head_alone(small: tuple[VGGT, Tensor, Truth]) -> None:
    model, images, truth = small
    result = vggt_geometry.knockout(model, images, truth=truth, count=1)
    table = result.table
    assert table.mode == "uniform"
    assert len(table.knockouts) == 8
    assert [rate for _, rate in result.order] == sorted(one.own for one in table.knockouts)[::-1]
    assert result.groups["best of all"] == (result.order[0][0],)
    alone = {(one.site, one.head): one.rates for one in table.knockouts}
    for name, (head,) in result.groups.items():
        assert table.groups[name].tokens == alone[head].tokens, name
        assert table.groups[name].pointing == pytest.approx(alone[head].pointing, nan_ok=True)
    assert "true matches" in result.label


def test_several_heads_go_together(small: tuple[VGGT, Tensor, Truth]) -> None:
    model, images, truth = small
    result = vggt_geometry.knockout(model, images, truth=truth, count=3, sites="global_block_0")
    assert {one.site for one in result.table.knockouts} == {"global_block_0"}
    group = result.groups["best of all"]
    assert len(group) == 3
    # Another way to it: knock them out, and ask for the undisturbed rates then.
    of = {n: [head for name, head in group if name == f"global_block_{n}"] for n in (0, 1)}
    with (
        intervene(model, "global_block_0", heads=of[0], mode="uniform"),
        intervene(model, "global_block_1", heads=of[1], mode="uniform"),
    ):
        other = knockout_table(model, images, truth=truth, sites="global_block_0")
    assert result.table.groups["best of all"].tokens == other.undisturbed.tokens
    assert result.table.undisturbed.tokens == 1
    assert other.undisturbed.tokens < 0.95
    with pytest.raises(InputError, match="count is how many heads"):
        vggt_geometry.knockout(model, images, count=0)


def test_figures_of_rates_and_of_losses(small: tuple[VGGT, Tensor, Truth]) -> None:
    model, images, truth = small
    result = vggt_geometry.knockout(model, images, truth=truth, count=2)
    figure = vggt_geometry.figure(result)
    cells = [text.get_text() for text in figure.axes[4].texts]
    own = {(one.site, one.head): one.own for one in result.table.knockouts}
    assert cells == [f"{100 * rate:.0f}" for rate in own.values()]
    change = result.table.knockouts[5].rates.tokens - result.table.undisturbed.tokens
    drawn = figure.axes[0].images[0].get_array()
    assert drawn[1, 1] == pytest.approx(100 * change, abs=1e-4)
    note = figure.texts[1].get_text().replace("\n", " ")
    assert "best of one block (of 2) " in note
    generator = torch.Generator().manual_seed(1)
    one = attention(*torch.randn(2, 1, 2, 3 * P, 16, generator=generator), 7)
    rates = vggt_geometry.match_rate(one, 0, 1, matches(torch.arange(20)), within=2)
    shown = vggt_geometry.figure(rates)
    assert [text.get_text() for text in shown.axes[0].get_yticklabels()] == ["global block 7"]
