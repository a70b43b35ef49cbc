"""Wrapping the `forward` of single module instances, and taking the wrapper off without a trace.

A wrapper on the instance runs `finally` on anything that leaves the forward, Ctrl-C included, where
forward hooks are skipped. Several listeners may sit on one module at once and go in any order, and
other tools may wrap the same method before or after: only what is ours is taken off. A copy of a
watched module, deep or unpickled, is a plain one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import nn

Forward: TypeAlias = Callable[..., Any]
Listener: TypeAlias = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
"""What wraps one module's method: called with it and its arguments, in place of it."""


class _Patch:
    """The wrapper on one method of one instance, and what was there before."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self.had = method in module.__dict__
        self.original: Forward = getattr(module, method)
        self.listeners: tuple[Listener, ...] = ()
        self.wrapped = self.original

        # One wrapper for all listeners: who wraps it in turn stays with it as they come and go.
        @functools.wraps(self.original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.listeners and not torch.compiler.is_compiling():
                _clear(self.module)  # another tool that held it has put it back
            return self.wrapped(*args, **kwargs)

        self.forward: Forward = forward

    def listen(self, listeners: tuple[Listener, ...]) -> None:
        wrapped = self.original
        for listener in listeners:
            wrapped = _wrap(wrapped, listener)
        self.listeners, self.wrapped = listeners, wrapped

    def take_off(self) -> bool:
        """Whether it is gone for good: a tool that wrapped it may yet put it back."""
        held = self.module.__dict__
        there = held.get(self.method)
        if there is self.forward:
            if self.had:
                held[self.method] = self.original
            else:
                del held[self.method]
            return True
        bare = isinstance(there, MethodType) and there.__self__ is self.module
        return bare or there in (None, self.original)


class _Patches:
    """The patches of one instance, in place of its `__reduce_ex__`: copies get none of them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.patches: list[_Patch] = []

    def __call__(self, protocol: Any) -> Any:
        reduced = type(self.module).__reduce_ex__(self.module, protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        state = {key: value for key, value in reduced[2].items() if value is not self}
        for patch in self.patches[::-1]:  # an earlier one may be what a later one wraps
            if state.get(patch.method) is patch.forward:
                if patch.had:
                    state[patch.method] = patch.original
                else:
                    del state[patch.method]
        return (*reduced[:2], state, *reduced[3:])


_LOCK = threading.RLock()
_HELD = "__reduce_ex__"  # copy, pickle and torch.save ask the instance for it first


def _patches(module: nn.Module) -> list[_Patch]:
    held = module.__dict__.get(_HELD)
    return held.patches if isinstance(held, _Patches) else []


def _clear(module: nn.Module) -> None:
    """Take off what nobody listens through."""
    with _LOCK:
        patches = _patches(module)
        for patch in patches[::-1]:
            if not patch.listeners and patch.take_off():
                patches.remove(patch)
        if not patches:
            module.__dict__.pop(_HELD, None)


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
        # Past nn.Module.__setattr__, which would look for parameters.
        held = module.__dict__
        there = held.get(method)
        patch = next((one for one in _patches(module) if one.forward is there), None)
        if patch is None:
            patch = _Patch(module, method)
            held.setdefault(_HELD, _Patches(module)).patches.append(patch)
            held[method] = patch.forward
        before = patch.listeners
        patch.listen((listener, *before) if inside else (*before, listener))


def detach(module: nn.Module, listener: Listener, *, method: str = "forward") -> None:
    """Take it off; with the last one gone, the instance is as it was. Twice does no harm."""
    with _LOCK:
        for patch in _patches(module):
            if patch.method == method and listener in patch.listeners:
                patch.listen(tuple(one for one in patch.listeners if one is not listener))
        _clear(module)
