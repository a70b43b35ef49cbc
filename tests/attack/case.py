"""What an attack is: cases, each a call that raises where a promise is broken."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """`name` holds all that is needed to do it once more, with the seed of the suite."""

    name: str
    run: Callable[[], object]
    count: int = 1  # of things tried that hang together: kills over one folder


@dataclass(frozen=True)
class Setting:
    """Where an attack may write, what its random numbers begin with, how much of it is wanted."""

    folder: Path
    seed: int = 0
    share: float = 1.0

    def count(self, full: int) -> int:
        return max(1, round(full * self.share))

    def thinned(self, everything: Sequence[T]) -> list[T]:
        """All of a full attack; else as many as its share, chosen evenly and by the seed."""
        if self.share >= 1:
            return list(everything)
        chosen = Random(self.seed).sample(range(len(everything)), self.count(len(everything)))
        return [everything[number] for number in sorted(chosen)]

    def random(self, name: object) -> Random:
        return Random(f"{self.seed}/{name}")


Attack = Callable[[Setting], Iterator[Case]]


class Slow(BaseException):
    """A case took longer than any may."""


@dataclass
class Outcome:
    """One row of the table."""

    attack: str
    tried: int = 0
    survived: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def carry_out(
    attack: str, cases: Iterator[Case], *, only: str | None = None, limit: float = 60
) -> Outcome:
    """Run cases; all of them, or the one that is named."""
    outcome, start = Outcome(attack), time.perf_counter()
    for case in cases:
        if only is not None and case.name != only:
            continue
        outcome.tried += case.count
        try:
            with time_limit(limit):
                case.run()
            outcome.survived += case.count
        except (Exception, Slow, KeyboardInterrupt) as error:
            outcome.failures.append(f"{case.name}: {told(error)}")
    outcome.seconds = time.perf_counter() - start
    return outcome


def told(error: BaseException) -> str:
    """An error and its causes in one line, with the places in the code that they came from."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))
    text = " ".join(str(error).split())
    told_of = f"; from {told(error.__cause__)}" if error.__cause__ else ""
    shown = text[:600].encode("unicode_escape").decode()
    return f"{type(error).__name__}: {shown} [{places}]{told_of}"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """`Slow` in the main thread when time is up, wherever it is."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Slow(f"after {seconds:g} s")

    before: Any = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
