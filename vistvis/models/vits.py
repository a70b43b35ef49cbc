"""Models of single pictures: the token layout that each gives to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vistvis.models.family import Inputs, grid_of, special_tokens
from vistvis.tokens import TokenLayout


def _layout(inputs: Inputs, patch: Any, special: tuple[str, ...]) -> TokenLayout | None:
    pictures = inputs.pictures()
    if pictures is None:
        return None
    return TokenLayout(1, grid_of((pictures.shape[-2], pictures.shape[-1]), patch), special, patch)


def _torchvision(model: Any, inputs: Inputs) -> TokenLayout | None:
    if not type(model).__module__.startswith("torchvision.") or not hasattr(model, "class_token"):
        return None
    return _layout(inputs, model.patch_size, ("cls",))


def _hugging_face(model: Any, inputs: Inputs) -> TokenLayout | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return None
    config = getattr(config, "vision_config", None) or config
    patch = getattr(config, "patch_size", None)
    family = str(config.model_type)
    if patch is None or family.startswith(("swin", "sam", "pvt", "hiera")):
        return None
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    special: tuple[str, ...] = ("cls",) + ("register",) * registers
    if family.startswith(("siglip", "pixtral")) or family == "ijepa":
        special = ()
    elif family == "deit":
        special = ("cls", "distillation")
    elif not family.startswith(("vit", "dino", "clip", "beit", "chinese_clip", "metaclip")):
        return None
    return _layout(inputs, patch, special)


def _open_clip(model: Any, inputs: Inputs) -> TokenLayout | None:
    visual = getattr(model, "visual", model)
    if not hasattr(visual, "class_embedding") or not hasattr(visual, "patch_size"):
        return None
    return _layout(inputs, visual.patch_size, ("cls",))


def _vit(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Of timm, and the originals of DINOv2 and DINOv3."""
    if not hasattr(model, "blocks") or getattr(model, "stages", None) is not None:
        return None
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    special = special_tokens(model)
    if patch is None or special is None:
        return None
    return _layout(inputs, patch, special)


# Each says nothing (None) of a model that is not of its family; the first that knows it answers.
LAYOUTS: tuple[Callable[[Any, Inputs], TokenLayout | None], ...] = (
    _torchvision,
    _hugging_face,
    _open_clip,
    _vit,
)
