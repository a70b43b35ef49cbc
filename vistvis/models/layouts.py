"""What is known of models' token layouts: patch size, grid and special tokens by family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vistvis.errors import LayoutError
from vistvis.tokens import TokenLayout

VGGT_SPECIAL = ("camera", "register", "register", "register", "register")


def layout_from_model(model: nn.Module, images: torch.Tensor | Sequence[int]) -> TokenLayout:
    """The token layout that a known model gives to pictures.

    Parameters
    ----------
    model
        A timm, Hugging Face, torchvision, open_clip or VGGT-like model.
    images
        `(B, 3, H, W)`; for a VGGT-like model `(S, 3, H, W)` or `(B, S, 3, H, W)`. A shape will do.

    Raises
    ------
    LayoutError
        If the model's grid or special tokens are not known.
    """
    shape = tuple(int(n) for n in (images.shape if isinstance(images, torch.Tensor) else images))
    inner: Any = getattr(model, "_orig_mod", model)
    if len(shape) < 3:
        raise LayoutError(f"images are (B, 3, H, W) or (B, S, 3, H, W), got shape {shape}")
    for family in (_vggt, _torchvision, _hugging_face, _open_clip, _timm):
        layout = family(inner, shape)
        if layout is not None:
            return layout
    raise LayoutError(
        f"the token layout of {type(inner).__name__} is not known; give one: "
        "TokenLayout(frames, (rows, cols), special=(…), patch_size=…)"
    )


def _vggt(model: Any, shape: tuple[int, ...]) -> TokenLayout | None:
    aggregator = getattr(model, "aggregator", model)
    if not (hasattr(aggregator, "frame_blocks") and hasattr(aggregator, "global_blocks")):
        return None
    patch = int(getattr(aggregator, "patch_size", 14))
    start = getattr(aggregator, "patch_start_idx", None)
    registers = getattr(aggregator, "register_token", None)
    if start is None:
        start = 1 + (registers.shape[2] if registers is not None else 4)
    special = ("camera",) + ("register",) * (int(start) - 1)
    frames = shape[1] if len(shape) == 5 else (shape[0] if len(shape) == 4 else 1)
    return _grid(shape, (patch, patch), special, frames)


def _torchvision(model: Any, shape: tuple[int, ...]) -> TokenLayout | None:
    if not type(model).__module__.startswith("torchvision.") or not hasattr(model, "class_token"):
        return None
    return _grid(shape, (model.patch_size, model.patch_size), ("cls",))


def _hugging_face(model: Any, shape: tuple[int, ...]) -> TokenLayout | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return None
    config = getattr(config, "vision_config", None) or config
    patch = getattr(config, "patch_size", None)
    kind = str(config.model_type)
    if patch is None or kind.startswith(("swin", "sam", "pvt", "hiera")):
        return None
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    special: tuple[str, ...] = ("cls",) + ("register",) * registers
    if kind.startswith(("siglip", "pixtral")):
        special = ()
    elif kind == "deit":
        special = ("cls", "distillation")
    elif not kind.startswith(("vit", "dino", "clip", "beit", "ijepa", "chinese_clip", "metaclip")):
        return None
    if kind == "ijepa":
        special = ()
    pair = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
    return _grid(shape, (int(pair[0]), int(pair[1])), special)


def _open_clip(model: Any, shape: tuple[int, ...]) -> TokenLayout | None:
    visual = getattr(model, "visual", model)
    if not hasattr(visual, "class_embedding") or not hasattr(visual, "patch_size"):
        return None
    patch = visual.patch_size
    pair = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
    return _grid(shape, (int(pair[0]), int(pair[1])), ("cls",))


def _timm(model: Any, shape: tuple[int, ...]) -> TokenLayout | None:
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if patch is None or not hasattr(model, "blocks") or getattr(model, "stages", None) is not None:
        return None
    pair = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
    special: list[str] = []
    if getattr(model, "cls_token", None) is not None:
        special.append("cls")
    if getattr(model, "dist_token", None) is not None:
        special.append("distillation")
    registers = getattr(model, "reg_token", None)
    if registers is None:
        registers = getattr(model, "register_tokens", None)
    if registers is not None:
        special += ["register"] * int(registers.shape[1])
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is not None and int(prefix) != len(special):
        if int(prefix) < len(special) and getattr(model, "no_embed_class", None) is None:
            return None
        special = (special + ["special"] * int(prefix))[: int(prefix)]
    return _grid(shape, (int(pair[0]), int(pair[1])), tuple(special))


def _grid(
    shape: tuple[int, ...], patch: tuple[int, int], special: tuple[str, ...], frames: int = 1
) -> TokenLayout:
    height, width = shape[-2:]
    rows, cols = height // patch[0], width // patch[1]
    if not rows or not cols:
        raise LayoutError(
            f"pictures of {width}×{height} are smaller than one patch of {patch[1]}×{patch[0]}"
        )
    return TokenLayout(frames, (rows, cols), special, patch)
