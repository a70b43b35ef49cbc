"""Progress bars of long work: tqdm's, one way to ask for them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def progress(
    steps: Iterable[Any] | None,
    label: str,
    *,
    shown: bool | None = True,
    unit: str = "it",
    total: int | None = None,
    delay: float = 0.0,
) -> Any:
    """A bar over `steps`; or, with `steps=None` and a total, one to `update` by hand.

    `shown=False` gives the steps alone, None a bar only where somebody watches a terminal. A bar
    appears after `delay` seconds, so that short work shows none, and then vanishes at its end.
    """
    # Not tqdm's `disable=`: also then it starts a thread and takes a lock, and a process that is
    # forked meanwhile waits for that lock for ever.
    if not (sys.stderr.isatty() if shown is None else shown):
        return _Silent() if steps is None else steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc=label, unit=unit, total=total, delay=delay, leave=not delay)


@contextlib.contextmanager
def run_progress(
    model: nn.Module, paths: Iterable[str], *, unit: str, shown: bool | None = True
) -> Iterator[None]:
    """A bar over some submodules while the model runs, if that takes longer than two seconds."""
    modules = [model.get_submodule(path) for path in paths]
    label = "running the model"
    with progress(None, label, unit=unit, total=len(modules), shown=shown, delay=2) as bar:
        # What a hook returns takes the place of the module's output, and a bar says True.
        hooks = [one.register_forward_hook(lambda *_: bar.update() and None) for one in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Silent(contextlib.nullcontext[Any]):
    """A bar that nobody sees."""

    def update(self, count: int = 1) -> None:
        """Nothing to move."""

    def __enter__(self) -> _Silent:
        return self
