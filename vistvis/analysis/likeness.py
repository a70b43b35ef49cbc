"""How alike heads, sites or queries attend, on sampled rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from vistvis.analysis.places import Side
from vistvis.attention import Attention
from vistvis.errors import InputError
from vistvis.progress import progress as bar

Of = Literal["heads", "sites", "queries"]
Measure = Literal["cosine", "js"]


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike n heads, sites or queries attend.

    Attributes
    ----------
    matrix
        `(n, n)` float64, symmetric. "cosine": 1 is equal up to a factor, 0 no key in common. "js":
        0 is equal, 1 no key in common (bits).
    labels
        n names: of heads "name head 0", of sites their names, of queries their tokens.
    order
        `(n,)` int64: in which order to draw them so that alike ones stand together,
        `matrix[order][:, order]`.
    queries
        `(S,)` int64: the tokens whose rows were compared.
    of, measure
        As they were asked for.
    """

    matrix: Tensor
    labels: tuple[str, ...]
    order: Tensor
    queries: Tensor
    of: Of
    measure: Measure


def similarity(
    items: Attention | Mapping[str, Attention],
    *,
    of: Of = "heads",
    measure: Measure = "cosine",
    samples: SupportsIndex | Sequence[int] | Tensor = 64,
    seed: int = 0,
    progress: bool = False,
) -> Similarity:
    """How alike heads, sites or queries attend, by the rows of some queries.

    Parameters
    ----------
    items
        One `Attention`, or several by name (what was captured, a run, a dict), whose queries and
        keys are the same tokens; a model's reordering and dropping is followed.
    of
        "heads": every head of every item; "sites": every item, by the mean row over its heads. Two
        are compared query by query, then the mean over queries and batch is taken. "queries":
        queries of one `Attention` with each other, mean over its heads and batch.
    measure
        "cosine" of two rows, or "js": their Jensen–Shannon divergence H((p + q) / 2) − (H(p) +
        H(q)) / 2 in bits (Lin, "Divergence measures based on the Shannon entropy", 1991, eq. 4.1).
        Rows are divided by their sum for it.
    samples
        How many queries are drawn at random, of those that every item has (all, where there are no
        more); or which ones, as numbers of tokens.
    seed
        Of the draw.

    A pair is compared on those queries alone in which both see a key; NaN if there is none. The
    order is that of the leaves in a tree of average linkage (Sokal & Michener 1958), groups turned
    so that alike ends meet.

    Cost: `B·S·h·Nk·d` multiply-adds an item for the rows, `B·S·n²·Nk` for cosines; for "js" as many
    logarithms. Memory: the n rows of one query (of "queries": of one head), and n². InputError if
    the items don't go together, or for samples that there are not; LayoutError if an order has no
    layout.
    """
    if of not in ("heads", "sites", "queries") or measure not in _MEASURES:
        raise InputError(
            'of is "heads", "sites" or "queries", and measure "cosine" or "js"; got '
            f"{of!r} and {measure!r}"
        )
    several = {"": items} if isinstance(items, Attention) else dict(items)
    if not several or (of == "queries" and len(several) > 1):
        what = "one attention" if of == "queries" else "at least one attention"
        raise InputError(f'of="{of}" compares rows of {what}, got {len(several)}')
    queries = _drawn(_together(several), samples, seed)
    every = list(several.values())
    batches = range(every[0].shape[0])
    if of == "queries":
        labels = tuple(map(str, queries.tolist()))
        groups = [(b, h) for b in batches for h in range(every[0].shape[1])]

        def rows(group: tuple[int, int]) -> Tensor:
            return every[0].token_rows(queries, batch=group[0], heads=group[1])[0]

    else:
        names = {name: range(a.shape[1]) for name, a in several.items()}
        labels = tuple(names)
        if of == "heads":
            labels = tuple(f"{n} head {h}".strip() for n, heads in names.items() for h in heads)
        groups = [(b, q) for b in batches for q in queries.tolist()]

        def rows(group: tuple[int, int]) -> Tensor:
            each = [a.token_rows(group[1], batch=group[0])[:, 0].double() for a in every]
            return torch.cat([one if of == "heads" else one.mean(0, keepdim=True) for one in each])

    total = torch.zeros(len(labels), len(labels), dtype=torch.float64, device=every[0].device)
    count = torch.zeros_like(total)
    for group in bar(groups, "rows compared", shown=progress, delay=0.5):
        p = rows(group).detach().double()
        if not bool((p >= 0).all()):
            raise InputError("rows that are compared are weights of 0 or more; some are negative")
        seen = (p.sum(-1) > 0).double()
        both = seen[:, None] * seen
        total += both * _MEASURES[measure](p)
        count += both
    matrix = (total / count).cpu()
    order = _leaves(1 - matrix if measure == "cosine" else matrix)
    return Similarity(matrix, labels, order, queries, of, measure)


def _together(items: Mapping[str, Attention]) -> Tensor:
    """The query tokens that every item has, in every batch item; an error unless they compare."""
    sizes: dict[str, tuple[int, ...]] = {}
    orders: list[list[list[int]] | None] = []
    common: Tensor | None = None
    for name, a in items.items():
        if not isinstance(a, Attention):
            raise InputError(
                f"items are attention, {name!r} is a {type(a).__name__}; take that of one pass"
            )
        present, keys = torch.ones(a.shape[2], dtype=torch.bool), a.shape[3]
        if a.site and a.site.query_order is not None:
            present = (Side.of(a, "query").rows() >= 0).all(0)
        if a.site and a.site.key_order is not None:
            keys = Side.of(a, "key").layout.num_tokens
        sizes[name] = a.shape[0], len(present), keys
        pictures = a.site.frame_order if a.site else None
        orders.append(None if pictures is None else pictures.tolist())
        if len(set(sizes.values())) > 1 or orders[0] != orders[-1]:
            first = next(iter(sizes))
            raise InputError(
                "what is compared has batch, queries and keys alike, and its pictures in one "
                f"order: {first!r} has {sizes[first]}, {name!r} {sizes[name]}"
                f"{'' if orders[0] == orders[-1] else ' in another order'}; take sites of one kind"
            )
        common = present if common is None else common & present
    assert common is not None
    return common.nonzero()[:, 0]


def _drawn(there: Tensor, samples: SupportsIndex | Sequence[int] | Tensor, seed: int) -> Tensor:
    """So many of the tokens that are there, in their order; or those that are asked for."""
    try:
        asked = torch.as_tensor(samples).cpu()
        if asked.ndim == 0:
            count = operator.index(samples)  # type: ignore[arg-type]
            order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))
            asked = there[order[: max(count, 0)].sort().values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"samples are a number, or tokens, got {samples!r}") from error
    if asked.ndim != 1 or not len(asked) or not bool(torch.isin(asked, there).all()):
        raise InputError(
            f"samples are one or more of the {len(there)} queries that every item has, "
            f"got {samples!r}"
        )
    return asked.long()


def _cosines(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)
    return unit @ unit.mT


def _divergences(rows: Tensor) -> Tensor:
    """Jensen–Shannon, in bits."""
    p = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    own: Tensor = torch.special.entr(p).sum(-1)
    out = own.new_zeros(len(p), len(p))
    for i, one in enumerate(p):
        mixed = torch.special.entr((one + p[i:]) / 2).sum(-1)
        out[i, i:] = out[i:, i] = mixed - (own[i] + own[i:]) / 2
    return (out / math.log(2)).clamp_min(0)


_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"cosine": _cosines, "js": _divergences}


def _leaves(distance: Tensor) -> Tensor:
    """Leaves of a tree of average linkage, from left to right."""
    far = distance.nan_to_num(nan=2.0)  # further than any
    between = far.clone().fill_diagonal_(math.inf)
    groups = [[number] for number in range(len(far))]
    for _ in groups[1:]:
        i, j = divmod(int(between.argmin()), len(far))
        left, right = groups[i], groups[j]
        ways = [(x, y) for x in (left, left[::-1]) for y in (right, right[::-1])]
        meeting = [float(far[x[-1], y[0]]) for x, y in ways]
        x, y = ways[meeting.index(min(meeting))]
        groups[i] = x + y
        mean = (between[i] * len(left) + between[j] * len(right)) / len(x + y)
        between[i] = between[:, i] = mean
        between[j] = between[:, j] = math.inf
    return torch.tensor(groups[0])
