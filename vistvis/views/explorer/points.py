"""Points, confidence and cameras of a scene, one point a patch, as a page carries them."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistvis.errors import InputError
from vistvis.store.scene import scene_tensors
from vistvis.tokens import TokenLayout


def point_record(
    layout: TokenLayout, *, points: Any, confidence: Any = None, cameras: Any = None
) -> dict[str, Any]:
    """The manifest's `points`: the world position of each patch of `layout`.

    `points` are floating `(S, rows, cols, 3)`, or `(S, H, W, 3)` of which those in the middle of
    the patches are taken, both also in a batch of one; `confidence` is the same without the 3;
    `cameras` are `(S, 3, 4)`, world to camera, as OpenCV's. In the record each is base64 of
    little-endian float32, and `left_out` counts the patches without a finite point, which no
    cloud shows. InputError for other shapes, a camera with NaN or infinite numbers, or where no
    point is finite.
    """
    scene = scene_tensors(
        images=None, points=points, confidence=confidence, cameras=cameras, layout=layout
    )
    frames, *grid = scene["points"].shape[:3]
    whole = all(side and side % count == 0 for side, count in zip(grid, layout.grid, strict=True))
    if frames != layout.frames or not whole:
        rows, cols = layout.grid
        raise InputError(
            f"points are of {layout.frames} frames of {rows}×{cols} patches, or of pictures of a "
            f"whole multiple of these, got {frames} of {grid[0]}×{grid[1]}; give those of the "
            "pictures that the model saw"
        )
    positions = _at_patches(scene["points"], layout)
    finite = positions.isfinite().all(-1)
    if not finite.any():
        raise InputError("points are finite numbers for some patch, got none; leave points= out")
    record = {"positions": _text(positions), "left_out": int((~finite).sum())}
    if "confidence" in scene:
        record["confidence"] = _text(_at_patches(scene["confidence"], layout))
    if "cameras" in scene:
        if not scene["cameras"].isfinite().all():
            raise InputError("cameras are finite numbers, got NaN or infinity; leave cameras= out")
        record["cameras"] = _text(scene["cameras"])
    return record


def _at_patches(values: Tensor, layout: TokenLayout) -> Tensor:
    """`(S, rows, cols, …)` of what lies in the middle of each patch."""
    for axis, count in enumerate(layout.grid, 1):
        step = values.shape[axis] // count
        middle = torch.arange(count, device=values.device) * step + step // 2
        values = values.index_select(axis, middle)
    return values.float().cpu()


def _text(values: Tensor) -> str:
    array = np.ascontiguousarray(values.float().cpu().numpy().astype("<f4"))
    return base64.b64encode(array.tobytes()).decode()
