"""What a run holds of the scene beside attention: pictures, points, confidence, cameras."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistvis.attention.checks import describe
from vistvis.errors import InputError
from vistvis.images import image_tensor
from vistvis.tokens import TokenLayout

_SHAPES = {
    "points": "(S, rows, cols, 3) or (S, H, W, 3)",
    "confidence": "(S, rows, cols) or (S, H, W)",
    "cameras": "(S, 3, 4)",
}
_ENDS = {"points": (3,), "confidence": (), "cameras": (3, 4)}
_DIMS = {"points": 4, "confidence": 3, "cameras": 3}


def scene_tensors(
    *, images: Any, points: Any, confidence: Any, cameras: Any, layout: TokenLayout | None
) -> dict[str, Tensor]:
    """What is given of a scene, by name, as `RunWriter` takes it; InputError if it can't be."""
    given = {"points": points, "confidence": confidence, "cameras": cameras}
    scene = {name: _tensor(name, value) for name, value in given.items() if value is not None}
    frames = {name: len(tensor) for name, tensor in scene.items()}
    sizes = {n: tuple(t.shape[1:3]) for n, t in scene.items() if n != "cameras"}
    if images is not None:
        pictures = image_tensor(images)
        if scene and pictures.ndim == 5 and len(pictures) > 1:
            raise InputError(
                f"{', '.join(scene)} belong to one scene, and images {tuple(pictures.shape)} are "
                f"of {len(pictures)}; store one run for each"
            )
        frames["images"] = pictures.shape[-4]
        wanted = [tuple(pictures.shape[-2:]), *([layout.grid] if layout else [])]
        if layout and (wrong := [name for name, size in sizes.items() if size not in wanted]):
            raise InputError(
                f"{wrong[0]} lie on the pixels of the images or on the patches of the layout, "
                f"{' or '.join(map(str, wanted))}, got {sizes[wrong[0]]}"
            )
        scene["images"] = pictures
    if len(set(frames.values())) > 1:
        listed = ", ".join(f"{name} of {count}" for name, count in frames.items())
        raise InputError(f"a scene has as many frames S in each of its parts, got {listed}")
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"points and their confidence have one size, got {sizes['points']} and "
            f"{sizes['confidence']}"
        )
    return scene


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} are a tensor or an array: {error}") from error
    if tensor.ndim == _DIMS[name] + 1 and len(tensor) == 1:
        tensor = tensor[0]
    end = _ENDS[name]
    fits = tensor.ndim == _DIMS[name] and tuple(tensor.shape[tensor.ndim - len(end) :]) == end
    if not (fits and tensor.is_floating_point()):
        raise InputError(
            f"{name} are floating {_SHAPES[name]}, or the same in a batch of one, got "
            f"{describe(tensor)}"
        )
    return tensor
