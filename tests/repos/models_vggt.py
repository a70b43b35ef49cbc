"""VGGT and the forks that keep its aggregator."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor, nn

from .model import Model, pictures, shrunk

WIDTH, HEADS, DEPTH = 64, 4, 3
_DPT = {"features": 16, "out_channels": [16] * 4, "intermediate_layer_idx": [0, 1, 2, 2]}
_HEAD = {"trunk_depth": 2, "num_heads": 4}
_TRACK = {"features": 16, "corr_levels": 3, "corr_radius": 2, "hidden_size": 384}


def tiny(package: str, name: str, **arguments: object) -> nn.Module:
    """A model of VGGT's code: three pairs of blocks, two blocks of DINOv2 in front."""
    vit = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
    home = f"{package}.models.{name.lower()}"
    head = importlib.import_module(f"{package}.heads.track_head")
    with (
        shrunk(f"{package}.layers.vision_transformer", DinoVisionTransformer=vit),
        shrunk(head.__name__, DPTHead=_DPT, BaseTrackerPredictor={"depth": 2}),
        shrunk(
            home,
            Aggregator={"depth": DEPTH, "num_heads": HEADS},
            CameraHead=_HEAD,
            DPTHead=_DPT,
            TrackHead=_TRACK,
        ) as module,
    ):
        built: nn.Module = getattr(module, name)(img_size=56, embed_dim=WIDTH, **arguments)
    return built


def run_with_points(model: nn.Module, images: Tensor) -> object:
    return model(images, query_points=torch.tensor([[5.0, 9.0], [30.0, 20.0]]))


def build_vggt(folder: Path) -> nn.Module:
    return tiny("vggt", "VGGT")


MODELS = [
    Model("VGGT", "vggt", build_vggt, pictures(3, 3, 4), run=run_with_points),
]
