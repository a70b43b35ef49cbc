"""Miniatures of multi-view families as a whole: how pictures come in, are folded, and in what order
tokens stand. Mixing is kept small, so that a lit patch stays where it is through all blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Block, VGGTAttention

WIDTH, HEADS, PATCH = 16, 2, 4


def plain_blocks(depth: int) -> nn.ModuleList:
    return nn.ModuleList(Block(WIDTH, VGGTAttention(WIDTH, HEADS, None)) for _ in range(depth))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, WIDTH))


class PatchEmbed(nn.Module):
    """Pictures `(n, 3, H, W)` to tokens `(n, hw, C)`."""

    def __init__(self, patch: int = PATCH) -> None:
        super().__init__()
        self.patch_size = (patch, patch)
        self.proj = nn.Conv2d(3, WIDTH, patch, patch)

    def forward(self, images: Tensor, true_shape: Tensor | None = None) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ManyARPatchEmbed(PatchEmbed):
    """Portrait pictures lie transposed in the batch, and are turned back for their tokens."""

    def forward(self, images: Tensor, true_shape: Tensor | None = None) -> Tensor:
        turn = (true_shape[:, 0] > true_shape[:, 1])[:, None, None]
        tokens = self.proj(images)
        return torch.where(turn, tokens.mT.flatten(2).mT, tokens.flatten(2).mT)


class Dino(nn.Module):
    """DINOv2 as the hub gives it, or with `storage` tokens DINOv3's original."""

    def __init__(self, registers: int = 0, *, storage: int = 0, patch: int = PATCH) -> None:
        super().__init__()
        self.patch_size, self.interpolate_antialias = patch, False
        self.patch_embed = PatchEmbed(patch)
        self.cls_token = parameter(1, 1)
        self.register_tokens = parameter(1, registers) if registers else None
        if storage:
            self.storage_tokens = parameter(1, storage)
        self.blocks = plain_blocks(1)
        self.extra = registers or storage

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(images)
        front = [self.cls_token]
        if self.extra:
            front.append(getattr(self, "storage_tokens", self.register_tokens))
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in front), x], 1)
        for block in self.blocks:
            x = block(x)
        return {"special": x[:, : 1 + self.extra], "patches": x[:, 1 + self.extra :]}


class OmegaAggregator(nn.Module):
    """Frame and inter-frame blocks; some of the latter see special tokens only."""

    def __init__(self, types: tuple[str, ...], registers: int) -> None:
        super().__init__()
        self.patch_size, self.patch_token_start = PATCH, 1 + registers
        self.patch_embed = Dino(2)
        self.camera_token, self.register_token = parameter(1, 2, 1), parameter(1, 2, registers)
        self.inter_frame_attention_types = list(types)
        self.frame_blocks, self.inter_frame_blocks = (plain_blocks(len(types)) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        special = torch.cat((self.camera_token, self.register_token), 2)
        special = torch.cat((special[:, :1], special[:, 1:].expand(-1, frames - 1, -1, -1)), 1)
        special = special.expand(batch, -1, -1, -1).flatten(0, 1)
        x = torch.cat((special, self.patch_embed(images.flatten(0, 1))["patches"]), 1)
        first = self.patch_token_start
        kinds = zip(
            self.frame_blocks,
            self.inter_frame_blocks,
            self.inter_frame_attention_types,
            strict=True,
        )
        for frame, inter, kind in kinds:
            x = frame(x)
            among = x[:, :first] if kind == "register" else x
            seen = inter(among.reshape(batch, -1, WIDTH)).view(among.shape)
            x = torch.cat((seen, x[:, first:]), 1) if kind == "register" else seen
        return x.unflatten(0, (batch, frames))


class Omega(nn.Module):
    """VGGT-Ω: an aggregator, and a camera head on the special tokens of all frames."""

    def __init__(self, types: tuple[str, ...] = ("global", "register"), registers: int = 2) -> None:
        super().__init__()
        self.aggregator = OmegaAggregator(types, registers)
        self.camera_head = nn.Module()
        self.camera_head.trunk = plain_blocks(1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.aggregator(images)
        first = self.aggregator.patch_token_start
        return self.camera_head.trunk[0](x[:, :, :first].flatten(1, 2))


class Pi3(nn.Module):
    """Encoder, one decoder whose odd blocks see all frames, frame-wise heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.patch_size, self.patch_start_idx = Dino(4), PATCH, 5
        self.register_token, self.decoder = parameter(1, 1, 5), plain_blocks(4)
        self.point_decoder = nn.Module()
        self.point_decoder.blocks = plain_blocks(1)

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        x = self.encoder(images.flatten(0, 1))["patches"]
        x = torch.cat((self.register_token[0].expand(len(x), -1, -1), x), 1)
        for index, block in enumerate(self.decoder):
            folded = x.reshape(batch, -1, WIDTH) if index % 2 else x
            x = block(folded).view(batch * frames, -1, WIDTH)
        return self.point_decoder.blocks[0](x)


class DepthBackbone(Dino):
    """A DINOv2 whose odd blocks from `alt_start` on see all frames."""

    def __init__(self, alt_start: int = 1) -> None:
        super().__init__()
        self.alt_start = alt_start
        if alt_start >= 0:
            self.camera_token = parameter(1, 2)
        self.blocks = plain_blocks(4)

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        x = self.patch_embed(images.flatten(0, 1))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        for index, block in enumerate(self.blocks):
            if index == self.alt_start:
                camera = self.camera_token[0].clone()
                camera = torch.cat((camera[:1], camera[1:].expand(frames - 1, -1)))
                x = torch.cat((camera.repeat(batch, 1)[:, None], x[:, 1:]), 1)
            every = 0 <= self.alt_start <= index and index % 2 == 1
            folded = x.reshape(batch, -1, WIDTH) if every else x
            x = block(folded).view(batch * frames, -1, WIDTH)
        return x


class DepthAnything(nn.Module):
    """The nested model: a multi-view backbone, and a metric one that sees single frames."""

    def __init__(self) -> None:
        super().__init__()
        for name, start in (("da3", 1), ("da3_metric", -1)):
            branch = nn.Module()
            branch.backbone = nn.Module()
            branch.backbone.pretrained = DepthBackbone(start)
            setattr(self, name, branch)

    def forward(self, image: Tensor, extrinsics: Tensor | None = None) -> Tensor:
        one = self.da3.backbone.pretrained(image)
        return one + self.da3_metric.backbone.pretrained(image)


class AlternatingSharing(nn.Module):
    """Even blocks see all views and the scale token, odd ones a view each."""

    def __init__(self) -> None:
        super().__init__()
        self.distinguish_ref_and_non_ref_views = True
        self.self_attention_blocks = plain_blocks(4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Views `(B, V, P, C)`, scale `(B, 1, C)`."""
        shape = x.shape
        x = x.flatten(1, 2)
        for index, block in enumerate(self.self_attention_blocks):
            if index % 2:
                x = block(x.reshape(-1, *shape[2:])).view(*x.shape)
            else:
                x, scale = block(torch.cat((x, scale), 1)).split((x.shape[1], 1), 1)
        return torch.cat((x, scale), 1)


class MapAnything(nn.Module):
    """Views as a list of dicts, encoded view by view; the encoder's special tokens go behind."""

    def __init__(self, *, behind: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.model, self.encoder.patch_size = Dino(1), PATCH
        self.scale_token, self.info_sharing = parameter(), AlternatingSharing()
        self.use_register_tokens_from_encoder = behind

    def forward(self, views: list[dict[str, Any]]) -> Tensor:
        encoded = self.encoder.model(torch.cat([view["img"] for view in views]))
        parts = [encoded["patches"]]
        if self.use_register_tokens_from_encoder:
            parts.append(encoded["special"])
        x = torch.cat(parts, 1).unflatten(0, (len(views), -1)).transpose(0, 1)
        return self.info_sharing(x, self.scale_token.expand(len(x), 1, -1))

    def infer(self, views: list[dict[str, Any]]) -> Tensor:
        return self(views)


class CrossAttention(nn.Module):
    """Queries of one picture, keys of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.projq, self.projk, self.projv, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear, x in ((self.projq, query), (self.projk, key), (self.projv, key))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Self-attention of one picture, then attention to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross_attn = VGGTAttention(WIDTH, HEADS, None), CrossAttention()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.cross_attn(x, other)


def decoder(depth: int) -> nn.ModuleList:
    return nn.ModuleList(DecoderBlock() for _ in range(depth))


class Dust3r(nn.Module):
    """Two dicts as arguments; both pictures encoded in one batch, view 1 first."""

    def __init__(self, embed: type[PatchEmbed] = PatchEmbed) -> None:
        super().__init__()
        self.patch_embed, self.enc_blocks = embed(), plain_blocks(1)
        self.dec_blocks, self.dec_blocks2 = decoder(2), decoder(2)

    def forward(self, view1: dict[str, Any], view2: dict[str, Any]) -> tuple[Tensor, Tensor]:
        images, shapes = (
            torch.cat((view1[name], view2[name])) if name in view1 else None
            for name in ("img", "true_shape")
        )
        x, y = self.enc_blocks[0](self.patch_embed(images, shapes)).chunk(2)
        for one, two in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            x, y = one(x, y), two(y, x)
        return x, y


class Croco(nn.Module):
    """Visible patches of picture 1, then all of picture 2, through the same encoder blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.enc_blocks = PatchEmbed(), plain_blocks(1)
        self.mask_token, self.dec_blocks = parameter(1, 1), decoder(1)

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        x, y = self.patch_embed(img1), self.patch_embed(img2)
        visible = slice(0, None, 2)
        seen, y = self.enc_blocks[0](x[:, visible]), self.enc_blocks[0](y)
        x = self.mask_token.expand(*x.shape[:2], -1).clone()
        x[:, visible] = seen
        return self.dec_blocks[0](x, y)


class Cut3r(nn.Module):
    """A view a step: image blocks look at the state, state blocks at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.enc_blocks = PatchEmbed(), plain_blocks(1)
        self.pose_token, self.state = parameter(1, 1), parameter(1, 6)
        self.dec_blocks, self.dec_blocks_state = decoder(1), decoder(1)

    def forward(self, views: list[dict[str, Any]]) -> Tensor:
        encoded = self.enc_blocks[0](self.patch_embed(torch.cat([v["img"] for v in views])))
        state = self.state.expand(len(views[0]["img"]), -1, -1)
        for x in encoded.chunk(len(views)):
            x = torch.cat((self.pose_token.expand(len(x), -1, -1), x), 1)
            state, x = self.dec_blocks_state[0](state, x), self.dec_blocks[0](x, state)
        return x


class CachedAttention(VGGTAttention):
    """Keys of earlier frames come from a cache."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        past_key_values: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            k, v = torch.cat((past_key_values[0], k), 2), torch.cat((past_key_values[1], v), 2)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(x), (k, v)


class Stream(nn.Module):
    """StreamVGGT: `forward` takes all views at once, `inference` one at a time with a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.aggregator = aggregator = nn.Module()
        aggregator.patch_embed, aggregator.patch_start_idx = PatchEmbed(), 2
        aggregator.camera_token, aggregator.register_token = parameter(1, 2, 1), parameter(1, 2, 1)
        aggregator.frame_blocks = plain_blocks(1)
        aggregator.global_blocks = nn.ModuleList([CachedAttention(WIDTH, HEADS, None)])

    def forward(self, views: list[dict[str, Any]]) -> Tensor:
        return self._step(torch.stack([view["img"] for view in views], 1), None)[0]

    def inference(self, frames: list[dict[str, Any]]) -> Tensor:
        cache = None
        for frame in frames:
            x, cache = self._step(frame["img"][:, None], cache)
        return x

    def _step(self, images: Tensor, cache: Any) -> tuple[Tensor, Any]:
        part, batch = self.aggregator, len(images)
        special = torch.cat((part.camera_token, part.register_token), 2)[0, :1]
        x = part.patch_embed(images.flatten(0, 1))
        x = part.frame_blocks[0](torch.cat((special.expand(len(x), -1, -1), x), 1))
        return part.global_blocks[0](x.reshape(batch, -1, WIDTH), cache, use_cache=True)
