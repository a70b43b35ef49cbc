"""Reading a module's code: which names its own `forward` can reach."""

from __future__ import annotations

import inspect
import weakref
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from vistvis.models.families import APPROXIMATIONS, KERNELS

# Weak, so that classes made in a loop (tests, notebooks) can go.
_REACHED: weakref.WeakKeyDictionary[type, dict[tuple[type, ...], frozenset[str]]] = (
    weakref.WeakKeyDictionary()
)


def reached_names(module: nn.Module) -> frozenset[str]:
    """Every global and attribute name that a module's own code mentions.

    Its code is its `forward`, and the `__call__` of plain objects that it holds and names there.
    """
    own = _names(type(module), ())
    held = {**vars(module), **module._modules}.items()
    called = {type(value) for name, value in held if name in own and _call_of(value) is not None}
    if not called:
        return own
    return _names(type(module), tuple(sorted(called, key=lambda cls: cls.__qualname__)))


def _names(cls: type, called: tuple[type, ...]) -> frozenset[str]:
    """Names that a class's forward reaches, with those of the classes of plain objects."""
    cached = _REACHED.setdefault(cls, {})
    if called not in cached:
        names: set[str] = set()
        seen: set[Any] = set()
        forward = getattr(cls, "forward", None)
        if forward is not None:
            _reach(inspect.unwrap(forward), (cls,), names, seen, 0)
        for other in called:
            # A plain object that is handed the module calls its methods, too.
            call: Any = other.__call__
            _reach(inspect.unwrap(call), (other, cls), names, seen, 0)
        cached[called] = frozenset(names)
    return cached[called]


def _call_of(value: Any) -> FunctionType | None:
    """What runs when a plain object is called: Python code that is no module's own way."""
    call = getattr(type(value), "__call__", None)  # noqa: B004
    if isinstance(value, (type, FunctionType)) or not isinstance(call, FunctionType):
        return None
    return None if _is_torch(call) else call


def _reach(
    function: Any, classes: tuple[type, ...], names: set[str], seen: set[Any], depth: int
) -> None:
    # Follows methods of the classes and functions of the same module, not child modules.
    if not isinstance(function, FunctionType) or function.__code__ in seen or depth > 4:
        return
    seen.add(function.__code__)
    own = _code_names(function.__code__)
    names |= own
    for name in own:
        for cls in classes:
            method = inspect.getattr_static(cls, name, None)
            if isinstance(method, staticmethod):
                method = method.__func__
            if not isinstance(method, FunctionType):
                call = _call_of(method)
                if call is not None:
                    _reach(inspect.unwrap(call), (type(method), cls), names, seen, depth + 1)
            elif not _is_torch(method):
                _reach(inspect.unwrap(method), classes, names, seen, depth + 1)
        if name in KERNELS or name in APPROXIMATIONS:
            continue  # what a kernel calls in turn is its own
        called = function.__globals__.get(name)
        called = called if called is None else inspect.unwrap(called)
        if isinstance(called, FunctionType) and not _is_torch(called):
            near = called.__module__ == function.__module__ or "att" in name.lower()
            if near and not name.startswith(("create_", "_prepare")):
                _reach(called, classes, names, seen, depth + 1)


def _is_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").startswith("torch.")


def _code_names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _code_names(constant)
    return names
