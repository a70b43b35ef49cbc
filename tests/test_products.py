"""Logits, Gram matrices and cost volumes equal dot products in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_matching import LAYOUT, OTHER, SITE, N, reordered, seeded, sharp
from torch import Tensor

from vistvis import Attention
from vistvis.analysis import cost_volume, gram, logits
from vistvis.attention import TokenOrder
from vistvis.errors import CaptureError, DenseLimitError, InputError, LayoutError


def products(query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double())


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5, equal_nan=True)


def test_logits_are_what_enters_the_softmax() -> None:
    mask = torch.randn(N, N, generator=seeded(7))
    mask[:, 4] = -math.inf
    scale = torch.tensor([0.3, 0.2, 0.5, 0.25])
    a = sharp(mask=mask, scale=scale, key_heads=2)
    every = products(a.query, a.key.repeat_interleave(2, 1)) * scale.view(-1, 1, 1) + mask
    close(logits(a, [7, 2]), every[:, :, [7, 2]])
    close(logits(a, slice(3, 9), batch=1, heads=[3, 1]), every[1:, [3, 1], 3:9])
    with pytest.raises(DenseLimitError):
        logits(a, None, max_bytes=1000)


def test_gram_matrices_are_plain_products_of_one_side() -> None:
    mask = torch.rand(N, N, generator=seeded(7)) < 0.5
    a = sharp(mask=mask, key_heads=2)
    for side, vectors in (("query", a.query), ("key", a.key)):
        every = products(vectors, vectors)
        close(gram(a, side), every)  # type: ignore[arg-type]
        found = gram(a, side, tokens=[9, 0], batch=1, heads=-1)  # type: ignore[arg-type]
        close(found, every[1:, -1:, [9, 0]])
        with pytest.raises(DenseLimitError, match="more than the limit"):
            gram(a, side, max_bytes=1000)  # type: ignore[arg-type]
    assert gram(a, "key").shape[1] == 2
    with pytest.raises(AssertionError):  # the sides exchanged
        close(gram(a, "key"), products(a.query, a.query)[:, :2])


@pytest.mark.parametrize("frames", [(0, 1), (1, 0), (1, 1)])
def test_cost_volumes_equal_loops_over_patches(frames: tuple[int, int]) -> None:
    mask = torch.rand(N, N, generator=seeded(7)) < 0.5
    scale = torch.tensor([0.3, 0.2, 0.5, 0.25])
    other = replace(SITE, key_layout=OTHER)
    for a in (
        sharp(),
        sharp(mask=mask, scale=scale, key_heads=2),
        sharp(keys=OTHER.num_tokens, site=other),
        sharp(segments=[0, 7, 20], site=SITE),
    ):
        key = a.key_layout
        assert key is not None
        every = products(a.query, a.key.repeat_interleave(a.groups, 1))
        every *= a.scale.view(-1, 1, 1) if isinstance(a.scale, Tensor) else a.scale
        found = cost_volume(a, *frames)
        assert found.shape == (2, 4, *LAYOUT.grid, *key.grid)
        for r, c in ((0, 0), (2, 1), (1, 3)):
            query = LAYOUT.index(frame=frames[0], row=r, col=c)
            for y in range(key.grid[0]):
                for x in range(key.grid[1]):
                    k = key.index(frame=frames[1], row=y, col=x)
                    close(found[:, :, r, c, y, x], every[:, :, query, k])
        close(cost_volume(a, *frames, batch=[1], heads=[2, 0]), found[1:, [2, 0]].double())
    with pytest.raises(DenseLimitError):
        cost_volume(a, *frames, max_bytes=1000)


def test_cost_volumes_of_tokens_in_another_order() -> None:
    a = reordered()
    assert a.site is not None
    query, key = a.site.query_order, a.site.key_order
    assert query is not None
    assert key is not None
    every = products(a.query, a.key) * a.scale
    expected = torch.full((2, 4, N, N), math.nan, dtype=torch.float64)
    for b in (0, 1):
        for i, token in enumerate(query.tokens[b].tolist()):
            for j, other in enumerate(key.tokens[b].tolist()):
                if other >= 0:
                    expected[b, :, token, other] = every[b, :, i, j]
    first, second = (LAYOUT.index(frame=f, patch=0) for f in (0, 1))
    expected = expected[:, :, first : first + 12, second : second + 12].reshape(2, 4, 3, 4, 3, 4)
    assert 0 < expected.isnan().double().mean() < 1
    close(cost_volume(a, 0, 1), expected)
    close(cost_volume(a, 0, 1, batch=-1, heads=1), expected[1:, 1:2])
    with pytest.raises(AssertionError):  # rows for columns
        close(cost_volume(a, 0, 1).transpose(4, 5).reshape(expected.shape), expected)


def test_what_has_no_queries_and_keys_is_refused() -> None:
    a = sharp()
    given = Attention.from_weights(a.dense(), site=SITE)
    for call in (
        lambda: logits(given, [0]),
        lambda: gram(given, "key"),
        lambda: cost_volume(given, 0, 1),
    ):
        with pytest.raises(InputError, match="'block 3' was made from weights alone"):
            call()
    with pytest.raises(InputError, match='"query" or the "key" side, got \'value\''):
        gram(a, "value")  # type: ignore[arg-type]
    folded = a.with_site(replace(SITE, frames_in_batch=True))
    with pytest.raises(LayoutError, match="frames in the batch"):
        cost_volume(folded, 0, 0)
    few = sharp(9, site=replace(SITE, query_order=TokenOrder(torch.arange(9))))
    with pytest.raises(LayoutError, match="no patch of frame 1 among its queries"):
        cost_volume(few, 1, 0)
    a.query.add_(1)
    for call in (lambda: logits(a, [0]), lambda: gram(a, "key"), lambda: cost_volume(a, 0, 1)):
        with pytest.raises(CaptureError, match="written into"):
            call()
