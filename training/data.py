"""Training and evaluation pictures with true correspondences: random scenes, rendered once to disk.

    python training/data.py --photos PHOTOS --split train --scenes 2000 --out DATA

One scene is a few views (224×224 unless told otherwise) of photographs on planes and boxes at
different depths, or of one plane only (then any two views are related by a homography). Beside the
pictures each shard keeps, for every ordered pair of views, where the places of a lattice lie in the
other view and whether they are visible there. The lattice runs in steps of half a patch, so every
crop that starts on it, and every picture halved, has its patch centres on the lattice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rendering as scenes
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from rendering import Camera, Surface, Texture
from tqdm import tqdm

STEP = 7  # lattice step in pixels: half a patch
SHARD = 50  # scenes in one file


def load_photos(folder: Path) -> list[np.ndarray]:
    """All pictures of a folder in name order, (h, w, 3) uint8."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix in {".png", ".jpg", ".jpeg"}]
    if not found:
        raise SystemExit(f"no pictures in {folder}: run training/photos.py first")
    return [np.asarray(Image.open(path).convert("RGB")) for path in found]


def noise_picture(rng: Generator, *, size: int = 512) -> np.ndarray:
    """Coloured noise with detail at every scale, with a few hard-edged shapes."""
    picture = np.zeros((size, size, 3), np.float32)
    decay = rng.uniform(0.5, 1.0)
    for level in range(2, 9):
        side = 2**level
        grain = torch.from_numpy(rng.standard_normal((1, 3, side, side), dtype=np.float32))
        grain = grain * 0.5 + grain.mean(1, keepdim=True)
        wide = F.interpolate(grain, (size, size), mode="bicubic", align_corners=False)
        picture += wide[0].permute(1, 2, 0).numpy() * decay ** (level - 2)
    picture = picture / picture.std() * rng.uniform(0.12, 0.25) + rng.uniform(0.3, 0.7, 3)
    for _ in range(rng.integers(0, 30)):
        x, y, w, h = rng.integers(0, size, 2).tolist() + rng.integers(8, 120, 2).tolist()
        picture[y : y + h, x : x + w] = rng.uniform(0, 1, 3) + rng.normal(0, 0.03, (1, 1, 3))
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def random_texture(photos: Sequence[np.ndarray], rng: Generator, *, noise: float = 0.1) -> Texture:
    """The busiest of three random crops of a photograph; with probability `noise`, noise."""
    if rng.random() < noise:
        return Texture(noise_picture(rng))
    crops, detail = [], []
    for _ in range(3):
        photo = photos[rng.integers(len(photos))]
        side = int(min(photo.shape[0], photo.shape[1]) * rng.uniform(0.3, 1.0))
        y = rng.integers(0, photo.shape[0] - side + 1)
        x = rng.integers(0, photo.shape[1] - side + 1)
        crop = photo[y : y + side, x : x + side]
        grey = crop[:: max(side // 128, 1), :: max(side // 128, 1)].astype(np.float32).mean(2)
        crops.append(crop)
        detail.append(np.abs(np.diff(grey)).mean() + np.abs(np.diff(grey, axis=0)).mean())
    crop = crops[int(np.argmax(detail))]
    if len(crop) > 400:  # a texture is seldom seen larger than the picture
        crop = np.asarray(Image.fromarray(crop).resize((400, 400), Image.Resampling.BOX))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return Texture(np.rot90(crop, rng.integers(4)))


def random_scene(
    photos: Sequence[np.ndarray],
    rng: Generator,
    *,
    views: int = 4,
    size: tuple[int, int] = (224, 224),
    planar: bool = False,
    noise: float = 0.1,
) -> tuple[list[Surface], list[Camera]]:
    """A back plane, sometimes a floor, two to six planes and boxes before it; and its cameras.

    `planar`: one plane alone, seen from more different directions (homographies).
    """
    texture = partial(random_texture, photos, rng, noise=noise)
    unit = min(size) / 224
    far = rng.uniform(4.0, 7.0)
    surfaces = [
        scenes.rectangle(
            centre=(0, 0, far),
            size=(far * (2.0 if planar else 3.2),) * 2,
            texture=texture(),
            yaw=rng.uniform(-25, 25),
            pitch=rng.uniform(-20, 20),
        )
    ]
    cameras = []
    if planar:
        for _ in range(views):
            away = rng.uniform(-1, 1, 3) * (far * 0.45, far * 0.4, far * 0.25)
            target = (rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), far)
            roll = rng.uniform(-40, 40)
            focal = unit * rng.uniform(190, 290)
            cameras.append(Camera.look_at(away, target, focal=focal, size=size, roll=roll))
        return surfaces, cameras
    if rng.random() < 0.4:
        surfaces.append(
            scenes.rectangle(
                centre=(0, rng.uniform(0.9, 1.5), 4),
                size=(12, 9),
                texture=texture(),
                label=1,
                pitch=rng.uniform(80, 95),
                shade=0.9,
            )
        )
    for label in range(2, 2 + rng.integers(2, 7)):
        depth = rng.uniform(1.8, far - 0.9)
        place = (rng.uniform(-0.5, 0.5) * depth, rng.uniform(-0.45, 0.45) * depth, depth)
        turn: dict[str, Any] = {
            "yaw": rng.uniform(-50, 50),
            "pitch": rng.uniform(-30, 30),
            "roll": rng.uniform(-30, 30),
        }
        reach = depth * rng.uniform(0.2, 0.5)
        if rng.random() < 0.6:
            wide = (reach * rng.uniform(0.8, 1.4), reach * rng.uniform(0.8, 1.4))
            surfaces.append(
                scenes.rectangle(centre=place, size=wide, texture=texture(), label=label, **turn)
            )
        else:
            edge = tuple(reach * rng.uniform(0.6, 1.0, 3))
            faces = [texture() for _ in range(3)]
            surfaces += scenes.box(centre=place, size=edge, textures=faces, label=label, **turn)
    base = rng.uniform(0.15, 1.0)  # how far apart the cameras are
    tilt = rng.choice([0.0, 4.0, 15.0])
    for _ in range(views):
        away = rng.uniform(-1, 1, 3) * (base, base * 0.5, base * 0.6)
        target = (*(rng.uniform(-0.4, 0.4, 2) + 0.4 * away[:2]), far * 0.7)
        focal = unit * rng.uniform(190, 250)
        roll = rng.normal(0, 1) * tilt
        cameras.append(Camera.look_at(away, target, focal=focal, size=size, roll=roll))
    return surfaces, cameras


def lattice(size: tuple[int, int]) -> np.ndarray:
    """(rows, cols, 2) places at multiples of STEP inside the picture, without its border."""
    h, w = size
    return np.stack(np.meshgrid(np.arange(STEP, w, STEP), np.arange(STEP, h, STEP)), -1) * 1.0


def render_scene(
    number: int,
    *,
    photos: Sequence[np.ndarray],
    seed: int,
    views: int = 4,
    size: tuple[int, int] = (224, 224),
    planar_share: float = 0.3,
    noise: float = 0.1,
    per_pixel: int = 1,
) -> dict[str, np.ndarray]:
    """Scene `number` of a seed: images (S, H, W, 3), labels (S, rows, cols) at the lattice,
    xy (S, S, rows, cols, 2) and visible (S, S, rows, cols): place in view i → place in view j."""
    rng = np.random.default_rng((seed, number))
    planar = bool(rng.random() < planar_share)
    surfaces, cameras = random_scene(
        photos, rng, views=views, size=size, planar=planar, noise=noise
    )
    seen = [scenes.render(surfaces, camera, per_pixel=per_pixel) for camera in cameras]
    places = lattice(size)
    xy = np.zeros((views, views, *places.shape), np.float16)
    visible = np.zeros((views, views, *places.shape[:2]), bool)
    for i, source in enumerate(cameras):
        for j, target in enumerate(cameras):
            if i == j:
                continue
            there = scenes.correspond(surfaces, source, target, places)
            xy[i, j] = np.clip(np.nan_to_num(there.xy, nan=-1e4), -1e4, 1e4)
            visible[i, j] = there.visible
    labels = np.stack([v.labels[STEP::STEP, STEP::STEP] for v in seen])
    return {
        "images": np.stack([v.image for v in seen]),
        "labels": labels[:, : places.shape[0], : places.shape[1]],
        "xy": xy,
        "visible": visible,
    }


_photos: list[np.ndarray] = []


def _start(folder: Path) -> None:
    torch.set_num_threads(1)
    _photos[:] = load_photos(folder)


def _shard(first: int, *, out: Path, options: dict[str, Any]) -> None:
    target = out / f"{first:06d}.npz"
    if target.exists():
        return
    made = [render_scene(n, photos=_photos, **options) for n in range(first, first + SHARD)]
    partial_file = target.with_suffix(".part")
    with partial_file.open("wb") as file:
        np.savez(file, **{key: np.stack([m[key] for m in made]) for key in made[0]})
    partial_file.rename(target)


def build(
    photos: Path, out: Path, *, count: int, workers: int, seed: int = 0, **options: Any
) -> None:
    """Renders `count` scenes to shards in `out`; finished shards are kept, so it can resume."""
    out.mkdir(parents=True, exist_ok=True)
    work = partial(_shard, out=out, options={"seed": seed, **options})
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(photos,)) as pool:
        firsts = range(0, count, SHARD)
        for _ in tqdm(pool.map(work, firsts), total=len(firsts), desc=f"scenes of {SHARD}"):
            pass


@dataclass(frozen=True)
class Batch:
    """One training step's input.

    Attributes:
        images: (B, S, 3, H, W) float32 in [0, 1].
        place: (B, S, S, N, 2) where each patch centre of view i lies in view j, in patch units
            (x, y; the centre of patch (0, 0) is (0, 0)).
        visible: (B, S, S, N) bool.
    """

    images: torch.Tensor
    place: torch.Tensor
    visible: torch.Tensor


class Scenes:
    """All shards of some folders in memory, and batches drawn from them.

    A batch is chosen by its step number alone, so a resumed run sees what it would have seen.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        files = sorted(folder.glob("*.npz"))[:limit]
        if not files:
            raise SystemExit(f"no scenes in {folder}: run training/data.py first")
        loaded = []
        for file in files:
            with np.load(file, allow_pickle=False) as shard:
                loaded.append({key: shard[key] for key in shard.files})
        self.arrays = {key: np.concatenate([s[key] for s in loaded]) for key in loaded[0]}
        self.size: tuple[int, int] = self.arrays["images"].shape[2:4]

    def __len__(self) -> int:
        return len(self.arrays["images"])

    def batch(
        self,
        numbers: Sequence[int],
        *,
        views: int,
        grid: tuple[int, int],
        halve: bool = False,
        rng: Generator | None = None,
    ) -> Batch:
        """Views of the given scenes, cropped to `grid` patches (after halving, if asked).

        With `rng`: random views, crops that follow the first view's middle, mirrorings, quarter
        turns and colour changes; without: the first views, centre crops, untouched colours.
        """
        scale = 2 if halve else 1
        step = STEP * 2 * scale  # pixels of the stored picture under one patch
        rows, cols = grid
        H, W = self.size
        crop_h, crop_w = rows * step, cols * step
        if crop_h > H or crop_w > W:
            raise ValueError(f"a grid of {rows}×{cols} does not fit stored pictures of {H}×{W}")
        images, place, visible = [], [], []
        for number in numbers:
            a = {key: self.arrays[key][number] for key in ("images", "xy", "visible")}
            total = len(a["images"])
            chosen = rng.permutation(total)[:views] if rng is not None else np.arange(views)
            corners = []
            for _ in chosen:
                free_y, free_x = (H - crop_h) // STEP, (W - crop_w) // STEP
                corner = (free_y // 2, free_x // 2)
                if rng is not None:
                    corner = tuple(
                        int(np.clip(round(f / 2 + rng.normal() * f / 5), 0, f))
                        for f in (free_y, free_x)
                    )
                corners.append((corner[0] * STEP, corner[1] * STEP))
            pictures = np.stack(
                [
                    a["images"][v][y : y + crop_h, x : x + crop_w]
                    for v, (y, x) in zip(chosen, corners, strict=True)
                ]
            )
            xy = np.full((views, views, rows, cols, 2), -1e3, np.float32)
            seen = np.zeros((views, views, rows, cols), bool)
            for i in range(views):
                # Lattice number k stands for pixel (k + 1)·STEP.
                first_y = (corners[i][0] + step // 2) // STEP - 1
                first_x = (corners[i][1] + step // 2) // STEP - 1
                at = np.s_[first_y :: step // STEP, first_x :: step // STEP]
                for j in range(views):
                    if i == j:
                        continue
                    there = a["xy"][chosen[i], chosen[j]][at][:rows, :cols].astype(np.float32)
                    there = (there - (corners[j][1], corners[j][0])) / step
                    inside = ((there >= 0) & (there < (cols, rows))).all(-1)
                    xy[i, j] = there - 0.5
                    seen[i, j] = a["visible"][chosen[i], chosen[j]][at][:rows, :cols] & inside
            tensors = (
                torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255,
                torch.from_numpy(xy),
                torch.from_numpy(seen),
            )
            if rng is not None:
                tensors = turned(*tensors, rng=rng, quarter=rows == cols)
            images.append(tensors[0])
            place.append(tensors[1].flatten(2, 3))
            visible.append(tensors[2].flatten(2, 3))
        stacked = torch.stack(images)
        if halve:
            stacked = F.avg_pool2d(stacked.flatten(0, 1), 2).unflatten(0, stacked.shape[:2])
        if rng is not None:
            stacked = recoloured(stacked, rng=rng)
        return Batch(stacked, torch.stack(place), torch.stack(visible))

    def batches(
        self, *, batch_size: int, views: int, grid: tuple[int, int], halve: bool = False
    ) -> Iterator[Batch]:
        """All scenes once, in order, without augmentation."""
        for first in range(0, len(self), batch_size):
            numbers = range(first, min(first + batch_size, len(self)))
            yield self.batch(numbers, views=views, grid=grid, halve=halve)


def turned(
    images: torch.Tensor, xy: torch.Tensor, visible: torch.Tensor, *, rng: Generator, quarter: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All views mirrored and, for square pictures, turned alike: a scene again, seen in a mirror.

    images (S, 3, H, W); xy (S, S, rows, cols, 2) in patch units; visible (S, S, rows, cols).
    """
    rows, cols = visible.shape[2:]
    if rng.random() < 0.5:
        images, xy, visible = images.flip(3), xy.flip(3), visible.flip(3)
        xy = torch.stack([cols - 1 - xy[..., 0], xy[..., 1]], -1)
    if rng.random() < 0.25:
        images, xy, visible = images.flip(2), xy.flip(2), visible.flip(2)
        xy = torch.stack([xy[..., 0], rows - 1 - xy[..., 1]], -1)
    if quarter and rng.random() < 0.25:
        images, xy, visible = images.mT, xy.transpose(2, 3).flip(-1), visible.mT
    return images, xy, visible


def recoloured(images: torch.Tensor, *, rng: Generator) -> torch.Tensor:
    """Each view its own brightness, contrast, colour cast, gamma, grain and, at times, blur."""
    B, S = images.shape[:2]

    def amount(spread: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, spread, (B, S, *shape)).astype(np.float32))

    gain = torch.exp(amount(0.15, 1, 1, 1) + amount(0.05, 3, 1, 1))
    gamma = torch.exp(amount(0.15, 1, 1, 1))
    mean = images.mean((3, 4), keepdim=True)
    changed = (images - mean) * torch.exp(amount(0.12, 1, 1, 1)) + mean
    changed = (changed * gain + amount(0.04, 1, 1, 1)).clamp(1e-4, 1) ** gamma
    if rng.random() < 0.15:
        soft = F.avg_pool2d(changed.flatten(0, 1), 3, 1, 1, count_include_pad=False)
        some = torch.from_numpy(rng.random((B, S, 1, 1, 1)) < 0.5)
        changed = torch.where(some, soft.unflatten(0, (B, S)), changed)
    seed = int(rng.integers(2**31))
    grain = torch.randn(changed.shape, generator=torch.Generator().manual_seed(seed))
    return (changed + grain * float(rng.uniform(0, 0.03))).clamp(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--split", default="train", choices=["train", "validation", "test"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--planar-share", type=float, default=0.3)
    parser.add_argument("--noise", type=float, default=0.1, help="share of noise textures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    build(
        given.photos / given.split,
        given.out,
        count=given.scenes,
        workers=given.workers,
        seed=given.seed,
        views=given.views,
        size=tuple(given.size),
        planar_share=given.planar_share,
        noise=given.noise,
    )
