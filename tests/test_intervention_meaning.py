"""What knock-outs mean in the bundled model, on rendered scenes whose matches are known.

What was expected of the control, and is not so: without any attention across frames its tokens
match nearly as well as before. They are descriptors that each view gets by itself; matching is what
frame attention does, and the head that points reads it off them. Both are held here.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import rendered_scenes

from vggt_adapter import VGGT
from vistvis import intervene
from vistvis.intervention import KnockoutTable, Truth, knockout_table

GRID = (16, 16)
Change = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def model() -> VGGT:
    return VGGT.tiny().eval().requires_grad_(False)


def rendered(count: int, views: int) -> Any:
    """Random scenes of photographs that the model was not trained on."""
    return rendered_scenes(count, views).batch(range(count), views=views, grid=GRID)


@pytest.fixture(scope="module")
def batch() -> Any:
    return rendered(3, 2)


def truth_of(batch: Any) -> Truth:
    return Truth(batch.place.flip(-1).double(), batch.visible)


def scores(model: VGGT, batch: Any) -> Any:
    import evaluate

    return evaluate.score(model, evaluate.Set("rendered", GRID, [batch]), None)


def token_rate(tokens: Tensor, batch: Any) -> float:
    """By the counting of training/matching.py; `tokens` (B, S, N, C) of patches."""
    from matching import Hits

    hits, near = Hits(), F.normalize(tokens, dim=-1)
    near = torch.einsum("bind,bjmd->bijnm", near, near)
    hits.add(near.argmax(-1), batch.place, batch.visible, GRID[1])
    return hits.shares[0]


def rate_with(model: VGGT, batch: Any, *changes: Change) -> float:
    with ExitStack() as stack:
        for sites, change in changes:
            stack.enter_context(intervene(model, sites, **change))
        tokens, start = model(batch.images)
    return token_rate(tokens[-1][:, :, start:, 128:], batch)


def test_undisturbed_rates_are_those_of_the_card_s_script(model: VGGT, batch: Any) -> None:
    expected = scores(model, batch)
    for within, part in ((1.0, 0), (0.001, 1)):
        table = knockout_table(
            model, batch.images, truth=truth_of(batch), sites="global_block_3", within=within
        )
        assert table.counted == expected.tokens.count
        assert table.undisturbed.tokens == pytest.approx(expected.tokens.shares[part])
        assert table.pointing == ("global_block_3", 0)
        for head in (0, 1):
            own = expected.heads[3, head].shares[part]
            assert table.knockouts[head].own == pytest.approx(own)


def holds(table: KnockoutTable) -> None:
    """What single knock-outs showed, in every scene and mode looked at."""
    assert table.undisturbed.tokens > 0.9
    for one in table.knockouts:
        # No head alone carries the matching of tokens, nor pointing but the pointing head itself.
        assert abs(one.rates.tokens - table.undisturbed.tokens) < 0.05
        if (one.site, one.head) == table.pointing:
            assert one.rates.pointing == (table.undisturbed.pointing if table.mode == "mean" else 0)
        else:
            assert abs(one.rates.pointing - table.undisturbed.pointing) < 0.05
    # A control that shows that pointing is across frames, and another that tokens are not.
    assert table.within_frames.pointing == 0
    assert abs(table.within_frames.tokens - table.undisturbed.tokens) < 0.05


@pytest.mark.slow
def test_no_head_alone_carries_the_matching(model: VGGT, batch: Any) -> None:
    holds(knockout_table(model, batch.images, truth=truth_of(batch)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["uniform", "zero", "mean"])
@pytest.mark.parametrize(("scenes", "views"), [(12, 2), (4, 4)])
def test_in_more_scenes_and_modes(model: VGGT, scenes: int, views: int, mode: Any) -> None:
    more = rendered(scenes, views)
    holds(knockout_table(model, more.images, mode=mode, truth=truth_of(more)))


def test_views_match_that_have_never_seen_each_other(model: VGGT, batch: Any) -> None:
    """Other code for the control: each view goes through the model alone."""
    plain = rate_with(model, batch)
    cut = rate_with(model, batch, ("global_*", {"within_frame": True}))
    alone = []
    with intervene(model, "global_*", within_frame=True):
        together, start = model(batch.images)
    for view in range(2):
        tokens, _ = model(batch.images[:, view : view + 1])
        alone.append(tokens[-1][:, 0])
    # The second view has special tokens of its own where it comes second, so only the first is
    # the same; with those of a first view it matches as well.
    assert (together[-1][:, 0] - alone[0]).abs().max() < 1e-4
    assert (together[-1][:, 1] - alone[1]).abs().max() > 1e-2
    apart = token_rate(torch.stack(alone, 1)[:, :, start:, 128:], batch)
    assert min(plain, cut, apart) > 0.9
    assert abs(plain - cut) < 0.03


def test_what_does_bring_tokens_down_to_the_same_position(model: VGGT, batch: Any) -> None:
    same = scores(model, batch).same.shares[0]
    everywhere: Change = ("global_*", {"mode": "uniform"})
    frames: Change = ("frame_*", {"mode": "uniform"})
    plain = rate_with(model, batch)
    without_frames = rate_with(model, batch, frames)
    without_both = rate_with(model, batch, frames, everywhere)
    assert rate_with(model, batch, everywhere) > 0.9
    assert without_frames < plain - 0.15
    assert without_both < without_frames - 0.1
    assert abs(without_both - same) < 0.2
