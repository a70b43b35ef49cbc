"""What match rates mean: on pictures with known geometry they are those of the model card.

Other witnesses: `training/evaluate.py`, which has counted them for the card by code of its own, and
the true points and cameras of rendered scenes.
"""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from zoo import rendered_scenes

import vggt_adapter
from vggt_adapter import VGGT, AttentionExtractor
from vggt_adapter.sample_scene import sample_points, sample_views
from vistvis import Attention
from vistvis.analysis import correspondence, match_rate, similarity

CARD = Path(vggt_adapter.__file__).parent / "weights" / "MODEL_CARD.md"
PATCH = 14
POINTING, FREE = (3, 0), (0, 1)  # the heads that the card's table has, as (block, head)


@pytest.fixture(scope="module")
def model() -> VGGT:
    return VGGT.tiny().eval()


def captured(model: VGGT, images: Tensor) -> list[Attention]:
    """Of the global blocks."""
    with torch.no_grad(), AttentionExtractor(model).register_hooks(attention_types="global") as run:
        model(images)
    return list(run.captured.values())


def centres(grid: tuple[int, int]) -> np.ndarray:
    """(x, y) in pixels."""
    x, y = ((np.arange(n) + 0.5) * PATCH for n in grid[::-1])
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def card(row: str) -> dict[tuple[int, int], tuple[int, int]]:
    """(within one, exact) in per cent of both heads, as the table of the card says."""
    text = CARD.read_text(encoding="utf-8")
    assert "global block 3, head 0" in text
    assert "the best head that no loss was put on is global block 0, head 1" in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row}")]
    cells = [re.findall(r"\d+", cell) for cell in line.split("|")[2:]]
    pointing, free = (tuple(map(int, cells[column])) for column in (0, 2))
    return {POINTING: pointing, FREE: free}  # type: ignore[dict-item]


# Within one patch, and «exact»: at most half a patch off, and a thousandth for rounding.
WITHIN = (1.0, 1e-3)


def hits(attention: list[Attention], batch: Any) -> tuple[np.ndarray, int]:
    """Hits `(2, blocks, heads)` over all pairs of views of a batch of training/data.py, as whole
    numbers, and of how many."""
    scenes, views, _, height, width = batch.images.shape
    start = torch.from_numpy(centres((height // PATCH, width // PATCH)))
    total, count = np.zeros((2, len(attention), attention[0].shape[1])), 0
    for b in range(scenes):
        for i, j in permutations(range(views), 2):
            seen = batch.visible[b, i, j]
            if not seen.any():
                continue
            end = (batch.place[b, i, j].double() + 0.5) * PATCH
            truth = torch.cat([start, end], 1)[seen]
            for block, a in enumerate(attention):
                for n, within in enumerate(WITHIN):
                    found = match_rate(a, i, j, truth, within=within, batch=b)
                    assert found.counted.tolist() == [int(seen.sum())]
                    total[n, block] += found.rate[0].numpy() * len(truth)
            count += len(truth)
    return total.round(), count


def agrees(model: VGGT, items: Any) -> dict[tuple[int, int], tuple[float, float]]:
    """The shares of every head in per cent, once they equal those that training/evaluate.py has."""
    import evaluate

    total, count = np.zeros((2, 4, 2)), 0
    for batch in items.items:
        found, of = hits(captured(model, batch.images), batch)
        total, count = total + found, count + of
    for (block, head), expected in evaluate.score(model, items, None).heads.items():
        assert count == expected.count
        assert total[0, block, head] == expected.within
        assert total[1, block, head] == expected.exact
    shares = 100 * total / count
    return {(b, h): tuple(shares[:, b, h]) for b in range(4) for h in range(2)}


def motorcycle() -> tuple[Any, tuple[int, int]]:
    data = pytest.importorskip("skimage.data")
    import evaluate

    batch, grid = evaluate.stereo_pair(*data.stereo_motorcycle())
    return evaluate.Set("motorcycle", grid, [batch]), grid


def test_a_stereo_pair_has_the_rates_of_the_card(model: VGGT) -> None:
    items, _ = motorcycle()
    found = agrees(model, items)
    for head, shares in card("motorcycle").items():
        assert tuple(map(round, found[head])) == shares
    assert max(found, key=lambda head: found[head]) == POINTING


def test_its_disparity_map_gives_the_same(model: VGGT) -> None:
    items, (rows, cols) = motorcycle()
    import skimage.data as data

    _, _, disparity = data.stereo_motorcycle()
    height, width = disparity.shape
    scale = rows * PATCH / height  # as evaluate.stereo_pair resizes and crops the pair
    edge = round((width * scale - cols * PATCH) / 2)
    y = ((np.arange(rows * PATCH)) / scale).astype(int)
    x = ((np.arange(cols * PATCH) + edge) / scale).astype(int)
    small = disparity[y][:, x] * scale
    (batch,) = items.items
    visible = int(batch.visible[0, 0, 1].sum())
    for (block, head), shares in card("motorcycle").items():
        a = captured(model, batch.images)[block]
        for share, within in zip(shares, WITHIN, strict=True):
            found = match_rate(a, 0, 1, small, within=within, heads=head)
            # Which patches are hidden is told on smaller pictures: a few are others.
            assert abs(int(found.counted[0]) - visible) <= 0.03 * visible
            assert abs(100 * found.rate.item() - share) < 2
            # Control: from the right picture to the left one disparities lead the wrong way.
            assert match_rate(a, 1, 0, small, within=within, heads=head).rate.item() < share / 200


def rendered(count: int, views: int, size: int = 3) -> Any:
    """Random scenes of photographs that the model was not trained on."""
    import evaluate

    batches = list(
        rendered_scenes(count, views).batches(batch_size=size, views=views, grid=(16, 16))
    )
    return evaluate.Set("rendered", (16, 16), batches)


@pytest.mark.parametrize(
    ("scenes", "views", "tolerance"),
    [
        (5, 2, 8),
        pytest.param(40, 2, 4, marks=pytest.mark.slow),
        pytest.param(10, 4, 6, marks=pytest.mark.slow),
    ],
)
def test_rendered_scenes_have_the_rates_of_the_card(
    model: VGGT, scenes: int, views: int, tolerance: float
) -> None:
    found = agrees(model, rendered(scenes, views))
    for head, shares in card(f"rendered scenes, {views} views").items():
        assert np.abs(np.subtract(found[head], shares)).max() < tolerance
    ranked = sorted(found, key=lambda head: -found[head][0])
    assert ranked[:2] == [POINTING, FREE]


def test_the_sample_views_points_and_cameras(model: VGGT) -> None:
    grid = rows, cols = 15, 20  # the pictures at half their size
    size = np.array([cols, rows]) * PATCH
    pictures = [
        np.asarray(Image.open(path).convert("RGB").resize(tuple(size), Image.Resampling.LANCZOS))
        for path in sample_views()
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    a = captured(model, images)[3]
    points, cameras = (array.astype(float) for array in sample_points(grid))
    inner = np.array([[260, 0, size[0] / 2], [0, 260, size[1] / 2], [0, 0, 1]])
    start = centres(grid)
    right, returned = [], []

    def seen(camera: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and depths."""
        there = (of.reshape(-1, 3) @ camera[:, :3].T + camera[:, 3]) @ inner.T
        return there[:, :2] / there[:, 2:], there[:, 2]

    for i, j in permutations(range(3), 2):
        end, depth = seen(cameras[j], points[i])
        inside = ((end >= 0) & (end < size)).all(-1) & (depth > 0)
        col, row = np.clip(end // PATCH, 0, [cols - 1, rows - 1]).astype(int).T
        nearest = seen(cameras[j], points[j])[1].reshape(grid)[row, col]
        visible = inside & (np.abs(depth - nearest) < 0.05 * depth)
        truth = np.concatenate([start, end], 1)[visible]
        found = match_rate(a, i, j, truth)
        assert found.counted.tolist() == [visible.sum()]
        assert found.rate[0, 0] > 0.85
        assert found.rate[0, 1] < 0.25  # a head of the same block that does not point
        there = correspondence(a, i, j)
        back = (there.cycle[0] <= 1).double().mean(-1)
        assert back[0] > 0.8
        assert back[1] < 0.2
        off = np.abs(there.places[0, 0].numpy() - (end[:, ::-1] / PATCH - 0.5)).max(-1)
        right.append(visible & (off <= 1.5))
        returned.append(there.cycle[0, 0].numpy() <= 1)

        turn = cameras[j][:, :3] @ cameras[i][:, :3].T
        x, y, z = cameras[j][:, 3] - turn @ cameras[i][:, 3]
        essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ turn
        matrix = np.linalg.inv(inner).T @ essential @ np.linalg.inv(inner)
        lined = match_rate(a, i, j, matrix, pixels=PATCH / 2).rate[0]
        assert lined[0] > 0.8
        assert lined[1] < 0.3
    # Who comes back is right more often than who doesn't, among which are all that is hidden.
    true, once = np.concatenate(right), np.concatenate(returned)
    assert true[once].mean() > true[~once].mean() + 0.5


def test_what_was_captured_is_compared_by_name(model: VGGT) -> None:
    items, _ = motorcycle()
    (batch,) = items.items
    with torch.no_grad(), AttentionExtractor(model).register_hooks(attention_types="global") as run:
        model(batch.images)
    found = similarity(run.captured, measure="js", samples=32)
    names = [f"global_block_{block} head {head}" for block in range(4) for head in range(2)]
    assert list(found.labels) == names
    # Most like the head that was trained to point is the one that came to point by itself.
    apart = found.matrix + torch.eye(8)
    pointing, free = (
        names.index(f"global_block_{block} head {head}") for block, head in (POINTING, FREE)
    )
    assert int(apart[pointing].argmin()) == free
