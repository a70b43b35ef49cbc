"""Which layer is running: one number per identifier, kept apart between threads and tasks.

The numbers live in a context variable. A thread starts with none of its own; an asyncio task starts
from those of the task that made it, and what it counts stays with it.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, SupportsIndex

from vistvis.errors import InputError


class LayerState:
    """The current layer of every identifier, 0 where it was never counted.

    Counting goes on where it stopped, also in the next call, until `reset` or `update`.
    """

    def __init__(self) -> None:
        # Mappings in here are replaced, never changed: contexts that were copied share them.
        self._layers: ContextVar[Mapping[str, int]] = ContextVar("vistvis_layers")
        self._starts: dict[str, int] = {}
        self._lock = threading.Lock()

    def get_layer(self, identifier: str) -> int:
        """The layer at which `identifier` stands in this thread or task."""
        own = self._layers.get({})
        return own[identifier] if identifier in own else self._starts.get(identifier, 0)

    def update(self, identifier: str, value: SupportsIndex) -> int:
        """Put the counter of `identifier` at `value`; `InputError` if that is no whole number.

        This holds in the calling thread or task, and in those that have not counted this identifier
        yet; others that are counting are not disturbed.
        """
        number = whole(value)
        with self._lock:
            self._starts[identifier] = number
        self._set(identifier, number)
        return number

    def bump(self, identifier: str, by: SupportsIndex = 1) -> int:
        """Count on by `by` layers, here only, and return the new layer."""
        number = self.get_layer(identifier) + whole(by)
        self._set(identifier, number)
        return number

    def reset(self, identifier: str | None = None) -> None:
        """Let `identifier` (or all of them) start at layer 0 again."""

        def others(layers: Mapping[str, int]) -> dict[str, int]:
            return {name: layer for name, layer in layers.items() if identifier not in (name, None)}

        with self._lock:
            self._starts = others(self._starts)
        self._layers.set(others(self._layers.get({})))

    def _set(self, identifier: str, number: int) -> None:
        self._layers.set({**self._layers.get({}), identifier: number})

    @contextlib.contextmanager
    def counting(self, identifier: str, start: SupportsIndex | None = None) -> Iterator[int]:
        """Count within a block: from `start`, or from where `identifier` stands.

        After an error the counter stands where it was: trying again writes the same layers again.
        """
        before = self.get_layer(identifier)
        first = before if start is None else whole(start)
        self._set(identifier, first)
        try:
            yield first
        except BaseException:
            self._set(identifier, before)
            raise

    def __repr__(self) -> str:
        return f"LayerState({ {**self._starts, **self._layers.get({})} })"


class LayerCounter(int):
    """A layer index: an int whose `+=` and `-=` also move the layer of its identifier.

    In everything else it is the int it looks like, so it compares, hashes, indexes and prints as
    one, and what was computed from it (`counter + 1`) is a plain int. Like any int it never changes
    in place: `counter += 1` names the next one, and a list that holds the old one keeps it.
    """

    identifier: str

    def __new__(cls, identifier: str, start: SupportsIndex | None = 0) -> LayerCounter:
        return cls._at(identifier, 0 if start is None else whole(start))

    @classmethod
    def _at(cls, identifier: str, number: int) -> LayerCounter:
        counter = super().__new__(cls, number)
        counter.identifier = identifier
        state._set(identifier, number)
        return counter

    @property
    def value(self) -> int:
        """The plain int."""
        return int(self)

    def __iadd__(self, other: SupportsIndex) -> LayerCounter:
        return self._at(self.identifier, int(self) + whole(other))

    def __isub__(self, other: SupportsIndex) -> LayerCounter:
        return self._at(self.identifier, int(self) - whole(other))

    def __repr__(self) -> str:
        return f"LayerCounter(identifier={self.identifier!r}, value={int(self)})"

    # f-strings and print show the number; without this line they would show the repr.
    __str__ = int.__repr__

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or one that was sent to another process, counts nothing here.
        return int, (int(self),)


def whole(value: SupportsIndex) -> int:
    """A whole number as a plain int."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"a layer is a whole number, got {value!r}") from error


state = LayerState()
