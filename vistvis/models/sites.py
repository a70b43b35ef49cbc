"""Finding attention modules: which modules of a model call an attention kernel, and how it is read.

A site is a module whose own code (its `forward`, the methods and small functions that it calls, not
its child modules) reaches an attention kernel. That is read off the compiled code's names, so it
works for classes that nobody has listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias, overload

import torch
from torch import nn

from vistvis.errors import InputError, SiteError
from vistvis.models import families
from vistvis.models.code import reached_names
from vistvis.models.families import ModuleTraits, kind_and_block, module_traits
from vistvis.models.family import Role
from vistvis.names import few, html_table, matches, nearest

Chooser: TypeAlias = "str | Sequence[str] | Callable[[Site], bool] | None"


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    `name` is its dotted name, or the name that a front end gave it; `path` is always the dotted
    one. `kind` is "self", "cross", "window", "frame", "global" or "register". `heads` is None where
    the module does not say. `source` says how its attention will be read: "kernel" (what reaches
    `scaled_dot_product_attention`), "softmax" (the weights that eager code computes), "module"
    (`nn.MultiheadAttention`), or "kernel or softmax" where the module decides when it runs.
    `refused` is the reason why it can't be read, or empty. `role` is what the model's family says
    of it, if one is known.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    kind: str = "self"
    heads: int | None = None
    source: str = "kernel"
    block: int | None = None
    refused: str = ""
    path: str = ""
    role: Role | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path or self.name)

    @property
    def type(self) -> str:
        """The module's class name."""
        return type(self.module).__name__

    @cached_property
    def traits(self) -> ModuleTraits:
        return module_traits(self.module)

    def matches(self, pattern: str) -> bool:
        """Whether a name or glob means this site, by its name or its dotted one."""
        return matches(pattern, self.name) or matches(pattern, self.path)

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
        chosen = self._sites[index]
        return SiteList(chosen) if isinstance(chosen, tuple) else chosen

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return [site.name for site in self._sites]

    def named(self, names: Mapping[str, str]) -> SiteList:
        """The same sites under names of a front end's own: dotted name → name.

        Those that are named come first, in the order of `names`. `SiteError` if there is no site of
        a dotted name, `InputError` if two sites would have one name.
        """
        by_path = {site.path: site for site in self._sites}
        for path in names:
            if path not in by_path:
                raise SiteError(_no_match(path, self))
        renamed = [replace(by_path.pop(path), name=name) for path, name in names.items()]
        sites = SiteList([*renamed, *by_path.values()])
        twice = [name for name, count in Counter(sites.names).items() if count > 1]
        if twice:
            raise InputError(f"names= gives {few(sorted(twice))} to more than one site")
        return sites

    def __str__(self) -> str:
        return table(self._rows()) if self._sites else "no attention sites"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._rows(), caption=f"{len(self)} attention sites")

    def _rows(self) -> Sequence[tuple[str, ...]]:
        rows = [("site", "module", "kind", "heads", "read from")]
        for site in self._sites:
            how = f"refused: {site.refused}" if site.refused else site.source
            heads = str(site.heads) if site.heads else "?"
            rows.append((site.name, site.type, site.kind, heads, how))
        return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as lines, every column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def find_sites(model: nn.Module) -> SiteList:
    """The attention modules that a model's code shows, in the order of `model.named_modules()`."""
    if not isinstance(model, nn.Module):
        raise InputError(f"a model is a torch.nn.Module, got {type(model).__name__}")
    sites = [_site(name, module) for name, module in named_modules(model)]
    roles = families.roles_of(model)
    return SiteList(_in_role(site, roles) for site in sites if site is not None)


def _in_role(site: Site, roles: Mapping[str, Role]) -> Site:
    """A site as its model's family knows it."""
    role = families.role_at(roles, site.path)
    if role is None:
        return site
    block = site.block if role.block is None else role.block
    return replace(site, kind=role.kind or site.kind, block=block, role=role)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model under the names of sites: a root is called by its class."""
    for name, module in model.named_modules():
        if module is not model and type(module).__name__ == "OptimizedModule":
            continue
        clean = ".".join(part for part in name.split(".") if part != "_orig_mod")
        yield clean or type(module).__name__, module


def seen_site(name: str, module: nn.Module, source: str, roles: Mapping[str, Role]) -> Site:
    """A site that only a pass has shown: the module that was running when a kernel was called.

    `roles` are what its model's family knows.
    """
    plain = name.split("#")[0]
    kind, block = _kind_and_block(plain, module)
    site = Site(plain, module, kind, _heads(module), source, block)
    return replace(_in_role(site, roles), name=name, path=name)


def is_torchs(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own, a part of what calls it."""
    return type(module).__module__.startswith("torch.nn.")


def names_softmax(module: nn.Module) -> bool:
    """Whether a module's own code mentions a softmax, whatever it is for."""
    if is_torchs(module):
        return False
    soft = bool(reached_names(module) & families.SOFTMAX)
    return soft or any(isinstance(child, nn.Softmax) for child in module.children())


def choose_sites(sites: SiteList, chooser: Chooser) -> SiteList:
    """The sites that a chooser means, as `capture` takes it.

    `SiteError` if there is none: the text gives the nearest names, or why it can't be read.
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
        return _readable(chosen, sites)
    names: set[str] = set()
    for pattern in [chooser] if isinstance(chooser, str) else chooser:
        meant = [site for site in sites if site.matches(pattern)]
        if not meant:
            raise SiteError(_no_match(pattern, sites))
        names.update(_readable(meant, sites).names)
    if not names:
        raise SiteError(f"no sites were named; {_some(sites.names)}")
    return SiteList(site for site in sites if site.name in names)


def _no_match(pattern: str, sites: SiteList) -> str:
    near = nearest(pattern, sites.names, cutoff=0.3)
    hint = f"nearest: {', '.join(near)}" if near else _some(sites.names)
    return (
        f"no site {pattern!r}: {hint}; list them with find_sites(model). With sites=None calls "
        "outside of these are kept, too; find_sites(model, example=…) lists them"
    )


def _readable(chosen: Sequence[Site], sites: SiteList) -> SiteList:
    readable = SiteList(site for site in chosen if not site.refused)
    if not readable:
        reasons = "; ".join(f"{site.name!r} ({site.type}): {site.refused}" for site in chosen[:3])
        more = f" (and {len(chosen) - 3} more)" if len(chosen) > 3 else ""
        rest = [site.name for site in sites if not site.refused]
        advice = _some(rest) if rest else "this model has no site that can be"
        raise SiteError(f"can't be read exactly: {reasons}{more}; {advice}")
    return readable


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"the model has {shown}" + (f", … {names[-1]}" if len(names) > 4 else "")


def _site(name: str, module: nn.Module) -> Site | None:
    type_name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", type_name)
        if families.ATTENTION_CLASS.search(original):
            return Site(name, module, refused=f"TorchScript ({original}) shows no kernel call")
        return None
    source, refused = _source(module), module_traits(module).refused
    if not (source or refused):
        refused = families.why_approximate(reached_names(module))
    if refused:
        return Site(name, module, heads=_heads(module), refused=refused)
    if not source:
        return None
    kind, block = _kind_and_block(name, module)
    return Site(name, module, kind, _heads(module), source, block)


def _kind_and_block(name: str, module: nn.Module) -> tuple[str, int | None]:
    kind, block = kind_and_block(name, type(module).__name__)
    crossing = getattr(module, "is_cross_attention", False) is True
    return ("cross" if crossing and kind == "self" else kind), block


def _source(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "module"
    if is_torchs(module):
        return ""
    names = reached_names(module)
    if names & families.MULTIHEAD:
        return "kernel"
    fused = bool(names & (families.KERNELS | families.DISPATCHERS))
    soft = names_softmax(module)
    if fused:
        fused_flag = getattr(module, "fused_attn", None)
        if fused_flag is False and soft:
            return "softmax"
        return "kernel or softmax" if soft and fused_flag is None else "kernel"
    if soft and _looks_like_attention(module):
        return "softmax"
    return ""


def _looks_like_attention(module: nn.Module) -> bool:
    named = families.ATTENTION_CLASS.search(type(module).__name__)
    return bool(named) or any(hasattr(module, name) for name in families.PROJECTIONS)


def _heads(module: nn.Module) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in families.HEADS:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
