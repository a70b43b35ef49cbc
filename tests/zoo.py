"""Tiny models with the attention structure of model families that can't be installed here.

Each is small, seeded by its caller, and keeps what makes its family hard to read: where positions
travel, which kernel is called and how, what is written in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vistvis
from vistvis.photos.photo import SeenPhoto
from vistvis.photos.records import photos_metadata


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


def store_scene(folder: Path, names: Sequence[str]) -> Path:
    """A run of the small VGGT over two pictures of these names."""
    torch.manual_seed(0)
    model, images = VGGTLike().eval(), torch.rand(1, 2, 3, 28, 42)
    with vistvis.capture(model) as captured, torch.no_grad():
        model(images)
    metadata = photos_metadata([SeenPhoto(name, None, None) for name in names])
    vistvis.save_run(captured, folder, images=images, model="small@random", metadata=metadata)
    return folder


class Pi3Attention(nn.Module):
    """SDPA imported by name, called inside `sdpa_kernel`; positions as `xpos=`."""

    def __init__(self, width: int, heads: int, rope: Rope2D) -> None:
        super().__init__()
        self.num_heads, self.rope = heads, rope
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None, xpos: Any = None) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).transpose(1, 3)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = self.rope(q, xpos), self.rope(k, xpos)
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            x = scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, count, width))


class Pi3Like(nn.Module):
    """One decoder: even blocks see a frame, odd ones all frames."""

    def __init__(self, *, width: int = 32, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        rope = Rope2D()
        self.decoder = nn.ModuleList(
            Block(width, Pi3Attention(width, heads, rope)) for _ in range(depth)
        )

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """tokens `(B, S, P, C)`, pos `(B, S, P, 2)`."""
        batch, frames, count, width = tokens.shape
        for index, block in enumerate(self.decoder):
            shape = (batch, frames * count) if index % 2 else (batch * frames, count)
            x = block(tokens.reshape(*shape, width), xpos=pos.reshape(*shape, 2))
            tokens = x.view(batch, frames, count, width)
        return tokens


class MergingAttention(VGGTAttention):
    """Neighbouring tokens are averaged before the kernel, and its output is handed back to them."""

    def forward(
        self, x: Tensor, pos: Tensor | None = None, global_merging: int | None = None
    ) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        if global_merging:
            q, k, v = (t.unflatten(2, (-1, global_merging)).mean(3) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        if global_merging:
            x = x.repeat_interleave(global_merging, 2)
        return self.proj(x.transpose(1, 2).reshape(batch, count, width))


class StreamAttention(VGGTAttention):
    """A cache of earlier frames (Nq ≠ Nk), an additive mask, and a tuple as result."""

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        attn_mask: Tensor | None = None,
        past_key_values: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
    ) -> Any:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        if past_key_values is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past_key_values, (k, v), strict=True))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        x = self.proj(x.transpose(1, 2).reshape(batch, count, width))
        return (x, (k, v)) if use_cache else x


class ScaledAttention(nn.Module):
    """The query is scaled by the number of tokens, and the kernel gets a `scale=` of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * torch.log(torch.tensor(float(count)))
        x = F.scaled_dot_product_attention(q, k, v, scale=0.21)
        return self.proj(x.transpose(1, 2).reshape(batch, count, width))


class CrocoAttention(nn.Module):
    """Eager softmax, then `attn_drop`; RoPE by position, written in place."""

    def __init__(self, width: int, heads: int, rope: Rope2D) -> None:
        super().__init__()
        self.num_heads, self.rope, self.scale = heads, rope, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).transpose(1, 3)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = self.rope(q, xpos), self.rope(k, xpos)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = (attn @ v).transpose(1, 2).reshape(batch, count, width)
        return self.proj(x)


class CrocoCrossAttention(nn.Module):
    """`projq`, `projk`, `projv`; eager."""

    def __init__(self, width: int, heads: int, rope: Rope2D) -> None:
        super().__init__()
        self.num_heads, self.rope, self.scale = heads, rope, (width // heads) ** -0.5
        self.projq, self.projk = nn.Linear(width, width), nn.Linear(width, width)
        self.projv, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.attn_drop = nn.Dropout(0.1)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor
    ) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = split(self.projq(query)), split(self.projk(key)), split(self.projv(value))
        q, k = self.rope(q, qpos), self.rope(k, kpos)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        x = self.attn_drop(attn) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class CrocoLike(nn.Module):
    """Two pictures: each decodes itself and looks at the other."""

    def __init__(self, *, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        rope = Rope2D(in_place=True)
        self.attn = CrocoAttention(width, heads, rope)
        self.cross_attn = CrocoCrossAttention(width, heads, rope)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, y: Tensor, xpos: Tensor, ypos: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), xpos)
        other = self.norm2(y)
        return x + self.cross_attn(self.norm2(x), other, other, xpos, ypos)


class PooledAttention(nn.Module):
    """Fewer queries than keys, and RoPE written into a slice of the keys in place."""

    def __init__(self, width: int, heads: int, rope: Rope2D) -> None:
        super().__init__()
        self.num_heads, self.rope = heads, rope
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, pos: Tensor, memory: int = 2) -> Tensor:
        def split(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        q = self.rope(q, pos)[:, :, ::2]
        k[:, :, :-memory] = self.rope(k[:, :, :-memory], pos[:, :-memory])
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class DepthAnythingLike(nn.Module):
    """A ViT whose odd later blocks see all frames; only those later blocks have RoPE."""

    def __init__(self, *, width: int = 32, heads: int = 4, depth: int = 4, first: int = 2) -> None:
        super().__init__()
        rope, self.first = Rope2D(), first
        self.blocks = nn.ModuleList(
            Block(width, VGGTAttention(width, heads, rope if index >= first else None))
            for index in range(depth)
        )

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:
        batch, frames, count, width = tokens.shape
        for index, block in enumerate(self.blocks):
            every = index >= self.first and index % 2
            shape = (batch, frames * count) if every else (batch * frames, count)
            x = block(tokens.reshape(*shape, width), pos=pos.reshape(*shape, 2))
            tokens = x.view(batch, frames, count, width)
        return tokens


def rendered_scenes(count: int, views: int) -> Any:
    """Random scenes with known geometry, of photographs that the model was not trained on."""
    free = pytest.importorskip("skimage.data")
    import data

    photos = [free.astronaut(), free.chelsea(), free.coffee(), free.rocket()]
    made = [
        data.render_scene(n, photos=photos, seed=9, views=views, planar_share=0.0, noise=0.0)
        for n in range(count)
    ]
    scenes = data.Scenes.__new__(data.Scenes)  # its batches, without a folder
    scenes.arrays = {key: np.stack([one[key] for one in made]) for key in made[0]}
    scenes.size = scenes.arrays["images"].shape[2:4]
    return scenes
