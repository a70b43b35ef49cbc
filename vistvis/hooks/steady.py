"""What an interrupt must not leave behind: function modes, gradients off, a thread's own state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

Result = TypeVar("Result")


def steadily(run: Callable[[], Result], *states: threading.local) -> Result:
    """Run it; if it fails, gradients, modes and this thread's `states` are as they were before.

    An exception may come anywhere (Ctrl-C), at the first line of an `__exit__` too. What `states`
    hold is compared to nothing and put back as it was: they hold nothing that is changed in place.
    """
    grad, modes = torch.is_grad_enabled(), function_modes()
    held = [dict(vars(state)) for state in states]

    def restore() -> None:
        for state, values in zip(states, held, strict=True):
            vars(state).update(values)
        torch.set_grad_enabled(grad)
        replace_modes(modes)

    try:
        try:
            return run()
        except BaseException:
            restore()
            raise
    except BaseException:
        restore()  # again: the first may itself have been interrupted
        raise


def function_modes() -> list[TorchFunctionMode]:
    """Torch's function modes of this thread, the innermost last."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def replace_modes(modes: Sequence[TorchFunctionMode]) -> None:
    """Put these on torch's stack in place of what is there."""
    there = function_modes()
    if there == modes:
        return
    for _ in there:
        _pop_mode()  # type: ignore[no-untyped-call]
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]
