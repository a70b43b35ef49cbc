"""Seeing calls of kernels that are Python functions: flash_attn, xformers, flex_attention, …

Torch functions are seen by a function mode; these are not. Code finds them by a name in a module,
so while a model is watched such names lead to a wrapper: wherever a kernel is bound in any loaded
module, or on a module of the model, under whatever name. None of their packages is imported. The
wrapper runs the kernel as it is, and tells those that listen in this thread what it got and gave.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from vistvis.hooks.steady import function_modes, replace_modes, steadily
from vistvis.models.families import APPROXIMATIONS, FLASH, FLEX, KERNELS, XFORMERS

NAMES = (KERNELS | APPROXIMATIONS.keys()) - {"scaled_dot_product_attention"}
# Parameters by which the kernel is told from other functions of its name.
_SIGNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FLASH, ("softmax_scale", "causal")),
    **dict.fromkeys(XFORMERS, ("query", "key", "value", "attn_bias")),
    **dict.fromkeys(FLEX, ("query", "key", "value")),
    "flex_attention": ("score_mod", "block_mask"),
    "varlen_attn": ("cu_seq_q", "cu_seq_k"),
}


class Owner(Protocol):
    """Who watches a model, while `open`."""

    @property
    def open(self) -> bool: ...


class KernelCall(NamedTuple):
    """One call of a kernel: under which name, what was called with what, and what came out."""

    name: str
    kernel: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


Hear: TypeAlias = Callable[[KernelCall], None]


class _Ears(threading.local):
    """Who listens in this thread: owners with what they hear with, the innermost last."""

    def __init__(self) -> None:
        self.stack: tuple[tuple[object, Hear], ...] = ()


EARS = _Ears()
_LOCK = threading.RLock()
# Who watches which model; who is gone or closed watches none.
_OWNERS: weakref.WeakKeyDictionary[Owner, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_WRAPPERS: dict[int, Callable[..., Any]] = {}  # by the id of the kernel, which each one holds
_KERNELS: dict[int, Callable[..., Any]] = {}  # by the id of the wrapper
# By their id, loaded modules that held no kernel when they were looked through, and how many names
# they had: 3,000 modules take 30 ms, most of them for nothing.
_PLAIN: dict[int, tuple[weakref.ref[Any], int]] = {}


@contextmanager
def listening(owner: object, hear: Hear) -> Iterator[None]:
    """Hear this thread's kernel calls; of one owner only the innermost hears a call."""
    before = EARS.stack
    EARS.stack = (*before, (owner, hear))
    try:
        yield
    finally:
        EARS.stack = before


def link(owner: Owner, model: nn.Module) -> None:
    """Lead the names of kernels to wrappers, until `owner` has closed and `unlink(model)`.

    Cost: some 30 ms for 3,000 loaded modules the first time, then a look at what is new. Kernels
    loaded later are not seen.
    """
    with _LOCK:
        _OWNERS[owner] = weakref.ref(model)
        known, changed, mine = len(_WRAPPERS), _changed(), list(_instances(model))
        for names in (*map(vars, changed), *mine):
            for name in NAMES & names.keys():
                if _is_kernel(name, names[name]):
                    _wrapper(name, names[name])
        for value in _compiled(model):
            name = value._torchdynamo_orig_callable.__name__
            if name in NAMES and _is_kernel(name, value):
                _wrapper(name, value)
        if len(_WRAPPERS) > known:  # it may be bound under other names, anywhere
            _PLAIN.clear()
            changed = _changed()
        for module in changed:
            names = vars(module)
            held = _replaced(names, _WRAPPERS) or not _KERNELS.keys().isdisjoint(
                map(id, names.values())  # those that another capture has put there
            )
            if not held:
                _PLAIN[id(module)] = weakref.ref(module), len(names)
        for names in mine:
            _replaced(names, _WRAPPERS)


def unlink(model: nn.Module) -> None:
    """Lead them to the kernels again, but for what others watch. Twice does no harm."""
    with _LOCK:
        for owner in [one for one in _OWNERS if not one.open]:
            del _OWNERS[owner]
        linked = [there() for there in _OWNERS.values()]
        rest = [one for one in linked if one is not None]
        watched = {id(names) for one in rest for names in _instances(one)}
        mine = [names for names in _instances(model) if id(names) not in watched]
        # A module that was loaded meanwhile may have bound a wrapper.
        for names in mine if rest else [*mine, *map(vars, _changed())]:
            _replaced(names, _KERNELS)


def _changed() -> list[ModuleType]:
    """Loaded modules, but for those that held no kernel and have not grown since."""
    found = []
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if type(names) is not dict or names is globals():
            continue
        seen, count = _PLAIN.get(id(module), (None, 0))
        if seen is None or seen() is not module or count != len(names):
            found.append(module)
    return found


def _instances(model: nn.Module) -> Iterator[dict[str, Any]]:
    return (vars(module) for module in model.modules())


def _compiled(model: nn.Module) -> Iterator[Any]:
    """What `torch.compile` made, bound in a module's own namespace or that of its class."""
    files = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    for names in (
        *(vars(sys.modules[file]) for file in files & sys.modules.keys()),
        *_instances(model),
    ):
        for value in list(names.values()):
            if type(value) is FunctionType and hasattr(value, "_torchdynamo_orig_callable"):
                yield value


def _replaced(names: dict[str, Any], by: dict[int, Callable[..., Any]]) -> bool:
    """Whether a namespace held one of these callables; it holds others for them now."""
    olds = by.keys()
    if olds.isdisjoint(map(id, names.values())):
        return False
    for name, value in list(names.items()):
        if id(value) in olds:
            names[name] = by[id(value)]
    return True


def _is_kernel(name: str, value: Any) -> bool:
    if id(value) in _KERNELS:
        return False
    if name in APPROXIMATIONS:
        return callable(value) and not isinstance(value, type)
    # Not torch's operator of the same name, which `flex_attention` ends in.
    if type(value) is not FunctionType:
        return False
    parameters = inspect.signature(value).parameters
    return all(sign in parameters for sign in _SIGNS[name])


def _wrapper(name: str, kernel: Callable[..., Any]) -> None:
    if id(kernel) in _WRAPPERS:
        return

    # Not what `torch.compile` keeps on its functions: the wrapper would be taken for one.
    @functools.wraps(kernel, updated=())
    def call_kernel(*args: Any, **kwargs: Any) -> Any:
        # Dynamo must not come to what it can't trace.
        if torch.compiler.is_compiling() or not EARS.stack:
            return kernel(*args, **kwargs)
        ears = EARS.stack
        out = steadily(partial(_run_alone, kernel, args, kwargs), EARS)
        call = KernelCall(name, kernel, args, kwargs, out)
        for hear in dict(ears).values():
            hear(call)
        return out

    _KERNELS[id(call_kernel)] = kernel
    _WRAPPERS[id(kernel)] = call_kernel


def _run_alone(kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Without our function modes: Dynamo, which `flex_attention` goes through, would trace them.

    And with no ears: what a kernel calls is its own business.
    """
    ears, modes, EARS.stack = EARS.stack, function_modes(), ()
    replace_modes([mode for mode in modes if not type(mode).__module__.startswith("vistvis.")])
    out = kernel(*args, **kwargs)
    replace_modes(modes)
    EARS.stack = ears
    return out
