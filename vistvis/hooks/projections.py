"""Queries and keys before their rotary embedding: read by forward hooks on the projections.

This is the second, independent way to a module's queries and keys; the first is the kernel call.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vistvis.attention import Attention
from vistvis.errors import CaptureError
from vistvis.models.families import FUSED_PROJECTIONS, NORM_PAIRS, PROJECTION_PAIRS


def _hook(tap: weakref.ref[ProjectionTap], name: str, child: nn.Module) -> Any:
    def take(module: nn.Module, inputs: Any, output: Any) -> None:
        there = tap()
        if there is None:
            handle.remove()  # an interrupt left it behind
        else:
            there.take(name, output)

    handle = child.register_forward_hook(take)
    return handle


class ProjectionTap:
    """Hooks on a module's q/k norms or, without them, its projections, on while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._taps: dict[str, Any] = {}
        for names in (*NORM_PAIRS, *PROJECTION_PAIRS, *((name,) for name in FUSED_PROJECTIONS)):
            taps = {name: getattr(module, name, None) for name in names}
            if all(isinstance(child, nn.Module) for child in taps.values()):
                self._taps = taps
                break

    def __enter__(self) -> ProjectionTap:
        for name, child in self._taps.items():
            self._handles.append(_hook(weakref.ref(self), name, child))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            self._seen[name] = output.detach().clone()

    def attention(self, kernel: Attention, *, rope: bool) -> Attention:
        """The attention of the projections' output, shaped like the kernel's.

        A rotary embedding turns pairs of numbers and keeps their length: the length of every query
        and key must be that of the kernel's, which proves that nothing else lies between.
        `CaptureError` otherwise, or if the module has no such projections.
        """
        if kernel.weights is not None:
            raise CaptureError("rope=False needs queries and keys, and this module shows weights")
        if not self._taps or self._seen.keys() != self._taps.keys():
            raise CaptureError(
                "has no q_norm/k_norm, q/k projections or qkv whose output could be taken before "
                "the rotary embedding"
            )
        query, key = self._split(kernel)
        for name, before, after in (("query", query, kernel.query), ("key", key, kernel.key)):
            if before.shape != after.shape:
                raise CaptureError(
                    f"the projections' {name} {tuple(before.shape)} is not shaped like the "
                    f"kernel's {tuple(after.shape)}: tokens were merged or cached in between"
                )
            old, new = before.float().norm(dim=-1), after.float().norm(dim=-1)
            eps = 8 * max(torch.finfo(before.dtype).eps, torch.finfo(after.dtype).eps)
            if not torch.allclose(old, new, rtol=4 * eps, atol=eps):
                raise CaptureError(
                    f"between the projections and the kernel the {name} is not only rotated, so "
                    "its weights before the rotary embedding can't be told"
                )
            if rope and not torch.equal(before.to(after.dtype), after):
                raise CaptureError(
                    f'source="projection" was asked for, but the kernel\'s {name} differs from the '
                    "projection (a rotary embedding?); use rope=False if that is meant"
                )
        # Values are not rotated: they are the kernel's.
        return kernel.replace(query=query.to(kernel.query.dtype), key=key.to(kernel.key.dtype))

    def _split(self, kernel: Attention) -> tuple[Tensor, Tensor]:
        batch, heads, queries, keys = kernel.shape
        width, key_heads = kernel.query.shape[-1], kernel.key.shape[1]
        if len(self._taps) == 1:
            (fused,) = self._seen.values()
            if fused.ndim != 3 or fused.shape[-1] != 3 * heads * width:
                raise CaptureError(
                    f"its fused projection {tuple(fused.shape)} is not (B, N, 3·h·d)"
                )
            query, key, _ = rearrange(fused, "b n (three h d) -> three b h n d", three=3, h=heads)
            return query, key
        query, key = (self._seen[name] for name in self._taps)
        sides = (query, heads, queries), (key, key_heads, keys)
        query, key = (self._shaped(one, (batch, h, n, width)) for one, h, n in sides)
        return query, key

    @staticmethod
    def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) == shape:
            return tensor
        batch, heads, tokens, width = shape
        if tuple(tensor.shape) in {(batch, tokens, heads, width), (batch, tokens, heads * width)}:
            return tensor.reshape(batch, tokens, heads, width).transpose(1, 2)
        raise CaptureError(
            f"its projection {tuple(tensor.shape)} is not shaped like the kernel's {shape}: "
            "tokens were merged or cached in between"
        )
