"""What is known of model families, in one place: names, exceptions, token layouts.

Most models need nothing here: attention modules are told by their code, heads and kinds by the
words that everybody uses. docs/architecture.md says how to add a family.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from vistvis.errors import LayoutError
from vistvis.tokens import TokenLayout

# -- names ---------------------------------------------------------------------------------------

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
NORM_PAIRS = (("q_norm", "k_norm"), ("norm_q", "norm_k"), ("query_norm", "key_norm"))
PROJECTION_PAIRS = (
    *(("q_proj", "k_proj"), ("query", "key"), ("to_q", "to_k"), ("projq", "projk")),
    ("q", "k"),
)
FUSED_PROJECTIONS = ("qkv", "to_qkv")
# What a module has whose softmax is one of attention, if its class does not say so.
PROJECTIONS = (*FUSED_PROJECTIONS, *(q for q, _ in PROJECTION_PAIRS), "q_bias", "in_proj_weight")
ATTENTION_CLASS = re.compile(r"att(n|ention|end)|mhsa|msa\b|mixer", re.IGNORECASE)
# Blocks that cut windows for their attention module say so by one of these.
WINDOW_SIZES = ("window_size", "partition_size")
CUTS_FOR_ITSELF = "ShiftedWindowAttention"  # torchvision's: cuts and attends in one module
# Ways into a model besides `forward`; a call of one is a pass of its own.
ENTRIES = ("forward_", "encode_", "get_image_", "get_text_", "get_intermediate_", "extract_")

KERNELS = frozenset({"scaled_dot_product_attention"})
DISPATCHERS = frozenset({"ALL_ATTENTION_FUNCTIONS", "attention_interface"})
MULTIHEAD = frozenset({"multi_head_attention_forward"})
SOFTMAX = frozenset({"softmax", "Softmax", "softmax_fp32", "_softmax"})
# What merges tokens inside an attention module: gives two functions, to merge and to undo it.
MERGES = frozenset({"token_merge_bipartite2d"})
# Kernels that hand nothing to torch functions; whether one runs is decided when the model runs.
UNREADABLE = {
    "memory_efficient_attention": "xformers",
    "flash_attn_func": "flash-attn",
    "flash_attn_varlen_func": "flash-attn",
    "flash_attn_qkvpacked_func": "flash-attn",
    "flash_attn_varlen_qkvpacked_func": "flash-attn",
    "flash_attn_kvpacked_func": "flash-attn",
    "flex_attention": "flex_attention",
}


def unreadable_packages(names: frozenset[str]) -> list[str]:
    """Packages of the unreadable kernels among names of code."""
    return sorted({UNREADABLE[name] for name in names & UNREADABLE.keys()})


def kind_and_block(name: str, type_name: str) -> tuple[str, int | None]:
    """Kind and block number of a site, from the words that names of modules and classes use."""
    alternating = re.search(r"(?:^|\.)(frame|global)_blocks\.(\d+)(?:\.|$)", name)
    if alternating:
        return alternating[1], int(alternating[2])
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    block = int(numbers[-1]) if numbers else None
    last, type_name = name.rsplit(".", 1)[-1].lower(), type_name.lower()
    crossing = "cross" in last or "encdec" in last or last in ("multihead_attn", "encoder_attn")
    if crossing or "cross" in type_name:
        return "cross", block
    return ("window" if "window" in type_name or "swin" in type_name else "self"), block


# -- modules -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleTraits:
    """What the code of an attention module does not say."""

    refused: str = ""
    """Why it has no token-to-token softmax matrix, though it carries the name of attention."""
    heads_at: int | None = None
    """Which leading dimension of its queries or weights are heads, where sizes may not tell; 0
    stands for (batch · heads, windows)."""
    head_by_head: bool = False
    """It calls its kernel once for each head, in order."""
    two_calls: str = ""
    """What two kernel calls of one run mean, if they can't be told apart."""


_REFUSED = {
    "attention over channels, not over tokens (cross-covariance)": "XCA CrossCovarianceAttn",
    "attention over channels, not over tokens": "ChannelAttention ChannelAttentionV2",
    "linear attention: no token-to-token matrix exists": (
        "LinearSelfAttention FactorAttnConvRelPosEnc LiteMLA"
    ),
    "additive linear attention: no token-to-token matrix exists": (
        "EfficientAdditiveAttention EfficientAdditiveAttnetion"
    ),
    "weights between branches, not between tokens": "SelectiveKernelAttn SplitAttn",
    "its product of queries and keys mixes the batch, not tokens": "SpatialTransformerBlock",
    "a lambda layer: its softmax normalises keys, no token-to-token matrix exists": "LambdaLayer",
    "outlook attention: weights come from a projection, not from keys": "OutlookAttention",
}

# By class name, or by module and class name where the class name alone says too little.
MODULES: dict[str, ModuleTraits] = {
    **{name: ModuleTraits(why) for why, names in _REFUSED.items() for name in names.split()},
    "HaloAttn": ModuleTraits(heads_at=0),
    "MaskUnitAttention": ModuleTraits(heads_at=1),
    "HieraMaskUnitAttention": ModuleTraits(heads_at=1),
    "timm.models.nest.Attention": ModuleTraits(heads_at=1),
    "LocallyGroupedAttn": ModuleTraits(heads_at=2),
    "CascadedGroupAttention": ModuleTraits(head_by_head=True),
    "DiffAttention": ModuleTraits(
        two_calls="differential attention subtracts one softmax matrix from another, and its fused "
        "path shows them apart; set its fused_attn = False to read what it uses"
    ),
}


def module_traits(module: nn.Module) -> ModuleTraits:
    cls = type(module)
    full = MODULES.get(f"{cls.__module__}.{cls.__name__}", ModuleTraits())
    return MODULES.get(cls.__name__, full)


# -- layouts -------------------------------------------------------------------------------------

Shape: TypeAlias = "tuple[int, ...]"


def grid_layout(
    shape: Shape, patch_size: Any, special: tuple[str, ...], frames: int = 1
) -> TokenLayout:
    """The layout of pictures of this shape, cut into patches."""
    down, across = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    height, width = shape[-2:]
    rows, cols = height // int(down), width // int(across)
    if not rows or not cols:
        raise LayoutError(
            f"pictures of {width}×{height} are smaller than one patch of {across}×{down}"
        )
    return TokenLayout(frames, (rows, cols), special, (int(down), int(across)))


def _vggt(model: Any, shape: Shape) -> TokenLayout | None:
    aggregator = getattr(model, "aggregator", model)
    if not (hasattr(aggregator, "frame_blocks") and hasattr(aggregator, "global_blocks")):
        return None
    if shape[-3] != 3:
        raise LayoutError(f"images are (S, 3, H, W) or (B, S, 3, H, W), got shape {shape}")
    registers = getattr(aggregator, "register_token", None)
    kinds = ["camera"] if hasattr(aggregator, "camera_token") else []
    kinds += ["register"] * (registers.shape[2] if isinstance(registers, Tensor) else 0)
    start = int(getattr(aggregator, "patch_start_idx", len(kinds)))
    # A fork with other special tokens: their number is what counts, their names are unknown.
    special = tuple(kinds) if start == len(kinds) else ("special",) * start
    frames = shape[-4] if len(shape) > 3 else 1
    return grid_layout(shape, getattr(aggregator, "patch_size", 14), special, frames)


def _torchvision(model: Any, shape: Shape) -> TokenLayout | None:
    if not type(model).__module__.startswith("torchvision.") or not hasattr(model, "class_token"):
        return None
    return grid_layout(shape, model.patch_size, ("cls",))


def _hugging_face(model: Any, shape: Shape) -> TokenLayout | None:
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
    return grid_layout(shape, patch, special)


def _open_clip(model: Any, shape: Shape) -> TokenLayout | None:
    visual = getattr(model, "visual", model)
    if not hasattr(visual, "class_embedding") or not hasattr(visual, "patch_size"):
        return None
    return grid_layout(shape, visual.patch_size, ("cls",))


def _timm(model: Any, shape: Shape) -> TokenLayout | None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None or not hasattr(model, "blocks") or getattr(model, "stages", None) is not None:
        return None
    tokens = (("cls_token", "cls"), ("dist_token", "distillation"))
    special = [kind for name, kind in tokens if getattr(model, name, None) is not None]
    for name in ("reg_token", "register_tokens"):
        registers = getattr(model, name, None)
        if registers is not None:
            special += ["register"] * int(registers.shape[1])
            break
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is not None and int(prefix) != len(special):
        if int(prefix) < len(special) and getattr(model, "no_embed_class", None) is None:
            return None
        special = (special + ["special"] * int(prefix))[: int(prefix)]
    return grid_layout(shape, patch, tuple(special))


# Each says nothing (None) of a model that is not of its family; the first that knows it answers.
LAYOUTS: tuple[Callable[[Any, Shape], TokenLayout | None], ...] = (
    _vggt,
    _torchvision,
    _hugging_face,
    _open_clip,
    _timm,
)
