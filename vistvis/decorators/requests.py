"""What overlays are asked for: tokens, frames and heads, and the check of the numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, TypeVar

from vistvis.decorators.paths import StaticMetadata
from vistvis.errors import IndexOutOfRange, InputError
from vistvis.tokens import TokenLayout
from vistvis.views.overlay_folder import Head

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_T = TypeVar("_T")

Indices: TypeAlias = "SupportsIndex | Sequence[SupportsIndex] | str"
"""A number, a list of numbers, or the one word that is allowed in their place."""


@dataclass(frozen=True)
class FrameQuery:
    """Query tokens within one frame and the frames they look at, as checked numbers."""

    frame: int
    tokens: tuple[int, ...]
    key_frames: tuple[int, ...]


@dataclass(frozen=True)
class OverlayRequest:
    """What a caller asks for; the fields are parameters of `run_overlay_for_reconstruction`."""

    query_frame_idx: SupportsIndex
    query_idx: Indices
    key_frame_idx: Indices
    head: Head | Sequence[Head]
    metadata: StaticMetadata | None
    is_cross_attention: bool
    batch_idx: SupportsIndex

    def query(self, images: NDArray[np.uint8], layout: TokenLayout) -> FrameQuery:
        """The tokens and frames, checked against pictures `(S, H, W, 3)` and their layout.

        "interactive" opens a window, and returns when it is closed.
        """
        frame = checked_index(self.query_frame_idx, layout.frames, "query_frame_idx")
        key_frames: Any = self.key_frame_idx
        if isinstance(key_frames, str):
            if key_frames != "all":
                raise InputError(f'key_frame_idx is a number, a list or "all", got {key_frames!r}')
            key_frames = range(layout.frames)
        frames = _checked_indices(key_frames, layout.frames, "key_frame_idx")
        if not isinstance(self.query_idx, str):
            name = "query_idx (a token within its frame)"
            tokens = _checked_indices(self.query_idx, layout.tokens_per_frame, name)
        elif self.query_idx == "interactive":
            from vistvis.views.pick import pick_patches

            tokens = tuple(pick_patches(images[frame], layout, title=f"frame {frame}"))
            if not tokens:
                raise InputError("no patch was chosen in the window, so there is no query to draw")
        else:
            raise InputError(
                f'query_idx is a token, a list of them or "interactive", got {self.query_idx!r}'
            )
        return FrameQuery(frame, tokens, frames)

    def heads(self, count: int) -> list[Head]:
        """The heads to draw of `count`, in the order asked for; of "all" the mean last."""
        if not isinstance(self.head, str):
            return _checked(self.head, lambda head: _head(head, count), "head")
        if self.head not in ("mean", "all"):
            raise InputError(f'head is a number, a list, "mean" or "all", got {self.head!r}')
        return [*(range(count) if self.head == "all" else ()), "mean"]


def checked_index(value: SupportsIndex, size: int, name: str) -> int:
    """`value` as a plain int from 0 to `size - 1`.

    Raises
    ------
    InputError, IndexOutOfRange
        If it is no whole number, or none of these.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} is a whole number, got {value!r}") from error
    if isinstance(value, bool) or not 0 <= number < size:
        raise IndexOutOfRange(f"{name} {value} is outside 0…{size - 1}")
    return number


def _checked_indices(values: Any, size: int, name: str) -> tuple[int, ...]:
    """One number or several, each once, in their order."""
    return tuple(_checked(values, lambda value: checked_index(value, size, name), name))


def _head(value: Any, count: int) -> Head:
    """A head of a list: a number of `count`, or "mean"."""
    mean = isinstance(value, str) and value == "mean"
    return "mean" if mean else checked_index(value, count, "head")


def _checked(values: Any, check: Callable[[Any], _T], name: str) -> list[_T]:
    """One value or several after their check, each once, in their order."""
    try:
        several = [values] if _is_single(values) else list(values)
    except TypeError as error:
        raise InputError(f"{name} is a whole number or a list of them, got {values!r}") from error
    if not several:
        raise InputError(f"{name}: the list is empty")
    return list(dict.fromkeys(check(value) for value in several))


def _is_single(values: Any) -> bool:
    # Arrays and tensors have `__index__` too, which fails for all but single numbers.
    return isinstance(values, SupportsIndex) and getattr(values, "ndim", 0) == 0
