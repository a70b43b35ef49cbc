"""Where attention weights come from: the description that `Attention` carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vistvis.errors import InputError
from vistvis.tokens import TokenLayout


@dataclass(frozen=True)
class WindowInfo:
    """How window attention cuts a picture: what is needed to put weights back in their place.

    The picture's `grid` of tokens, padded to a multiple of `window`, is rolled by `-shift` and cut
    into windows in reading order; the batch of the attention is `pictures × windows`.
    `strided` marks the grid attention of MaxViT, whose windows take every n-th token instead.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    strided: bool = False


@dataclass(frozen=True)
class SiteInfo:
    """Which attention module weights come from, and what their indices mean.

    `frames_in_batch` says that frames are folded into the batch: batch index `b · S + s`.
    `rope` is False where queries and keys were taken before their rotary embedding on purpose, and
    None where there is nothing to say. `source` says how they were read: "kernel", "projection",
    "softmax", "module" or "given".
    """

    name: str
    kind: str = "self"
    block: int | None = None
    module: str = ""
    query_layout: TokenLayout | None = None
    key_layout: TokenLayout | None = None
    frames_in_batch: bool = False
    rope: bool | None = None
    source: str = "given"
    window: WindowInfo | None = None

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """`(height, width)` of a key patch in pixels, where the layout is known."""
        layout = self.key_layout or self.query_layout
        return layout.patch_size if layout else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        for side in ("query_layout", "key_layout"):
            layout: TokenLayout | None = getattr(self, side)
            data[side] = layout.to_dict() if layout else None
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteInfo:
        """The reverse of `to_dict`."""
        known = dict(data)
        for side in ("query_layout", "key_layout"):
            if known.get(side):
                known[side] = TokenLayout.from_dict(known[side])
        if known.get("window"):
            window = known["window"]
            known["window"] = WindowInfo(
                tuple(window["grid"]),
                tuple(window["window"]),
                tuple(window["shift"]),
                window["strided"],
            )
        try:
            return cls(**known)
        except TypeError as error:
            raise InputError(f"not a site description: {error}") from error
