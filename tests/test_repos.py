"""The runner of other repositories' models, on a model of our own: what it passes and what not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import softmax_of
from repos import check, places
from repos.check import Outcome, measure, told
from repos.model import Model, pictures
from repos.readings import largest_errors, match
from repos.witness import witnessed
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as bound_by_name

from vggt_adapter import VGGT, VGGTConfig
from vistvis.attention import Attention, TokenOrder


def entry() -> Model:
    config = VGGTConfig(embed_dim=32, depth=2, num_heads=2, patch_embed="conv")
    return Model("own", "", lambda _: VGGT(config), pictures(2, 2, 3))


def outcome_of(own: Model) -> Outcome:
    outcome = Outcome(own.name)
    measure(own, own.build(None), outcome)  # type: ignore[arg-type]
    return outcome


def test_all_is_right_on_a_model_that_is_described() -> None:
    outcome = outcome_of(entry())
    assert not outcome.failures
    assert (outcome.captured, outcome.calls, outcome.calls_captured) == (4, 4, 4)
    # 2 pictures, 3 patches, both sides of 4 sites; then 3 patches of one or of two pictures.
    assert outcome.right == 2 * 3 * 2 * 4
    assert outcome.values == 2 * (2 * 3 + 2 * 2 * 3)
    assert 0.3 <= outcome.largest[0] <= outcome.largest[1] <= 0.95
    assert outcome.figure == "drawn"


class Kernels(nn.Module):
    """One kernel call of each spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.soft = nn.Softmax(-1)
        self.multihead = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        scores = x @ x.mT
        return [
            bound_by_name(x, x, x),
            F.softmax(scores, -1),
            scores.softmax(-1),
            self.soft(scores),
            torch.softmax(scores, 0),
            self.multihead(x[0], x[0], x[0], need_weights=False)[0],
        ]


def test_the_witness_sees_every_spelling_and_who_ran() -> None:
    model, x = Kernels().eval(), torch.randn(1, 2, 5, 8)
    calls, output = witnessed(model, lambda: model(x))
    assert [call.module for call in calls] == ["", "", "", "soft", "", "multihead"]
    torch.testing.assert_close(calls[0].weights, softmax_of(x, x))
    for call, made in zip(calls[1:4], output[1:4], strict=True):
        torch.testing.assert_close(call.weights.float(), made)
    assert calls[5].weights.shape == (2, 2, 5, 5)


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_and_columns_of_other_keys_go_red(shift: int) -> None:
    query, key = torch.randn(2, 1, 2, 5, 8) * 2
    model = nn.Identity()
    calls, _ = witnessed(model, lambda: F.scaled_dot_product_attention(query, key, key))
    attention = Attention(query=query, key=key.roll(shift, 2))
    rows, columns = largest_errors(match([attention], calls, [0])[0], calls)
    assert (rows < 1e-6 and columns < 1e-6) if not shift else (rows > 0.1 and columns > 0.1)


def test_a_token_said_to_be_elsewhere_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = places.expected_at

    def turned(attention: Attention, side: str, *place: object, **more: object) -> object:
        site = attention.site
        assert site is not None
        count = attention.shape[2]
        order = TokenOrder(torch.arange(count).flip(0))
        site = replace(site, query_order=order, key_order=order)
        return right(attention.with_site(site), side, *place, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(places, "expected_at", turned)
    outcome = outcome_of(entry())
    assert outcome.wrong
    assert outcome.failures


def test_a_call_that_nobody_speaks_of_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    report = "x\nseen outside all sites: softmax, while 'a.b' (Head) ran, 1 time\n"
    assert told(report) == {"a.b": 1}

    class Deaf(dict):  # type: ignore[type-arg]
        def report(self) -> str:
            return report

    model = nn.Sequential(nn.Softmax(-1))
    calls, _ = witnessed(model, lambda: model(torch.randn(3, 4)))
    outcome = Outcome("own")
    check.account([], calls, Deaf(), entry(), outcome)  # type: ignore[arg-type]
    assert outcome.silent == ["0 (3×4)"]
