"""Losses and scores of matching: what «this patch is that patch» means, in one place.

Shapes: B scenes, S views, N patches in a view, d channels. `place` (B, S, S, N, 2) says where each
patch centre of view i lies in view j, in patch units (x, y); `visible` (B, S, S, N) whether it can
be seen there. Both come from training/data.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_adapter.model import VGGT

SIGMA = 0.5  # width of the soft target, in patches


@dataclass
class Kernels:
    """Queries and keys of the attention calls of one forward pass, in call order."""

    keep_last: bool = True
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, q: Tensor, k: Tensor) -> None:
        if self.keep_last:
            self.calls.clear()
        self.calls.append((q, k))


@contextmanager
def kernels(*, keep_last: bool = True) -> Iterator[Kernels]:
    """Sees the queries and keys (B, h, N, d) that reach the attention kernel, after RoPE.

    On a CPU, short bfloat16 sequences also take a faster route: this PyTorch's fused kernel is
    several times slower there than two plain matrix products.
    """
    real: Callable[..., Tensor] = F.scaled_dot_product_attention
    seen = Kernels(keep_last)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.add(q, k)
        if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return real(q, k, v)
        if q.shape[-2] > 320:
            with torch.autocast("cpu", enabled=False):
                return real(q.float(), k.float(), v.float())
        weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
        return weights.to(v.dtype) @ v

    F.scaled_dot_product_attention = attention
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = real


def frames_apart(x: Tensor, views: int) -> Tensor:
    """(B, h, S·P, d) → (B, S, h, P, d)."""
    return x.unflatten(2, (views, -1)).transpose(1, 2)


def soft_targets(place: Tensor, grid: tuple[int, int]) -> Tensor:
    """(…, 2) places → (…, rows·cols): a Gaussian of width SIGMA around the place, sum 1."""
    rows, cols = grid
    x = torch.arange(cols, device=place.device) - place[..., :1].clamp(-1, cols)
    y = torch.arange(rows, device=place.device) - place[..., 1:].clamp(-1, rows)
    across = (-(x**2) / (2 * SIGMA**2)).softmax(-1)
    down = (-(y**2) / (2 * SIGMA**2)).softmax(-1)
    return (down[..., :, None] * across[..., None, :]).flatten(-2)


def match_loss(logits: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
    """Cross-entropy over the patches of the other view, mean over visible patches.

    logits, targets (B, S, S, N, N); visible (B, S, S, N).
    """
    entropy = -(targets * logits.log_softmax(-1)).sum(-1)
    return (entropy * visible).sum() / visible.sum().clamp(min=1)


def row_loss(q: Tensor, k: Tensor, targets: Tensor, visible: Tensor, start: int) -> Tensor:
    """Cross-entropy of a head's whole row against equal shares on every place the patch is seen.

    The row runs over all tokens of all views, special tokens too; its target is the patch itself
    and its true places in the other views. q, k (B, S, P, d); targets (B, S, S, N, N).
    """
    B, S, P, d = q.shape
    N = P - start
    logits = torch.einsum("bind,bjmd->binjm", q[:, :, start:], k).float() * d**-0.5
    logp = logits.flatten(3).log_softmax(-1).unflatten(3, (S, P))[..., start:]
    own = torch.eye(S, device=q.device, dtype=torch.bool)[None, :, :, None].expand(B, S, S, N)
    seen = (visible | own).float()
    share = seen / seen.sum(2, keepdim=True)  # over the views j
    entropy = -(targets * logp.permute(0, 1, 3, 2, 4)).sum(-1)  # (B, S, S, N)
    return (entropy * share).sum() / (B * S * N)


@dataclass
class Hits:
    """Counts of matches that fell within one patch, and at most half a patch off."""

    within: float = 0.0
    exact: float = 0.0
    count: float = 0.0

    def add(self, best: Tensor, place: Tensor, visible: Tensor, cols: int) -> None:
        """`best` (…, N) chosen patch, `place` (…, N, 2) true place in patch units."""
        chosen = torch.stack([best % cols, best // cols], -1)
        off = (chosen - place).abs().amax(-1)  # the larger of the two distances
        # A centre on the border of two patches is as near to both: half a patch counts.
        self.within += float(((off <= 1.0 + 0.5) & visible).sum())
        self.exact += float(((off <= 0.5 + 1e-3) & visible).sum())
        self.count += float(visible.sum())

    @property
    def shares(self) -> tuple[float, float]:
        """(within one patch, exact), in 0…1; NaN where nothing was visible."""
        if not self.count:
            return float("nan"), float("nan")
        return self.within / self.count, self.exact / self.count


@torch.no_grad()
def forward_with_kernels(
    model: VGGT, images: Tensor
) -> tuple[Tensor, int, list[tuple[Tensor, Tensor]]]:
    """Last tokens (B, S, P, 2C), special tokens per view, and q, k of every global block."""
    with kernels(keep_last=False) as seen:
        tokens, start = model(images, pairs=[-1])
    depth = model.config.depth
    blocks = seen.calls[-2 * depth :][1::2]  # frame, global, frame, global, …
    return tokens[-1], start, blocks
