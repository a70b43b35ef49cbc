"""What is true of the sample views: where their cameras stood, and what each patch shows.

`samples/scene.npz`, written with the pictures by training/samples.py, holds the rectangles that
were drawn and the cameras, which give the points of a grid of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vistvis.photos.photo import Photo

FOLDER = Path(__file__).parent / "samples"


def sample_views() -> list[Path]:
    """The three views that come with the package."""
    return sorted(p for p in FOLDER.iterdir() if p.suffix in (".jpg", ".png"))


def sample_points(grid: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The true points of the sample views' patches, and the cameras.

    Points `(3, rows, cols, 3)` float32 in the world, at the centres of the patches of `grid`;
    cameras `(3, 3, 4)` float64, world to camera (x right, y down, z forward, as OpenCV's).

    A rectangle `corner + a·u + b·v` is met by the ray d from o where `[u v corner−o]⁻¹ d` is
    `(a/t, b/t, 1/t)`; the nearest is the one with the largest 1/t.
    """
    with np.load(FOLDER / "scene.npz") as scene:
        rectangles, cameras, focal = scene["rectangles"], scene["cameras"], float(scene["focal"])
        height, width = scene["size"]
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in grid)
    seen = np.stack([*np.meshgrid(x * width / focal, y * height / focal), np.ones(grid)], -1)
    points = []
    for camera in cameras:
        turn, shift = camera[:, :3], camera[:, 3]
        place, rays = -turn.T @ shift, seen @ turn
        depth = np.full(grid, np.inf)
        for corner, u, v in rectangles:
            inverse = np.linalg.inv(np.stack([u, v, corner - place], 1))
            a, b, s = np.moveaxis(rays @ inverse.T, -1, 0)
            met = (s > 0) & (a >= 0) & (a <= s) & (b >= 0) & (b <= s)
            depth[met] = np.minimum(depth[met], 1 / s[met])
        points.append(place + rays * depth[..., None])
    return np.stack(points).astype(np.float32), cameras


def scene_of(photos: Sequence[Photo], grid: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """Points and cameras where all photos are sample views, as runs take them; else nothing."""
    views = [path.resolve() for path in sample_views()]
    paths = [photo.path.resolve() for photo in photos]
    if not all(path in views for path in paths):
        return {}
    points, cameras = sample_points(grid)
    chosen = [views.index(path) for path in paths]
    return {"points": points[chosen], "cameras": cameras[chosen]}
