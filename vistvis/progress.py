"""Progress bars of long work: tqdm's, one way to ask for them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any


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


class _Silent(contextlib.nullcontext[Any]):
    """A bar that nobody sees."""

    def update(self, count: int = 1) -> None:
        """Nothing to move."""

    def __enter__(self) -> _Silent:
        return self
