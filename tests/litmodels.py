"""VGGT's relatives in miniature, whose attention is known: like colours look at each other.

A token is the mean colour of its patch, and queries and keys are tokens: in pictures that are black
but for one red, one green and one blue patch each, a red patch looks at the red patches. So what a
figure must mark is known from the pictures alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, COLS, PATCH, WIDTH = 3, 5, 16, 4
SHARP = 11.0


def scene(frames: int, *, seed: int = 0) -> tuple[Tensor, list[list[int]]]:
    """Pictures `(S, 3, H, W)`, and of each the patches that are red, green and blue."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(frames, 3, ROWS * PATCH, COLS * PATCH)
    lit = []
    for image in images:
        patches = torch.randperm(ROWS * COLS, generator=generator)[:3].tolist()
        for colour, patch in enumerate(patches):
            y, x = patch // COLS * PATCH, patch % COLS * PATCH
            image[colour, y : y + PATCH, x : x + PATCH] = 1
        lit.append(patches)
    return images, lit


def embed(images: Tensor) -> Tensor:
    """`(…, 3, H, W)` as tokens `(…, rows · cols, 4)`: their colour, and a little of their own."""
    colours = F.avg_pool2d(images.flatten(0, -4), PATCH).flatten(2).transpose(1, 2)
    own = torch.linspace(0, 0.1, colours.shape[:2].numel()).view(*colours.shape[:2], 1)
    return torch.cat((colours, own), 2).unflatten(0, images.shape[:-3])


class Attention(nn.Module):
    """Two equal heads; queries and keys are the tokens."""

    num_heads = 2

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k = (t[:, None].expand(-1, 2, -1, -1) for t in (x, x if y is None else y))
        return F.scaled_dot_product_attention(q * SHARP, k, k).mean(1)


class Block(nn.Module):
    """Tokens stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.attn(x)


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


class Family(nn.Module):
    patch_size = PATCH
    special = 0

    def tokens(self, images: Tensor) -> Tensor:
        """`(B, S, P, C)`; special tokens are alike in no way."""
        shape, generator = (
            (*images.shape[:2], self.special, WIDTH),
            torch.Generator().manual_seed(1),
        )
        return torch.cat((torch.randn(shape, generator=generator) / 9, embed(images)), 2)

    def fold(self, block: nn.Module, x: Tensor, kind: str) -> Tensor:
        if kind == "frame":
            return block(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if kind == "global":
            return block(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        chosen = x[:, :, : self.special]
        done = block(chosen.flatten(1, 2)).unflatten(1, chosen.shape[1:3])
        return torch.cat((done, x[:, :, self.special :]), 2)


class OmegaLike(nn.Module):
    """VGGT-Ω: the second of three inter-frame blocks sees special tokens only."""

    class Aggregator(Family):
        special = patch_token_start = 5

        def __init__(self) -> None:
            super().__init__()
            self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, WIDTH))
            self.register_token = nn.Parameter(torch.zeros(1, 2, 4, WIDTH))
            self.frame_blocks, self.inter_frame_blocks = blocks(3), blocks(3)
            self.inter_frame_attention_types = ["global", "register", "global"]

        def forward(self, images: Tensor) -> Tensor:
            x = self.tokens(images)
            for one, inter, kind in zip(
                self.frame_blocks,
                self.inter_frame_blocks,
                self.inter_frame_attention_types,
                strict=True,
            ):
                x = self.fold(inter, self.fold(one, x, "frame"), kind)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.aggregator = OmegaLike.Aggregator()

    def forward(self, images: Tensor) -> Tensor:
        return self.aggregator(images if images.ndim == 5 else images[None])


class Pi3Like(Family):
    """Pi3: even blocks of one list see a frame, odd ones all."""

    special = patch_start_idx = 5

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, 1), blocks(4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for number, block in enumerate(self.decoder):
            x = self.fold(block, x, "global" if number % 2 else "frame")
        return x


class DepthLike(nn.Module):
    """Depth Anything 3: the view of number `reference` goes first from block 1 on."""

    class Backbone(Family):
        special, alt_start = 1, 2

        def __init__(self, reference: int) -> None:
            super().__init__()
            self.blocks, self.reference = blocks(4), reference

        def forward(self, images: Tensor) -> Tensor:
            x = self.tokens(images)
            for number, block in enumerate(self.blocks):
                if number == self.alt_start - 1:
                    x = x[:, order_of(x.shape[1], self.reference)]
                every = number >= self.alt_start and number % 2
                x = self.fold(block, x, "global" if every else "frame")
            return x[:, order_of(x.shape[1], self.reference).argsort()]

    def __init__(self, reference: int) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.pretrained = DepthLike.Backbone(reference)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.pretrained(images)


def order_of(frames: int, reference: int) -> Tensor:
    """The reference view, then the others as they came in."""
    return torch.tensor([reference, *(f for f in range(frames) if f != reference)])


class CrossBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross_attn = Attention(), Attention()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 0 * self.attn(x) + 0 * self.cross_attn(x, y)


class DustLike(nn.Module):
    """DUSt3R: two pictures, a decoder for each, which looks at the other's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.enc_blocks = blocks(1)
        self.dec_blocks = nn.ModuleList(CrossBlock() for _ in range(2))
        self.dec_blocks2 = nn.ModuleList(CrossBlock() for _ in range(2))

    def forward(self, view1: dict[str, Tensor], view2: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = self.enc_blocks[0](embed(torch.cat((view1["img"], view2["img"])))).chunk(2)
        for one, two in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            x, y = one(x, y), two(y, x)
        return x, y


class CachedAttention(Attention):
    def forward(self, x: Tensor, past_key_values: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        keys = x if past_key_values is None else torch.cat((past_key_values, x), 1)
        q, k = (t[:, None].expand(-1, 2, -1, -1) for t in (x, keys))
        return F.scaled_dot_product_attention(q * SHARP, k, k).mean(1), keys


class CachedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = CachedAttention()

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        out, keys = self.attn(x, past_key_values=past)
        return x + 0 * out, keys


class StreamLike(nn.Module):
    """StreamVGGT: a frame a step; global blocks keep the keys of the steps before."""

    class Aggregator(Family):
        special = patch_start_idx = 5

        def __init__(self) -> None:
            super().__init__()
            self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, WIDTH))
            self.register_token = nn.Parameter(torch.zeros(1, 2, 4, WIDTH))
            self.frame_blocks = blocks(1)
            self.global_blocks = nn.ModuleList([CachedBlock()])

        def forward(self, images: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x = self.fold(self.frame_blocks[0], self.tokens(images), "frame")
            return self.global_blocks[0](x.flatten(1, 2), past)

    def __init__(self) -> None:
        super().__init__()
        self.aggregator = StreamLike.Aggregator()

    def inference(self, frames: list[dict[str, Tensor]]) -> list[Tensor]:
        past, out = None, []
        for frame in frames:
            tokens, past = self.aggregator(frame["img"][None], past)
            out.append(tokens)
        return out

    def forward(self, views: list[dict[str, Tensor]]) -> Tensor:
        images = torch.stack([view["img"] for view in views], 1)
        return self.aggregator(images)[0]


class WholeLike(nn.Module):
    """VGGT with heads: the camera head runs its trunk four times, the track head never."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = blocks(2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                for block in self.trunk:
                    x = block(x)
            return x

    class Aggregator(Family):
        special = patch_start_idx = 5

        def __init__(self) -> None:
            super().__init__()
            self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, WIDTH))
            self.register_token = nn.Parameter(torch.zeros(1, 2, 4, WIDTH))
            self.frame_blocks, self.global_blocks = blocks(2), blocks(2)

        def forward(self, images: Tensor) -> tuple[Tensor, int]:
            x = self.tokens(images)
            for one, every in zip(self.frame_blocks, self.global_blocks, strict=True):
                x = self.fold(every, self.fold(one, x, "frame"), "global")
            return x, 5

    def __init__(self) -> None:
        super().__init__()
        self.aggregator = WholeLike.Aggregator()
        self.camera_head, self.track_head = WholeLike.Head(), WholeLike.Head()

    def forward(self, images: Tensor, query_points: Any = None) -> dict[str, Tensor]:
        x, _ = self.aggregator(images if images.ndim == 5 else images[None])
        found = {"pose": self.camera_head(x[:, :, 0])}
        if query_points is not None:
            found["track"] = self.track_head(x[:, :, 0])
        return found
