"""Progress bars of long work: tqdm's, one way to ask for them."""

from __future__ import annotations

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

    Parameters
    ----------
    shown
        False: no bar, only the steps. None: only where somebody is watching a terminal.
    delay
        Seconds before the bar appears, so that short work shows none.
    """
    from tqdm.auto import tqdm

    return tqdm(
        steps,
        desc=label,
        unit=unit,
        total=total,
        delay=delay,
        disable=None if shown is None else not shown,
        leave=not delay,
    )
