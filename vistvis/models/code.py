"""Reading a module's code: which names its own `forward` can reach."""

from __future__ import annotations

import inspect
import weakref
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from vistvis.models.families import APPROXIMATIONS, KERNELS

# Weak, so that classes made in a loop (tests, notebooks) can go.
_REACHED: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


def reached_names(cls: type[nn.Module]) -> frozenset[str]:
    """Every global and attribute name that a module class's own forward code mentions."""
    if cls not in _REACHED:
        names: set[str] = set()
        forward = getattr(cls, "forward", None)
        if forward is not None:
            _reach(inspect.unwrap(forward), cls, names, set(), 0)
        _REACHED[cls] = frozenset(names)
    return _REACHED[cls]


def _reach(function: Any, cls: type, names: set[str], seen: set[Any], depth: int) -> None:
    # Follows methods of the class and functions of the same module, not child modules.
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
        if name in KERNELS or name in APPROXIMATIONS:
            continue  # what a kernel calls in turn is its own
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
