"""Finding attention modules: which modules of a model call an attention kernel, and how it is read.

A site is a module whose own code (its `forward`, the methods and small functions that it calls, not
its child modules) reaches an attention kernel. That is read off the compiled code's names, so it
works for classes that nobody has listed; what is listed here are the classes that look like
attention over tokens and are not.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, TypeAlias, overload

import torch
from torch import nn

from vistvis.errors import SiteError
from vistvis.models.layouts import layout_from_model as layout_from_model
from vistvis.names import matches, nearest

Chooser: TypeAlias = "str | Sequence[str] | Callable[[Site], bool] | None"

_FUSED = {"scaled_dot_product_attention"}
_DISPATCHED = {"ALL_ATTENTION_FUNCTIONS", "attention_interface"}
_MULTIHEAD = {"multi_head_attention_forward"}
_SOFTMAX = {"softmax", "Softmax", "softmax_fp32", "_softmax"}
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
_LOOKS_LIKE_ATTENTION = re.compile(r"att(n|ention|end)|mhsa|msa\b|mixer", re.IGNORECASE)
_PROJECTIONS = (
    "qkv",
    "to_qkv",
    "q_proj",
    "to_q",
    "query",
    "projq",
    "q_bias",
    "in_proj_weight",
    "q",
)

# Modules that carry the name of attention and have no token-to-token softmax matrix.
REFUSED = {
    "XCA": "attention over channels, not over tokens (cross-covariance)",
    "CrossCovarianceAttn": "attention over channels, not over tokens (cross-covariance)",
    "ChannelAttention": "attention over channels, not over tokens",
    "ChannelAttentionV2": "attention over channels, not over tokens",
    "LinearSelfAttention": "linear attention: no token-to-token matrix exists",
    "FactorAttnConvRelPosEnc": "linear attention: no token-to-token matrix exists",
    "LiteMLA": "linear attention: no token-to-token matrix exists",
    "EfficientAdditiveAttention": "additive linear attention: no token-to-token matrix exists",
    "EfficientAdditiveAttnetion": "additive linear attention: no token-to-token matrix exists",
    "SelectiveKernelAttn": "weights between branches, not between tokens",
    "SpatialTransformerBlock": "its product of queries and keys mixes the batch, not tokens",
    "SplitAttn": "weights between branches, not between tokens",
    "LambdaLayer": "a lambda layer: its softmax normalises keys, no token-to-token matrix exists",
    "OutlookAttention": "outlook attention: weights come from a projection, not from keys",
}


# Which leading dimension of queries or weights are heads, where sizes may not tell; 0 stands for
# (batch · heads, windows).
_HEADS_AT = {
    "HaloAttn": 0,
    "MaskUnitAttention": 1,
    "HieraMaskUnitAttention": 1,
    "timm.models.nest.Attention": 1,
    "LocallyGroupedAttn": 2,
}
# One kernel call for each head, in order.
HEAD_BY_HEAD = {"CascadedGroupAttention"}


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    `source` says how its attention will be read: "kernel" (what reaches
    `scaled_dot_product_attention`), "softmax" (the weights that eager code computes), "module"
    (`nn.MultiheadAttention`), or "kernel or softmax" where the module decides when it runs.
    `refused` is the reason why it can't be read, or empty.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    kind: str = "self"
    heads: int | None = None
    source: str = "kernel"
    block: int | None = None
    refused: str = ""

    @property
    def type(self) -> str:
        """The module's class name."""
        return type(self.module).__name__

    @property
    def heads_at(self) -> int | None:
        """Which leading dimension of its queries are heads, for classes that are known for it."""
        return _HEADS_AT.get(
            self.type, _HEADS_AT.get(f"{type(self.module).__module__}.{self.type}")
        )

    def __str__(self) -> str:
        heads = f"{self.heads} heads" if self.heads else "heads unknown"
        how = f"refused: {self.refused}" if self.refused else f"read from {self.source}"
        return f"{self.name}  ({self.type}, {self.kind}, {heads}, {how})"


class SiteList(Sequence[Site]):
    """The sites of a model in its own order; prints as a table."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = tuple(sites)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> SiteList: ...
    def __getitem__(self, index: int | slice) -> Site | SiteList:
        if isinstance(index, slice):
            return SiteList(self._sites[index])
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def names(self) -> list[str]:
        """The dotted names, in model order."""
        return [site.name for site in self._sites]

    def __str__(self) -> str:
        if not self._sites:
            return "no attention sites"
        rows = [("site", "module", "kind", "heads", "read from")]
        for site in self._sites:
            how = f"refused: {site.refused}" if site.refused else site.source
            heads = str(site.heads) if site.heads else "?"
            rows.append((site.name, site.type, site.kind, heads, how))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return "\n".join(lines)

    __repr__ = __str__


def find_sites(model: nn.Module) -> SiteList:
    """List the attention modules of a model, without running it.

    Returns
    -------
    SiteList
        In the order of `model.named_modules()`: name, module, kind ("self", "cross", "window",
        "frame", "global"), heads where the module says, and how queries and keys will be read.

    Cost: looks at every module's class once; no forward.
    """
    return SiteList(_walk(model))


def choose_sites(sites: SiteList, chooser: Chooser) -> SiteList:
    """The sites that a glob, a list of names or globs, or a predicate names.

    In a glob `*` stands for anything within one part of a dotted name, `**` for any number of
    parts. None takes every site that can be read.

    Raises
    ------
    SiteError
        If there is no site, or a name or glob matches none; the text gives the nearest names. If a
        site named in full can't be read, the text gives the reason.
    """
    if not sites:
        raise SiteError(
            "this model has no attention site: no module calls scaled_dot_product_attention, a "
            "softmax over attention scores, or nn.MultiheadAttention in its own code"
        )
    if chooser is None:
        return _readable(sites, sites)
    if callable(chooser):
        chosen = [site for site in sites if chooser(site)]
        if not chosen:
            raise SiteError(
                f"the predicate chose none of the {len(sites)} sites; {_some(sites.names)}"
            )
        return _readable(SiteList(chosen), sites)
    patterns = [chooser] if isinstance(chooser, str) else list(chooser)
    wanted: set[str] = set()
    for pattern in patterns:
        found = [site for site in sites if matches(pattern, site.name)]
        if not found:
            raise SiteError(_no_match(pattern, sites))
        _readable(SiteList(found), sites)
        wanted.update(site.name for site in found if not site.refused)
    if not wanted:
        raise SiteError(f"no sites were named; {_some(sites.names)}")
    return SiteList(site for site in sites if site.name in wanted)


def _readable(found: SiteList, sites: SiteList) -> SiteList:
    readable = SiteList(site for site in found if not site.refused)
    if not readable:
        reasons = "; ".join(f"{site.name!r} ({site.type}): {site.refused}" for site in found[:3])
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        rest = [site.name for site in sites if not site.refused]
        advice = _some(rest) if rest else "this model has no site that can be"
        raise SiteError(f"can't be read exactly: {reasons}{more}; {advice}")
    return readable


def _no_match(pattern: str, sites: SiteList) -> str:
    near = nearest(pattern, sites.names, cutoff=0.3)
    hint = f"nearest: {', '.join(near)}" if near else _some(sites.names)
    return f"no site {pattern!r}: {hint}; list them with find_sites(model)"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"the model has {shown}" + (f", … {names[-1]}" if len(names) > 4 else "")


# -- walking a model ----------------------------------------------------------------------------


def _walk(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        clean = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if module is not model and type(module).__name__ == "OptimizedModule":
            continue
        site = _site(clean or type(module).__name__, module)
        if site is not None:
            yield site


def _site(name: str, module: nn.Module) -> Site | None:
    type_name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", type_name)
        if _LOOKS_LIKE_ATTENTION.search(original):
            return Site(name, module, refused=f"TorchScript ({original}) shows no kernel call")
        return None
    if type_name in REFUSED:
        return Site(name, module, heads=_heads(module), refused=REFUSED[type_name])
    source = _source(module)
    if not source:
        return None
    kind, block = _kind(name, type_name)
    return Site(name, module, kind, _heads(module), source, block)


def _source(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "module"
    if type(module).__module__.startswith("torch.nn."):
        return ""
    names = reached_names(type(module))
    if names & _MULTIHEAD:
        return "kernel"
    fused = bool(names & (_FUSED | _DISPATCHED))
    soft = bool(names & _SOFTMAX) or any(isinstance(c, nn.Softmax) for c in module.children())
    if fused:
        fused_flag = getattr(module, "fused_attn", None)
        if fused_flag is False and soft:
            return "softmax"
        return "kernel or softmax" if soft and fused_flag is None else "kernel"
    if soft and _looks_like_attention(module):
        return "softmax"
    unreadable = sorted({UNREADABLE[name] for name in names & set(UNREADABLE)})
    return f"nothing ({', '.join(unreadable)} only)" if unreadable else ""


def _looks_like_attention(module: nn.Module) -> bool:
    if _LOOKS_LIKE_ATTENTION.search(type(module).__name__):
        return True
    return any(hasattr(module, name) for name in _PROJECTIONS)


def _heads(module: nn.Module) -> int | None:
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _kind(name: str, type_name: str) -> tuple[str, int | None]:
    """Kind and block number, from the words that names of modules and classes use."""
    alternating = re.search(r"(?:^|\.)(frame|global)_blocks\.(\d+)(?:\.|$)", name)
    if alternating:
        return alternating[1], int(alternating[2])
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    block = int(numbers[-1]) if numbers else None
    last = name.rsplit(".", 1)[-1].lower()
    if (
        "cross" in type_name.lower()
        or "cross" in last
        or "encdec" in last
        or last in ("multihead_attn", "encoder_attn")
    ):
        return "cross", block
    if "window" in type_name.lower() or "swin" in type_name.lower():
        return "window", block
    return "self", block


# -- reading code -------------------------------------------------------------------------------


def reached_names(cls: type[nn.Module]) -> frozenset[str]:
    """Every global and attribute name that a module class's own forward code mentions.

    Follows methods of the class and functions of the same module, not child modules.
    """
    if cls not in _REACHED:
        names: set[str] = set()
        forward = getattr(cls, "forward", None)
        if forward is not None:
            _reach(inspect.unwrap(forward), cls, names, set(), 0)
        _REACHED[cls] = frozenset(names)
    return _REACHED[cls]


# Weak, so that classes made in a loop (tests, notebooks) can go.
_REACHED: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


def _reach(function: Any, cls: type, names: set[str], seen: set[Any], depth: int) -> None:
    if not isinstance(function, FunctionType) or function.__code__ in seen or depth > 4:
        return
    seen.add(function.__code__)
    own = _code_names(function.__code__)
    names |= own
    for name in own:
        method = inspect.getattr_static(cls, name, None)
        if isinstance(method, staticmethod):
            method = method.__func__
        if isinstance(method, FunctionType) and not _is_torch(method):
            _reach(inspect.unwrap(method), cls, names, seen, depth + 1)
        called = function.__globals__.get(name)
        called = called if called is None else inspect.unwrap(called)
        if isinstance(called, FunctionType) and not _is_torch(called):
            near = called.__module__ == function.__module__ or "att" in name.lower()
            if near and not name.startswith(("create_", "_prepare")):
                _reach(called, cls, names, seen, depth + 1)


def _is_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").startswith("torch.")


def _code_names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _code_names(constant)
    return names
