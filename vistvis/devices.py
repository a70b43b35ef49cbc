"""Devices and dtypes as people name them, checked before anything is loaded."""

from __future__ import annotations

import torch

from vistvis.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that is meant; None: CUDA where there is one, else the CPU.

    Raises
    ------
    InputError
        If there is no such device, or not on this machine.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if cuda else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"no device {device!r}: a device must be like 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from error
    if place.type == "cuda" and (place.index or 0) >= cuda:
        seen = f"has {cuda} CUDA devices" if cuda else "has no CUDA device"
        raise InputError(f"device {str(place)!r} was asked for, and this machine {seen}; use cpu")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' was asked for, and this machine has none; use cpu")
    return place


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype by its name, or the dtype itself.

    Raises
    ------
    InputError
        If it is none of `DTYPES`, or no floating type.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    named: torch.dtype = getattr(torch, str(dtype))
    return named
