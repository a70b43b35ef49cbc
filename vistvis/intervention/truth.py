"""Where patches of one view truly lie in the others, from points and cameras."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vistvis.errors import InputError

# What is deeper by less is of the same surface: a patch is wider than a point.
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

    What lies behind something else is not visible: it is more than 5 % deeper than what the patches
    around its place show, between which inverse depths are interpolated, as on a plane.
    `InputError` where the points are not those that pinhole cameras see through the grid.
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
            inside = (far > 0) & ((place >= -0.5) & (place < (rows - 0.5, cols - 0.5))).all(-1)
            places[i, j] = place
            visible[i, j] = inside & (
                far < (1 + _DEPTH) * _between(depth.reshape(rows, cols), place)
            )
    return Truth(torch.from_numpy(places)[None], torch.from_numpy(visible)[None])


def _seen(points: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes of the rays down and across, and depths."""
    x, y, z = (points.reshape(-1, 3) @ camera[:, :3].T + camera[:, 3]).T
    front = np.where(z > 0, z, np.nan)
    return y / front, x / front, np.where(z > 0, z, -1.0)


def _between(depth: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Depths `(n,)` at places `(n, 2)` between those of patches `(rows, cols)`."""
    last = np.array(depth.shape) - 1
    place = np.clip(place, 0, last)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, last), place - low
    inverse = np.zeros(len(place))
    for down, y in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0])):
        for across, x in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1])):
            inverse += y * x / depth[down, across]
    return 1 / inverse


def _line(rays: np.ndarray, numbers: np.ndarray, view: int) -> tuple[float, float]:
    """The grid coordinate as a linear function of a ray's slope."""
    fit = np.polyfit(rays, numbers, 1) if np.isfinite(rays).all() else np.full(2, np.nan)
    if not np.abs(np.polyval(fit, rays) - numbers).max() < 0.1:
        raise InputError(
            f"the points of view {view} are not what a pinhole camera sees at the centres of a "
            "grid of patches"
        )
    return float(fit[0]), float(fit[1])
