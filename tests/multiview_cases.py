"""Every miniature of a family with the pictures it takes, and what a capture of it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mixed import Joint, Qwen
from multiview import (
    PATCH,
    WIDTH,
    Croco,
    DepthAnything,
    Dino,
    Dust3r,
    MapAnything,
    Omega,
    Pi3,
    Stream,
)
from torch import Tensor, nn
from zoo import VGGTLike

import vistvis
from vistvis.attention import Attention

FRAMES, ROWS, COLS = 3, 2, 4


def pictures(frames: int = FRAMES, batch: int = 2, rows: int = ROWS, cols: int = COLS) -> Tensor:
    return torch.rand(batch, frames, 3, rows * PATCH, cols * PATCH)


def as_views(images: Tensor) -> list[dict[str, Tensor]]:
    return [{"img": view} for view in images.unbind(1)]


def calm(model: nn.Module) -> nn.Module:
    """Attention and MLPs answer softly, so that a lit patch stays the brightest token."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("proj.weight", "mlp.2.weight")) and weight.ndim == 2:
                weight.mul_(0.02)
    return model.eval()


@dataclass
class Case:
    """A model, how it takes pictures `(B, S, 3, H, W)`, and what its sites are."""

    model: nn.Module
    call: Callable[[nn.Module, Tensor], Any] = lambda model, images: model(images)
    frames: int = FRAMES
    batch: int = 2
    sites: str | None = None


def flux(model: nn.Module, images: Tensor) -> Any:
    pixels = images[:, 0, :, ::PATCH, ::PATCH].flatten(2).mT
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(ROWS), torch.arange(COLS))
    return model(pixels, torch.ones(len(images), 5, WIDTH), img_ids=ids)


def sd3(model: nn.Module, images: Tensor) -> Any:
    return model(images[:, 0], torch.ones(len(images), 5, WIDTH))


def qwen(model: nn.Module, images: Tensor) -> Any:
    patches = images[0].unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    rows, cols = patches.shape[2:4]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return model(patches, torch.tensor([[1, rows, cols]] * images.shape[1]))


def views(model: nn.Module, images: Tensor) -> Any:
    return model(as_views(images))


CASES: dict[str, Callable[[], Case]] = {
    "VGGT": lambda: Case(VGGTLike(width=WIDTH, heads=2, patch=PATCH)),
    "VGGT-Ω": lambda: Case(Omega()),
    "Pi3": lambda: Case(Pi3()),
    "Depth Anything 3": lambda: Case(DepthAnything()),
    "MapAnything": lambda: Case(MapAnything(), views),
    "MapAnything, one scene": lambda: Case(MapAnything(), views, batch=1),
    "MapAnything, plain": lambda: Case(MapAnything(behind=False), views),
    "DUSt3R": lambda: Case(Dust3r(), lambda model, x: model(*as_views(x)), frames=2, batch=1),
    "CroCo": lambda: Case(Croco(), lambda model, x: model(*x.unbind(1)), 2, 2, "dec_blocks.**"),
    "StreamVGGT": lambda: Case(Stream(), views),
    "Flux": lambda: Case(Joint(text_first=True), flux, frames=1),
    "SD3": lambda: Case(Joint(text_first=False), sd3, frames=1),
    "Qwen2-VL": lambda: Case(Qwen(), qwen, batch=1),
    "Qwen2.5-VL": lambda: Case(Qwen(window=1), qwen, batch=1),
    "DINOv2": lambda: Case(Dino(4), lambda model, x: model(x[:, 0]), frames=1),
    "DINOv3": lambda: Case(Dino(storage=3), lambda model, x: model(x[:, 0]), frames=1),
}


def captured(case: Case, images: Tensor, **options: Any) -> dict[str, Attention]:
    with torch.no_grad(), vistvis.capture(case.model, case.sites, **options) as seen:
        case.call(case.model, images)
    return dict(seen.items())
