"""Where patches of one view truly lie in the others, from points and cameras."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vistvis.errors import InputError

# Depths that differ by less are of one surface: a patch is wider than a point.
_DEPTH = 0.05


class Truth(NamedTuple):
    """True matches of B scenes of S views with P = rows · cols patches each."""

    places: Tensor
    """`(B, S, S, P, 2)`: (row, col) in view j of what a patch of view i shows at its centre, in
    patches; the centre of the top left one is (0, 0)."""
    visible: Tensor
    """`(B, S, S, P)` bool: whether it can be seen there; never in its own view."""


def truth_of_scene(points: ArrayLike, cameras: ArrayLike) -> Truth:
    """True matches of one scene, from points `(S, rows, cols, 3)` in the world, at the centres of
    patches, and cameras `(S, 3, 4)`, world to camera (x right, y down, z forward).

    What lies behind something else is not visible: its depth differs from that of the patch it
    falls on by more than 5 %. `InputError` where the points are not those that pinhole cameras see
    through the grid.
    """
    world, matrices = np.asarray(points, float), np.asarray(cameras, float)
    if world.ndim != 4 or world.shape[3] != 3 or matrices.shape != (len(world), 3, 4):
        raise InputError(
            "a scene is points (S, rows, cols, 3) and cameras (S, 3, 4), got "
            f"{world.shape} and {matrices.shape}"
        )
    views, rows, cols, _ = world.shape
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), -1).reshape(-1, 2)
    places = np.zeros((views, views, rows * cols, 2))
    visible = np.zeros((views, views, rows * cols), bool)
    for j, camera in enumerate(matrices):
        down, across, depth = _seen(world[j], camera)
        lines = [_line(down, grid[:, 0], j), _line(across, grid[:, 1], j)]
        for i in range(views):
            if i == j:
                continue
            *rays, far = _seen(world[i], camera)
            place = np.stack([a * ray + b for (a, b), ray in zip(lines, rays, strict=True)], -1)
            patch = np.round(place)
            inside = (far > 0) & ((patch >= 0) & (patch < (rows, cols))).all(-1)
            row, col = np.clip(patch, 0, (rows - 1, cols - 1)).astype(int).T
            nearest = depth.reshape(rows, cols)[row, col]
            places[i, j] = place
            visible[i, j] = inside & (np.abs(far - nearest) < _DEPTH * far)
    return Truth(torch.from_numpy(places)[None], torch.from_numpy(visible)[None])


def _seen(points: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes of the rays down and across, and depths."""
    x, y, z = (points.reshape(-1, 3) @ camera[:, :3].T + camera[:, 3]).T
    front = np.where(z > 0, z, np.nan)
    return y / front, x / front, np.where(z > 0, z, -1.0)


def _line(rays: np.ndarray, numbers: np.ndarray, view: int) -> tuple[float, float]:
    """The grid coordinate as a linear function of a ray's slope."""
    fit = np.polyfit(rays, numbers, 1) if np.isfinite(rays).all() else np.full(2, np.nan)
    if not np.abs(np.polyval(fit, rays) - numbers).max() < 0.1:
        raise InputError(
            f"the points of view {view} are not what a pinhole camera sees at the centres of a "
            "grid of patches"
        )
    return float(fit[0]), float(fit[1])
