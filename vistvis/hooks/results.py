"""What a capture was asked for, and what the passes of its model have given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import nn

from vistvis.attention import Attention
from vistvis.errors import InputError
from vistvis.hooks.trace import Trace
from vistvis.models.sites import Site
from vistvis.tokens import TokenLayout

ReadFrom: TypeAlias = Literal["kernel", "softmax", "module", "projection"]
Sink: TypeAlias = Callable[[str, Attention], None]
LayoutOf: TypeAlias = "Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], TokenLayout | None]"


@dataclass(frozen=True)
class Options:
    """The options of `capture`, under its names."""

    accumulate: bool = False
    keep: str | None = None
    source: str | None = None
    rope: bool = True
    verify: bool = False
    values: bool = False
    sink: Sink | None = None
    layout: TokenLayout | LayoutOf | Literal["trace"] | None = None
    discover: bool = False
    asked: bool = False  # whether sites were chosen, rather than all taken

    def __post_init__(self) -> None:
        if self.keep not in (None, "cpu"):
            raise InputError(f'keep is None or "cpu", got {self.keep!r}')
        if self.source not in (None, *get_args(ReadFrom)):
            raise InputError(
                f'source is "kernel", "softmax", "module" or "projection", got {self.source!r}'
            )

        if isinstance(self.layout, str) and self.layout != "trace":
            raise InputError(f'layout is a TokenLayout, a function or "trace", got {self.layout!r}')

    @property
    def projections(self) -> bool:
        """Whether queries and keys are those of the projections, the kernel's being the check."""
        return self.source == "projection" or not self.rope

    @property
    def kernel_source(self) -> str | None:
        """Which kernel calls count; None leaves it to what the module shows."""
        return None if self.projections else self.source


@dataclass
class Pass:
    """One forward of the watched model: what its sites gave."""

    layout: TokenLayout | None = None
    trace: Trace | str | None = None  # what a dye test found, or why it found nothing
    loose: bool = False  # framed by no forward of the model: a site was called by itself
    attention: dict[str, list[Attention]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    """By name of the module, how many of its calls outside of sites were kept."""


class Call(NamedTuple):
    """A kernel call outside of the sites that were asked for: which, and whose."""

    kernel: str
    name: str
    type: str


def numbered(name: str, number: int) -> str:
    """What the readings of one module in one pass are called: `name`, `name#2`, `name#3`, …"""
    return name if number == 1 else f"{name}#{number}"


class Results:
    """What all passes gave together."""

    def __init__(self, names: Iterable[str], *, accumulate: bool) -> None:
        self.lock = threading.RLock()
        self.attention: dict[str, list[Attention]] = {}
        self.errors: dict[str, str] = {}
        self.fired = dict.fromkeys(names, 0)
        self.sources: dict[str, str] = {}
        self.repeated: set[str] = set()
        self.adopted: dict[str, Site] = {}
        """Sites that only a pass has shown."""
        self.outside: dict[Call, int] = {}
        """How often each call was seen that was not kept."""
        self.passes = self.failed_passes = 0
        self.last_failed = False
        self._accumulate = accumulate
        self._outgoing: dict[str, list[Attention]] = {}

    def adopt(self, name: str, make: Callable[[], Site]) -> Site:
        """The site of a name that a pass shows, made when it is seen first."""
        with self.lock:
            if name not in self.adopted:
                self.adopted[name] = make()
                self.fired[name] = 0
            return self.adopted[name]

    def begin(self) -> None:
        """A pass begins, and the last one wins."""
        # What the one before took makes room site by site (`make_room`): freed at once, its pages
        # went back to the system and cost their way in again.
        if not self._accumulate:
            with self.lock:
                self._outgoing, self.attention, self.errors = self.attention, {}, {}

    def make_room(self, name: str) -> None:
        """Let go of what a site gave in the pass before."""
        self._outgoing.pop(name, None)

    def end(self) -> None:
        """The outermost pass is over, well or not."""
        self._outgoing = {}

    def fail(self) -> None:
        """A pass ended in an exception; what it gave is not kept."""
        self.failed_passes += 1
        self.last_failed = True

    def commit(self, done: Pass, *, count: bool = True) -> None:
        """Take over what a pass gave."""
        with self.lock:
            self.last_failed = False
            self.passes += count
            if self._accumulate:
                # All of a pass or nothing, where an interrupt comes between.
                given = {n: [*self.attention.get(n, ()), *a] for n, a in done.attention.items()}
                self.attention = {**self.attention, **given}
                if done.loose:
                    done.attention = {}
                self.errors.update(done.errors)
            else:
                self.attention, self.errors = dict(done.attention), dict(done.errors)
