"""`summarize`: every site's numbers in one walk over its rows, as a tidy table."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vistvis.analysis.layouts import Distances, FrameSums, Masses
from vistvis.analysis.places import Side
from vistvis.analysis.rows import sinks_among
from vistvis.analysis.table import Column, Table, stacked
from vistvis.analysis.walk import Buffers, walk
from vistvis.attention import Attention
from vistvis.attention.site import chosen_names
from vistvis.errors import InputError, LayoutError
from vistvis.names import suggestion
from vistvis.progress import progress as bar

if TYPE_CHECKING:
    from typing_extensions import Self

OF = ("entropy", "received", "masses", "distance", "strongest")

_LINE = ("site", "kind", "block", "batch", "head")
_UNITS = {
    "queries": "tokens",
    "keys": "tokens",
    "entropy": "nats",
    "effective_rank": "keys",
    "strongest": "share of a row",
    "special_mass": "share of a row",
    "own_frame_mass": "share of a row",
    "other_frames_mass": "share of a row",
    "mass": "share of a row",
    "distance": "patches",
    "sinks": "keys",
    "sink_mass": "share of all attention",
    "most_received": "even shares",
}


class Summary(Table):
    """What `summarize` gives: a table with one line for each site, batch item and head.

    | column | what | unit |
    |---|---|---|
    | `site`, `kind`, `block`, `batch`, `head` | which; block is −1 where the site has no number | |
    | `queries`, `keys` | how many | tokens |
    | `entropy` | −Σ p log p, mean over queries | nats |
    | `effective_rank` | exp(entropy), mean over queries | keys |
    | `strongest` | the largest weight, mean over queries | share of a row |
    | `special_mass` | given to special tokens, mean over queries | share of a row |
    | `camera_mass`, … | the same by kind | share of a row |
    | `own_frame_mass` | given to the own frame, mean over patches, then frames | share of a row |
    | `other_frames_mass` | given to all other frames, so | share of a row |
    | `distance` | how far a patch looks within its frame, mean over patches | patches |
    | `sinks` | keys that get more than `times` an even share | keys |
    | `sink_mass` | what they get | share of all attention |
    | `most_received` | what the key gets that gets most | even shares |
    | `most_received_token` | that key | |

    Numbers that need to know where tokens lie are NaN for sites that don't say it.
    """

    frames: Table
    """Mean mass from frame to frame, one line for each site, batch item, head, pair of frames and
    sort of token (`query_part`, `key_part`: "special" or "patch"); as in `frame_mass`."""
    queries: Table | None
    """One line for each query, where `summarize(queries=True)` asked for it: `entropy`,
    `strongest`, `strongest_key`, `special_mass`, `distance`, and where it lies: `frame`, `token`
    (both −1 for tokens outside the layout)."""

    @classmethod
    def _of(cls, numbers: Sequence[_Numbers], queries: bool) -> Self:
        made = cls(stacked([one.heads() for one in numbers]), keys=_LINE, units=_units(numbers))
        framed = [one.frame_lines() for one in numbers if one.frames is not None]
        keys = (*_LINE, "query_frame", "key_frame", "query_part", "key_part")
        empty = {name: np.empty(0) for name in (*keys, "mass")}
        made.frames = Table(stacked(framed) or empty, keys=keys, units=_UNITS)
        made.queries = None
        if queries:
            lines = stacked([one.query_lines() for one in numbers])
            made.queries = Table(lines, keys=(*_LINE, "query"), units=_units(numbers))
        return made


def summarize(
    captured: Mapping[str, Attention] | Attention,
    *,
    sites: str | Sequence[str] | None = None,
    of: Collection[str] = OF,
    times: float = 10.0,
    queries: bool = False,
    max_bytes: int | None = None,
    progress: bool | None = None,
) -> Summary:
    """Entropy, received attention, masses, distance and strongest key of every site and head.

    Parameters
    ----------
    captured
        A `Capture`, a run (`open_run`), any mapping of `Attention` by name, or one `Attention`.
    sites
        Names or globs of the sites that count; None takes all.
    of
        Which statistics, of "entropy", "received", "masses", "distance", "strongest".
    times
        A sink token gets more than so many even shares, as in `sink_tokens`.
    queries
        Whether to keep the numbers of every query too, `.queries`; some 50 bytes for each query of
        each head.
    max_bytes
        Bound on a block of rows, as in `Attention.row_blocks`.
    progress
        A bar over all rows; None shows one where somebody watches.

    Every site is walked once, whatever is asked. `InputError` for words that are no statistic and a
    `times` that is not positive, or where there is no site; `SiteError` for names that fit none.

    Cost: one to two times the model's own attention kernel; memory of two blocks of rows and what
    the tables hold.
    """
    unknown = [word for word in of if word not in OF]
    if unknown or isinstance(of, str) or not of:
        hint = suggestion(str(unknown[0]), OF, otherwise="leave it out for all") if unknown else ""
        raise InputError(f"of= is a tuple of {', '.join(OF)}; got {of!r}; {hint}".rstrip("; "))
    chosen = dict(_chosen(captured, sites))
    total = sum(a.shape[0] * a.shape[1] * a.shape[2] for a in chosen.values())
    buffers = Buffers()
    with bar(None, "summary", shown=progress, unit=" rows", total=total, delay=0.5) as moving:
        numbers = [
            _numbers(name, a, set(of), times, buffers, max_bytes, moving.update)
            for name, a in chosen.items()
        ]
    return Summary._of(numbers, queries)


def _chosen(
    captured: Mapping[str, Attention] | Attention, sites: str | Sequence[str] | None
) -> Iterator[tuple[str, Attention]]:
    if isinstance(captured, Attention):
        captured = {captured.site.name if captured.site else "attention": captured}
    for name in chosen_names(captured, sites):
        a: Any = captured[name]
        if not isinstance(a, Attention):
            raise InputError(
                f"site {name!r} is {type(a).__name__} and no Attention; of several passes "
                "(accumulate=True) summarize one: {name: captured[name][0] for name in captured}"
            )
        yield name, a


@dataclass
class _Numbers:
    """What one site gave. Tensors `(B, h, Nq)` by query, `(B, h, …)` by head."""

    name: str
    a: Attention
    times: float
    by_query: dict[str, Tensor] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    received: Tensor | None = None
    frames: Tensor | None = None

    def _lines(self, *sizes: int) -> dict[str, Any]:
        """The columns that say which site, batch item and head; each line `sizes` times."""
        site, (batch, heads) = self.a.site, self.a.shape[:2]
        more = int(np.prod(sizes, dtype=int))
        lines = batch * heads * more
        block = -1 if site is None or site.block is None else site.block
        return {
            "site": np.full(lines, self.name),
            "kind": np.full(lines, site.kind if site else ""),
            "block": np.full(lines, block),
            "batch": np.repeat(np.arange(batch), heads * more),
            "head": np.tile(np.repeat(np.arange(heads), more), batch),
        }

    def heads(self) -> dict[str, Column]:
        columns = self._lines()
        counts = dict(zip(("queries", "keys"), self.a.shape[2:], strict=True))
        columns |= {name: np.full(len(columns["site"]), n) for name, n in counts.items()}
        for name, values in self.by_query.items():
            if name != "strongest_key":
                columns[name] = _flat(values.nanmean(-1))
            if name == "entropy":
                columns["effective_rank"] = _flat(values.exp().mean(-1))
        if self.frames is not None:
            own, others = _own_and_others(
                self.frames, self.a.site.first_frame if self.a.site else 0
            )
            columns |= {"own_frame_mass": _flat(own), "other_frames_mass": _flat(others)}
        if self.received is not None:
            columns |= self._sinks(self.received)
        return columns

    def _sinks(self, received: Tensor) -> dict[str, Column]:
        batch, heads, queries = self.a.shape[:3]
        found = sinks_among(received, queries, self.times)
        at = found.tokens[:, 0] * heads + found.tokens[:, 1]
        count = torch.bincount(at.cpu(), minlength=batch * heads)
        gets = received[tuple(found.tokens.T)].cpu()
        mass = torch.bincount(at.cpu(), gets, minlength=batch * heads) / max(1, queries)
        most, token = received.max(-1)
        return {
            "sinks": count.numpy(),
            "sink_mass": mass.numpy(),
            "most_received": _flat(most * (self.a.shape[3] / max(1, queries))),
            "most_received_token": _flat(token),
        }

    def frame_lines(self) -> dict[str, Column]:
        assert self.frames is not None
        sizes = self.frames.shape[2:]
        batch_and_heads = self.frames.shape[0] * self.frames.shape[1]
        numbers = [np.tile(one.ravel(), batch_and_heads) for one in np.indices(sizes)]
        parts = np.array(["special", "patch"])
        return {
            **self._lines(*sizes),
            "query_frame": numbers[0],
            "key_frame": numbers[1],
            "query_part": parts[numbers[2]],
            "key_part": parts[numbers[3]],
            "mass": _flat(self.frames),
        }

    def query_lines(self) -> dict[str, Column]:
        queries = self.a.shape[2]
        columns = self._lines(queries)
        heads = self.a.shape[0] * self.a.shape[1]
        columns["query"] = np.tile(np.arange(queries), heads)
        tokens = frame = torch.full((self.a.shape[0], queries), -1)
        with contextlib.suppress(LayoutError):
            side = Side.of(self.a, "query")
            tokens = side.originals().expand(self.a.shape[0], -1)
            known = tokens.clamp_min(0)  # groups are 2 · frame and more, −1 of no frame
            frame = torch.where(tokens < 0, -1, side.groups()[known] // 2)
        for name, values in (("token", tokens), ("frame", frame)):
            columns[name] = _flat(values[:, None].expand(self.a.shape[:3]))
        return columns | {name: _flat(values) for name, values in self.by_query.items()}


def _numbers(
    name: str,
    a: Attention,
    of: set[str],
    times: float,
    buffers: Buffers,
    max_bytes: int | None,
    moved: Any,
) -> _Numbers:
    """One walk over the rows of one site."""
    out = _Numbers(name, a, times)
    masses = _where(Masses, a) if "masses" in of else None
    sums = _where(FrameSums, a) if masses else None
    distances = _where(Distances, a) if "distance" in of else None

    def by_query(key: str, values: Tensor, rows: Any) -> None:
        if key not in out.by_query:
            dtype = torch.int64 if key == "strongest_key" else torch.float64
            out.by_query[key] = torch.empty(a.shape[:3], dtype=dtype, device=a.device)
        out.by_query[key][rows.index] = values

    if "received" in of:
        sizes = (*a.shape[:2], a.shape[3])
        out.received = torch.zeros(sizes, dtype=torch.float64, device=a.device)
    wanted = {"strongest": "strongest" in of, "entropy": "entropy" in of}
    for rows in walk(a, **wanted, buffers=buffers, max_bytes=max_bytes):
        if masses is not None:  # first: it knows the sums of rows
            kinds, frames = masses.of(rows)
            by_query("special_mass", kinds.sum(-1), rows)
            for number, kind in enumerate(masses.kinds):
                by_query(f"{kind}_mass", kinds[..., number], rows)
            if sums is not None:
                sums.add(rows.index, frames)
        if "entropy" in of:
            by_query("entropy", rows.entropy, rows)
        if rows.highest is not None and rows.strongest is not None:
            by_query("strongest", rows.weigh(rows.highest), rows)
            by_query("strongest_key", rows.strongest, rows)
        if distances is not None:
            by_query("distance", distances.of(rows), rows)
        if out.received is not None:
            out.received[rows.index[:2]] += rows.columns()
        moved(rows.values.shape[:3].numel())
    if sums is not None:
        out.frames = sums.means()
    return out


def _where(make: Any, a: Attention) -> Any:
    """A statistic of places; None where the site does not say where its tokens lie."""
    try:
        return make(a)
    except LayoutError:
        return None


def _own_and_others(frames: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Of patches: mass within their frame and to all others, `(B, h)`, mean over frames."""
    given = frames[..., 1, :].sum(-1)  # (B, h, S_q, S_k)
    own = given.diagonal(first, 2, 3)
    return own.nanmean(-1), given.sum(-1).nanmean(-1) - own.nanmean(-1)


def _units(numbers: Sequence[_Numbers]) -> dict[str, str]:
    kinds = {name for one in numbers for name in one.by_query if name.endswith("_mass")}
    return _UNITS | dict.fromkeys(kinds, "share of a row")


def _flat(values: Tensor) -> Column:
    array: Column = values.reshape(-1).cpu().numpy()
    return array
