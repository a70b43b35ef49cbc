"""What is known of model families, in one place: names, exceptions, the table of families.

Most models need nothing here: attention modules are told by their code, heads and kinds by the
words that everybody uses. docs/architecture.md says how to add a family.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from vistvis.models.family import Family, Role
from vistvis.models.mixed import MIXED
from vistvis.models.multiview import MULTIVIEW

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
ENTRIES = (
    "forward_",
    "encode_",
    "get_image_",
    "get_text_",
    "get_intermediate_",
    "extract_",
    "infer",
)

FLASH = frozenset(
    f"flash_attn_{name}"
    for name in (
        *("func", "qkvpacked_func", "kvpacked_func", "with_kvcache"),
        *("varlen_func", "varlen_qkvpacked_func", "varlen_kvpacked_func"),
    )
)
XFORMERS = frozenset({"memory_efficient_attention", "memory_efficient_attention_forward"})
FLEX = frozenset({"flex_attention", "compile_friendly_flex_attention"})
KERNELS = frozenset({"scaled_dot_product_attention", "varlen_attn"}) | FLASH | XFORMERS | FLEX
DISPATCHERS = frozenset({"ALL_ATTENTION_FUNCTIONS", "attention_interface", "dispatch_attention_fn"})
MULTIHEAD = frozenset({"multi_head_attention_forward"})
SOFTMAX = frozenset({"softmax", "Softmax", "softmax_fp32", "_softmax"})
# What merges tokens inside an attention module: gives two functions, to merge and to undo it.
MERGES = frozenset({"token_merge_bipartite2d"})

_QUANTISED = (
    "SageAttention, which rounds queries and keys to 8 or 4 bits: what it uses is not the softmax "
    "of the queries and keys that it gets"
)
_SPARSE = (
    "block-sparse, and leaves out keys by estimates of its own: what it uses is not the softmax "
    "over all keys"
)
# Kernels whose weights are not the softmax of the queries and keys that they get, and why.
APPROXIMATIONS = {
    "sageattn": _QUANTISED,
    "sageattn_varlen": _QUANTISED,
    "sageattn_qk_int8_pv_fp16_cuda": _QUANTISED,
    "sageattn_qk_int8_pv_fp16_triton": _QUANTISED,
    "sageattn_qk_int8_pv_fp8_cuda": _QUANTISED,
    "sageattn_qk_int8_pv_fp8_cuda_sm90": _QUANTISED,
    "sageattn3_blackwell": _QUANTISED,
    "block_sparse_attn_func": _SPARSE,
    "block_sparse_sage2_attn_cuda": _SPARSE,
    "spas_sage_attn_meansim_cuda": _SPARSE,
    "spas_sage2_attn_meansim_cuda": _SPARSE,
    "spas_sage2_attn_meansim_topk_cuda": _SPARSE,
}


def why_approximate(names: frozenset[str]) -> str:
    """Why the approximations among names of code can't be read, or nothing."""
    found = sorted(names & APPROXIMATIONS.keys())
    return f"its kernel {found[0]} is {APPROXIMATIONS[found[0]]}" if found else ""


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


# -- families ------------------------------------------------------------------------------------

# Tried in order: the first that knows a module is its family.
FAMILIES: tuple[Family, ...] = (*MULTIVIEW, *MIXED)
_DEPTH = 6  # how far inside a model its families are looked for


def parts_of(model: nn.Module) -> dict[str, tuple[nn.Module, Family]]:
    """The parts of a model that a family knows, by dotted name, outermost first.

    Cost: a look at the modules outside all lists; no forward.
    """
    parts: dict[str, tuple[nn.Module, Family]] = {}
    rest: deque[tuple[tuple[str, ...], nn.Module]] = deque([((), model)])
    while rest:
        path, module = rest.popleft()
        family = next((family for family in FAMILIES if family.knows(module)), None)
        if family is not None:
            parts[".".join(path)] = module, family
        elif len(path) < _DEPTH and not isinstance(module, (nn.ModuleList, nn.Sequential)):
            for name, child in module.named_children():
                rest.append((path if name == "_orig_mod" else (*path, name), child))
    return parts


def roles_of(model: nn.Module) -> dict[str, Role]:
    """What is known of blocks and submodules, by dotted name; empty for a model of no family.

    The model itself has the role that says nothing: heads and trackers beside what a family
    describes have tokens of which nothing is known.
    """
    roles: dict[str, Role] = {}
    for path, (module, family) in parts_of(model).items():
        for name, role in family.blocks(module):
            roles[f"{path}.{name}" if path else name] = role
    return {"": Role(), **roles} if roles else {}


def role_at(roles: Mapping[str, Role], path: str) -> Role | None:
    """The role of the site of this dotted name: its own, or that of the nearest block around it."""
    while path and path not in roles:
        path = path.rpartition(".")[0]
    return roles.get(path)


def blocks_of(model: nn.Module) -> list[tuple[str, str, int]]:
    """Dotted name, kind and number of the blocks of a multi-view model, in the order they run.

    Kinds are "frame", "global", "register" and "cross". Numbers count within the kind, but where a
    model's users know its blocks by one number for all kinds (Depth Anything 3, the inter-frame
    blocks of VGGT-Ω) by that. Empty for a model that is of no multi-view family.
    """
    kinds = ("frame", "global", "register", "cross")
    return [
        (path, role.kind, role.block)
        for path, role in roles_of(model).items()
        if role.kind in kinds and role.block is not None
    ]
