"""Tiny models with the attention structure of model families that can't be installed here.

Each is small, seeded by its caller, and keeps what makes its family hard to read: where positions
travel, which kernel is called and how, what is written in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Rope2D(nn.Module):
    """Rotary embedding of a grid: half of the width turns with y, half with x."""

    def __init__(self, base: float = 100.0, *, in_place: bool = False) -> None:
        super().__init__()
        self.base, self.in_place = base, in_place

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angles = (places[..., None].float() * self.base**-steps).to(x.dtype)[:, None]
        cos, sin = angles.cos().repeat(1, 1, 1, 2), angles.sin().repeat(1, 1, 1, 2)
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos + turned * sin

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """x `(B, h, N, d)`, pos `(B, N, 2)` as (y, x)."""
        y, z = x.chunk(2, -1)
        turned = torch.cat((self._turn(y, pos[..., 0]), self._turn(z, pos[..., 1])), -1)
        if self.in_place:
            x.copy_(turned)
            return x
        return turned


class VGGTAttention(nn.Module):
    """Fused qkv, q/k norm, shared rope with `pos=` as a keyword, SDPA."""

    def __init__(self, width: int, heads: int, rope: Rope2D | None) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, count, width))


class Block(nn.Module):
    """Residual attention and MLP around any attention module."""

    def __init__(self, width: int, attn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.attn(self.norm1(x), **kwargs)
        return x + self.mlp(self.norm2(x))


class VGGTLike(nn.Module):
    """Frame and global blocks in turn over camera, register and patch tokens."""

    def __init__(
        self,
        *,
        width: int = 32,
        heads: int = 4,
        depth: int = 2,
        patch: int = 14,
        checkpoint: bool = True,
        in_place_rope: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx, self.checkpoint = patch, 5, checkpoint
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, width))
        self.register_token = nn.Parameter(torch.randn(1, 2, 4, width))
        self.rope = Rope2D(in_place=in_place_rope)

        def blocks() -> nn.ModuleList:
            made = (VGGTAttention(width, heads, self.rope) for _ in range(depth))
            return nn.ModuleList(Block(width, attn) for attn in made)

        self.frame_blocks, self.global_blocks = blocks(), blocks()

    def _run(self, block: nn.Module, x: Tensor, pos: Tensor) -> Tensor:
        if self.training and self.checkpoint:
            return torch.utils.checkpoint.checkpoint(block, x, pos=pos, use_reentrant=False)
        return block(x, pos=pos)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.ndim == 4:
            images = images[None]
        batch, frames = images.shape[:2]
        patches = self.embed(images.flatten(0, 1))
        rows, cols = patches.shape[-2:]
        special = torch.cat((self.camera_token, self.register_token), 2)
        special = torch.cat((special[:, :1], special[:, 1:].expand(-1, frames - 1, -1, -1)), 1)
        special = special.expand(batch, -1, -1, -1)
        x = patches.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
        x = torch.cat((special.to(x.dtype), x), 2)
        count, width = x.shape[2:]
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)) + 1
        pos = torch.cat((torch.zeros(5, 2, dtype=grid.dtype), grid)).to(x.device)
        pos = pos.expand(batch, frames, -1, -1)
        out = []
        for one, every in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = self._run(one, x.reshape(batch * frames, count, width), pos.flatten(0, 1))
            local = x.view(batch, frames, count, width)
            x = self._run(every, x.reshape(batch, frames * count, width), pos.flatten(1, 2))
            x = x.view(batch, frames, count, width)
            out.append(torch.cat((local, x), -1))
        return out


_SDPA = scaled_dot_product_attention  # imported by name, as some families do
