"""What callers give to a run beside attention: names, pictures, metadata; checked and plain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vistvis.errors import InputError
from vistvis.files import checked_name


def image_tensor(images: Any) -> Tensor:
    """Pictures as one tensor, as they are: dtype, range and shape are kept.

    Raises
    ------
    InputError
        If they are not `(S, C, H, W)`, `(B, S, C, H, W)`, or a list of equal pictures.
    """
    import numpy as np

    if not isinstance(images, (Tensor, np.ndarray)) or images.ndim == 3:
        if isinstance(images, (Tensor, np.ndarray)):
            images = [images]
        arrays = [p if isinstance(p, Tensor) else torch.as_tensor(np.array(p)) for p in images]
        if not arrays or len({array.shape for array in arrays}) > 1:
            shapes = [tuple(array.shape) for array in arrays]
            raise InputError(f"a list of pictures has at least one, all of one shape, got {shapes}")
        images = torch.stack(arrays)
        if images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
            images = images.permute(0, 3, 1, 2)
    tensor = torch.as_tensor(images)
    if tensor.ndim not in (4, 5) or tensor.shape[-3] not in (1, 3):
        raise InputError(
            "images are (S, C, H, W) or (B, S, C, H, W) with 1 or 3 channels, or a list of "
            f"pictures (H, W, 3), got {tuple(tensor.shape)}"
        )
    return tensor.detach()


def site_names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise InputError(f"names are a list, got the string {names!r}")
    result = tuple(checked_name(name, "the name of a site") for name in names)
    if len(set(result)) != len(result):
        raise InputError(f"names of sites are given twice: {few(result)}")
    return result


def few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def plain_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata is what JSON can hold: {error}") from error
    return plain


def made_by() -> str:
    from importlib import metadata

    try:
        return f"vistvis {metadata.version('vistvis')}"
    except metadata.PackageNotFoundError:
        return "vistvis"
