"""Numbers about attention equal the dense computation in float64, whatever the source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import dense_of
from torch import Tensor

from vistvis import Attention, SiteInfo, TokenLayout, TokenOrder, WindowInfo, open_run, save_run
from vistvis.analysis import (
    distance,
    effective_rank,
    entropy,
    frame_mass,
    received,
    sink_tokens,
    special_mass,
    summarize,
    top_keys,
    top_mass,
)
from vistvis.errors import InputError, LayoutError

LAYOUT = TokenLayout(2, (3, 4), ("camera", "register", "register"), 14)
N = LAYOUT.num_tokens  # 30
OTHER = TokenLayout(3, (2, 3), ("camera",), 14)  # 21 keys of other pictures


def sharp(
    queries: int = N, keys: int = N, heads: int = 4, key_heads: int = 4, **more: object
) -> Attention:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    query = 2.0 * torch.randn(2, heads, queries, 16, generator=generator)
    key = torch.randn(2, key_heads, keys, 16, generator=generator)
    layouts = {N: LAYOUT, OTHER.num_tokens: OTHER}
    site = SiteInfo("site", "global", query_layout=LAYOUT, key_layout=layouts[keys])
    return Attention(query=query, key=key, site=site, **more)  # type: ignore[arg-type]


def masked() -> Attention:
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, 0, 5] = False  # a query that sees no key
    return sharp(mask=mask)


SOURCES: dict[str, Callable[[], Attention]] = {
    "plain": sharp,
    "large": lambda: sharp(scale=2.0),  # logits whose maximum has to be taken off
    "masked": masked,
    "causal": lambda: sharp(causal=True),
    "grouped": lambda: sharp(key_heads=2),
    "cross": lambda: sharp(keys=OTHER.num_tokens),
    "segments": lambda: sharp(segments=[0, 7, 15]),
    "weights": lambda: Attention.from_weights(sharp().dense(), site=sharp().site),
}


@pytest.fixture(params=[*SOURCES, "stored"])
def a(request: pytest.FixtureRequest, tmp_path: Path) -> Attention:
    if request.param != "stored":
        return SOURCES[request.param]()
    save_run({"site": sharp()}, tmp_path / "run")
    return open_run(tmp_path / "run")["site"]


# One row at a time, a block of a few, and everything at once.
SIZES = pytest.mark.parametrize("max_bytes", [1, 2000, None])


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6, equal_nan=True)


@SIZES
def test_statistics_of_rows_equal_dense_ones(a: Attention, max_bytes: int | None) -> None:
    p = dense_of(a)
    assert p.max() > 0.5
    close(entropy(a, max_bytes=max_bytes), -(p * p.clamp_min(1e-300).log()).sum(-1))
    close(effective_rank(a, max_bytes=max_bytes), entropy(a).exp())
    close(received(a, max_bytes=max_bytes), p.sum(2))
    ordered = p.sort(-1, descending=True).values
    close(top_mass(a, 3, max_bytes=max_bytes), ordered[..., :3].sum(-1))
    weights, indices = top_keys(a, 3, max_bytes=max_bytes)
    assert weights.shape == indices.shape == (*a.shape[:3], 3)
    close(weights.double(), ordered[..., :3])
    close(p.gather(-1, indices), ordered[..., :3])


@SIZES
def test_masses_by_kind_and_frame_equal_dense_ones(a: Attention, max_bytes: int | None) -> None:
    p, key = dense_of(a), a.key_layout
    assert key is not None
    kinds = [key.locate(token).kind for token in range(a.shape[3])]
    found = special_mass(a, max_bytes=max_bytes)
    assert list(found) == [kind for kind in ("camera", "register") if kind in kinds]
    for kind, mass in found.items():
        close(mass, p[..., [one == kind for one in kinds]].sum(-1))
    masses = frame_mass(a, max_bytes=max_bytes)
    assert masses.shape == (2, 4, LAYOUT.frames, key.frames, 2, 2)
    queries = [LAYOUT.locate(token) for token in range(N)]
    keys = [key.locate(token) for token in range(a.shape[3])]
    for s in range(LAYOUT.frames):
        for t in range(key.frames):
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                rows = [one.frame == s and one.is_patch == bool(i) for one in queries]
                columns = [one.frame == t and one.is_patch == bool(j) for one in keys]
                mean = p[:, :, rows][..., columns].sum(-1).mean(2)
                close(masses[:, :, s, t, i, j], mean)


@SIZES
def test_distances_equal_dense_ones(max_bytes: int | None) -> None:
    for a in (sharp(), masked()):
        p, places = dense_of(a), [LAYOUT.locate(token) for token in range(N)]
        expected = torch.full(a.shape[:3], math.nan, dtype=torch.float64)
        for q, query in enumerate(places):
            total = mass = torch.zeros(2, 4, dtype=torch.float64)
            for k, key in enumerate(places):
                if query.is_patch and key.is_patch and query.frame == key.frame:
                    far = math.dist((query.row, query.col), (key.row, key.col))  # type: ignore[arg-type]
                    total, mass = total + p[:, :, q, k] * far, mass + p[:, :, q, k]
            expected[:, :, q] = total / mass
        close(distance(a, max_bytes=max_bytes), expected)
        assert distance(a)[:, :, :3].isnan().all()  # camera and registers lie nowhere


def reordered(per_item: bool) -> tuple[Attention, list[Tensor]]:
    """`sharp` with its tokens in another order, which its site tells, and that order."""
    a = sharp()
    assert a.site is not None
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(N, generator=generator) for _ in range(2)]
    if not per_item:
        orders[1] = orders[0]
    query, key = (torch.stack([t[b][:, orders[b]] for b in range(2)]) for t in (a.query, a.key))
    order = TokenOrder(torch.stack(orders) if per_item else orders[0])
    site = replace(a.site, query_order=order, key_order=order)
    return Attention(query=query, key=key, site=site), orders


@pytest.mark.parametrize("per_item", [False, True])
@SIZES
def test_tokens_in_another_order_are_followed(per_item: bool, max_bytes: int | None) -> None:
    moved, orders = reordered(per_item)
    a = sharp()
    close(frame_mass(moved, max_bytes=max_bytes), frame_mass(a))
    for b, order in enumerate(orders):
        for kind, mass in special_mass(moved, max_bytes=max_bytes).items():
            close(mass[b], special_mass(a)[kind][b][:, order])
        close(distance(moved, max_bytes=max_bytes)[b], distance(a)[b][:, order])
    # The order left out goes red.
    assert moved.site is not None
    bare = moved.with_site(replace(moved.site, query_order=None, key_order=None))
    with pytest.raises(AssertionError):
        close(frame_mass(bare), frame_mass(a))


def test_dropped_and_merged_tokens_count_as_the_order_says() -> None:
    tokens = torch.tensor([0, 3, 4, 5, 15, 20, 21, 22, -1])
    members = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5, 6])
    a = sharp()
    assert a.site is not None
    order = TokenOrder(tokens, members)
    site = replace(a.site, query_order=order, key_order=order)
    merged = Attention(query=a.query[:, :, :7], key=a.key[:, :, :7], site=site)
    p = order.spread(dense_of(merged), N)  # (2, 4, 7, 30)
    kinds = [LAYOUT.locate(token).kind for token in range(N)]
    for kind, mass in special_mass(merged).items():
        close(mass, p[..., [one == kind for one in kinds]].sum(-1))
    frames = torch.arange(N) // LAYOUT.tokens_per_frame
    patch = torch.tensor([one == "patch" for one in kinds])
    rows = p[:, :, members[[i for i, t in enumerate(tokens) if t in (3, 4, 5)]]]
    mass = frame_mass(merged)
    close(mass[:, :, 0, 1, 1, 1], rows[..., (frames == 1) & patch].sum(-1).mean(2))
    assert mass[:, :, 1, :, 0].isfinite().all()  # token 15 is the camera of frame 1
    with pytest.raises(LayoutError, match="merged"):
        distance(merged)


def test_keys_of_earlier_frames_lie_before_those_of_the_queries() -> None:
    """A cache: the queries are frame 1 of the keys' two frames."""
    a, first = sharp(), LAYOUT.tokens_per_frame
    assert a.site is not None
    site = replace(a.site, query_layout=LAYOUT.frame_layout(), first_frame=1)
    late = Attention(query=a.query[:, :, first:], key=a.key, site=site)
    close(distance(late), distance(a)[:, :, first:])
    close(frame_mass(late)[:, :, 0], frame_mass(a)[:, :, 1])


def test_known_answers() -> None:
    even = Attention(query=torch.zeros(1, 1, N, 8), key=torch.randn(1, 1, N, 8), site=sharp().site)
    close(entropy(even), torch.full((1, 1, N), math.log(N), dtype=torch.float64))
    close(effective_rank(even), torch.full((1, 1, N), float(N), dtype=torch.float64))
    close(top_mass(even, 6), torch.full((1, 1, N), 6 / N, dtype=torch.float64))
    close(received(even), torch.ones(1, 1, N, dtype=torch.float64))
    assert not len(sink_tokens(even, 1.5).shares)
    own = Attention.from_weights(torch.eye(N)[None, None], site=sharp().site)
    assert (entropy(own) == 0).all()
    assert (top_keys(own, 1).indices[0, 0, :, 0] == torch.arange(N)).all()
    assert (distance(own)[0, 0, 3:15] == 0).all()
    # Block-diagonal by frame, even within: every frame gives all of its mass to itself.
    frames = torch.arange(N) // LAYOUT.tokens_per_frame
    blocks = (frames[:, None] == frames).float() / LAYOUT.tokens_per_frame
    mass = frame_mass(Attention.from_weights(blocks[None, None], site=sharp().site))[0, 0]
    torch.testing.assert_close(mass.sum(-1)[..., 1], torch.eye(2).double(), atol=1e-6, rtol=0)
    close(mass[0, 0, 1], torch.tensor([3 / 15, 12 / 15]).double())


def test_a_planted_sink_is_found() -> None:
    weights = torch.full((1, 2, N, N), 0.5 / (N - 1))
    weights[:, 1, :, 7] = 0.5
    weights[:, 0] = 1 / N
    found = sink_tokens(Attention.from_weights(weights), times=10)
    assert found.tokens.tolist() == [[0, 1, 7]]
    assert found.shares.tolist() == pytest.approx([0.5 * N])


def test_a_token_off_is_seen() -> None:
    a = sharp()
    p = dense_of(a).roll(1, -1)
    with pytest.raises(AssertionError):
        close(received(a), p.sum(2))
    with pytest.raises(AssertionError):
        close(frame_mass(a)[:, :, 0, 0, 1, 1], p[:, :, 3:15, 3:15].sum(-1).mean(2))


def test_windows_have_rows_and_no_places() -> None:
    window = WindowInfo(grid=(10, 6), window=(5, 6))  # a batch item for each of two windows
    a = sharp()
    cut = a.with_site(SiteInfo("windows", "window", window=window))
    close(entropy(cut), entropy(a))
    close(received(cut), received(a))
    with pytest.raises(LayoutError, match="'windows' does not say where its key tokens lie"):
        special_mass(cut)


@pytest.mark.gpu
def test_numbers_on_cuda_are_those_on_the_cpu() -> None:
    a = sharp().to(torch.bfloat16)
    there = a.to("cuda")
    for call in (entropy, received, frame_mass, distance):
        found = call(there)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), call(a), rtol=1e-4, atol=1e-5, equal_nan=True)
    for kind, mass in special_mass(there).items():
        torch.testing.assert_close(mass.cpu(), special_mass(a)[kind], rtol=1e-4, atol=1e-5)
    table = summarize(there)
    for name, column in summarize(a).columns.items():
        if column.dtype.kind == "f":
            torch.testing.assert_close(
                torch.from_numpy(table[name]), torch.from_numpy(column), rtol=1e-4, atol=1e-5
            )


def test_what_cannot_be_answered_is_an_error() -> None:
    a = sharp()
    query = a.query.clone()
    query[0, 0, 3, 0] = math.inf
    for call in (entropy, received, frame_mass):
        with pytest.raises(InputError, match="must be finite"):
            call(Attention(query=query, key=a.key, site=a.site))
        with pytest.raises(InputError, match="overflow"):
            call(Attention(query=a.query * 1e30, key=a.key * 1e30, site=a.site))
    for k in (0, N + 1):
        with pytest.raises(InputError, match=rf"1 to the number of keys, {N}, got {k}"):
            top_keys(a, k)
    with pytest.raises(InputError, match="positive"):
        sink_tokens(a, 0)
    bare = Attention(query=a.query, key=a.key)
    for call in (special_mass, frame_mass, distance):
        with pytest.raises(LayoutError, match="does not say where its"):
            call(bare)
    with pytest.raises(LayoutError, match="within one frame"):
        distance(sharp(keys=OTHER.num_tokens))
