"""The training's parts: true places after every augmentation, losses, hits, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _training_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "training"))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few small rendered scenes of noise, as train.py expects it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "training"))
        import data

        folder = tmp_path_factory.mktemp("scenes")
        rng = np.random.default_rng(0)
        photos = [data.noise_picture(rng, size=128) for _ in range(4)]
        made = [
            data.render_scene(n, photos=photos, seed=3, views=3, size=(112, 112), noise=0.0)
            for n in range(6)
        ]
        arrays = {key: np.stack([m[key] for m in made]) for key in made[0]}
        for name in ("train", "validation"):
            (folder / name).mkdir()
            np.savez(folder / name / "000000.npz", **arrays)
    return folder


def small_config() -> dict[str, Any]:
    return {
        "model": {
            "img_size": 112,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
            "patch_embed": "conv",
            "init_values": 0.5,
        },
        "pointing_head": 0,
        "weights": {"attention": 1.0, "row": 0.25, "tokens": 0.5},
        "seed": 4,
        "optimizer": "muon",
        "muon_rate": 2e-3,
        "adam_rate": 2e-3,
        "weight_decay": 0.02,
        "warmup": 2,
        "steps": 6,
        "decay_from": 4,
        "save_every": 2,
        "check_every": 3,
        "phases": [
            {
                "until": 3,
                "ways": [
                    {
                        "data": "train",
                        "grid": [4, 4],
                        "halve": True,
                        "views": 2,
                        "batch": 2,
                        "weight": 1,
                    }
                ],
            },
            {
                "until": 100,
                "ways": [
                    {
                        "data": "train",
                        "grid": [6, 5],
                        "halve": False,
                        "views": 3,
                        "batch": 2,
                        "weight": 1,
                    }
                ],
            },
        ],
    }


@pytest.mark.parametrize(
    ("grid", "halve"), [((8, 8), False), ((5, 7), False), ((6, 6), False), ((4, 4), True)]
)
def test_places_stay_true_under_crops_mirrors_and_turns(
    rendered: Path, grid: tuple[int, int], halve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data

    monkeypatch.setattr(data, "recoloured", lambda images, rng: images)
    scenes = data.Scenes(rendered / "train")
    rows, cols = grid
    right, wrong = [], []
    for seed in range(4):
        batch = scenes.batch(
            range(6), views=3, grid=grid, halve=halve, rng=np.random.default_rng(seed)
        )
        assert batch.images.shape == (6, 3, 3, rows * 14, cols * 14)
        assert not batch.visible[:, [0, 1, 2], [0, 1, 2]].any()
        soft = F.avg_pool2d(batch.images.flatten(0, 1), 4, 1)  # cornered on pixel centres 2, 3, …
        centres = soft[:, :, 5::14, 5::14].unflatten(0, (6, 3)).flatten(3)
        for i, j in ((0, 1), (1, 2), (2, 0)):
            at = (batch.place[:, i, j] + 0.5) * 14 - 2  # in pixels of `soft`, corner-counted
            size = torch.tensor([soft.shape[3], soft.shape[2]])
            seen = F.grid_sample(
                soft.unflatten(0, (6, 3))[:, j],
                ((at + 0.5) / size * 2 - 1)[:, None],
                align_corners=False,
            )[:, :, 0]
            off = (seen - centres[:, i]).abs().mean(1)
            right.append(off[batch.visible[:, i, j]])
            mixed = (seen - centres[:, i].flip(-1)).abs().mean(1)
            wrong.append(mixed[batch.visible[:, i, j]])
    assert torch.cat(right).mean() < 0.35 * torch.cat(wrong).mean()


def test_a_batch_follows_from_seed_and_step_alone(rendered: Path) -> None:
    import data
    import train

    scenes = {"train": data.Scenes(rendered / "train")}
    course = train.Course(small_config(), torch.device("cpu"))
    course.step = 5
    first, grid = course.draw(scenes)
    course.draw(scenes)
    again, _ = course.draw(scenes)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.place, again.place)
    assert sorted(grid) == [5, 6]
    course.step = 4
    assert not torch.equal(course.draw(scenes)[0].images, first.images)


def test_resuming_equals_never_stopping(rendered: Path, tmp_path: Path) -> None:
    import train

    cpu = torch.device("cpu")
    whole = train.train(small_config(), rendered, tmp_path / "whole", cpu)
    config = small_config()
    train.train(config | {"steps": 4}, rendered, tmp_path / "parts", cpu)
    resumed = train.train(config, rendered, tmp_path / "parts", cpu)
    assert resumed.step == whole.step == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    logs = [(tmp_path / run / "metrics.csv").read_text() for run in ("whole", "parts")]
    without_time = [
        [line.split(",")[:1] + line.split(",")[2:8] for line in log.splitlines()] for log in logs
    ]
    assert without_time[0] == without_time[1]
    assert len(without_time[1]) == 7
    assert (tmp_path / "parts" / "metrics.png").stat().st_size > 5000
    # Another seed is another run: the comparison can fail.
    other = train.train(config | {"seed": 5}, rendered, tmp_path / "other", cpu)
    assert not torch.equal(other.model.aggregator.camera_token, whole.model.aggregator.camera_token)


def test_training_lowers_the_loss(rendered: Path) -> None:
    import data
    import train

    config = small_config()
    config["phases"] = config["phases"][:1]
    config["phases"][0]["until"] = 1000
    config |= {"steps": 1000, "decay_from": 1000}
    course = train.Course(config, torch.device("cpu"))
    scenes = {"train": data.Scenes(rendered / "train")}
    told = [course.advance(scenes) for _ in range(60)]
    for name in ("attention", "row", "tokens"):
        first = np.mean([t[name] for t in told[:5]])
        assert np.mean([t[name] for t in told[-10:]]) < first - 0.05, name


def test_soft_targets_are_gaussians_that_sum_to_one() -> None:
    import matching

    place = torch.tensor([[2.0, 1.0], [2.3, 0.6], [0.0, 0.0]])
    targets = matching.soft_targets(place, (3, 4)).view(3, 3, 4)
    torch.testing.assert_close(targets.sum((1, 2)), torch.ones(3))
    assert targets[0].argmax() == 1 * 4 + 2
    torch.testing.assert_close(
        targets[0, 1, 1] / targets[0, 1, 2], torch.tensor(np.exp(-2.0)).float()
    )
    torch.testing.assert_close(
        targets[1, 1, 2] / targets[1, 0, 2], torch.tensor(np.exp((0.36 - 0.16) * 2)).float()
    )


def test_match_loss_counts_only_visible_patches() -> None:
    import matching

    torch.manual_seed(0)
    logits = torch.randn(1, 2, 2, 6, 6)
    targets = torch.softmax(torch.randn(1, 2, 2, 6, 6), -1)
    visible = torch.zeros(1, 2, 2, 6, dtype=torch.bool)
    visible[0, 0, 1, 2] = visible[0, 1, 0, 5] = True
    each = [
        F.cross_entropy(logits[0, i, j, n][None], targets[0, i, j, n][None])
        for i, j, n in ((0, 1, 2), (1, 0, 5))
    ]
    torch.testing.assert_close(matching.match_loss(logits, targets, visible), sum(each) / 2)


def test_row_loss_is_a_cross_entropy_over_all_tokens() -> None:
    import matching

    torch.manual_seed(1)
    views, start, count, d = 2, 3, 4, 8
    q, k = (torch.randn(1, views, start + count, d) for _ in range(2))
    targets = torch.softmax(torch.randn(1, views, views, count, count), -1)
    visible = torch.zeros(1, views, views, count, dtype=torch.bool)
    visible[0, 0, 1, :2] = True
    total = 0.0
    for i in range(views):
        for n in range(count):
            row = (q[0, i, start + n] @ k[0].reshape(-1, d).T) * d**-0.5
            wanted = torch.zeros(views, start + count)
            seen = [j for j in range(views) if j == i or visible[0, i, j, n]]
            for j in seen:
                wanted[j, start:] = targets[0, i, j, n] / len(seen)
            total += float(F.cross_entropy(row[None], wanted.reshape(1, -1)))
    got = matching.row_loss(q, k, targets, visible, start)
    assert abs(float(got) - total / (views * count)) < 1e-4


def test_hits_count_neighbours_and_exact_places() -> None:
    import matching

    cols = 5
    place = torch.tensor([[1.0, 1.0]] * 5)
    best = torch.tensor([1 * 5 + 1, 1 * 5 + 2, 2 * 5 + 2, 1 * 5 + 3, 1 * 5 + 1])
    visible = torch.tensor([True, True, True, True, False])
    hits = matching.Hits()
    hits.add(best, place, visible, cols)
    assert hits.shares == (0.75, 0.25)
    assert np.isnan(matching.Hits().shares[0])


def test_kernels_are_the_models_own_and_are_put_back() -> None:
    import matching

    from vggt_adapter import VGGT

    torch.manual_seed(0)
    model = VGGT.from_config(**small_config()["model"]).eval()
    images = torch.rand(1, 2, 3, 56, 42)
    real = F.scaled_dot_product_attention
    with torch.no_grad():
        plain = model(images)[0][-1]
        tokens, start, blocks = matching.forward_with_kernels(model, images)
        assert torch.equal(tokens, plain)
        with torch.autocast("cpu", torch.bfloat16), matching.kernels():
            near = model(images)[0][-1].float()
    assert F.scaled_dot_product_attention is real
    assert (start, len(blocks)) == (5, 1)
    assert blocks[0][0].shape == (1, 2, 2 * (5 + 12), 16)
    assert (near - plain).abs().max() < 0.1 * plain.abs().max()  # bfloat16


def test_a_stereo_pair_is_placed_by_its_disparity() -> None:
    pytest.importorskip("skimage")
    import evaluate

    height, width, shift = 112, 140, 28
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 255, (height, width + shift, 3), np.uint8)
    left, right = wide[:, :width], wide[:, shift:]
    disparity = np.full((height, width), float(shift))
    disparity[:14] = np.inf
    batch, grid = evaluate.stereo_pair(left, right, disparity, rows=8)
    assert grid == (8, 10)
    visible = batch.visible[0, 0, 1].view(8, 10)
    assert not visible[0].any()
    assert visible[1:, 2:].all()
    assert not visible[:, :2].any()
    place = batch.place[0, 0, 1].view(8, 10, 2)
    torch.testing.assert_close(place[3, 5], torch.tensor([3.0, 3.0]))
    a = batch.images[0, 0, :, 42:56, 70:84]
    torch.testing.assert_close(a, batch.images[0, 1, :, 42:56, 42:56])


def test_homography_pairs_show_the_same_at_true_places() -> None:
    pytest.importorskip("skimage")
    import data
    import evaluate

    photo = data.noise_picture(np.random.default_rng(1), size=448)
    for batch in evaluate.homography_pairs([photo], per_photo=3):
        soft = F.avg_pool2d(batch.images[0], 4, 1)
        for i, j in ((0, 1), (1, 0)):
            here = soft[i, :, 5::14, 5::14].flatten(1)
            at = (batch.place[0, i, j] + 0.5) * 14 - 2 + 0.5
            grid = (at / soft.shape[-1] * 2 - 1)[None, None]
            there = F.grid_sample(soft[j][None], grid, align_corners=False)[0, :, 0]
            seen = batch.visible[0, i, j]
            assert seen.sum() > 60
            off = (here - there).abs().mean(0)[seen].mean()
            assert off < 0.4 * (here.flip(-1) - there).abs().mean(0)[seen].mean()


def test_every_photograph_has_a_package_a_licence_and_a_split() -> None:
    import csv

    rows = list(csv.DictReader((ROOT / "training" / "photos.csv").open(encoding="utf-8")))
    assert len(rows) > 50
    free = {"CC0-1.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-2+"}
    assert {row["licence"] for row in rows} <= free
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    assert len({(row["package"], row["file"]) for row in rows}) == len(rows)
    assert all(row["author"] for row in rows)
