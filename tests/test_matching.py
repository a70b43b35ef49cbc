"""Places, confidence, cycles and match rates equal loops over dense weights in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import dense_of
from torch import Tensor

from vistvis import Attention, SiteInfo, TokenLayout, open_run, save_run
from vistvis.analysis import correspondence, cost_volume, match_rate, similarity
from vistvis.analysis.matching import How
from vistvis.attention import TokenOrder
from vistvis.errors import InputError, LayoutError

LAYOUT = TokenLayout(2, (3, 4), ("camera", "register"), (14, 10), before=("scale",))
N = LAYOUT.num_tokens  # 29
OTHER = TokenLayout(3, (2, 5), ("camera",), 14)  # 33 keys of other pictures
SITE = SiteInfo("block 3", "global", query_layout=LAYOUT, key_layout=LAYOUT)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def sharp(
    queries: int = N, keys: int = N, key_heads: int = 4, site: SiteInfo = SITE, **more: object
) -> Attention:
    query = 2.0 * torch.randn(2, 4, queries, 16, generator=seeded(queries))
    key = torch.randn(2, key_heads, keys, 16, generator=seeded(keys + 1))
    return Attention(query=query, key=key, site=site, **more)  # type: ignore[arg-type]


def masked() -> Attention:
    mask = torch.rand(2, 1, N, N, generator=seeded(1)) < 0.6
    mask[0, 0, 5] = False  # a patch that sees no key
    mask[1, 0, 6, 15:] = False  # one that sees no patch of the other frame
    return sharp(mask=mask)


def reordered() -> Attention:
    """Other tokens in another order in both batch items; one outside the layout."""
    orders = [
        TokenOrder(torch.stack([torch.randperm(N, generator=seeded(n + b))[:20] for b in (0, 1)]))
        for n in (3, 5)
    ]
    orders[1].tokens[0, 2] = -1
    return sharp(20, 20, site=replace(SITE, query_order=orders[0], key_order=orders[1]))


def merged() -> Attention:
    """Neighbours merged in twos, on both sides."""
    order = TokenOrder(torch.arange(N), torch.arange(N) // 2)
    return sharp(15, 15, site=replace(SITE, query_order=order, key_order=order))


def cached() -> Attention:
    """Queries of the newest two frames, keys of four."""
    keys = replace(LAYOUT, frames=4)
    return sharp(keys=keys.num_tokens, site=replace(SITE, key_layout=keys, first_frame=2))


SOURCES: dict[str, Callable[[], Attention]] = {
    "plain": sharp,
    "masked": masked,
    "causal": lambda: sharp(causal=True),
    "grouped": lambda: sharp(key_heads=2),
    "cross": lambda: sharp(keys=OTHER.num_tokens, site=replace(SITE, key_layout=OTHER)),
    "segments": lambda: sharp(segments=[0, 7, 20]),
    "weights": lambda: Attention.from_weights(sharp().dense(), site=SITE),
    "reordered": reordered,
    "merged": merged,
    "cached": cached,
}


@pytest.fixture(params=[*SOURCES, "stored"])
def a(request: pytest.FixtureRequest, tmp_path: Path) -> Attention:
    if request.param != "stored":
        return SOURCES[request.param]()
    save_run({"site": sharp()}, tmp_path / "run")
    return open_run(tmp_path / "run")["site"]


def of_originals(a: Attention) -> Tensor:
    """Dense weights between original tokens; rows of dropped ones are NaN."""
    assert a.site is not None
    p, site = dense_of(a), a.site
    assert site.query_layout is not None
    assert site.key_layout is not None
    for order, count, dim in (
        (site.key_order, site.key_layout.num_tokens, 3),
        (site.query_order, site.query_layout.num_tokens, 2),
    ):
        if order is None:
            continue
        shape = [*p.shape]
        shape[dim] = count
        out = torch.full(shape, 0.0 if dim == 3 else math.nan, dtype=p.dtype)
        for b in range(len(p)):
            tokens = order.tokens if order.tokens.ndim == 1 else order.tokens[b]
            members = torch.arange(len(tokens)) if order.members is None else order.members
            for token, member in zip(tokens.tolist(), members.tolist(), strict=True):
                if token >= 0 and dim == 3:
                    out[b, :, :, token] = p[b, :, :, member] / int((members == member).sum())
                elif token >= 0:
                    out[b, :, token] = p[b, :, member]
        p = out
    return p


def pointed(
    p: Tensor, layouts: tuple[TokenLayout, TokenLayout], frames: tuple[int, int], how: How
) -> np.ndarray:
    """(row, col, confidence, mass) of every patch, `(B, h, P, 4)`, by loops."""
    query, key = layouts
    rows, cols = key.grid
    out = np.full((*p.shape[:2], query.num_patches, 4), np.nan)
    keys = [
        (r, c, key.index(frame=frames[1], row=r, col=c)) for r in range(rows) for c in range(cols)
    ]
    for b, h, patch in np.ndindex(*out.shape[:3]):
        row = p[b, h, query.index(frame=frames[0], patch=patch)]
        weights = {(r, c): float(row[k]) for r, c, k in keys}
        mass = sum(weights.values())
        if math.isnan(mass):
            continue
        out[b, h, patch, 3] = mass
        if mass == 0:
            continue
        if how == "argmax":
            place = max(weights, key=lambda one: weights[one])
        else:
            place = tuple(
                sum(w * one[axis] for one, w in weights.items()) / mass for axis in (0, 1)
            )  # type: ignore[assignment]
        on = weights[math.floor(place[0] + 0.5), math.floor(place[1] + 0.5)]
        out[b, h, patch, :3] = (*place, on / mass)
    return out


def cycles(there: np.ndarray, back: np.ndarray, layout: TokenLayout) -> np.ndarray:
    out = np.full(there.shape[:3], np.nan)
    cols = layout.grid[1]
    for b, h, patch in np.ndindex(*out.shape):
        r, c = there[b, h, patch, :2]
        if math.isnan(r):
            continue
        end = back[b, h, math.floor(r + 0.5) * cols + math.floor(c + 0.5), :2]
        out[b, h, patch] = math.dist(end, divmod(patch, cols))
    return out


def close(found: Tensor, expected: np.ndarray | Tensor) -> None:
    assert found.dtype == torch.float64
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5, equal_nan=True)


# One row at a time, a block of a few, and everything at once.
@pytest.mark.parametrize("max_bytes", [1, 2000, None])
@pytest.mark.parametrize("how", ["argmax", "expected"])
def test_correspondences_equal_loops_over_dense_weights(
    a: Attention, how: How, max_bytes: int | None
) -> None:
    assert a.site is not None
    layouts = a.query_layout, a.key_layout
    assert layouts[0] is not None
    assert layouts[1] is not None
    assert 0.3 < dense_of(a).amax(-1).mean() < 0.95
    p = of_originals(a)
    frames = (1, 0) if a.causal else (0, layouts[1].frames - 1)
    found = correspondence(a, *frames, how=how, max_bytes=max_bytes)
    there = pointed(p, layouts, frames, how)  # type: ignore[arg-type]
    close(torch.cat([found.places, found.confidence[..., None], found.mass[..., None]], -1), there)
    if layouts[1] == OTHER:
        assert found.cycle.isnan().all()
        return
    first = a.site.first_frame
    back = pointed(p, layouts, (frames[1] - first, frames[0] + first), how)  # type: ignore[arg-type]
    close(found.cycle, cycles(there, back, layouts[0]))
    assert a.causal or not found.cycle.isnan().all()  # the first frame sees no later one


def test_a_mistake_is_seen() -> None:
    a = sharp()
    p, layouts = dense_of(a), (LAYOUT, LAYOUT)
    found = correspondence(a, 0, 1)
    back = pointed(p, layouts, (1, 0), "argmax")
    wrong = {
        "rows for columns": found.places.flip(-1),
        "a query off": correspondence(of_weights(p.roll(1, 2)), 0, 1).places,
        "a key off": correspondence(of_weights(p.roll(1, 3)), 0, 1).places,
        "the other frame": correspondence(a, 0, 0).places,
    }
    there = pointed(p, layouts, (0, 1), "argmax")
    for what, places in wrong.items():
        try:
            close(places, there[..., :2])
        except AssertionError:
            continue
        pytest.fail(f"nobody saw {what}")
    with pytest.raises(AssertionError):
        close(found.mass, found.mass / found.mass.sum())
    with pytest.raises(AssertionError):  # a cycle that forgets where it began
        close(found.cycle, cycles(there, back[:, :, ::-1], LAYOUT))


def of_weights(weights: Tensor) -> Attention:
    return Attention.from_weights(weights.float(), site=SITE)


def pointing(targets: Tensor, back: Tensor | None = None) -> Attention:
    """Patches of frame 0 that give 0.8 to the patches `targets` of frame 1; those of frame 1 the
    same back, or to the patches `back` of frame 0. One head, one batch item."""
    count = LAYOUT.num_patches
    back = targets.argsort() if back is None else back
    first, second = (LAYOUT.index(frame=f, patch=0) for f in (0, 1))
    weights = torch.full((1, 1, N, N), 0.2 / (N - 1))
    weights[0, 0, first + torch.arange(count), second + targets] = 0.8
    weights[0, 0, second + torch.arange(count), first + back] = 0.8
    return of_weights(weights)


def centres(patches: Tensor) -> Tensor:
    """(x, y) in pixels, as the layout's own boxes say."""
    boxes = [LAYOUT.locate(LAYOUT.index(patch=int(patch))).box for patch in patches]
    return torch.tensor([((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes])  # type: ignore[misc]


def matches(targets: Tensor) -> Tensor:
    return torch.cat([centres(torch.arange(len(targets))), centres(targets)], 1)


def test_a_permutation_is_found_and_points_back() -> None:
    targets = torch.randperm(12, generator=seeded(2))
    a = pointing(targets)
    found = correspondence(a, 0, 1)
    assert (found.places[0, 0] == torch.stack([targets // 4, targets % 4], -1)).all()
    assert (found.cycle == 0).all()
    mass = 0.8 + 11 * 0.2 / 28
    close(found.mass, torch.full((1, 1, 12), mass).double())
    close(found.confidence, torch.full((1, 1, 12), 0.8 / mass).double())
    for within in (0, 1):
        rate = match_rate(a, 0, 1, matches(targets), within=within)
        assert rate.rate.tolist() == [[1.0]]
        assert rate.counted.tolist() == [12]
    # Back at the patch to the right of where they came from, or from the end of a line three away.
    away = (targets.argsort() + 1) % 12
    cycle = correspondence(pointing(targets, away), 0, 1).cycle[0, 0]
    expected = [math.dist(divmod(n, 4), divmod((n + 1) % 12, 4)) for n in range(12)]
    close(cycle, torch.tensor(expected).double())


def test_mean_places_lie_between_patches() -> None:
    weights = torch.zeros(1, 1, N, N)
    start, end = (LAYOUT.index(frame=f, patch=0) for f in (0, 1))
    weights[0, 0, start, end + 1], weights[0, 0, start, end + 10] = 0.5, 0.25  # (0, 1) and (2, 2)
    found = correspondence(of_weights(weights), 0, 1, how="expected")
    close(found.places[0, 0, 0], torch.tensor([2 / 3, 4 / 3]).double())
    assert found.confidence[0, 0, 0] == 0  # nothing is on (1, 1), where they meet
    assert found.mass[0, 0, 1] == 0
    assert found.places[0, 0, 1].isnan().all()


def test_the_half_patch_rule() -> None:
    a = pointing(torch.arange(12))
    start = centres(torch.tensor([5]))  # patch (1, 1), of 14×10 pixels
    for dx, dy, hits in (
        (5.0, 0.0, (1, 1)),
        (5.1, 0.0, (0, 1)),
        (-15.0, 0.0, (0, 1)),
        (15.1, 0.0, (0, 0)),
        (0.0, 7.0, (1, 1)),
        (0.0, 20.9, (0, 1)),
        (0.0, -20.9, (0, 1)),
        (0.0, 21.1 - 42, (0, 1)),
        (0.0, 7.1, (0, 1)),
        (14.0, 19.0, (0, 1)),
        (16.0, 0.0, (0, 0)),
    ):
        truth = torch.cat([start, start + torch.tensor([dx, dy])], 1)
        found = [match_rate(a, 0, 1, truth, within=within).rate.item() for within in (0, 1)]
        assert found == list(hits), (dx, dy)


def test_what_is_counted() -> None:
    targets = torch.arange(12)
    truth = matches(targets)
    truth[0, 0], truth[1, 3], truth[2, 2], truth[3, 2] = math.nan, math.inf, -0.1, 40.0
    truth[4, 2:] = centres(torch.tensor([11]))[0]  # patch 4 is seen at patch 11: a miss
    # Several in one patch each count, wherever in it.
    truth = torch.cat([truth, truth[5:6] + torch.tensor([[4.9, -6.9, 0, 0]])])
    found = match_rate(pointing(targets), 0, 1, truth.numpy())
    assert found.counted.tolist() == [9]
    assert found.rate.item() == 8 / 9
    none = match_rate(pointing(targets), 0, 1, truth[:4])
    assert none.counted.tolist() == [0]
    assert none.rate.isnan().all()
    # Who gives nothing to that frame has missed; who was dropped was not asked.
    kept = torch.cat([torch.arange(6), torch.arange(8, N)])  # without patches 3 and 4
    site = replace(SITE, query_order=TokenOrder(kept))
    weights = pointing(targets).dense()[:, :, kept]
    weights[0, 0, 5, :] = 0  # token 5, patch 2
    found = match_rate(Attention.from_weights(weights, site=site), 0, 1, matches(targets))
    assert found.counted.tolist() == [10]
    assert found.rate.item() == 9 / 10


def test_a_planted_shift_agrees_with_its_disparity() -> None:
    grid = torch.arange(12).view(3, 4)
    a = pointing(grid.roll(1, 1).flatten(), grid.roll(-1, 1).flatten())  # one patch to the left
    disparity = torch.full(LAYOUT.image_size, 10.0)
    found = match_rate(a, 0, 1, disparity, within=0)
    assert found.counted.tolist() == [9]  # the first column leaves the picture
    assert found.rate.item() == 1
    assert match_rate(a, 0, 1, disparity * 2, within=0).rate.item() == 0
    assert match_rate(a, 0, 1, disparity * 2, within=1).rate.item() == 1
    disparity[:14] = torch.tensor([0.0, -3.0, math.nan, math.inf]).repeat_interleave(10)
    assert match_rate(a, 0, 1, disparity).counted.tolist() == [6]


def test_what_is_nearer_hides_what_is_behind() -> None:
    # In grid row 1 pixels from x on lie before the others. The centre of patch (1, 2), at 25, lands
    # on pixel 23; pixel 34 on 22 beside it, 33 and 36 on 21 and 24, 37 on 25.
    for x, nearer, hidden in (
        (slice(30, 40), 12.0, 1),
        (slice(34, 35), 12.0, 1),
        (slice(36, 37), 12.0, 1),
        (slice(33, 34), 12.0, 0),
        (slice(37, 38), 12.0, 0),
        (slice(26, 27), 2.9, 0),  # lands on 23, and is no nearer than a pixel
        (slice(26, 27), 3.1, 1),  # on 23 as well
    ):
        disparity = torch.full(LAYOUT.image_size, 2.0)
        disparity[14:28, x] = nearer
        found = match_rate(pointing(torch.arange(12)), 0, 1, disparity)
        assert found.counted.tolist() == [12 - hidden], (x, nearer)


def fundamental(seed: int) -> np.ndarray:
    """Of two cameras, turned a little against each other: K⁻ᵀ [t]ₓ R K⁻¹."""
    rng = np.random.default_rng(seed)
    inner = np.array([[50.0, 0, 20], [0, 50, 21], [0, 0, 1]])
    t = rng.normal(size=3)
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    turn = np.linalg.qr(np.eye(3) + 0.2 * rng.normal(size=(3, 3)))[0]
    return np.asarray(np.linalg.inv(inner).T @ cross @ turn @ np.linalg.inv(inner))


@pytest.mark.parametrize("how", ["argmax", "expected"])
def test_sampson_distances_equal_loops(how: How) -> None:
    a = sharp()
    there = pointed(dense_of(a), (LAYOUT, LAYOUT), (0, 1), how)
    start = centres(torch.arange(12)).double().numpy()
    rates = []
    for seed in range(4):
        F = fundamental(seed)
        far, counted = np.full((2, 4, 12), np.nan), np.zeros(12, bool)
        for patch in range(12):
            x = np.array([*start[patch], 1.0])
            line = F @ x
            # The points of the line on a fine net of places in the picture.
            net = np.stack(np.meshgrid(np.linspace(0, 40, 201), np.linspace(0, 42, 201)), -1)
            side = net @ line[:2] + line[2]
            counted[patch] = side.min() < 0 < side.max()
            for b, h in np.ndindex(2, 4):
                row, col = there[b, h, patch, :2]
                y = np.array([(col + 0.5) * 10, (row + 0.5) * 14, 1.0])
                back = F.T @ y
                slope = line[0] ** 2 + line[1] ** 2 + back[0] ** 2 + back[1] ** 2
                far[b, h, patch] = abs(y @ F @ x) / math.sqrt(slope)
        for limit in (1.0, 5.0, 12.0):
            found = match_rate(a, 0, 1, F, pixels=limit, how=how)
            assert found.counted.tolist() == [counted.sum()] * 2
            close(found.rate, (far <= limit)[..., counted].mean(-1))
            rates.append(found.rate)
        within = match_rate(a, 0, 1, F, within=0, how=how)
        close(within.rate, (far <= 5.0)[..., counted].mean(-1))
    assert 0 < torch.stack(rates).mean() < 1
    turned = match_rate(a, 0, 1, F.T, pixels=5.0, how=how).rate
    with pytest.raises(AssertionError):  # the two pictures exchanged
        close(turned, (far <= 5.0)[..., counted].mean(-1))


def test_a_rectified_pair_has_matches_on_its_lines() -> None:
    F = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # y' = y
    grid = torch.arange(12).view(3, 4)
    assert match_rate(pointing(grid.roll(1, 1).flatten()), 0, 1, F, pixels=0).rate.item() == 1
    assert match_rate(pointing(grid.roll(1, 0).flatten()), 0, 1, F, pixels=7).rate.item() == 0


def test_only_the_rows_of_two_frames_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    a, sizes = sharp(), []
    walk = Attention.row_blocks

    def counted(self: Attention, **more: object) -> object:
        for index, weights in walk(self, **more):  # type: ignore[arg-type]
            sizes.append(weights.shape[:3].numel())
            yield index, weights

    monkeypatch.setattr(Attention, "row_blocks", counted)
    correspondence(a, 0, 1, batch=1, heads=[2, 0])
    assert sum(sizes) == 2 * (12 + 12)
    sizes.clear()
    match_rate(a, 1, 0, matches(torch.arange(12)))
    assert sum(sizes) == 2 * 4 * 12


def test_some_batch_items_and_heads() -> None:
    for a in (sharp(), reordered()):
        whole, truth = correspondence(a, 1, 0), matches(torch.arange(12))
        some = correspondence(a, 1, 0, batch=[1], heads=[3, 0])
        for part, every in zip(some, whole, strict=True):
            close(part, every[1:, [3, 0]])
        rates = match_rate(a, 1, 0, truth)
        assert 0 < rates.rate.nanmean() < 1
        for b in (0, 1):
            one = match_rate(a, 1, 0, truth, batch=b, heads=slice(1, 3))
            close(one.rate, rates.rate[b : b + 1, 1:3])
            assert one.counted.tolist() == [rates.counted[b]]


def test_pictures_of_their_own_have_no_way_back() -> None:
    """As the decoders of DUSt3R, told by hand: queries of one picture, keys of another."""
    one = LAYOUT.frame_layout()
    site = SiteInfo("dec", "cross", query_layout=one, key_layout=one)
    found = correspondence(sharp(one.num_tokens, one.num_tokens, site=site), 0, 0)
    assert found.cycle.isnan().all()
    assert not found.places.isnan().any()
    other = sharp(keys=OTHER.num_tokens, site=replace(SITE, key_layout=OTHER))
    assert correspondence(other, 0, 1).cycle.isnan().all()


def test_what_cannot_be_answered_is_an_error() -> None:
    a, truth = sharp(), matches(torch.arange(12))
    folded = a.with_site(replace(SITE, frames_in_batch=True))
    bare = Attention(query=a.query, key=a.key)
    dropped = sharp(9, site=replace(SITE, query_order=TokenOrder(torch.arange(9))))
    for wrong, frames, text in (
        (folded, (0, 0), "'block 3' has its frames in the batch.*take a site"),
        (bare, (0, 1), "does not say where its query tokens lie"),
        (a, (0, 2), "'block 3' has keys of frames 0…1, got 2"),
        (a, (-1, 0), "'block 3' has queries of frames 0…1, got -1"),
        (dropped, (1, 0), "'block 3' saw no patch of frame 1 among its queries"),
    ):
        for call in (
            lambda one=wrong, two=frames: correspondence(one, *two),
            lambda one=wrong, two=frames: match_rate(one, *two, truth),
        ):
            with pytest.raises(LayoutError, match=text):
                call()
    with pytest.raises(InputError, match='"argmax" or "expected", got \'best\''):
        correspondence(a, 0, 1, how="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'block 3' has negative weights"):
        correspondence(of_weights(a.dense() - 0.1), 0, 1)
    for bad, text in (
        (torch.zeros(12, 2), r"\(M, 4\), a disparity map of the picture \(42, 40\) or.*fits none"),
        ("photo", "array of numbers"),
        (torch.zeros(3, 3), "finite and not zero"),
        (torch.full((3, 3), math.nan), "finite and not zero"),
    ):
        with pytest.raises(InputError, match=text):
            match_rate(a, 0, 1, bad)
    with pytest.raises(InputError, match="0 or more"):
        match_rate(a, 0, 1, truth, within=-1)
    with pytest.raises(InputError, match="pixels go with a fundamental matrix, the truth is match"):
        match_rate(a, 0, 1, truth, pixels=3)
    small = TokenLayout(2, (3, 3), patch_size=1)
    site = SiteInfo("small", "global", query_layout=small, key_layout=small)
    with pytest.raises(InputError, match="fits fundamental matrix and disparity"):
        match_rate(sharp(18, 18, site=site), 0, 1, torch.ones(3, 3))


@pytest.mark.gpu
def test_matches_on_cuda_are_those_on_the_cpu() -> None:
    disparity = torch.full(LAYOUT.image_size, 10.0)
    for a in (sharp(), reordered()):
        there = a.to("cuda")
        for found, expected in zip(
            correspondence(there, 0, 1), correspondence(a, 0, 1), strict=True
        ):
            assert found.is_cuda
            close(found.cpu(), expected)
        for truth in (matches(torch.arange(12)), disparity, fundamental(0)):
            found, expected = match_rate(there, 0, 1, truth), match_rate(a, 0, 1, truth)
            close(found.rate.cpu(), expected.rate)
            assert found.counted.tolist() == expected.counted.tolist()
        close(cost_volume(there, 0, 1).double().cpu(), cost_volume(a, 0, 1).double())
        close(similarity(there, samples=5).matrix, similarity(a, samples=5).matrix)
