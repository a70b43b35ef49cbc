"""What an intervention was asked for, and what that means for the tokens of one kernel call."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vistvis.attention import SiteInfo, TokenOrder
from vistvis.errors import IndexOutOfRange, InputError, LayoutError, SiteError
from vistvis.hooks.changed import Cut
from vistvis.tokens import TokenLayout

Mode: TypeAlias = Literal["uniform", "zero", "mean"]
Tokens: TypeAlias = "Sequence[int] | Tensor"
# A frame by its number, or tokens.
Place: TypeAlias = "int | tuple[int, ...]"


@dataclass(frozen=True)
class Plan:
    """The options of `intervene`, checked, but for what only a model or a pass can tell."""

    heads: tuple[int, ...] | None
    mode: Mode | None
    cut: tuple[tuple[Place, Place], ...]
    cut_keys: tuple[int, ...]
    cut_queries: tuple[int, ...]
    within_frame: bool

    @classmethod
    def of(
        cls,
        heads: Any,
        mode: Any,
        cut: Any,
        cut_keys: Any,
        cut_queries: Any,
        within_frame: bool,
    ) -> Plan:
        """`InputError` for a value that none of them can have."""
        if mode not in (None, *get_args(Mode)):
            raise InputError(f'mode is "uniform", "zero" or "mean", got {mode!r}')
        return cls(
            None if heads is None else _numbers(heads, "heads"),
            mode,
            tuple(_pair(pair) for pair in _sequence(cut, "cut")),
            _numbers(cut_keys, "cut_keys"),
            _numbers(cut_queries, "cut_queries"),
            bool(within_frame),
        )

    @property
    def cuts_tokens(self) -> bool:
        return bool(self.cut or self.cut_keys or self.cut_queries or self.within_frame)

    @property
    def empty(self) -> bool:
        """Whether nothing is to be changed."""
        return self.heads == () or not (self.mode or self.cuts_tokens)

    @property
    def text(self) -> str:
        """What is changed, in short."""
        whose = "" if self.heads is None else f"{_some('head', self.heads)} "
        parts = [f"{whose or 'all heads '}{self.mode}"] if self.mode else []
        cuts = [_pair_text(*pair) for pair in self.cut]
        if cuts:
            few = cuts if len(cuts) <= 4 else [*cuts[:4], f"{len(cuts) - 4} more"]
            parts.append(f"{whose}{', '.join(few)} cut")
        if self.cut_keys:
            parts.append(f"{whose}{_some('key', self.cut_keys)} cut")
        if self.cut_queries:
            parts.append(
                f"{whose}{_some('querie', self.cut_queries)} cut".replace("querie ", "query ")
            )
        if self.within_frame:
            parts.append(f"{whose}within frames")
        return "; ".join(parts)

    def check_heads(self, count: int, name: str) -> None:
        """`IndexOutOfRange` if a site with `count` heads lacks one that was asked for."""
        for head in self.heads or ():
            if not 0 <= head < count:
                raise IndexOutOfRange(f"site {name!r} has heads 0…{count - 1}, got {head}")

    def modes(self, count: int) -> dict[int, str]:
        heads = range(count) if self.heads is None else self.heads
        return dict.fromkeys(heads, self.mode) if self.mode else {}

    def cuts(self, info: SiteInfo, queries: int, keys: int) -> tuple[Cut, ...]:
        """What is cut of `queries` × `keys` tokens that lie as `info` says.

        `LayoutError` where frames are asked for and not known, `IndexOutOfRange` for a token or
        frame that is not there, `SiteError` where frames don't see each other or tokens are merged.
        """
        heads = None if self.heads is None else frozenset(self.heads)
        rows = Side(info, "query", info.query_layout, info.query_order, queries, info.first_frame)
        columns = Side(info, "key", info.key_layout, info.key_order, keys)
        cuts = []
        for query, key in self.cut:
            hidden = rows.chosen(query), columns.chosen(key)
            cuts.append(Cut(*hidden, torch.tensor([[True, True], [True, False]]), heads))
        if self.cut_keys:
            hidden = torch.zeros(queries).long(), columns.chosen(self.cut_keys)
            cuts.append(Cut(*hidden, torch.tensor([[True, False]]), heads))
        if self.cut_queries:
            hidden = rows.chosen(self.cut_queries), torch.zeros(keys).long()
            cuts.append(Cut(*hidden, torch.tensor([[True], [False]]), heads))
        if self.within_frame and not (info.frames_in_batch or info.kind == "frame"):
            cuts.append(_within_frames(rows.frames(), columns.frames(), heads))
        return tuple(cut for cut in cuts if cut.hides)


@dataclass(frozen=True, eq=False)
class Side:
    """The queries or the keys of a kernel call, and how they lie."""

    info: SiteInfo
    name: str
    layout: TokenLayout | None
    order: TokenOrder | None
    count: int
    first_frame: int = 0

    def chosen(self, place: Place) -> Tensor:
        """1 for tokens of a place, 0 for others, `(count,)`."""
        if isinstance(place, int):
            return self._of_frame(place)
        numbers, wanted = self._numbers(), torch.tensor(place)
        here = torch.isin(wanted, numbers)
        if not bool(here.all()):
            missing = int(wanted[~here][0])
            kept = f"0…{self.count - 1}" if self.order is None else f"{self.count} of its layout"
            raise IndexOutOfRange(
                f"site {self.info.name!r} has {self.name} tokens {kept}, and not {missing}"
            )
        return torch.isin(numbers, wanted).long()

    def _of_frame(self, frame: int) -> Tensor:
        if self.info.frames_in_batch or self.info.kind == "frame":
            raise SiteError(
                f"cut names frames, and site {self.info.name!r} sees each frame by itself: "
                "there is nothing to cut between them; choose global blocks"
            )
        frames = self.frames()  # says first if they are not known
        assert self.layout is not None
        count = self.layout.frames + self.first_frame
        if not 0 <= frame < count:
            raise IndexOutOfRange(
                f"site {self.info.name!r} has {self.name} frames 0…{count - 1}, got frame {frame}"
            )
        return (frames == frame).long()

    def frames(self) -> Tensor:
        """The frame of each token, −1 for a token of no frame, `(count,)`."""
        layout = self.layout
        if layout is None:
            raise LayoutError(
                f"which frames the {self.count} {self.name} tokens of site {self.info.name!r} "
                "belong to is not known; run the model that was given to intervene, or give it "
                "layout=TokenLayout(frames, (rows, cols), special=(…))"
            )
        numbers = self._numbers()
        if self.order is None and layout.num_tokens != self.count:
            raise LayoutError(
                f"site {self.info.name!r} has {self.count} {self.name} tokens, and its layout "
                f"{layout.num_tokens}; give the layout of what the model runs on"
            )
        inside = numbers - len(layout.before)
        frames = inside.div(layout.tokens_per_frame, rounding_mode="floor")
        real = (inside >= 0) & (frames < layout.frames)
        return torch.where(real, frames + self.first_frame, -1)

    def _numbers(self) -> Tensor:
        """The number of each token in the layout, −1 for one that is not in it, `(count,)`."""
        order = self.order
        if order is None:
            return torch.arange(self.count)
        if order.members is not None or order.tokens.ndim > 1:
            how = "merged" if order.members is not None else "in another order in each batch item"
            raise SiteError(
                f"the {self.name} tokens of site {self.info.name!r} are {how}, and a cut needs to "
                "know which is which; switch that off in the model"
            )
        return order.tokens.cpu()


def _within_frames(queries: Tensor, keys: Tensor, heads: frozenset[int] | None) -> Cut:
    """Tokens of no frame (−1) see all and are seen by all."""
    count = 1 + int(max(queries.max(), keys.max()))
    sees = torch.eye(count + 1).bool()
    sees[count] = sees[:, count] = True
    loose = bool((queries < 0).any() or (keys < 0).any())
    if not loose:
        sees = sees[:count, :count]
    rows, columns = (torch.where(side < 0, count, side) for side in (queries, keys))
    return Cut(rows, columns, sees, heads)


def _pair(pair: Any) -> tuple[Place, Place]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(
            "cut is a list of pairs (queries, keys), each side a frame's number or token numbers, "
            f"got {pair!r} among them"
        )
    query, key = (_number_or_tokens(side) for side in pair)
    return query, key


def _number_or_tokens(side: Any) -> Place:
    if isinstance(side, Tensor) or not hasattr(side, "__index__"):
        return _numbers(side, "a side of cut")
    return _numbers([side], "a side of cut")[0]


def _numbers(values: Any, name: str) -> tuple[int, ...]:
    """Integers, each once."""
    values = values.tolist() if isinstance(values, Tensor) else values
    numbers = []
    for value in _sequence(values, name):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise InputError(f"{name} are whole numbers, got {value!r} among them")
        numbers.append(operator.index(value))
    return tuple(dict.fromkeys(numbers))


def _sequence(values: Any, name: str) -> list[Any]:
    if isinstance(values, (str, dict)) or not isinstance(values, Iterable):
        raise InputError(f"{name} is a sequence, got {values!r}; write [{values!r}] for one")
    return list(values)


def _some(what: str, numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and list(numbers) == list(range(first, last + 1)):
        shown = f"{first}…{last}"
    else:
        shown = ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")
    many = what if len(numbers) == 1 else {"query": "queries"}.get(what, f"{what}s")
    return f"{many} {shown}"


def _pair_text(query: Place, key: Place) -> str:
    if isinstance(query, int) and isinstance(key, int):
        return f"frames {query}→{key}"
    return f"{_place(query)}→{_place(key)}"


def _place(place: Place) -> str:
    return f"frame {place}" if isinstance(place, int) else _some("token", place)
