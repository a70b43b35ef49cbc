"""The bundled weights: whole, small, described, and pointing at true correspondences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rendering as scenes
import torch
from PIL import Image

import vggt_adapter
from vggt_adapter import VGGT, AttentionExtractor
from vistvis.errors import CheckpointError

HOME = Path(vggt_adapter.__file__).parent
WEIGHTS = HOME / "weights"
FILE = WEIGHTS / "vggt_tiny.safetensors"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="no trained weights in the package yet")


@pytest.fixture(scope="module")
def told() -> dict:
    return json.loads((WEIGHTS / "vggt_tiny.json").read_text(encoding="utf-8"))


def sample_views(width: int) -> torch.Tensor:
    """The sample views (3, 3, H, W), whole patches."""
    views = [Image.open(path).convert("RGB") for path in sorted((HOME / "samples").glob("*.jpg"))]
    height = round(views[0].height * width / views[0].width / 14) * 14
    arrays = [np.asarray(v.resize((width, height), Image.Resampling.BICUBIC)) for v in views]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def hit_rates(weights: torch.Tensor, grid: tuple[int, int]) -> tuple[float, float]:
    """Shares within one patch and exact of rows (N all, N all) over the three sample views,
    against the renderer's correspondences."""
    import samples

    surfaces, cameras = samples.sample_scene()
    rows, cols = grid
    scale = np.array([samples.SIZE[1] / cols, samples.SIZE[0] / rows])  # sample pixels a patch
    centres = np.stack(np.meshgrid(np.arange(cols) + 0.5, np.arange(rows) + 0.5), -1) * scale
    views = weights.unflatten(0, (3, -1)).unflatten(2, (3, -1))[:, 5:, :, 5:]
    hits = []
    for i in range(3):
        for j in range(3):
            if i == j:
                continue
            there = scenes.correspond(surfaces, cameras[i], cameras[j], centres)
            place = (there.xy / scale - 0.5).reshape(-1, 2)[there.visible.ravel()]
            best = views[i, :, j].argmax(-1).numpy()[there.visible.ravel()]
            hits.append(np.abs(np.stack([best % cols, best // cols], -1) - place).max(-1))
    off = np.concatenate(hits)
    assert len(off) > 300
    return float((off <= 1.5).mean()), float((off <= 0.5).mean())


def test_the_default_head_points_at_true_correspondences_in_the_sample_views(
    told: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(str(HOME.parent / "training"))
    default, model = told["default"], VGGT.tiny()
    images = sample_views(default["size"])
    grid = (images.shape[-2] // 14, images.shape[-1] // 14)
    name = f"global_block_{default['block']}"
    with AttentionExtractor(model) as extractor, torch.no_grad():
        extractor.register_hooks(
            block_indices=[default["block"]], attention_types=["global"], dense=False
        )
        model(images)
        weights = extractor.captured[name].dense()[0]
    within, exact = hit_rates(weights[default["head"]], grid)
    assert within > 0.9
    assert exact > 0.55
    # The oracle can fail: the same maps a few patches over are wrong.
    count = grid[0] * grid[1] + 5
    moved = weights[default["head"]].unflatten(1, (3, count)).roll(3, -1).flatten(1)
    assert hit_rates(moved, grid)[0] < within / 2


def test_weights_are_small_and_complete(told: dict) -> None:
    assert FILE.stat().st_size <= 12_000_000
    model = VGGT.tiny()
    assert model.trained
    assert model.default == told["default"]
    assert 0 <= told["default"]["block"] < model.config.depth
    assert 0 <= told["default"]["head"] < model.config.num_heads
    assert told["default"]["size"] % 14 == 0


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    from vggt_adapter.model import load_tiny

    for file in WEIGHTS.glob("vggt_tiny.*"):
        shutil.copy(file, tmp_path)
    assert load_tiny(folder=tmp_path).trained
    damaged = bytearray(FILE.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit
    (tmp_path / FILE.name).write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"SHA-256 .* damaged"):
        load_tiny(folder=tmp_path)


def test_the_card_tells_what_was_supervised_and_measured(told: dict) -> None:
    card = (WEIGHTS / "MODEL_CARD.md").read_text(encoding="utf-8")
    head = told["supervised"][0]["head"]
    assert f"head {head} of the last global block" in card
    numbers = card.split("<!-- numbers -->")[1].split("<!-- end of numbers -->")[0]
    for name in ("2 views", "4 views", "homographies", "motorcycle", "aloeL/aloeR", "graf1/graf3"):
        assert name in numbers
    for licence in ("CC BY", "GPL-2+", "CC0"):
        assert licence in card
