"""What `Attention` demands of its tensors, and how sizes are written in messages."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from vistvis.errors import InputError


def check_pair(query: Tensor, key: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
            raise InputError(
                f"{name} is a floating tensor (batch, heads, tokens, head_dim), "
                f"got {describe(tensor)}"
            )
    fits = (
        query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and query.shape[3] > 0
        and 0 < key.shape[1] <= query.shape[1]
        and query.shape[1] % key.shape[1] == 0
    )
    if not fits:
        raise InputError(
            "query (B, h, Nq, d) and key (B, h_k, Nk, d) share B and d, and h_k divides h, with at "
            f"least one head and a d of 1; got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.device != key.device:
        raise InputError(f"query is on {query.device} and key on {key.device}; move one")


def check_value(value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Values `(B, h_v, Nk, dv)` of attention `(B, h, Nq, Nk)`."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        raise InputError(
            f"value is a floating tensor (batch, heads, keys, width), got {describe(value)}"
        )
    batch, heads, keys, width = value.shape
    if (batch, keys) != (shape[0], shape[3]) or not heads or shape[1] % heads or not width:
        raise InputError(
            f"value (B, h_v, Nk, dv) has the B and Nk of (B, h, Nq, Nk) = {tuple(shape)}, h_v "
            f"divides h and dv is 1 at least; got {tuple(value.shape)}"
        )
    if value.device != device:
        raise InputError(f"value is on {value.device} and the rest on {device}; move one")


def checked_scale(scale: Any, heads: int, device: torch.device) -> float | Tensor:
    if isinstance(scale, Tensor):
        real = scale.dtype != torch.bool and not scale.is_complex()
        if real and scale.numel() in (1, heads):
            return scale.reshape(-1).expand(heads).to(device)
    elif not isinstance(scale, bool) and isinstance(scale, Real):
        return float(scale)
    raise InputError(
        f"scale is one number, or a tensor of one for each of the {heads} heads, "
        f"got {describe(scale)}"
    )


def checked_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise InputError(
            "a mask is bool (True where a key takes part) or floating (added to the logits), "
            f"got {describe(mask)}"
        )
    try:
        mask.expand(shape)
    except RuntimeError as error:
        raise InputError(
            f"the mask {tuple(mask.shape)} must broadcast to (B, h, Nq, Nk) = {shape}"
        ) from error
    return mask.to(device)


def checked_segments(starts: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    try:
        rows: Tensor = torch.as_tensor(starts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"segments are the start rows of blocks, got {starts!r}") from error
    good = rows.ndim == 1 and len(rows) and rows.dtype == torch.int64
    if good:
        bounds = torch.cat([rows.cpu(), torch.tensor([shape[2]])])
        good = int(bounds[0]) == 0 and bool((bounds.diff() > 0).all())
    if not good or shape[2] != shape[3]:
        raise InputError(
            "segments are the start rows of blocks of tokens, int64, the first 0 and increasing, "
            f"where there are as many queries as keys; got {describe(rows)}, "
            f"{rows.tolist() if rows.numel() < 9 else '…'}, for {shape[2]} queries and "
            f"{shape[3]} keys"
        )
    return rows.to(device)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.is_nested:  # without a shape
            return f"a nested tensor of {value.dtype}"
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def bytes_text(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GB"
