"""Where attention weights come from: the description that `Attention` carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from vistvis.attention.order import TokenOrder
from vistvis.errors import IndexOutOfRange, InputError, SiteError
from vistvis.names import few, matches, suggestion
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

    `name` is what the site is called everywhere: the dotted name of its module, or the name that a
    front end gave it; `path` is the dotted name in either case. `source` says how the site was
    read: "kernel", "softmax", "module" or "projection", or "given" where nothing was. `rope` is
    False where queries and keys were taken before their rotary embedding on purpose, and None where
    there is nothing to say. `frames_in_batch` says that frames are folded into the batch: batch
    index `b · S + s`.

    Layouts number tokens as the model's pictures came in. Where a model reorders, drops or merges
    tokens, `query_order` and `key_order` say which of them the captured ones are, and
    `frame_order` `(B, S)`, where frames are folded into the batch, which picture lies at
    `b · S + s`. `first_frame` is the frame of the key layout that the query layout's first one is,
    where keys of earlier frames come from a cache. `intervened` says what `vistvis.intervene` had
    changed; the weights are those that the model then used.
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
    path: str = ""
    query_order: TokenOrder | None = None
    key_order: TokenOrder | None = None
    frame_order: Tensor | None = field(default=None, compare=False)
    first_frame: int = 0
    intervened: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path or self.name)

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """`(height, width)` of a key patch in pixels, where the layout is known."""
        layout = self.key_layout or self.query_layout
        return layout.patch_size if layout else None

    def batch_item(self, batch: int, frame: int, *, frames: int) -> int:
        """The batch item of the attention that holds a picture, of `frames` S in each of B scenes.

        It is `batch` itself where frames are not folded into the batch; else `b · S + s`, where
        `frame_order` says at which s the picture lies. `IndexOutOfRange` if it lies at none.
        """
        if not self.frames_in_batch:
            return batch
        if not (0 <= frame < frames and batch >= 0):
            raise IndexOutOfRange(
                f"frame {frame} of batch {batch} is outside the {frames} frames of {self.name!r}"
            )
        if self.frame_order is None:
            return batch * frames + frame
        if batch >= len(self.frame_order):
            raise IndexOutOfRange(f"batch {batch} is outside 0…{len(self.frame_order) - 1}")
        found = (self.frame_order[batch] == frame).nonzero()
        if not len(found):
            raise IndexOutOfRange(f"frame {frame} is not among those that {self.name!r} saw")
        return batch * self.frame_order.shape[1] + int(found[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; orders are tensors, and not in it."""
        data = asdict(replace(self, query_order=None, key_order=None, frame_order=None))
        for name in ("query_order", "key_order", "frame_order"):
            del data[name]
        for name in ("first_frame", "intervened"):
            if not data[name]:
                del data[name]
        for side in ("query_layout", "key_layout"):
            layout: TokenLayout | None = getattr(self, side)
            data[side] = layout.to_dict() if layout else None
        if self.path == self.name:
            del data["path"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteInfo:
        """The reverse of `to_dict`."""
        fields = dict(data)
        for side in ("query_layout", "key_layout"):
            if fields.get(side):
                fields[side] = TokenLayout.from_dict(fields[side])
        try:
            if fields.get("window"):
                window: dict[str, Any] = dict(fields["window"])
                for name, value in window.items():
                    window[name] = tuple(value) if isinstance(value, list) else value
                fields["window"] = WindowInfo(**window)
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"not a site description: {error}") from error


def chosen_names(names: Iterable[str], sites: str | Sequence[str] | None) -> list[str]:
    """The names of sites that names or globs mean, in their order; all where `sites` is None.

    `SiteError` for one that fits none, with the nearest name; `InputError` where there is no site.
    """
    every = list(names)
    if not every:
        raise InputError("there is no site: the source is empty")
    if sites is None:
        return every
    patterns = [sites] if isinstance(sites, str) else list(sites)
    if not patterns:
        raise SiteError(f"no sites were named; there are {few(every)}")
    for pattern in patterns:
        if not any(matches(pattern, name) for name in every):
            hint = suggestion(pattern, every, otherwise=f"there are {few(every)}")
            raise SiteError(f"no site {pattern!r}: {hint}")
    return [name for name in every if any(matches(pattern, name) for pattern in patterns)]
