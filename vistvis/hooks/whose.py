"""Whose a pass is: which capture it belongs to, and whether what runs is a pass at all."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_LOCK = threading.RLock()
_CLAIMS: weakref.WeakSet[Claim] = weakref.WeakSet()


class _Here(threading.local):
    """Whether the capture was opened in this thread."""

    mine = False


class Claim:
    """What one capture may take for its own: passes of its thread, others if it is alone."""

    def __init__(self, model: nn.Module) -> None:
        # Weakly: an id would soon be that of another model's module.
        self._modules = weakref.WeakSet(model.modules())
        self._here = _Here()
        self._here.mine = True
        self.open = True
        self.unclear = ""
        """Why it is not known whose a pass was."""
        self._crowded = False  # whether captures of other threads watched the same meanwhile
        with _LOCK:
            for other in self._rivals():
                if not other._here.mine:
                    self._crowded = other._crowded = True
            _CLAIMS.add(self)

    def _rivals(self) -> list[Claim]:
        """Others on the same modules."""
        with _LOCK:
            others = [one for one in _CLAIMS if one is not self and one.open]
        return [one for one in others if not one._modules.isdisjoint(self._modules)]

    def holds(self) -> bool:
        """Whether a pass that begins in this thread is this capture's."""
        if self._here.mine:
            return True
        rivals = self._rivals()
        if not rivals:
            return True
        if not any(one._here.mine for one in rivals):
            self.unclear = (
                f"the model ran in thread {threading.current_thread().name!r}, where none of the "
                f"{len(rivals) + 1} captures that watched it was opened, so whose pass that was is "
                "not known; open each capture in the thread that runs the model"
            )
        return False

    def holds_compiled(self) -> bool:
        """Whether what compiled code noted is this capture's: it does not say in which thread."""
        if self._crowded:
            self.unclear = (
                "compiled code ran while captures of several threads watched it, and does not say "
                "in which; open one only after the other is closed"
            )
        return not self._crowded


def symbolic() -> bool:
    """Whether code runs to be written down, on tensors that stand for others."""
    return torch._C._get_tracing_state() is not None or any(
        isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()
    )


def recomputing() -> bool:
    """Whether autograd runs a backward pass, where checkpointed blocks run a second time."""
    return bool(torch._C._current_graph_task_id() != -1)


# Newer than the oldest torch.
exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
