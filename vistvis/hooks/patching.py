"""Wrapping the `forward` of single module instances, and taking the wrapper off without a trace.

A wrapper on the instance runs `finally` on anything that leaves the forward, Ctrl-C included, where
forward hooks are skipped. Several listeners may sit on one module at once and go in any order.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

Forward: TypeAlias = Callable[..., Any]
Listener: TypeAlias = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
"""What wraps one module's method: called with it and its arguments, in place of it."""


class _Patch:
    """The wrapper on one method of one instance, and what was there before."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.method = method
        self.had = method in module.__dict__
        self.original: Forward = getattr(module, method)
        self.listeners: tuple[Listener, ...] = ()

    def apply(self, module: nn.Module) -> None:
        wrapped = self.original
        for listener in self.listeners:
            wrapped = _wrap(wrapped, listener)
        # Past nn.Module.__setattr__, which would look for parameters.
        if self.listeners:
            module.__dict__[self.method] = wrapped
        elif self.had:
            module.__dict__[self.method] = self.original
        else:
            module.__dict__.pop(self.method, None)


_LOCK = threading.RLock()
_PATCHES: weakref.WeakKeyDictionary[nn.Module, dict[str, _Patch]] = weakref.WeakKeyDictionary()


def _wrap(original: Forward, listener: Listener) -> Forward:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return listener(original, args, kwargs)

    return forward


def attach(
    module: nn.Module, listener: Listener, *, method: str = "forward", inside: bool = False
) -> None:
    """Put a listener around a method of one instance, and around or `inside` all others on it."""
    with _LOCK:
        patches = _PATCHES.setdefault(module, {})
        patch = patches.get(method)
        if patch is None:
            patch = patches[method] = _Patch(module, method)
        patch.listeners = (listener, *patch.listeners) if inside else (*patch.listeners, listener)
        patch.apply(module)


def detach(module: nn.Module, listener: Listener, *, method: str = "forward") -> None:
    """Take it off; with the last one gone, the instance is as it was. Twice does no harm."""
    with _LOCK:
        patches = _PATCHES.get(module, {})
        patch = patches.get(method)
        if patch is None:
            return
        patch.listeners = tuple(one for one in patch.listeners if one is not listener)
        patch.apply(module)
        if not patch.listeners:
            del patches[method]
        if not patches:
            del _PATCHES[module]
