"""Measures the bundled weights: how often attention points at the true correspondence.

    python training/evaluate.py --photos PHOTOS --data DATA --opencv DIR --dinov2 FILE.onnx

DATA holds the rendered `validation` and `test` scenes of training/data.py; `--opencv` is the folder
with Debian's opencv-doc pictures (aloeL.jpg, aloeR.jpg, aloeGT.png, graf1.png, graf3.png,
H1to3p.xml); `--dinov2` see training/dinov2.py. Sets whose files are not given are left out.
Prints the table and, with `--card`, puts it into vggt_adapter/weights/MODEL_CARD.md.

A hit: the chosen patch is the one under the true place («exact»: at most half a patch off), or one
of its eight neighbours («within one»). Only patches that are visible in the other view count.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dinov2
import numpy as np
import torch
import torch.nn.functional as F
from data import Batch, Scenes, load_photos
from matching import Hits, forward_with_kernels
from PIL import Image
from tqdm import tqdm

from vggt_adapter import VGGT

CARD = Path(__file__).resolve().parent.parent / "vggt_adapter" / "weights" / "MODEL_CARD.md"
Grid = tuple[int, int]


@dataclass
class Set:
    """Pictures with true correspondences; `batches` starts anew at each call."""

    name: str
    grid: Grid
    items: list[Batch] = field(repr=False)


def homography_pairs(photos: list[np.ndarray], *, per_photo: int, seed: int = 5) -> list[Batch]:
    """Square crops of photographs, each beside itself warped: turned up to 30°, 0.75–1.33 times
    the size, moved, with perspective; 16×16 patches."""
    rng = np.random.default_rng(seed)
    size, batches = 224, []
    for photo in photos:
        for _ in range(per_photo):
            side = int(min(photo.shape[:2]) * rng.uniform(0.6, 1.0))
            y = rng.integers(0, photo.shape[0] - side + 1)
            x = rng.integers(0, photo.shape[1] - side + 1)
            crop = Image.fromarray(photo[y : y + side, x : x + side])
            # Both views look at the middle of a wider picture, so that little leaves it.
            wide = crop.resize((448, 448), Image.Resampling.LANCZOS)
            source = torch.from_numpy(np.asarray(wide).copy()).permute(2, 0, 1).float() / 255
            turn = np.radians(rng.uniform(-30, 30))
            scale = np.exp(rng.uniform(np.log(0.75), np.log(1.33)))
            linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            H = np.eye(3)  # view 0 → view 1, both in −1…1
            H[:2, :2] = linear
            H[:2, 2] = rng.uniform(-0.2, 0.2, 2)
            H[2, :2] = rng.uniform(-0.2, 0.2, 2)
            views = [warped(source, np.eye(3), size), warped(source, np.linalg.inv(H), size)]
            centres = (np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1) + 0.5) / 8 - 1
            place, visible = [], []
            for matrix in (H, np.linalg.inv(H)):
                there = np.c_[centres.reshape(-1, 2), np.ones(256)] @ matrix.T
                xy = there[:, :2] / there[:, 2:]
                place.append((xy + 1) * 8 - 0.5)
                visible.append((np.abs(xy) < 1).all(-1) & (there[:, 2] > 0))
            batches.append(two_views(views, place, visible))
    return batches


def warped(source: torch.Tensor, back: np.ndarray, size: int) -> torch.Tensor:
    """The middle half of `source` seen through a homography; `back` leads from the new picture
    (−1…1) to the middle half (−1…1). Drawn three times finer and averaged."""
    fine = size * 3
    at = (np.arange(fine) + 0.5) / fine * 2 - 1
    xy = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2)
    there = np.c_[xy, np.ones(len(xy))] @ back.T
    grid = torch.from_numpy(there[:, :2] / there[:, 2:] / 2).float().view(1, fine, fine, 2)
    drawn = F.grid_sample(source[None], grid, align_corners=False, padding_mode="reflection")
    return F.avg_pool2d(drawn, 3)[0]


def two_views(
    views: list[torch.Tensor], place: list[np.ndarray], visible: list[np.ndarray]
) -> Batch:
    """A batch of one pair; `place[i]` (N, 2) of view i's patches in the other, in patch units."""
    count = len(place[0])
    where = torch.full((1, 2, 2, count, 2), -1e3)
    seen = torch.zeros(1, 2, 2, count, dtype=torch.bool)
    for i in (0, 1):
        where[0, i, 1 - i] = torch.from_numpy(place[i]).float()
        seen[0, i, 1 - i] = torch.from_numpy(visible[i])
    return Batch(torch.stack(views)[None], where, seen)


def stereo_pair(
    left: np.ndarray, right: np.ndarray, disparity: np.ndarray, *, rows: int = 16
) -> tuple[Batch, Grid]:
    """A rectified pair, `rows` patches high; only left → right is scored.

    `disparity` (H, W) in pixels, not finite or ≤ 0 where unknown. Hidden where another pixel of
    the left picture with a larger disparity lands on the same place (± 1 pixel).
    """
    H, W = disparity.shape
    known = np.isfinite(disparity) & (disparity > 0)
    y, x = np.nonzero(known)
    nearest = np.zeros((H, W + 2))
    landing = np.round(x - disparity[y, x]).astype(int)
    fits = (landing >= 0) & (landing < W)
    for shift in (0, 1, 2):
        np.maximum.at(nearest, (y[fits], landing[fits] + shift), disparity[y, x][fits])
    scale = rows * 14 / H
    cols = int(W * scale) // 14
    edge = (W * scale - cols * 14) / 2
    pictures = []
    for picture in (left, right):
        resized = Image.fromarray(picture).resize(
            (round(W * scale), rows * 14), Image.Resampling.LANCZOS
        )
        start = round(edge)
        array = np.asarray(resized)[:, start : start + cols * 14].copy()
        pictures.append(torch.from_numpy(array).permute(2, 0, 1).float() / 255)
    px = (np.arange(cols) + 0.5) * 14
    py = (np.arange(rows) + 0.5) * 14
    there_x, there_y = np.meshgrid(px, py)
    source_x = np.clip(((there_x + round(edge)) / scale).astype(int), 0, W - 1)
    source_y = np.clip((there_y / scale).astype(int), 0, H - 1)
    d = np.where(known, disparity, 0)[source_y, source_x]
    target = there_x - d * scale
    at = np.clip(np.round(source_x - d).astype(int), 0, W - 1)
    shown = d >= nearest[source_y, at + 1] - 2
    visible = known[source_y, source_x] & shown & (target >= 0) & (target < cols * 14)
    place = np.stack([target / 14 - 0.5, there_y / 14 - 0.5], -1).reshape(-1, 2)
    nothing = np.zeros(visible.size, bool)
    return two_views(pictures, [place, place], [visible.ravel(), nothing]), (rows, cols)


def homography_set(first: np.ndarray, second: np.ndarray, H: np.ndarray, rows: int) -> Set:
    """Two pictures of a plane with their pixel homography, `rows` patches high."""
    h, w = first.shape[:2]
    scale = rows * 14 / h
    cols = int(w * scale) // 14
    left = round((w * scale - cols * 14) / 2)
    views = []
    for picture in (first, second):
        image = Image.fromarray(picture).resize((round(w * scale), rows * 14), Image.LANCZOS)
        array = np.asarray(image)[:, left : left + cols * 14].copy()
        views.append(torch.from_numpy(array).permute(2, 0, 1).float() / 255)
    at = np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), -1).reshape(-1, 2) * 14 + 7.0
    pixels = (at + np.array([left, 0])) / scale
    place, visible = [], []
    for matrix in (H, np.linalg.inv(H)):
        there = np.c_[pixels, np.ones(len(pixels))] @ matrix.T
        xy = there[:, :2] / there[:, 2:] * scale - np.array([left, 0])
        place.append(xy / 14 - 0.5)
        visible.append(((xy >= 0) & (xy < (cols * 14, rows * 14))).all(-1) & (there[:, 2] > 0))
    return Set("graf1/graf3", (rows, cols), [two_views(views, place, visible)])


@dataclass
class Scores:
    """Hits of every way of matching on one set."""

    heads: dict[tuple[int, int], Hits] = field(default_factory=dict)
    head_mean: list[Hits] = field(default_factory=list)
    tokens: Hits = field(default_factory=Hits)
    dinov2: Hits = field(default_factory=Hits)
    same: Hits = field(default_factory=Hits)
    shifted: Hits = field(default_factory=Hits)
    chance: tuple[float, float] = (float("nan"),) * 2


@torch.no_grad()
def score(model: VGGT, items: Set, rival: torch.nn.Module | None) -> Scores:
    """Everything that the table needs of one set."""
    rows, cols = items.grid
    depth, heads = model.config.depth, model.config.num_heads
    scores = Scores(head_mean=[Hits() for _ in range(depth)])
    scores.heads = {(b, h): Hits() for b in range(depth) for h in range(heads)}
    shifts = {(dx, dy): Hits() for dx in range(-cols + 1, cols) for dy in range(-4, 5)}
    x, y = (
        a.flatten() for a in torch.meshgrid(torch.arange(cols), torch.arange(rows), indexing="xy")
    )
    everywhere = torch.stack([x, y], -1)
    chance = [0.0, 0.0, 0.0]
    for batch in tqdm(items.items, desc=items.name, leave=False):
        place, visible, views = batch.place, batch.visible, batch.images.shape[1]
        last, start, blocks = forward_with_kernels(model, batch.images)
        for block, (q, k) in enumerate(blocks):
            logits = q @ k.mT * q.shape[-1] ** -0.5
            logits = logits.unflatten(2, (views, -1))[:, :, :, start:]
            rowwise = logits.softmax(-1).unflatten(-1, (views, -1))[..., start:]
            rowwise = rowwise.permute(0, 1, 2, 4, 3, 5)  # (B, h, S, S', N, N)
            for head in range(heads):
                best = rowwise[:, head].argmax(-1)
                scores.heads[block, head].add(best, place, visible, cols)
            scores.head_mean[block].add(rowwise.mean(1).argmax(-1), place, visible, cols)
        tokens = last[:, :, start:]
        tokens = F.normalize(tokens[..., tokens.shape[-1] // 2 :], dim=-1)
        near = torch.einsum("bind,bjmd->bijnm", tokens, tokens)
        scores.tokens.add(near.argmax(-1), place, visible, cols)
        if rival is not None:
            features = dinov2.patch_features(rival, batch.images)
            near = torch.einsum("bind,bjmd->bijnm", features, features)
            scores.dinov2.add(near.argmax(-1), place, visible, cols)
        same = torch.arange(rows * cols).expand(visible.shape)
        scores.same.add(same, place, visible, cols)
        for (dx, dy), hits in shifts.items():
            moved = (y + dy).clamp(0, rows - 1) * cols + (x + dx).clamp(0, cols - 1)
            hits.add(moved.expand(visible.shape), place, visible, cols)
        true = place[visible]
        off = (everywhere[None] - true[:, None]).abs().amax(-1)
        chance[0] += float((off <= 1.5).float().mean(1).sum())
        chance[1] += float((off <= 0.5).float().mean(1).sum())
        chance[2] += len(true)
    scores.shifted = max(shifts.values(), key=lambda hits: hits.exact)
    scores.chance = (chance[0] / chance[2], chance[1] / chance[2])
    return scores


@torch.no_grad()
def same_object(model: VGGT, scenes: Scenes, *, views: int = 2) -> list[tuple[float, float]]:
    """For every frame block: share of a patch's ten strongest other patches that lie on the same
    object (mean over heads, patches, scenes), and the share that chance gives."""
    results = []
    labels = torch.from_numpy(scenes.arrays["labels"][:, :, ::2, ::2].astype(np.int64))
    grid = (scenes.size[0] // 14, scenes.size[1] // 14)
    sums = np.zeros((model.config.depth, 2))
    depth, batches = model.config.depth, 0
    for first in range(0, len(scenes), 8):
        numbers = range(first, min(first + 8, len(scenes)))
        batch = scenes.batch(numbers, views=views, grid=grid)
        from matching import kernels

        with kernels(keep_last=False) as seen:
            _, start = model(batch.images, pairs=[-1])
        frames = seen.calls[-2 * depth :][0::2]
        object_of = labels[list(numbers), :views].flatten(0, 1).flatten(1)  # (B·S, N)
        alike = object_of[:, :, None] == object_of[:, None, :]
        alike = alike & ~torch.eye(alike.shape[-1], dtype=torch.bool)
        for block, (q, k) in enumerate(frames):
            weights = (q @ k.mT * q.shape[-1] ** -0.5)[:, :, start:, start:]
            weights.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
            top = weights.topk(10, -1).indices
            hit = torch.gather(alike[:, None].expand_as(weights), -1, top).float().mean()
            sums[block] += float(hit), float(alike.float().sum(-1).mean() / (alike.shape[-1] - 1))
        batches += 1
    for own, chance in sums / batches:
        results.append((float(own), float(chance)))
    return results


def percent(shares: tuple[float, float]) -> str:
    return "–" if np.isnan(shares[0]) else f"{100 * shares[0]:.0f} / {100 * shares[1]:.0f}"


def collect(given: argparse.Namespace) -> Iterator[Set]:
    """The sets whose files were given."""
    if given.data is not None:
        test = Scenes(given.data / "test", limit=given.limit)
        grid = (test.size[0] // 14, test.size[1] // 14)
        yield Set(
            "rendered scenes, 2 views", grid, list(test.batches(batch_size=4, views=2, grid=grid))
        )
        yield Set(
            "rendered scenes, 4 views", grid, list(test.batches(batch_size=2, views=4, grid=grid))
        )
    if given.photos is not None:
        from skimage import data as free

        photos = load_photos(given.photos / "test")
        photos += [free.astronaut(), free.chelsea(), free.coffee(), free.rocket()]
        yield Set(
            "homographies of unseen photographs", (16, 16), homography_pairs(photos, per_photo=4)
        )
    from skimage import data as pictures

    batch, grid = stereo_pair(*pictures.stereo_motorcycle())
    yield Set("motorcycle", grid, [batch])
    if given.opencv is not None:
        aloe = [np.asarray(Image.open(given.opencv / f"aloe{side}.jpg")) for side in "LR"]
        truth = np.asarray(Image.open(given.opencv / "aloeGT.png").convert("L")).astype(float)
        batch, grid = stereo_pair(*aloe, truth)
        yield Set("aloeL/aloeR", grid, [batch])
        graf = [
            np.asarray(Image.open(given.opencv / f"graf{n}.png").convert("RGB")) for n in (1, 3)
        ]
        text = (given.opencv / "H1to3p.xml").read_text()
        data = re.search(r"<data>(.*?)</data>", text, re.S)
        assert data is not None
        yield homography_set(*graf, np.array(data[1].split(), float).reshape(3, 3), 16)


def table(model: VGGT, given: argparse.Namespace) -> str:
    """The Markdown table, one set a row: «within one patch / exact», in per cent."""
    validation = Scenes(given.data / "validation")
    grid = (validation.size[0] // 14, validation.size[1] // 14)
    chosen_on = Set("validation", grid, list(validation.batches(batch_size=4, views=2, grid=grid)))
    picks = score(model, chosen_on, None)
    block, head = max(picks.heads, key=lambda place: picks.heads[place].within)
    free = {
        place: hits for place, hits in picks.heads.items() if place[0] != block or place[1] != head
    }
    other = max(free, key=lambda place: free[place].within)
    lines = [
        f"Chosen on the validation scenes: global block {block}, head {head} "
        f"({percent(picks.heads[block, head].shares)}); the best head that no loss was put on is "
        f"global block {other[0]}, head {other[1]} ({percent(free[other].shares)}).",
        "",
        f"| set (grid) | attention, block {block} head {head} | attention, mean over the heads of "
        f"block {block} | best free head | tokens, nearest | DINOv2 ViT-S/14, nearest | "
        "same position | best constant shift | chance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rival = dinov2.load(given.dinov2) if given.dinov2 is not None else None
    for items in collect(given):
        s = score(model, items, rival)
        cells = [
            f"{items.name} ({items.grid[0]}×{items.grid[1]})",
            f"**{percent(s.heads[block, head].shares)}**",
            percent(s.head_mean[block].shares),
            percent(s.heads[other].shares),
            percent(s.tokens.shares),
            percent(s.dinov2.shares),
            percent(s.same.shares),
            percent(s.shifted.shares),
            percent(s.chance),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    test = Scenes(given.data / "test", limit=given.limit)
    lines += [
        "",
        "Frame attention: share of a patch's ten strongest other patches on the same object",
    ]
    lines[-1] += " (mean over heads, rendered scenes), against chance:"
    for number, (own, chance) in enumerate(same_object(model, test)):
        end = "." if number == model.config.depth - 1 else ","
        lines.append(f"frame block {number}: {100 * own:.0f} % (chance {100 * chance:.0f} %){end}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="rendered validation and test")
    parser.add_argument("--photos", type=Path, help="folder of training/photos.py")
    parser.add_argument("--opencv", type=Path, help="folder with aloe and graf pictures")
    parser.add_argument("--dinov2", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("--limit", type=int, help="shards of rendered test scenes; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="write the table into the model card")
    parser.add_argument("--weights", type=Path, help="a model.safetensors of train.py instead")
    parser.add_argument("--config", type=Path, help="its config.yaml")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.weights is None:
        model = VGGT.tiny()
    else:
        import yaml
        from safetensors.torch import load_file

        sizes = yaml.safe_load(given.config.read_text(encoding="utf-8"))["model"]
        model = VGGT.from_config(**sizes)
        model.load_state_dict(load_file(given.weights))
    made = table(model.float().eval(), given)
    print(made)
    if given.card:
        old = CARD.read_text(encoding="utf-8")
        mark = r"(<!-- numbers -->).*?(<!-- end of numbers -->)"
        new = re.sub(mark, lambda m: f"{m[1]}\n{made}\n{m[2]}", old, flags=re.S)
        CARD.write_text(new, encoding="utf-8")
