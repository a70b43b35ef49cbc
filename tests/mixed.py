"""Miniatures of models whose tokens are not only rows of patches: text, levels, groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from multiview import HEADS, PATCH, WIDTH, CrossAttention, PatchEmbed, plain_blocks
from torch import Tensor, nn
from zoo import VGGTAttention


class Joint(nn.Module):
    """Flux and SD3: text beside the picture; text first or picture first."""

    def __init__(self, *, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.context_embedder = nn.Linear(WIDTH, WIDTH)
        self.transformer_blocks = plain_blocks(1)
        self.config = nn.Module()
        self.config.patch_size = 1
        if text_first:
            self.x_embedder, self.single_transformer_blocks = nn.Linear(3, WIDTH), plain_blocks(1)
        else:
            self.pos_embed = PatchEmbed()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        img_ids: Tensor | None = None,
    ) -> Tensor:
        text = self.context_embedder(encoder_hidden_states)
        if self.text_first:
            x = torch.cat((text, self.x_embedder(hidden_states)), 1)
            return self.single_transformer_blocks[0](self.transformer_blocks[0](x))
        x = torch.cat((self.pos_embed(hidden_states), text), 1)
        return self.transformer_blocks[0](x)


class Levels(nn.Module):
    """UNet: `attn1` among the picture at two resolutions, `attn2` from it to text."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, WIDTH, 1)
        for name in ("down_blocks", "mid_block"):
            level = nn.Module()
            level.attn1, level.attn2 = VGGTAttention(WIDTH, HEADS, None), CrossAttention()
            setattr(self, name, level)
        self.up_blocks = nn.Identity()

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.conv_in(sample)
        for level in (self.down_blocks, self.mid_block):
            tokens = x.flatten(2).mT
            tokens = tokens + level.attn1(tokens)
            tokens = tokens + level.attn2(tokens, encoder_hidden_states)
            x = F.avg_pool2d(tokens.mT.unflatten(2, x.shape[2:]), 2, ceil_mode=True)
        return x


class Qwen(nn.Module):
    """Patches of all pictures in groups of 2×2, with `window` in windows of such groups."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.spatial_merge_size, self.patch_size = 2, PATCH
        self.config = nn.Module()
        self.config.model_type = "qwen2_vl" if window is None else "qwen2_5_vl"
        if window is not None:
            self.window_size, self.fullatt_block_indexes = window * 2 * PATCH, [1]
        self.patch_embed = PatchEmbed()
        self.blocks = plain_blocks(2)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches `(seq, 3, p, p)` in reading order, which stand for the preprocessor's input."""
        x = self.patch_embed(hidden_states)[:, 0]
        groups, start = [], 0
        for frames, rows, cols in grid_thw.tolist():
            for _ in range(frames):
                picture = x[start : start + rows * cols].view(rows // 2, 2, cols // 2, 2, WIDTH)
                start += rows * cols
                cells = picture.transpose(1, 2).reshape(rows // 2, cols // 2, -1)
                side = max(rows, cols)
                if hasattr(self, "window_size"):
                    side = self.window_size // 2 // PATCH
                for tall in cells.split(side):
                    groups += [wide.reshape(-1, WIDTH) for wide in tall.split(side, 1)]
        x = torch.cat(groups)[None]
        for block in self.blocks:
            x = block(x)
        return x
