"""Rollout of one token equals the product of dense float64 matrices, whatever the blocks are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws import reference_weights
from test_extractor import sharpen
from torch import Tensor

from vggt_adapter.extractor import AttentionExtractor
from vggt_adapter.model import VGGT
from vistvis import Attention, SiteInfo, TokenLayout, open_run, save_run
from vistvis.analysis import rollout
from vistvis.attention import TokenOrder, WindowInfo
from vistvis.errors import IndexOutOfRange, InputError, LayoutError, SiteError

LAYOUT = TokenLayout(3, (2, 3), ("camera", "register"), 14)
P, N = LAYOUT.tokens_per_frame, LAYOUT.num_tokens  # 8, 24
FRAME = SiteInfo("frame", "frame", query_layout=LAYOUT.frame_layout(), frames_in_batch=True)
GLOBAL = SiteInfo("global", "global", query_layout=LAYOUT)


def made(
    seed: int, *, batch: int = 2, tokens: int = N, key_heads: int = 4, **more: object
) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    query = 1.5 * torch.randn(batch, 4, tokens, 16, generator=generator)
    key = torch.randn(batch, key_heads, tokens, 16, generator=generator)
    return Attention(query=query, key=key, **more)  # type: ignore[arg-type]


def plain() -> list[Attention]:
    return [made(seed) for seed in range(3)]


def masked() -> list[Attention]:
    mask = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0, 0, 5] = False  # a query that sees no key
    return [made(seed, mask=mask) for seed in range(3)]


def mixed() -> list[Attention]:
    """Frame and global blocks by turns, two scenes of three frames."""
    frames = [made(10 + n, batch=6, tokens=P, site=FRAME) for n in range(2)]
    whole = [made(20 + n, site=GLOBAL) for n in range(2)]
    return [block for pair in zip(frames, whole, strict=True) for block in pair]


STACKS: dict[str, Callable[[], list[Attention]]] = {
    "plain": plain,
    "masked": masked,
    "causal": lambda: [made(seed, causal=True) for seed in range(3)],
    "grouped": lambda: [made(seed, key_heads=2) for seed in range(3)],
    "segments": lambda: [made(0, segments=[0, 7, 15]), made(1), made(2, segments=[0, 9])],
    "weights": lambda: [Attention.from_weights(block.dense()) for block in plain()],
    "mixed": mixed,
    "global last": lambda: mixed()[:-1],
}


@pytest.fixture(params=[*STACKS, "stored"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> list[Attention]:
    if request.param != "stored":
        return STACKS[request.param]()
    save_run({f"block_{n}": block for n, block in enumerate(mixed())}, tmp_path / "run")
    return list(open_run(tmp_path / "run").values())


def matrices(block: Attention) -> Tensor:
    """`(B, h, N, N)` in float64 by another way, frames put on the diagonal."""
    if block.weights is not None:
        return block.weights.double()
    seen = torch.ones(block.shape, dtype=torch.bool)
    if block.mask is not None:
        seen &= block.mask
    if block.segments is not None:
        of = torch.searchsorted(block.segments, torch.arange(block.shape[2]), right=True)
        seen &= of[:, None] == of
    weights = reference_weights(block.query, block.key, mask=seen, causal=block.causal)
    assert weights.max() > 0.3
    if block.site is None or not block.site.frames_in_batch:
        return weights
    frames = block.shape[0] // 2
    scenes = weights.unflatten(0, (2, frames)).transpose(1, 2)  # (B, h, S, P, P)
    return torch.stack([torch.stack([torch.block_diag(*h) for h in scene]) for scene in scenes])


def expected(
    stack: list[Attention], *, fusion: str = "mean", residual: float = 0.5, discard: float = 0.0
) -> Tensor:
    """Every row of the rollout, `(B, N, N)`, the matrices multiplied from the first on."""
    product = torch.eye(N, dtype=torch.float64).expand(2, N, N)
    for block in stack:
        weights = matrices(block)
        fused = {
            "mean": weights.sum(1) / weights.shape[1],
            "max": weights.max(1).values,
            "min": weights.min(1).values,
        }[fusion]
        size = N if block.site is None or not block.site.frames_in_batch else P
        for start in range(0, N, size):  # in a frame block only a frame's own keys count
            own = fused[:, start : start + size, start : start + size]
            least = own.sort(-1).values[..., math.floor(discard * size), None]
            own[own < least] = 0
        mix = residual * torch.eye(N, dtype=torch.float64) + (1 - residual) * fused
        total = mix.sum(-1, keepdim=True)
        product = (mix / total.where(total > 0, 1.0)) @ product
    return product


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


# One row at a time, a few, and everything at once.
@pytest.mark.parametrize("max_bytes", [1, 4 * 4 * N * 5, None])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_equal_to_the_product_of_matrices(
    stack: list[Attention], fusion: str, max_bytes: int | None
) -> None:
    for residual in (0.5, 0.2):
        for discard in (0.0, 0.6):
            options = {"fusion": fusion, "residual": residual, "discard": discard}
            wanted = expected(stack, **options)  # type: ignore[arg-type]
            found = rollout(stack, 5, max_bytes=max_bytes, **options)  # type: ignore[arg-type]
            assert found.shape == (2, N)
            close(found, wanted[:, 5])
            close(found.sum(-1), torch.ones(2).double())


@pytest.mark.parametrize("residual", [0.0, 1.0])
def test_all_or_nothing_of_the_residual(residual: float) -> None:
    found = rollout(masked(), 5, residual=residual)
    close(found, expected(masked(), residual=residual)[:, 5])
    # The query that sees no key, in the last block, without a residual: nothing is left.
    assert found[0].sum() == pytest.approx(residual)
    assert found[1].sum() == pytest.approx(1)


def test_the_bundled_vggt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = VGGT.tiny(), torch.rand(2, 3, 3, 28, 42)
    sharpen(model, images)
    with torch.no_grad(), AttentionExtractor(model) as extractor:
        extractor.register_hooks()
        model(images)
    captured = extractor.captured
    layout = captured["global_block_0"].query_layout
    assert layout is not None
    per_frame, count = layout.tokens_per_frame, layout.num_tokens
    product = torch.eye(count, dtype=torch.float64).expand(2, -1, -1)
    for name, block in captured.items():
        every = reference_weights(block.query, block.key)
        assert 0.3 < every.max() < 0.95
        weights = every.mean(1)
        if name.startswith("frame"):
            wide = torch.zeros(2, count, count, dtype=torch.float64)
            for item, matrix in enumerate(weights):
                scene, frame = divmod(item, 3)
                own = slice(frame * per_frame, (frame + 1) * per_frame)
                wide[scene, own, own] = matrix
            weights = wide
        product = (torch.eye(count, dtype=torch.float64) + weights) / 2 @ product
    query = layout.index(frame=1, row=1, col=2)
    close(rollout(captured, query), product[:, query])
    in_frame = layout.index(frame=0, row=1, col=2)
    assert torch.equal(rollout(captured, in_frame, frame=1), rollout(captured, query))
    assert torch.equal(rollout(captured, -1, frame=0), rollout(captured, per_frame - 1))
    save_run(captured, tmp_path / "run")
    close(rollout(open_run(tmp_path / "run"), query), product[:, query])
    # Frames alone never leave the frame of the query, and are scenes of their own.
    alone = rollout(captured, in_frame, sites="frame_*")
    assert alone.shape == (6, per_frame)
    close(alone.sum(-1), torch.ones(6).double())


def test_known_answers() -> None:
    def of(matrix: Tensor, blocks: int) -> list[Attention]:
        return [Attention.from_weights(matrix.expand(1, 2, *matrix.shape))] * blocks

    one_hot = torch.eye(N, dtype=torch.float64)
    assert torch.equal(rollout(of(torch.eye(N), 4), 7)[0], one_hot[7])
    # Even weights keep what the residual keeps, and spread the rest: 0.7³ stays in three blocks.
    even = torch.full((N, N), 1 / N, dtype=torch.float64)
    wanted = 0.343 * one_hot[7] + (1 - 0.343) / N
    for fusion in ("mean", "max", "min"):
        close(rollout(of(even, 3), 7, residual=0.7, fusion=fusion)[0], wanted)  # type: ignore[arg-type]
    # A token hands on to the next one: without a residual it comes from three before.
    step = one_hot.roll(1, 0)
    assert torch.equal(rollout(of(step, 3), 7, residual=0)[0], one_hot[4])
    # Of ten keys the three smallest go; equal ones stay.
    row = torch.tensor([1.0, 2, 3, 4, 4, 4, 5, 6, 7, 8]).double() / 44
    found = rollout(of(row.expand(10, 10), 1), 0, residual=0, discard=0.35)
    close(found[0], torch.tensor([0.0, 0, 0, 4, 4, 4, 5, 6, 7, 8]).double() / 38)
    close(rollout(of(even, 3), 7, residual=0.7, discard=0.9)[0], wanted)


def test_sites_and_negative_queries() -> None:
    every = {f"{'fg'[n % 2]}_{n // 2}": block for n, block in enumerate(mixed())}
    close(rollout(every, 3, sites="g_*"), expected(mixed()[1::2])[:, 3])
    # In the order of the model, whatever the order in which they are named.
    close(rollout(every, 3, sites=["g_1", "f_0"]), expected([mixed()[0], mixed()[3]])[:, 3])
    assert torch.equal(rollout(every, -1), rollout(every, N - 1))
    assert torch.equal(rollout(mixed(), 3), rollout(every, 3))


@pytest.mark.parametrize("mistake", ["left out", "transposed", "swapped", "other query"])
def test_mistakes_are_seen(mistake: str) -> None:
    stack, query = mixed(), 5
    wanted = expected(stack)[:, query]
    if mistake == "left out":
        stack = stack[:-1]
    elif mistake == "transposed":
        turned = stack[1].dense().mT.contiguous()
        stack[1] = Attention.from_weights(turned, site=GLOBAL)
    elif mistake == "swapped":
        stack = stack[::-1]
    else:
        query += 1
    with pytest.raises(AssertionError):
        close(rollout(stack, query), wanted)


def test_only_rows_that_count_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    rows = Attention.rows

    def watched(self: Attention, queries: Tensor, **more: object) -> Tensor:
        asked.append(len(queries))
        return rows(self, queries, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Attention, "rows", watched)
    # Where all rows are needed the mean takes another way, by `walk`.
    rollout(mixed(), 5, fusion="max")
    assert asked == [1, 1, *[P] * 6, N, N, *[P] * 6]  # of the last block one in each scene
    asked.clear()
    rollout(mixed()[:3], 5, fusion="max")  # the frame block is last: only the query's frame counts
    assert asked == [1, 1, P, P, *[P] * 6]


def test_blocks_of_other_streams_are_refused() -> None:
    good, fix = made(0, site=replace(GLOBAL, name="good")), "with sites="
    order = TokenOrder(torch.arange(N).flip(0))
    short = made(1, tokens=N - 1)
    cross = Attention(query=good.query, key=short.key)
    window = WindowInfo((4, 6), (4, 6))
    others = {
        "23 in 2": short,
        "24 queries and 23 keys": cross,
        "is window attention": good.with_site(SiteInfo("w", window=window)),
        "is cross attention": good.with_site(SiteInfo("c", "cross")),
        "another order": good.with_site(replace(GLOBAL, query_order=order)),
        "camera": good.with_site(replace(GLOBAL, query_layout=TokenLayout(3, (2, 3), 2))),
        "8 in 4": made(2, batch=4, tokens=P, site=FRAME),  # two frames of three
        "8 in 6": made(3, batch=6, tokens=P),  # nobody says that these are frames
    }
    for text, other in others.items():
        with pytest.raises(LayoutError, match=text) as caught:
            rollout({"good": good, "bad": other}, 0)
        assert "'bad'" in str(caught.value)
        assert fix in str(caught.value)
        close(rollout({"good": good, "bad": other}, 0, sites="good"), rollout([good], 0))
    turned = replace(FRAME, frame_order=torch.tensor([[1, 0, 2], [0, 1, 2]]))
    with pytest.raises(LayoutError, match="another order"):
        rollout([made(2, batch=6, tokens=P, site=turned), good], 0)


def test_arguments_that_cannot_be() -> None:
    stack = plain()
    for options, text in (
        ({"fusion": "sum"}, "mean, max, min"),
        ({"residual": 1.5}, "0 to 1"),
        ({"discard": 1.0}, "below 1"),
        ({"sites": "a"}, "from a mapping"),
    ):
        with pytest.raises(InputError, match=text):
            rollout(stack, 0, **options)  # type: ignore[arg-type]
    for query in (N, -N - 1):
        with pytest.raises(IndexOutOfRange, match=rf"outside 0…{N - 1}"):
            rollout(stack, query)
    with pytest.raises(LayoutError, match="count query over all tokens"):
        rollout(stack, 0, frame=1)
    with pytest.raises(LayoutError, match="frame 3 is outside"):
        rollout(mixed(), 0, frame=3)
    with pytest.raises(InputError, match="one block at least"):
        rollout([], 0)
    with pytest.raises(InputError, match="block 0 is list; of several passes"):
        rollout([stack], 0)  # type: ignore[list-item]
    with pytest.raises(SiteError, match="did you mean 'block'"):
        rollout({"block": stack[0]}, 0, sites="blok")
