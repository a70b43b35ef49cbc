"""VGGT for the commands of vistvis that run a model: `vggt:tiny`, `vggt:facebook/VGGT-1B`, …"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vggt_adapter.blocks import find_blocks, watched_part
from vggt_adapter.steps import load_model, load_pictures
from vistvis.models.loading import LoadedModel


def load(
    model: str, *, device: str | None, dtype: str | None, images: Sequence[Path], size: int | None
) -> LoadedModel:
    """The loader of the entry-point group "vistvis.models"; `model` as in `load_model`."""
    ready = load_model(model, device=device, dtype=dtype)
    pictures = load_pictures(list(images), ready, size=size).images.unsqueeze(0)
    watched = watched_part(ready)
    return LoadedModel(
        model=ready,
        images=pictures.to(next(ready.parameters())),
        pictures=pictures,
        watched=watched,
        names={block.path: block.name for block in find_blocks(watched)},
    )
