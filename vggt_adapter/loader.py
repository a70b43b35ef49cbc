"""VGGT for the commands of vistvis that run a model: `vggt:tiny`, `vggt:facebook/VGGT-1B`, …"""

from __future__ import annotations

from collections.abc import Sequence

from vggt_adapter.blocks import find_blocks, watched_part
from vggt_adapter.sample_scene import scene_of
from vggt_adapter.steps import layout_of, load_model, load_pictures
from vistvis.models.loading import LoadedModel
from vistvis.photos.photo import Photo


def load(
    model: str, *, device: str | None, dtype: str | None, images: Sequence[Photo], size: int | None
) -> LoadedModel:
    """The loader of the entry-point group "vistvis.models"; `model` as in `load_model`."""
    ready = load_model(model, device=device, dtype=dtype)
    loaded = load_pictures(images, ready, size=size)
    pictures = loaded.images.unsqueeze(0)
    watched = watched_part(ready)
    grid = layout_of(ready, loaded).grid
    return LoadedModel(
        model=ready,
        images=pictures.to(next(ready.parameters())),
        pictures=pictures,
        watched=watched,
        photos=loaded.seen,
        sharp_pixels=loaded.sharp_pixels,
        scene=scene_of(loaded.photos, grid),
        names={block.path: block.name for block in find_blocks(watched)},
    )
