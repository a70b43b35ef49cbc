"""VGGT's aggregator: the part of the model that attends.

Written from the paper (Wang et al., "VGGT: Visual Geometry Grounded Transformer", CVPR 2025) and
from the behaviour of the published model, with the names of its checkpoints, so that these load.
The heads (camera, depth, points, tracks) are left out, because attention does not need them.

Symbols: B batch, S frames, P tokens per frame, N tokens, C width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vggt_adapter.config import VGGTConfig, ViTConfig
from vistvis.errors import InputError

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)


class RotaryPositions(nn.Module):
    """Rotary position embedding in two dimensions (RoFormer, Su et al. 2021, section 3.4).

    The first half of the channels of every head turns with y, the second with x. Inside a half of
    D = d/2 channels, channel i and channel i + D/2 turn together by `position · base^(−2i/D)`.
    Position 0 is the identity, which is where the special tokens sit.

    Has no weights. All blocks share one instance: a hook on it sees q, then k, of each of them.
    """

    def __init__(self, frequency: float = 100.0) -> None:
        super().__init__()
        self.frequency = frequency
        # Tables of the positions in use: a forward rotates q and k of every block by the same
        # two, so they are made once. The aggregator empties this when its forward ends.
        self._tables: tuple[tuple[Tensor, int, torch.dtype, Tensor, Tensor], ...] = ()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rotate tokens (B, h, N, d) by their integer positions (B, N, 2), each (y, x)."""
        cos, sin = self._cos_sin(tokens, positions)
        # In each of the two halves: swap the two partners; the sign is already in `sin`.
        halves = tokens.reshape(*tokens.shape[:-1], 2, 2, -1)
        partners = halves.flip(-2).flatten(-3)
        return tokens * cos + partners * sin

    def forget(self) -> None:
        self._tables = ()

    def _cos_sin(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        width, dtype = tokens.shape[-1], tokens.dtype
        if torch.compiler.is_compiling():
            return self._make_tables(positions, width, dtype)
        for its_positions, its_width, its_dtype, cos, sin in self._tables:
            if its_positions is positions and its_width == width and its_dtype == dtype:
                return cos, sin
        # Inference tensors could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = self._make_tables(positions, width, dtype)
        self._tables = (*self._tables[-3:], (positions, width, dtype, cos, sin))
        return cos, sin

    def _make_tables(
        self, positions: Tensor, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and signed sin, each (B or 1, 1, N, d)."""
        if positions.ndim == 3 and positions.stride(0) == 0:
            positions = positions[:1]  # the same in every batch entry
        half = width // 2
        exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
        angles = positions.float()[..., None] * (1 / self.frequency**exponents)  # (B, N, 2, D/2)
        # The published model computes angles in float32 and turns them to the tokens' type before
        # cos and sin, so in bfloat16 positions lose precision. Its attention is reproduced here.
        angles = angles.to(dtype)
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.stack((cos, cos), -2).flatten(-3)[:, None],
            torch.stack((-sin, sin), -2).flatten(-3)[:, None],
        )


class Attention(nn.Module):
    """Self-attention with optional LayerNorm and rotary positions on queries and keys."""

    def __init__(
        self, width: int, num_heads: int, *, qk_norm: bool, rope: RotaryPositions | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x (B, N, C), pos (B, N, 2) or None → (B, N, C)."""
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, count, width))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        # The exact (erf) GELU.
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        rope: RotaryPositions | None = None,
        eps: float = 1e-5,
        init_values: float = 0.01,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, qk_norm=qk_norm, rope=rope)
        self.ls1 = LayerScale(width, init_values)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, round(width * mlp_ratio))
        self.ls2 = LayerScale(width, init_values)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchProjection(nn.Module):
    """One token for each patch: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, rows · cols, C), grid row after grid row."""
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """DINOv2's transformer (Oquab et al. 2023; registers: Darcet et al. 2023).

    Order of its tokens: cls, registers, patches. Only the patches leave it, normalised.
    """

    def __init__(self, config: VGGTConfig, vit: ViTConfig) -> None:
        super().__init__()
        width, side = config.embed_dim, config.img_size // config.patch_size
        self.patch_size = config.patch_size
        self.num_heads = vit.num_heads
        self.num_register_tokens = vit.num_register_tokens
        self.gradient_checkpointing = True
        self.patch_embed = PatchProjection(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.register_tokens = None
        if vit.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, vit.num_register_tokens, width))
        # Only masked training uses it; published checkpoints carry it.
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        options: dict[str, Any] = {"mlp_ratio": vit.mlp_ratio, "eps": 1e-6, "init_values": 1.0}
        self.blocks = nn.ModuleList(
            Block(width, vit.num_heads, qk_norm=False, **options) for _ in range(vit.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # Random weights, as DINOv2 starts its training.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, rows: int, cols: int) -> Tensor:
        """The positional embedding (1, 1 + rows · cols, C), resized to this grid."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if (rows, cols) == (side, side):
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        # Half precision has no antialiased kernel everywhere, and resizing would lose by it.
        grid = grid.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (rows, cols), mode="bicubic", antialias=True)
        return torch.cat((cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)), 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, rows · cols, C)."""
        rows, cols = (side // self.patch_size for side in images.shape[-2:])
        tokens = self.patch_embed(images)
        batch = tokens.shape[0]
        tokens = torch.cat((self.cls_token.expand(batch, -1, -1), tokens), 1)
        tokens = tokens + self.positions(rows, cols)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(batch, -1, -1)
            tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), 1)
        save = self.training and self.gradient_checkpointing
        for block in self.blocks:
            tokens = _run(block, tokens, None, save=save)
        return self.norm(tokens)[:, 1 + self.num_register_tokens :]  # type: ignore[no-any-return]


class Aggregator(nn.Module):
    """Patch embedding, then frame and global blocks in turn.

    Attributes
    ----------
    frame_blocks, global_blocks
        Frame blocks see the tokens of one frame, (B · S, P, C); global blocks those of all frames
        one after the other, (B, S · P, C). A pair is one frame block, then one global block.
    camera_token, register_token
        (1, 2, 1, C) and (1, 2, R, C): entry 0 for frame 0, entry 1 for all others.
    patch_start_idx
        Special tokens at the start of every frame (camera, then registers).
    patch_size, embed_dim, depth, num_heads
        As in `VGGTConfig`.
    gradient_checkpointing
        True: in train mode blocks are run again in the backward pass instead of being kept.
        Set it to False to train faster where memory allows.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        width, heads, vit = config.embed_dim, config.num_heads, config.vit
        self.patch_size, self.embed_dim = config.patch_size, width
        self.depth, self.num_heads = config.depth, heads
        self.patch_start_idx = 1 + config.num_register_tokens
        self.patch_embed = (
            VisionTransformer(config, vit) if vit else PatchProjection(config.patch_size, width)
        )
        self.rope = RotaryPositions(config.rope_frequency)
        options: dict[str, Any] = {"mlp_ratio": config.mlp_ratio, "init_values": config.init_values}
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(Block(width, heads, rope=self.rope, **options) for _ in range(self.depth))
            for _ in ("frame", "global")
        )
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, width))
        self.register_token = nn.Parameter(torch.empty(1, 2, config.num_register_tokens, width))
        nn.init.normal_(self.camera_token, std=1e-6)
        nn.init.normal_(self.register_token, std=1e-6)
        self._gradient_checkpointing = True
        self.reset_buffers()

    @property
    def gradient_checkpointing(self) -> bool:
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._gradient_checkpointing = value
        if isinstance(self.patch_embed, VisionTransformer):
            self.patch_embed.gradient_checkpointing = value

    def reset_buffers(self) -> None:
        """Make the constants that no checkpoint holds, where the weights are."""
        weight = self.camera_token
        for name, values in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            # Through float32, as published: its rounding is part of the model.
            made = torch.tensor(values).to(weight).view(1, 3, 1, 1)
            self.register_buffer(name, made, persistent=False)

    def forward(
        self, images: Tensor, *, pairs: Sequence[int] | None = None
    ) -> tuple[list[Tensor], int]:
        """Aggregate images; see `VGGT.forward`."""
        images = self._checked(images)
        returned = self._checked_pairs(pairs)
        batch, frames, _, height, width = images.shape
        rows, cols = height // self.patch_size, width // self.patch_size

        pixels = (images.flatten(0, 1) - self.image_mean) / self.image_std
        patches = self.patch_embed(pixels.to(self.camera_token.dtype))
        special = torch.cat((self.camera_token, self.register_token), 2)  # (1, 2, R + 1, C)
        first, others = special[:, :1], special[:, 1:].expand(-1, frames - 1, -1, -1)
        special = torch.cat((first, others), 1).expand(batch, -1, -1, -1).flatten(0, 1)
        tokens = torch.cat((special.to(patches.dtype), patches), 1)  # (B · S, P, C)
        count = tokens.shape[1]

        positions = grid_positions(rows, cols, self.patch_start_idx, tokens.device)
        frame_pos = positions.expand(batch * frames, -1, -1)
        global_pos = positions.repeat(frames, 1).expand(batch, -1, -1)
        save = self.training and self._gradient_checkpointing
        outputs: dict[int, Tensor] = {}
        try:
            for index in range(self.depth):
                tokens = tokens.view(batch * frames, count, -1)
                tokens = in_frame = _run(self.frame_blocks[index], tokens, frame_pos, save=save)
                tokens = tokens.view(batch, frames * count, -1)
                tokens = _run(self.global_blocks[index], tokens, global_pos, save=save)
                if index in returned:
                    both = (t.view(batch, frames, count, -1) for t in (in_frame, tokens))
                    outputs[index] = torch.cat(tuple(both), -1)
        finally:
            self.rope.forget()
        return [outputs[index] for index in returned], self.patch_start_idx

    def _checked(self, images: Tensor) -> Tensor:
        """Images as (B, S, 3, H, W), or InputError."""
        if not isinstance(images, Tensor):
            raise InputError(
                f"images must be a tensor, got {type(images).__name__}; "
                "load_and_preprocess_images(paths) makes one"
            )
        shape = tuple(images.shape)
        if images.ndim not in (4, 5) or shape[-3] != 3:
            raise InputError(
                f"images must be (S, 3, H, W) or (B, S, 3, H, W), got {shape}; "
                "for one picture (3, H, W) give images[None]"
            )
        if images.ndim == 4:
            images = images[None]
        if 0 in shape:
            raise InputError(f"images must hold at least one frame, got {shape}")
        if not images.is_floating_point():
            raise InputError(
                f"images must be floating-point values in [0, 1], got {images.dtype}; "
                "use images.float() / 255"
            )
        size = self.patch_size
        if shape[-2] % size or shape[-1] % size:
            near = tuple(max(size, round(side / size) * size) for side in shape[-2:])
            raise InputError(
                f"height and width must be multiples of the patch size {size}, got "
                f"{shape[-2]}×{shape[-1]}; resize to {near[0]}×{near[1]}, as "
                "load_and_preprocess_images does"
            )
        return images

    def _checked_pairs(self, pairs: Sequence[int] | None) -> list[int]:
        if pairs is None:
            return list(range(self.depth))
        wrong = [index for index in pairs if not -self.depth <= index < self.depth]
        if wrong:
            raise InputError(
                f"pairs must lie in 0…{self.depth - 1} (or be negative, from the end), got {wrong}"
            )
        return [index % self.depth for index in pairs]


def grid_positions(
    rows: int, cols: int, num_special: int, device: torch.device | str | None = None
) -> Tensor:
    """(y, x) of every token of a frame, (P, 2): special tokens (0, 0), patches (row + 1, col + 1).

    Patches start at 1 so that no patch shares the special tokens' place.
    """
    y, x = (torch.arange(1, count + 1, device=device) for count in (rows, cols))
    return F.pad(torch.cartesian_prod(y, x), (0, 0, num_special, 0))


def _run(block: nn.Module, tokens: Tensor, pos: Tensor | None, *, save: bool) -> Tensor:
    """Run a block; `save` keeps only its input and runs it again in the backward pass."""
    if save and torch.is_grad_enabled():
        # No randomness inside a block, so no generator state to put back.
        result = checkpoint(block, tokens, pos=pos, use_reentrant=False, preserve_rng_state=False)
    else:
        result = block(tokens, pos=pos)
    assert isinstance(result, Tensor)
    return result
