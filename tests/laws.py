"""Laws that every source of attention rows keeps. Subclass `AttentionLaws`, supply two methods.

The reference is written here from the formula, in float64 and with plain loops over heads; it
shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from vistvis import Attention
from vistvis.attention import arithmetic, indexing


def reference_weights(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale · q·k + mask) in float64; rows without any key are zero."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            factor = width**-0.5 if scale is None else scale
            if isinstance(factor, Tensor):
                factor = float(factor.reshape(-1)[h if factor.numel() > 1 else 0])
            q, k = query[b, h].double().numpy(), key[b, h // group].double().numpy()
            logits = factor * np.einsum("id,jd->ij", q, k)
            if causal:
                logits[np.triu_indices(queries, 1, keys)] = -math.inf
            if mask is not None:
                part = mask.expand(batch, heads, queries, keys)[b, h].numpy()
                added = np.where(part, 0.0, -math.inf) if part.dtype == bool else part
                logits = logits + added
            highest = logits.max(-1, keepdims=True)
            highest[highest == -math.inf] = 0.0
            powers = np.exp(logits - highest)
            total = powers.sum(-1, keepdims=True)
            out[b, h] = torch.from_numpy(powers / np.where(total == 0, 1, total))
    return out


def largest_logit(attention: Attention) -> float:
    if attention.weights is not None:
        return 1.0
    logits = attention.logits(slice(None))
    return float(logits[logits.isfinite()].abs().max()) if logits.isfinite().any() else 1.0


class AttentionLaws:
    """`make()` gives the attention under test, `dense()` its weights by an independent way."""

    stochastic = True  # rows sum to 1 or are empty

    def make(self) -> Attention:
        raise NotImplementedError

    def dense(self) -> Tensor:
        raise NotImplementedError

    @pytest.fixture
    def attention(self) -> Attention:
        return self.make()

    @pytest.fixture
    def expected(self) -> Tensor:
        return self.dense()

    @pytest.fixture
    def tolerance(self, attention: Attention) -> float:
        eps = torch.finfo(attention.dtype).eps
        return 8 * eps * max(1.0, largest_logit(attention))

    def close(self, found: Tensor, wanted: Tensor, tolerance: float) -> None:
        assert found.shape == wanted.shape
        assert float((found.double() - wanted).abs().max()) <= tolerance

    def test_is_sharp(self, attention: Attention, expected: Tensor) -> None:
        assert expected.max() > 0.3  # near-uniform weights would hide mistakes

    def test_rows_are_distributions(self, attention: Attention, tolerance: float) -> None:
        rows = attention.rows(slice(None))
        assert bool((rows >= 0).all())
        if self.stochastic:
            sums = rows.double().sum(-1)
            off = torch.minimum((sums - 1).abs(), sums)
            assert float(off.max()) <= 50 * tolerance

    def test_rows(self, attention: Attention, expected: Tensor, tolerance: float) -> None:
        batch, heads, queries, _ = expected.shape
        self.close(attention.rows(None), expected, tolerance)
        for q in (0, queries // 2, -1):
            self.close(attention.rows(q), expected[:, :, q].unsqueeze(2), tolerance)
            one = attention.rows(q, batch=batch - 1, heads=heads - 1)
            self.close(one, expected[-1:, -1:, q].unsqueeze(2), tolerance)
        chosen = [queries - 1, 0, 0]
        self.close(
            attention.rows(chosen, heads=[0, -1]), expected[:, [0, -1]][:, :, chosen], tolerance
        )

    def test_columns(self, attention: Attention, expected: Tensor, tolerance: float) -> None:
        keys = expected.shape[3]
        for _ in range(2):  # before and after the rows' sums are known
            for k in (0, keys // 2, -1):
                wanted = expected[..., [k]]
                self.close(attention.columns(k), wanted, tolerance)
                one = attention.columns(k, batch=0, heads=0)
                self.close(one, wanted[:1, :1], tolerance)
            self.close(attention.columns([keys - 1, 0]), expected[..., [keys - 1, 0]], tolerance)
            every = attention.columns(slice(0, keys - 1))
            self.close(every, expected[..., :-1], tolerance)
            if self.stochastic:
                assert bool(((every >= 0) & (every <= 1)).all())
            if attention.weights is None:
                attention.log_sum_exp()

    def test_any_chunk_gives_the_same(
        self,
        attention: Attention,
        expected: Tensor,
        tolerance: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for limit in (1, 300, 5000):
            monkeypatch.setattr(arithmetic, "_CHUNK_BYTES", limit)
            fresh = self.make()
            self.close(fresh.dense(), expected, tolerance)
            self.close(fresh.columns(0), expected[..., [0]], tolerance)
            self.close(fresh[..., 1:, -1], expected[..., 1:, -1], tolerance)

    def assert_blocks_tile(
        self,
        blocks: Iterable[tuple[tuple[slice, ...], Tensor]],
        expected: Tensor,
        tolerance: float,
    ) -> None:
        """Each row of `expected` lies in one block, in order, under its own index."""
        seen = torch.zeros(expected.shape[:3], dtype=torch.int64)
        numbers = torch.arange(seen.numel()).view(seen.shape)
        last = -1
        for index, weights in blocks:
            assert weights.shape[:3] == seen[index].shape
            self.close(weights, expected[index], tolerance)
            seen[index] += 1
            assert int(numbers[index].min()) == last + 1  # none left out, and none before its turn
            last = int(numbers[index].max())
        assert bool((seen == 1).all())

    def test_row_blocks_tile_the_rows(
        self, attention: Attention, expected: Tensor, tolerance: float
    ) -> None:
        last = expected.shape[2] - 1
        chosen = expected[:, [-1, 0]][:, :, [last, 0, last]]
        for max_bytes in (None, 1, 150, 400, 10_000):
            blocks = list(attention.row_blocks(max_bytes=max_bytes))
            self.assert_blocks_tile(blocks, expected, tolerance)
            row_bytes = expected.shape[3] * attention.dtype.itemsize
            limit = max(8 * 2**20 if max_bytes is None else max_bytes, row_bytes)
            assert all(weights.nbytes <= limit for _, weights in blocks)
            some = attention.row_blocks(heads=[-1, 0], queries=[last, 0, last], max_bytes=max_bytes)
            self.assert_blocks_tile(some, chosen, tolerance)
            one = attention.row_blocks(batch=-1, heads=slice(1, None), max_bytes=max_bytes)
            self.assert_blocks_tile(one, expected[-1:, 1:], tolerance)
        assert all(type(weights) is Tensor for _, weights in blocks)

    def test_a_wrong_row_block_is_seen(
        self, attention: Attention, expected: Tensor, tolerance: float
    ) -> None:
        blocks = list(attention.row_blocks(max_bytes=1))
        (first, weights), (second, _) = blocks[:2]
        wrong = {
            "left out": blocks[1:],
            "twice": [*blocks, blocks[-1]],
            "out of turn": [blocks[1], blocks[0], *blocks[2:]],
            "of other rows": [(first, blocks[-1][1]), *blocks[1:]],
            "with its keys turned round": [(first, weights.flip(-1)), *blocks[1:]],
            "under another index": [(second, weights), *blocks[1:]],
        }
        for what, mistaken in wrong.items():
            try:
                self.assert_blocks_tile(mistaken, expected, tolerance)
            except AssertionError:
                continue
            pytest.fail(f"nobody saw a block {what}")

    def test_indexing_is_that_of_torch(
        self, attention: Attention, expected: Tensor, tolerance: float
    ) -> None:
        b, h, q, k = expected.shape
        mask = torch.zeros(q, dtype=torch.bool)
        mask[[0, q - 1]] = True
        for index in (
            0,
            (0, h - 1),
            (0, 0, q - 1),
            (b - 1, -1, q // 2, -1),
            slice(0, 1),
            (..., 0),
            (slice(None), 0, ..., k - 1),
            (slice(None), slice(None), [0, q - 1]),
            ([0, b - 1], [0, h - 1], [q - 1, 0]),
            (0, slice(None), torch.tensor([[0, 1], [1, 0]])),
            ([0], slice(None), [1, 0], slice(0, k, 2)),
            (0, [0, 0], slice(None), [0, -1]),
            (None, 0, 0),
            (0, 0, None, ..., None),
            (0, 0, mask),
            (0, 0, mask.tolist()),
            (0, slice(0, 0)),
            (0, 0, []),
            (torch.tensor(0), 0, np.int64(1)),
            (0, 0, np.array([1, 0])),
            (0, 0, slice(-2, None), slice(1, -1)),
            (0, 0, range(0, q, 2)),
        ):
            torch_index = index
            if isinstance(index, tuple):
                torch_index = tuple(list(i) if isinstance(i, range) else i for i in index)
            self.close_or_empty(attention[index], expected[torch_index], tolerance)

    def close_or_empty(self, found: Tensor, wanted: Tensor, tolerance: float) -> None:
        assert type(found) is Tensor
        assert found.shape == wanted.shape
        if wanted.numel():
            self.close(found, wanted, tolerance)

    def test_moving_keeps_the_weights(
        self, attention: Attention, expected: Tensor, tolerance: float
    ) -> None:
        self.close(attention.to(torch.float64).dense(), expected, tolerance)
        assert attention.to(torch.float64).dtype == torch.float64
        self.close(attention.cpu().detach().dense(), expected, tolerance)

    def test_no_index_leaves_the_attention(self, attention: Attention) -> None:
        b, h, q, k = attention.shape
        for index in ((b,), (0, h), (0, 0, -q - 1), (0, 0, 0, k), (0, 0, [q]), (0,) * 5):
            with pytest.raises(IndexError):
                attention[index]
        assert indexing.DIMENSIONS == ("batch", "head", "query", "key")
