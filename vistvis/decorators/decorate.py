"""`visTvis_store` and `visTvis_layer_counter`: keep what a function returns, layer by layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from vistvis.attention.checks import describe
from vistvis.errors import InputError, VistvisWarning
from vistvis.files import checked_name, checked_path, inside
from vistvis.state import LayerCounter, state
from vistvis.store.formats import checked_format, write

Function = TypeVar("Function", bound=Callable[..., Any])
Arguments: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"


def visTvis_store(
    base_folder_path: str | os.PathLike[str],
    identifier: str,
    file_name: str,
    folder_name: str,
    *,
    pos_ret: int | None = None,
) -> Callable[[Function], Function]:
    """Store what a function returns, and return it untouched.

    It lands at `<base_folder_path>/<identifier>/<folder_name>/layer_<layer>/<file_name>`, where
    `layer` is what `visTvis_layer_counter` or `state.update` says at the moment of return. Works on
    plain and `async` functions. A file that is there is replaced, whole or not at all.

    Parameters
    ----------
    base_folder_path
        Made where it is missing; `~` is the home folder.
    identifier, folder_name
        Plain names: nothing that leaves the base folder.
    file_name
        Its ending chooses the format: `.pt` or `.pth` (`torch.load(weights_only=True)` reads it),
        `.npy`, `.npz`, `.safetensors`; without an ending `.pt` is added. bfloat16 becomes float32
        where the format has none (numpy).
    pos_ret
        Which element to store, where a tuple or list is returned.

    What is stored is a tensor, an array, or a lazy `vistvis.Attention`: that one keeps queries and
    keys in `.safetensors`, and becomes the dense matrix elsewhere, under the limit of `dense`. For
    None nothing is stored, with a warning.

    A later reading sees damage in the header of a file and one cut short; flipped bits in values it
    sees in `.npz` alone, which has checksums. A run (`save_run`) has them of all it holds.

    Raises
    ------
    InputError
        At decoration, for names and endings that can't be; at a call, for a value that can't be
        stored.
    StoreError
        At a call, if the file can't be written.
    """
    base = Path(os.path.expanduser(checked_path(base_folder_path)))
    names = (checked_name(identifier, "identifier"), checked_name(folder_name, "folder_name"))
    name = checked_format(file_name)

    def keep(result: Any) -> Any:
        layer = state.get_layer(identifier)
        if layer < 0:
            raise InputError(
                f"layers count from 0, but the counter of {identifier!r} is at {layer}"
            )
        value = _chosen(result, pos_ret)
        where = Path(*names, f"layer_{layer}", name)
        if value is None:
            warnings.warn(
                f"nothing stored for {where}: None was returned (pos_ret chooses an element)",
                VistvisWarning,
                stacklevel=3,
            )
        else:
            write(value, inside(base, *where.parts))
        return result

    return lambda function: _wrapped(function, contextlib.nullcontext, keep)


def visTvis_layer_counter(
    identifier: str, var_name: str = "layer_idx"
) -> Callable[[Function], Function]:
    """Let the function that runs the layers count them.

    Its parameter `var_name` becomes a `LayerCounter`: an int whose `+= 1` also tells
    `visTvis_store` functions of the same identifier which layer is running. It starts where the
    identifier stands (0 at first, and after a call where that call ended); a value that the caller
    passes is used in its place. What is returned has plain ints in place of counters.

    A function without that parameter can count by `state.bump(identifier)`. Works on plain and
    `async` functions; threads and tasks count for themselves. After an error the counter stands
    where it was before the call.
    """
    checked_name(identifier, "identifier")

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameter = signature.parameters.get(var_name)
        if parameter is not None and parameter.kind in _VARIADIC:
            raise InputError(
                f"{var_name!r} of {_name(function)} takes many values, not one counter"
            )

        @contextlib.contextmanager
        def counting(given: Arguments) -> Iterator[Arguments]:
            bound = None
            # A call that does not fit is left as it is: the function itself says what is wrong.
            with contextlib.suppress(TypeError):
                bound = signature.bind_partial(*given[0], **given[1]) if parameter else None
            start = bound.arguments.get(var_name) if bound else None
            with state.counting(identifier, start) as first:
                if bound:
                    # By name after an argument that is missing, so that it does not take its place.
                    bound.arguments[var_name] = LayerCounter(identifier, first)
                    given = bound.args, bound.kwargs
                yield given

        return _wrapped(function, counting, _plain)

    return decorate


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _wrapped(
    function: Function,
    around: Callable[[Arguments], contextlib.AbstractContextManager[Arguments]],
    result_of: Callable[[Any], Any],
) -> Function:
    """`function`, plain or `async`, called within `around`, which may change its arguments."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InputError(f"{_name(function)} is a generator; decorate the function it calls")
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper_async(*args: Any, **kwargs: Any) -> Any:
            with around((args, kwargs)) as (args, kwargs):
                return result_of(await function(*args, **kwargs))

        return cast(Function, wrapper_async)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with around((args, kwargs)) as (args, kwargs):
            return result_of(function(*args, **kwargs))

    return cast(Function, wrapper)


def _chosen(result: Any, position: int | None) -> Any:
    if position is None:
        return result
    if not isinstance(result, (tuple, list)) or not -len(result) <= position < len(result):
        raise InputError(
            f"pos_ret={position} needs a tuple or list that has this element, got "
            f"{describe(result)}"
        )
    return result[position]


def _plain(value: Any) -> Any:
    """`value` with ints in place of counters, at the top and in plain tuples, lists and dicts."""
    if isinstance(value, LayerCounter):
        return int(value)
    if type(value) not in (tuple, list, dict):
        return value
    items = list(value.values() if type(value) is dict else value)
    plain = [_plain(item) for item in items]
    if all(map(operator.is_, items, plain)):  # what has no counter is passed through as it is
        return value
    return dict(zip(value, plain, strict=True)) if type(value) is dict else type(value)(plain)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
