"""Captured attention keeps the laws of every row source."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from laws import AttentionLaws
from oracle import record_inputs, reference_weights
from torch import Tensor, nn
from zoo import CrocoLike, VGGTAttention, VGGTLike

import vistvis
from vistvis import Attention


class CapturedLaws(AttentionLaws):
    """`model()` gives a model, its arguments and the site; the reference is a float64 copy."""

    def model(self) -> tuple[nn.Module, tuple[Any, ...], str]:
        raise NotImplementedError

    def make(self) -> Attention:
        torch.manual_seed(3)
        self._model, self._args, self._site = self.model()
        self._model.eval()
        with torch.no_grad(), vistvis.capture(self._model, self._site) as captured:
            self._model(*self._args)
        return captured[self._site]

    def dense(self) -> Tensor:
        self.make()
        site = next(s for s in vistvis.find_sites(self._model) if s.name == self._site)
        with torch.no_grad():
            inputs = record_inputs({site.name: site.module}, lambda: self._model(*self._args))
        return reference_weights(site.module, *inputs[site.name], site.heads)


class TestGlobalAttention(CapturedLaws):
    def model(self) -> tuple[nn.Module, tuple[Any, ...], str]:
        model = VGGTLike()
        for module in model.modules():
            if isinstance(module, VGGTAttention):
                nn.init.constant_(module.q_norm.weight, 2.0)
                nn.init.normal_(module.q_norm.bias, 0, 0.5)
        return model, (torch.rand(2, 2, 3, 28, 42),), "global_blocks.1.attn"


class TestEagerCrossAttention(CapturedLaws):
    """Only weights exist, and there are more keys than queries."""

    def model(self) -> tuple[nn.Module, tuple[Any, ...], str]:
        model = CrocoLike()
        with torch.no_grad():
            model.cross_attn.projq.weight.mul_(12)
        places = torch.cartesian_prod(torch.arange(3), torch.arange(6))
        args = (
            *(torch.randn(2, 12, 32), torch.randn(2, 18, 32)),
            *(places[:12].expand(2, 12, 2), places.expand(2, 18, 2)),
        )
        return model, args, "cross_attn"


class GroupedAttention(nn.Module):
    """Four query heads over two key heads, with a mask that leaves one query no key."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 16)
        self.v_proj = nn.Linear(32, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2) * 6
        k = self.k_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.7, enable_gqa=True)


class TestMaskedAndGrouped(CapturedLaws):
    def model(self) -> tuple[nn.Module, tuple[Any, ...], str]:
        mask = torch.rand(2, 1, 10, 10) > 0.4
        mask[0, 0, 3] = False
        return GroupedAttention(), (torch.randn(2, 10, 32), mask), "GroupedAttention"
