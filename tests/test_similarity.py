"""How alike heads, sites and queries attend equals loops over dense rows in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import dense_of
from test_matching import (
    OTHER,
    SITE,
    SOURCES,
    N,
    masked,
    of_originals,
    reordered,
    seeded,
    sharp,
)

from vistvis import Attention, open_run, save_run
from vistvis.analysis import similarity
from vistvis.analysis.likeness import Measure
from vistvis.attention import TokenOrder
from vistvis.errors import InputError, LayoutError

MEASURES: tuple[Measure, ...] = ("cosine", "js")


def alike(p: np.ndarray, q: np.ndarray, measure: str) -> float:
    if measure == "cosine":
        return float(p @ q / math.sqrt((p @ p) * (q @ q)))
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def leaning(one: np.ndarray) -> float:  # Kullback–Leibler, in bits
        some = one > 0
        return float((one[some] * np.log2(one[some] / middle[some])).sum())

    return (leaning(p) + leaning(q)) / 2


def compared(rows: list[np.ndarray], measure: str) -> np.ndarray:
    """Of n lists of rows `(G, N)`: the mean over the groups in which both have weight."""
    out = np.full((len(rows), len(rows)), math.nan)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            values = [
                alike(p, q, measure)
                for p, q in zip(one, other, strict=True)
                if p.sum() > 0 and q.sum() > 0
            ]
            if values:
                out[i, j] = np.mean(values)
    return out


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=2e-5)


def several(name: str) -> dict[str, Attention]:
    """Two items that compare."""
    first = SOURCES[name]()
    if first.weights is not None:
        return {
            "one": first,
            "two": Attention.from_weights(first.weights.flip(1, 2), site=first.site),
        }
    options = {"mask": first.mask, "causal": first.causal, "segments": first.segments}
    query, site = first.query.roll(1, 1).flip(2), first.site
    return {"one": first, "two": Attention(query=query, key=first.key, site=site, **options)}  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", [name for name in SOURCES if name != "reordered"])
def test_heads_sites_and_queries_equal_loops(name: str, measure: Measure) -> None:
    items = several(name)
    assert 0.3 < dense_of(items["one"]).amax(-1).mean() < 0.95
    p = {key: of_originals(a).numpy() for key, a in items.items()}
    found = similarity(items, measure=measure, samples=9, seed=3)
    queries = found.queries.numpy()
    assert len(set(queries)) == 9
    assert sorted(queries) == queries.tolist()
    heads = [one[:, h][:, queries].reshape(18, -1) for one in p.values() for h in range(4)]
    close(found.matrix, compared(heads, measure))
    assert found.labels[0] == "one head 0"
    assert found.labels[-1] == "two head 3"
    sites = similarity(items, of="sites", measure=measure, samples=9, seed=3)
    means = [one.mean(1)[:, queries].reshape(18, -1) for one in p.values()]
    close(sites.matrix, compared(means, measure))
    assert sites.labels == ("one", "two")
    each = similarity(items["one"], of="queries", measure=measure, samples=queries.tolist())
    close(each.matrix, compared([p["one"][:, :, q].reshape(8, -1) for q in queries], measure))
    assert each.labels == tuple(map(str, queries))
    one = similarity(items["one"], measure=measure, samples=found.queries)
    close(one.matrix, found.matrix[:4, :4].numpy())
    assert one.labels == ("head 0", "head 1", "head 2", "head 3")
    for result in (found, sites, each):
        assert sorted(result.order.tolist()) == list(range(len(result.labels)))
        assert torch.equal(result.matrix, result.matrix.T)


@pytest.mark.parametrize("measure", MEASURES)
def test_tokens_in_another_order_are_the_same_tokens(measure: Measure) -> None:
    plain = sharp()
    p = torch.randperm(N, generator=seeded(4))
    moved = Attention(
        query=plain.query[:, :, p],
        key=plain.key[:, :, p.flip(0)],
        site=replace(SITE, query_order=TokenOrder(p), key_order=TokenOrder(p.flip(0))),
    )
    equal = 1.0 if measure == "cosine" else 0.0
    found = similarity({"a": plain, "b": moved}, of="sites", measure=measure)
    assert len(found.queries) == N
    close(found.matrix, np.full((2, 2), equal))
    # Without the orders they are other tokens, and it shows.
    lost = similarity({"a": plain, "b": moved.with_site(SITE)}, of="sites", measure=measure)
    assert abs(float(lost.matrix[0, 1]) - equal) > 0.3
    # Of those that were dropped in one batch item none is drawn.
    a = reordered()
    both = similarity({"a": a, "b": plain}, measure=measure)
    assert a.site is not None
    assert a.site.query_order is not None
    in_both = set(a.site.query_order.tokens[0].tolist()) & set(
        a.site.query_order.tokens[1].tolist()
    )
    assert set(both.queries.tolist()) == in_both
    rows = torch.cat([of_originals(a), of_originals(plain)], 1)[:, :, both.queries].numpy()
    close(both.matrix, compared([rows[:, h].reshape(-1, N) for h in range(8)], measure))


def test_known_answers() -> None:
    weights = torch.zeros(1, 4, N, N)
    weights[0, 0, :, 0] = weights[0, 1, :, 0] = 1.0  # equal
    weights[0, 2, :, 1] = 1.0  # nothing in common with them
    weights[0, 3, :, :2] = 0.5  # between both
    a = Attention.from_weights(weights)
    half = 1 / math.sqrt(2)
    close(
        similarity(a).matrix,
        np.array([[1, 1, 0, half], [1, 1, 0, half], [0, 0, 1, half], [half, half, half, 1]]),
    )
    # (½·1 + ¼·log₂ ½/¾ + …): entropy of (¾, ¼) less half of 0 and 1 bit.
    mixed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    close(
        similarity(a, measure="js").matrix,
        np.array([[0, 0, 1, mixed], [0, 0, 1, mixed], [1, 1, 0, mixed], [mixed] * 3 + [0]]),
    )
    assert similarity(a).order.tolist() in ([0, 1, 3, 2], [1, 0, 3, 2], [2, 3, 1, 0], [2, 3, 0, 1])


@pytest.mark.parametrize("measure", MEASURES)
def test_planted_groups_stand_together(measure: Measure) -> None:
    kinds = torch.randperm(12, generator=seeded(5)) % 3
    base = torch.rand(3, N, N, generator=seeded(6)) ** 8
    weights = base[kinds] + 0.02 * torch.rand(12, N, N, generator=seeded(7))
    a = Attention.from_weights((weights / weights.sum(-1, keepdim=True))[None])
    order = similarity(a, measure=measure).order
    assert int((kinds[order].diff() != 0).sum()) == 2
    assert int((kinds.diff() != 0).sum()) > 2


@pytest.mark.parametrize("measure", MEASURES)
def test_groups_are_turned_so_that_alike_ends_meet(measure: Measure) -> None:
    places = torch.tensor([2.0, 5.0, 9.0, 12.0, 17.0, 20.0, 24.0, 27.0])
    for seed in range(5):
        shuffled = places[torch.randperm(8, generator=seeded(seed))]
        bumps = torch.exp(-((torch.arange(N) - shuffled[:, None]) ** 2) / 18)
        weights = (bumps / bumps.sum(-1, keepdim=True))[None, :, None].expand(1, 8, 4, N)
        order = similarity(Attention.from_weights(weights), measure=measure).order
        steps = shuffled[order].diff()
        assert (steps > 0).all() or (steps < 0).all()


def test_a_query_without_keys_is_left_out() -> None:
    a = masked()
    found = similarity(a, of="queries", samples=[4, 5, 6])
    assert not found.matrix.isnan().any()  # in the other batch item 5 sees keys
    weights = a.dense()
    weights[:, :, 5] = 0
    empty = similarity(Attention.from_weights(weights), of="queries", samples=[4, 5, 6])
    assert empty.matrix[1].isnan().all()
    assert not empty.matrix[[0, 2]][:, [0, 2]].isnan().any()
    assert sorted(empty.order.tolist()) == [0, 1, 2]


def test_a_run_and_the_same_draw_again(tmp_path: Path) -> None:
    save_run({"b": sharp(), "a": sharp(key_heads=2)}, tmp_path / "run")
    with open_run(tmp_path / "run") as run:
        found = similarity(run, of="sites", samples=5, seed=1)
    again = similarity({"b": sharp(), "a": sharp(key_heads=2)}, of="sites", samples=5, seed=1)
    assert found.labels == ("b", "a")
    assert torch.equal(found.queries, again.queries)
    close(found.matrix, again.matrix.numpy())
    assert not torch.equal(found.queries, similarity(sharp(), samples=5, seed=2).queries)
    assert len(similarity(sharp(), samples=1000).queries) == N


def test_a_mistake_is_seen() -> None:
    a = sharp()
    p = of_originals(a).numpy()
    found = similarity(a, samples=[2, 7, 11])
    right = [p[:, h][:, [2, 7, 11]].reshape(6, -1) for h in range(4)]
    close(found.matrix, compared(right, "cosine"))
    off = [p[:, h][:, [3, 8, 12]].reshape(6, -1) for h in range(4)]
    swapped = [right[0], *right[2:], right[1]]
    for wrong in (off, swapped):
        with pytest.raises(AssertionError):
            close(found.matrix, compared(wrong, "cosine"))
    with pytest.raises(AssertionError):
        close(found.matrix, compared(right, "js"))


def test_what_cannot_be_compared_is_an_error() -> None:
    a = sharp()
    cross = sharp(keys=OTHER.num_tokens, site=replace(SITE, key_layout=OTHER))
    other = replace(SITE, frames_in_batch=True, frame_order=torch.tensor([[1, 0]]))
    nowhere = replace(SITE, query_layout=None, query_order=TokenOrder(torch.arange(N)))
    for items, more, text in (
        ({"a": a, "b": cross}, {}, r"'a' has \(2, 29, 29\), 'b' \(2, 29, 33\); take sites of one"),
        ({"a": a, "b": a.with_site(other)}, {}, "in another order; take"),
        ({"a": a, "b": a}, {"of": "queries"}, "rows of one attention, got 2"),
        ({}, {}, "at least one attention, got 0"),
        ({"a": [a, a]}, {}, "'a' is a list; take that of one pass"),
        (a, {"of": "tokens"}, 'of is "heads"'),
        (a, {"measure": "euclid"}, 'measure "cosine" or "js"'),
        (a, {"samples": 0}, "one or more of the 29 queries"),
        (a, {"samples": [N]}, "one or more of the 29 queries"),
        (a, {"samples": []}, "one or more of the 29 queries"),
        (a, {"samples": "all"}, "a number, or tokens, got 'all'"),
        (a, {"samples": 2.5}, "a number, or tokens"),
        (Attention.from_weights(a.dense() - 0.1), {"samples": 3}, "some are negative"),
    ):
        with pytest.raises(InputError, match=text):
            similarity(items, **more)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="'block 3' does not say where its query"):
        similarity(a.with_site(nowhere))
