"""Wrapping the `forward` of single module instances, and taking the wrapper off without a trace.

A wrapper on the instance runs `finally` on anything that leaves the forward, Ctrl-C included, where
forward hooks are skipped. Several listeners may sit on one module at once and go in any order, and
other tools may wrap the same method before or after: only what is ours is taken off. A copy of a
watched module, deep or unpickled, is a plain one.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from vistvis.errors import CaptureError
from vistvis.hooks.kernels import Owner, unlink

Forward: TypeAlias = Callable[..., Any]


class Listener(NamedTuple):
    """What wraps one module's method, as long as its owner is there and open.

    `run` is called in place of the method, with the owner, the method and its arguments;
    `compiled`, without the owner, where Dynamo traces it. `changes` says that it changes what the
    method computes: it runs inside of all that only watch, which then see what was computed.
    """

    owner: weakref.ref[Any]
    run: Callable[..., Any]
    compiled: Callable[..., Any] | None = None
    changes: bool = False

    @property
    def over(self) -> bool:
        owner: Owner | None = self.owner()
        return owner is None or not owner.open


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
            if not torch.compiler.is_compiling() and self.left_behind:
                _tidy(self.module)
                if not self.listeners:
                    self.take_off()
            return self.wrapped(*args, **kwargs)

        self.forward: Forward = forward

    @property
    def left_behind(self) -> bool:
        """Whether nobody listens, or one who is gone: an interrupt, or a tool that held it."""
        return not self.listeners or any(one.over for one in self.listeners)

    def listen(self, listeners: tuple[Listener, ...]) -> None:
        wrapped = self.original
        for listener in listeners:
            wrapped = _wrap(wrapped, listener)
        self.listeners, self.wrapped = listeners, wrapped

    def take_off(self) -> None:
        held = self.module.__dict__
        if held.get(self.method) is self.forward:
            if self.had:
                held[self.method] = self.original
            else:
                del held[self.method]

    @property
    def can_leave(self) -> bool:
        """Whether no tool wraps it, who may put it back."""
        there = self.module.__dict__.get(self.method)
        bare = isinstance(there, MethodType) and there.__self__ is self.module
        return bare or there in (None, self.original, self.forward)


class _Patches:
    """The patches of one instance, in place of its `__reduce_ex__`: copies get none of them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.patches: list[_Patch] = []
        # torch.jit.script asks the instance for the first; copy, pickle and torch.save for the
        # second, which goes last: by it the rest is found.
        self.names = {"__prepare_scriptable__": self.script, _HELD: self}

    def script(self) -> nn.Module:
        """For `torch.jit.script`, which can't compile wrappers."""
        _tidy(self.module)
        if self.patches:
            raise CaptureError(
                f"{type(self.module).__name__} is being watched, and torch.jit.script can't "
                "compile what a capture has put on it; close the capture first"
            )
        return self.module

    def __call__(self, protocol: Any) -> Any:
        reduced = type(self.module).__reduce_ex__(self.module, protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced
        state = {key: value for key, value in reduced[2].items() if key not in self.names}
        for patch in self.patches[::-1]:  # an earlier one may be what a later one wraps
            if state.get(patch.method) is patch.forward:
                if patch.had:
                    state[patch.method] = patch.original
                else:
                    del state[patch.method]
        return (*reduced[:2], state, *reduced[3:])


_LOCK = threading.RLock()
_HELD = "__reduce_ex__"


def _patches(module: nn.Module) -> list[_Patch]:
    held = module.__dict__.get(_HELD)
    return held.patches if isinstance(held, _Patches) else []


def clear(module: nn.Module) -> None:
    """Take off whose owner is gone or closed; with the last, the instance is as it was."""
    with _LOCK:
        patches = _patches(module)
        for patch in patches[::-1]:
            if patch.left_behind:
                patch.listen(tuple(one for one in patch.listeners if not one.over))
            if not patch.listeners and patch.can_leave:
                patches.remove(patch)
                if not patches:
                    _unmark(module)
                patch.take_off()  # last: if an interrupt leaves it, its next call tidies up
        if not patches:
            _unmark(module)


def _unmark(module: nn.Module) -> None:
    held = module.__dict__.get(_HELD)
    for name in held.names if isinstance(held, _Patches) else ():
        module.__dict__.pop(name, None)


def _tidy(module: nn.Module) -> None:
    """Take off what was left behind here and below."""
    if isinstance(module, nn.Module):  # functions that merge tokens lie in a namespace
        for below in module.modules():
            clear(below)
        unlink(module)
    clear(module)


def _wrap(original: Forward, listener: Listener) -> Forward:
    owner, run, compiled, _ = listener

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return (
                original(*args, **kwargs) if compiled is None else compiled(original, args, kwargs)
            )
        there = owner()
        if there is None or not there.open:
            return original(*args, **kwargs)
        return run(there, original, args, kwargs)

    return forward


def attach(
    module: nn.Module, listener: Listener, *, method: str = "forward", inside: bool = False
) -> None:
    """Put a listener around a method of one instance, and around or `inside` all others on it.

    One that `changes` the method goes inside of all that don't, whatever came first.
    """
    with _LOCK:
        # Past nn.Module.__setattr__, which would look for parameters.
        held = module.__dict__
        there = held.get(method)
        ours = [one for one in _patches(module) if one.method == method]
        patch = next((one for one in ours if one.forward is there), None)
        if listener.changes and ours:
            patch = ours[0]  # the innermost, whatever another tool has wrapped around it
        if patch is None:
            patch = _Patch(module, method)
            marks = held.get(_HELD)
            if not isinstance(marks, _Patches):
                marks = _Patches(module)
            marks.patches.append(patch)
            held.update(marks.names)
            held[method] = patch.forward
        before = patch.listeners
        order = (listener, *before) if inside else (*before, listener)
        patch.listen(tuple(sorted(order, key=lambda one: not one.changes)))
