"""What keys add by their values equals the dense computation in float64, whatever the source."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import dense_of
from torch import Tensor

from vistvis import Attention, SiteInfo, open_run, save_run
from vistvis.analysis import received, sink_kinds, sink_tokens, weighted_values
from vistvis.errors import CaptureError, DenseLimitError, InputError

N, WIDTH = 24, 6


def sharp(keys: int = N, *, key_heads: int = 4, value_heads: int = 4, **more: object) -> Attention:
    generator = torch.Generator().manual_seed(keys)
    query = 2.0 * torch.randn(2, 4, N, 16, generator=generator)
    key = torch.randn(2, key_heads, keys, 16, generator=generator)
    value = torch.randn(2, value_heads, keys, WIDTH, generator=generator)
    # Lengths of their own, or a key that is taken for another would hardly show.
    value *= torch.rand(2, value_heads, keys, 1, generator=generator) * 4
    return Attention(query=query, key=key, value=value, site=SiteInfo("site"), **more)  # type: ignore[arg-type]


def masked() -> Attention:
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, 0, 5] = False  # a query that sees no key
    return sharp(mask=mask)


SOURCES: dict[str, Callable[[], Attention]] = {
    "plain": sharp,
    "masked": masked,
    "causal": lambda: sharp(causal=True),
    "grouped": lambda: sharp(key_heads=2, value_heads=2),
    "one head of values": lambda: sharp(value_heads=1),
    "cross": lambda: sharp(17),
    "segments": lambda: sharp(segments=[0, 7, 15]),
    "functions": lambda: sharp(mask_mod=lambda b, h, i, j: j <= i + 3),
    "weights": lambda: Attention.from_weights(sharp().dense(), value=sharp(value_heads=2).value),
    "float64": lambda: sharp().to(torch.float64),
    "bfloat16 values": lambda: sharp().replace(value=sharp().value.bfloat16()),  # type: ignore[union-attr]
}


@pytest.fixture(params=[*SOURCES, "stored", "stored weights"])
def a(request: pytest.FixtureRequest, tmp_path: Path) -> Attention:
    if not request.param.startswith("stored"):
        return SOURCES[request.param]()
    made = SOURCES["grouped" if request.param == "stored" else "weights"]()
    return save_run({"site": made}, tmp_path / "run")["site"]


# One row at a time, a block of a few, and everything at once.
SIZES = pytest.mark.parametrize("max_bytes", [1, 2000, None])


def dense(a: Attention) -> Tensor:
    """By torch, with what the function of indices above says."""
    if a.mask_mod is None:
        return dense_of(a)
    columns = torch.arange(a.shape[3])
    return dense_of(a, also=columns <= torch.arange(a.shape[2])[:, None] + 3)


def values_of(a: Attention) -> Tensor:
    """Values of every query head, `(B, h, Nk, dv)`, in float64."""
    assert a.value is not None
    return a.value.double().repeat_interleave(a.shape[1] // a.value.shape[1], 1)


def lengths(a: Attention) -> Tensor:
    return values_of(a).square().sum(-1).sqrt()


def near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5, equal_nan=True)


# -- weights times lengths -----------------------------------------------------------------------


@SIZES
def test_weighted_values_equal_dense_ones(a: Attention, max_bytes: int | None) -> None:
    p, norms = dense(a), lengths(a)
    assert 0.5 < p.max() <= 1
    every = p * norms[:, :, None]
    near(weighted_values(a, max_bytes=max_bytes), every.sum(2))
    near(weighted_values(a, queries=[5, 0, 5], max_bytes=max_bytes), every[:, :, [5, 0, 5]])
    near(weighted_values(a, queries=-1), every[:, :, -1:])
    near(weighted_values(a, queries=slice(None)).sum(2), weighted_values(a))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_values_of_another_are_seen(dim: int) -> None:
    a = sharp()
    assert a.value is not None
    wrong = a.replace(value=a.value.roll(1, dim))
    for queries in (None, 3):
        with pytest.raises(AssertionError, match="not close"):
            near(weighted_values(wrong, queries=queries), weighted_values(a, queries=queries))


def test_the_order_of_grouped_values_is_that_of_grouped_keys() -> None:
    grouped = sharp(key_heads=2, value_heads=2)
    each = [h // 2 for h in range(4)]
    assert grouped.value is not None
    apart = Attention(query=grouped.query, key=grouped.key[:, each], value=grouped.value[:, each])
    near(weighted_values(grouped), weighted_values(apart))


# -- kinds of sinks ------------------------------------------------------------------------------


def stable_rank(out: Tensor) -> float:
    singular = torch.linalg.svdvals(out)
    return float(singular.square().sum() / singular.max().square())


@SIZES
def test_norms_and_ranks_equal_dense_ones(a: Attention, max_bytes: int | None) -> None:
    found = sink_kinds(a, times=2, max_bytes=max_bytes)
    tokens, shares = sink_tokens(a, 2)
    assert len(tokens) > 3
    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(found.shares, shares, rtol=1e-5, atol=1e-6)
    out, norms = dense(a) @ values_of(a), lengths(a)
    for number, (b, h, key) in enumerate(tokens.tolist()):
        others = [float(norms[b, h, k]) for k in range(a.shape[3]) if k != key]
        mean = sum(others) / len(others)
        assert float(found.norms[number]) == pytest.approx(float(norms[b, h, key]) / mean)
        rank = stable_rank(out[b, h])
        assert float(found.ranks[number]) == pytest.approx(rank, rel=1e-5)
        short, long = norms[b, h, key] <= 0.2 * mean, norms[b, h, key] >= 0.5 * mean
        kind = "nop" if short else "broadcast" if long and rank <= 1.5 else "other"
        assert found.kinds[number] == kind


def planted(length: float, mass: float = 0.9) -> Attention:
    """Two heads: key 7 of the second gets `mass` from all, and its value has this length."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.softmax(4 * torch.randn(2, 2, N, N, generator=generator), -1)
    sink = torch.zeros(N)
    sink[7] = 1.0
    weights[:, 1] = mass * sink + (1 - mass) * weights[:, 1]
    value = torch.nn.functional.normalize(torch.randn(2, 2, N, WIDTH, generator=generator), dim=-1)
    value[:, 1, 7] *= length
    return Attention.from_weights(weights, value=value)


@pytest.mark.parametrize(
    ("length", "mass", "kind"),
    [
        (0.0, 0.9, "nop"),
        (0.15, 0.9, "nop"),
        (0.35, 0.9, "other"),  # neither short nor as long as the rest
        (1.0, 0.9, "broadcast"),
        (3.0, 0.7, "broadcast"),
        (1.0, 0.5, "broadcast"),
        (1.0, 0.15, "other"),  # it takes too little to rule what its head gives
    ],
)
def test_planted_sinks_are_told(length: float, mass: float, kind: str) -> None:
    a = planted(length, mass)
    found = sink_kinds(a, times=3)
    assert sorted(found.tokens.tolist()) == [[0, 1, 7], [1, 1, 7]]
    assert found.kinds == (kind, kind)
    torch.testing.assert_close(found.norms, torch.full((2,), length).double(), rtol=1e-5, atol=1e-6)
    # What it adds says the same: a nop gets most of the attention and adds the least.
    added, got = weighted_values(a)[0, 1], received(a)[0, 1]
    assert got.argmax() == 7
    if kind == "broadcast":
        assert added.argmax() == 7
    if length == 0:
        assert added.argmin() == 7


def test_thresholds_are_those_given() -> None:
    a = planted(0.35)
    assert set(sink_kinds(a, times=3, negligible=0.4).kinds) == {"nop"}
    assert set(sink_kinds(a, times=3, full=0.3, rank=math.inf).kinds) == {"broadcast"}
    assert set(sink_kinds(planted(1.0, 0.15), times=3, rank=math.inf).kinds) == {"broadcast"}
    assert set(sink_kinds(planted(1.0), times=3, rank=1.0).kinds) == {"other"}


def test_lengths_of_another_head_go_red() -> None:
    a = planted(0.0)
    assert a.value is not None
    assert set(sink_kinds(a.replace(value=a.value.flip(1)), times=3).kinds) == {"broadcast"}
    assert set(sink_kinds(a.replace(value=a.value.roll(1, 2)), times=3).kinds) != {"nop"}


def test_without_sinks_there_are_none() -> None:
    found = sink_kinds(sharp(), times=20)
    assert found.kinds == ()
    assert found.tokens.shape == (0, 3)
    assert len(found.shares) == len(found.norms) == len(found.ranks) == 0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_heads_that_give_nothing_or_no_numbers(value: float) -> None:
    a = planted(1.0)
    found = sink_kinds(a.replace(value=torch.full((2, 2, N, WIDTH), value)), times=3)
    assert found.kinds == ("other", "other")
    assert found.norms.isnan().all()
    assert found.ranks.isnan().all()


# -- what can't be answered ----------------------------------------------------------------------


def test_what_cannot_be_answered_is_an_error(tmp_path: Path) -> None:
    a = sharp()
    save_run({"site": a.replace(value=None)}, tmp_path)
    bare = Attention(query=a.query, key=a.key)
    for call in (weighted_values, sink_kinds):
        with pytest.raises(InputError, match=r"this attention has no values; capture .*values=Tr"):
            call(bare)
        with pytest.raises(InputError, match="site 'site' has no values"):
            call(open_run(tmp_path)["site"])
    with pytest.raises(InputError, match="positive"):
        sink_kinds(a, times=0)
    long = Attention(
        query=torch.zeros(1, 16, 8192, 4), key=torch.zeros(1, 1, 8192, 4),
        value=torch.zeros(1, 1, 8192, 4),
    )  # fmt: skip
    with pytest.raises(DenseLimitError, match="more than the limit"):
        weighted_values(long, queries=slice(None))
    assert a.value is not None
    a.value.add_(1)
    for call in (weighted_values, sink_kinds):
        with pytest.raises(CaptureError, match="written into"):
            call(a)
