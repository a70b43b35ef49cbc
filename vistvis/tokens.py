"""Where a token is: sequence index ↔ frame, special or patch, grid cell, pixel box.

A sequence holds `frames` pictures one after the other. Each picture contributes its special tokens
first (camera, register, cls, …), then its patches in reading order, then, in a few models, special
tokens behind them:

    frame 0                          frame 1
    camera register… patch patch …   camera register… patch patch …

With P tokens per frame, the token at place t of frame f has the absolute index `f * P + t`. Frame
attention counts within one frame; global attention counts absolutely. Tokens of no frame (text, a
scale token) stand before or after all frames, and are counted with them.
"""

from __future__ import annotations

import operator
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

from einops import rearrange

from vistvis.errors import LayoutError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    Row = TypeVar("Row", torch.Tensor, np.ndarray[Any, Any])

PATCH = "patch"
# Kinds of tokens that most layouts have none of.
_REST = ("behind", "before", "after")
# An int of special tokens becomes as many names: more than any model has would only fill memory.
_MOST_SPECIAL = 1_000_000
_CORNERS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class TokenPlace:
    """Where a token is; `patch`, `row`, `col` and `box` are None for a special token.

    `frame` is None for a token of no frame; `token_in_frame` then counts among those before, or
    among those after, all frames. `box` is `(x0, y0, x1, y1)` in pixels of the picture as the model
    saw it, `x1`, `y1` exclusive.
    """

    token: int
    frame: int | None
    token_in_frame: int
    kind: str
    patch: int | None = None
    row: int | None = None
    col: int | None = None
    box: tuple[int, int, int, int] | None = None

    @property
    def is_patch(self) -> bool:
        return self.patch is not None

    @property
    def frame_idx(self) -> int:
        """`frame`, for a token that has one; else a `LayoutError`."""
        if self.frame is None:
            raise LayoutError(f"{self} lies in no picture; choose a token of one")
        return self.frame

    def __str__(self) -> str:
        if self.frame is None:
            return f"token {self.token} ({self.kind} {self.token_in_frame}, of no frame)"
        where = f"frame {self.frame}, token {self.token_in_frame}"
        if self.patch is None:
            return f"token {self.token} ({where}, {self.kind})"
        return (
            f"token {self.token} ({where}, patch {self.patch}, grid row {self.row}, col {self.col})"
        )


@dataclass(frozen=True)
class TokenLayout:
    """How a sequence of tokens is laid out over pictures.

    Parameters
    ----------
    frames
        Number of pictures S in the sequence.
    grid
        `(rows, cols)` of patches in each picture. Never assumed square.
    special
        The kind of every special token at the start of a frame, in order, for example
        `("camera", "register", "register", "register", "register")`. An int n stands for n tokens
        of kind `"special"`.
    patch_size
        `(height, width)` of a patch in pixels; an int means square.
    behind
        Kinds of the special tokens behind the patches of a frame (MapAnything).
    before, after
        Kinds of the tokens of no frame, in front of all frames and after them (text, scale).

    Sizes that are not positive are a `LayoutError`.

    >>> layout = TokenLayout(20, (28, 37), ("camera",) + ("register",) * 4)
    >>> print(layout.locate(20280))
    token 20280 (frame 19, token 501, patch 496, grid row 13, col 15)
    """

    frames: int
    grid: tuple[int, int]
    special: tuple[str, ...] = ()
    patch_size: tuple[int, int] = (14, 14)
    behind: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Ints and lists are accepted because they are what configurations and JSON hold.
        # (`hasattr` and not SupportsIndex, whose isinstance takes 20 µs: layouts are made while a
        # model runs.)
        for name in ("special", "behind", "before", "after"):
            special: Any = getattr(self, name)
            if hasattr(special, "__index__"):
                count = operator.index(special)
                if count > _MOST_SPECIAL:
                    raise LayoutError(f"{name} has at most {_MOST_SPECIAL} tokens, got {count}")
                special = ("special",) * count
            elif isinstance(special, str):
                special = (special,)
            object.__setattr__(self, name, tuple(map(str, special)))
        patch: Any = self.patch_size
        if hasattr(patch, "__index__"):
            patch = (patch, patch)
        object.__setattr__(self, "frames", operator.index(self.frames))
        object.__setattr__(self, "grid", _pair(self.grid, "grid"))
        object.__setattr__(self, "patch_size", _pair(patch, "patch_size"))
        if self.frames < 1:
            raise LayoutError(f"a layout has at least one frame, got frames={self.frames}")
        if PATCH in (*self.special, *self.behind, *self.before, *self.after):
            raise LayoutError(f"{PATCH!r} names image tokens; give special tokens another kind")

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def num_special(self) -> int:
        """Special tokens per frame."""
        return len(self.special) + len(self.behind)

    @property
    def patch_start_idx(self) -> int:
        """The first patch token's place within a frame; the name is VGGT's."""
        return len(self.special)

    @property
    def num_patches(self) -> int:
        """Patches per frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens_per_frame(self) -> int:
        """P: special tokens and patches of one frame."""
        return self.num_special + self.num_patches

    @property
    def num_tokens(self) -> int:
        """N = S · P, and the tokens of no frame."""
        return len(self.before) + self.frames * self.tokens_per_frame + len(self.after)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(H, W)` in pixels that the grid covers."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]

    # -- token → place -------------------------------------------------------------------------

    def locate(self, token: SupportsIndex) -> TokenPlace:
        """Say where an absolute token index lies; `LayoutError` if outside `0…num_tokens - 1`."""
        token = operator.index(token)
        if not 0 <= token < self.num_tokens:
            raise LayoutError(
                f"token {token} is outside 0…{self.num_tokens - 1} ({self.frames} frames of "
                f"{self.tokens_per_frame} tokens); the last patch is {self._last_patch()}"
            )
        if token < len(self.before):
            return TokenPlace(token, None, token, self.before[token])
        frame, in_frame = divmod(token - len(self.before), self.tokens_per_frame)
        if frame >= self.frames:
            nth = token - len(self.before) - self.frames * self.tokens_per_frame
            return TokenPlace(token, None, nth, self.after[nth])
        if in_frame < self.patch_start_idx:
            return TokenPlace(token, frame, in_frame, self.special[in_frame])
        patch = in_frame - self.patch_start_idx
        if patch >= self.num_patches:
            kind = self.behind[patch - self.num_patches]
            return TokenPlace(token, frame, in_frame, kind)
        row, col = divmod(patch, self.grid[1])
        height, width = self.patch_size
        box = (col * width, row * height, (col + 1) * width, (row + 1) * height)
        return TokenPlace(token, frame, in_frame, PATCH, patch, row, col, box)

    def nearest_patch(self, token: SupportsIndex) -> int:
        """The patch token nearest to `token` in sequence order, within the same frame.

        A special token gives its frame's first patch (one behind the patches its last); an index
        past the frames gives the last patch of the last frame; one before them, or a negative one,
        the first patch of frame 0.
        """
        token = operator.index(token) - len(self.before)
        if token >= self.frames * self.tokens_per_frame:
            return self._last_patch()
        frame, in_frame = divmod(max(token, 0), self.tokens_per_frame)
        first = self.patch_start_idx
        return self._start(frame) + min(max(in_frame, first), first + self.num_patches - 1)

    # -- place → token -------------------------------------------------------------------------

    def index(
        self,
        *,
        frame: SupportsIndex = 0,
        token: SupportsIndex | None = None,
        patch: SupportsIndex | None = None,
        row: SupportsIndex | None = None,
        col: SupportsIndex | None = None,
        kind: str | None = None,
        nth: SupportsIndex = 0,
    ) -> int:
        """The absolute index of one token, named in exactly one way.

        Name it by `token` (place within its frame), by `patch`, by `row` and `col`, or by the
        `kind` of a special token (`nth` counts among those of that kind). `LayoutError` if it is
        named in no way or in two, or does not exist.
        """
        ways = sum(way is not None for way in (token, patch, row, kind or None))
        if ways != 1 or (row is None) != (col is None):
            raise LayoutError(
                "name the token in one way: token=, patch=, row= with col=, or kind=; got "
                f"token={token}, patch={patch}, row={row}, col={col}, kind={kind!r}"
            )
        start = self._start(self._within("frame", frame, self.frames))
        first = self.patch_start_idx
        if token is not None:
            return start + self._within("token", token, self.tokens_per_frame)
        if patch is not None:
            return start + first + self._within("patch", patch, self.num_patches)
        if row is not None and col is not None:
            y = self._within("row", row, self.grid[0])
            x = self._within("col", col, self.grid[1])
            return start + first + y * self.grid[1] + x
        behind = first + self.num_patches
        after = self._start(self.frames)
        places = [
            base + place
            for base, kinds in (
                (start, self.special),
                (start + behind, self.behind),
                (0, self.before),
                (after, self.after),
            )
            for place, name in enumerate(kinds)
            if name == kind
        ]
        if not places:
            raise LayoutError(
                f"no special token of kind {kind!r}: this layout has {self._special_text()}"
            )
        return places[self._within(f"nth {kind}", nth, len(places))]

    def token_at(self, frame: SupportsIndex, x: float, y: float) -> int:
        """The absolute index of the patch under pixel `(x, y)` of a frame.

        Pixels count in the picture as the model saw it: x to the right, y down, `[0, W) × [0, H)`;
        others, and frames that do not exist, are a `LayoutError`.
        """
        height, width = self.image_size
        if not (0 <= x < width and 0 <= y < height):
            raise LayoutError(f"pixel ({x:g}, {y:g}) lies outside the {width}×{height} picture")
        row, col = int(y // self.patch_size[0]), int(x // self.patch_size[1])
        return self.index(frame=frame, row=row, col=col)

    def corner(self, which: str, *, frame: SupportsIndex = 0) -> int:
        """The patch in a corner: "top left", "top right", "bottom left" or "bottom right"."""
        if which not in _CORNERS:
            raise LayoutError(f"no corner {which!r}: it is one of {', '.join(_CORNERS)}")
        vertical, horizontal = which.split()
        row = 0 if vertical == "top" else self.grid[0] - 1
        col = 0 if horizontal == "left" else self.grid[1] - 1
        return self.index(frame=frame, row=row, col=col)

    def center(self, *, frame: SupportsIndex = 0) -> int:
        """The patch in the middle of a frame; of two middles, the one further down and right."""
        return self.index(frame=frame, row=self.grid[0] // 2, col=self.grid[1] // 2)

    # -- rows → pictures -----------------------------------------------------------------------

    def maps(self, row: Row) -> Row:
        """Lay weights over tokens out as pictures; special tokens are left out.

        A tensor or array `(…, N)` gives `(…, S, rows, cols)`, a view where the memory layout
        allows. `LayoutError` if the last dimension is not `num_tokens`.
        """
        if row.ndim < 1 or row.shape[-1] != self.num_tokens:
            raise LayoutError(
                f"a row over this layout has {self.num_tokens} values ({self.frames} × "
                f"{self.tokens_per_frame}), got shape {tuple(row.shape)}"
            )
        row = row[..., self._start(0) : self._start(self.frames)]
        framed = rearrange(row, "... (s n) -> ... s n", s=self.frames)
        first = self.patch_start_idx
        patches = framed[..., first : first + self.num_patches]
        return rearrange(patches, "... (rows cols) -> ... rows cols", rows=self.grid[0])

    def frame_layout(self) -> TokenLayout:
        """The layout of a single frame: what frame attention sees."""
        return replace(self, frames=1, before=(), after=())

    def sides(self, queries: int, keys: int) -> tuple[TokenLayout | None, TokenLayout | None]:
        """The layouts of the query and of the key side of attention with so many of each.

        Each is this layout (all frames), `frame_layout()` (one frame) or None (neither fits). Keys
        of one frame have none where the queries cover several: nothing says whose keys they are.
        """
        fitting = {self.tokens_per_frame: self.frame_layout(), self.num_tokens: self}
        if self.frames > 1 and queries == self.num_tokens:
            return self, self if keys == queries else None
        return fitting.get(queries), fitting.get(keys)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and ints, for JSON."""
        return {
            "frames": self.frames,
            "grid": list(self.grid),
            "special": list(self.special),
            "patch_size": list(self.patch_size),
            **{name: list(getattr(self, name)) for name in _REST if getattr(self, name)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenLayout:
        """The reverse of `to_dict`."""
        try:
            kinds = {name: data[name] for name in _REST if name in data}
            kinds["special"] = data["special"]
            if not all(isinstance(one, str) for several in kinds.values() for one in several):
                raise TypeError
            return cls(data["frames"], data["grid"], patch_size=data["patch_size"], **kinds)
        except (KeyError, TypeError) as error:
            raise LayoutError(
                "a layout has frames, grid, special (a list of words) and patch_size, got "
                f"{reprlib.repr(data)}"
            ) from error

    @classmethod
    def from_model(cls, model: nn.Module, images: torch.Tensor | Sequence[Any]) -> TokenLayout:
        """The layout that a timm, Hugging Face, torchvision, open_clip or multi-view model gives.

        `images` are `(B, 3, H, W)`; for a multi-view model `(S, 3, H, W)`, `(B, S, 3, H, W)`, or a
        list of S views, each a tensor `(B, 3, H, W)` or a dict with one as `img`. `LayoutError` if
        grid, patch size or special tokens are not known; pass a layout by hand then.
        """
        from vistvis.models.layouts import layout_from_model

        return layout_from_model(model, images)

    def _start(self, frame: int) -> int:
        """The first token of a frame; of the one past the last: where the frames end."""
        return len(self.before) + frame * self.tokens_per_frame

    def _last_patch(self) -> int:
        return self._start(self.frames) - 1 - len(self.behind)

    def _within(self, name: str, value: SupportsIndex, size: int) -> int:
        number = operator.index(value)
        if not 0 <= number < size:
            raise LayoutError(f"{name} {number} is outside 0…{size - 1} of {self}")
        return number

    def _special_text(self) -> str:
        every = (*self.special, *self.behind, *self.before, *self.after)
        return ", ".join(f"{n} × {kind}" for kind, n in Counter(every).items()) or (
            "no special tokens"
        )

    def __str__(self) -> str:
        frames = f"{self.frames} frame{'s' if self.frames != 1 else ''}"
        return f"{frames} of {self.grid[0]}×{self.grid[1]} patches with {self._special_text()}"


def _pair(value: Any, name: str) -> tuple[int, int]:
    try:
        first, second = (operator.index(part) for part in value)
    except (TypeError, ValueError) as error:
        raise LayoutError(f"{name} is two whole numbers, got {value!r}") from error
    if first < 1 or second < 1:
        raise LayoutError(f"{name} must be positive, got {first}×{second}")
    return first, second
