"""Attention sinks: whether a head parks its attention or spreads one message.

Fesser, Jacobs, Fel, Keller, Kakade: "A Unifying View of Attention Sinks: Two Algorithms, Two
Solutions", arXiv 2606.08105. The formula as in the authors' code,
github.com/KempnerInstitute/attention_sink, `lejepa_sinks/diagnose.py` (`collect`) and
`sink_table.py`, commit a83cd59: sinks per image of section 5.

Any self-attention with its values (`capture(model, values=True)`); the authors' are ViTs', all
blocks but the first. The model's own softmax, all tokens as queries and keys, values of each head
before the output projection. `vistvis.analysis.sink_kinds` asks another question of the same
values: it goes over every key that draws many times its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistvis.analysis import received
from vistvis.attention import Attention
from vistvis.errors import InputError
from vistvis.recipes.sites import Captured, one

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

# A query is routed to a key that gets half of its attention.
_ROUTED = 0.5


@dataclass(frozen=True, eq=False)
class Kinds:
    """Of each site and head the key that draws most, and what it is; L sites, `(L, B, h)` all."""

    sites: tuple[str, ...]
    kinds: tuple[tuple[tuple[str, ...], ...], ...]
    """By site, batch item and head: "nop", "broadcast", "between", or "" where it is no sink."""
    token: Tensor
    """int64: the key with the largest mean weight."""
    mass: Tensor
    """Its mean weight over all queries."""
    routed: Tensor
    """The share of queries that give it half of their attention, or more."""
    least: Tensor
    """The smallest weight that a query gives it: 1 − ε of the paper's Definition 1."""
    ratio: Tensor
    """The length of its value over the mean length of the head's others."""
    label: str


def kinds(
    captured: Captured,
    *,
    routed: float = 0.9,
    negligible: float = 0.2,
    full: float = 0.5,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Kinds:
    """Whether each head has a sink, and whether that is a NOP or a broadcast.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture(…, values=True)`, or a run with values), of which all of one
        batch and number of heads are taken, or one `Attention`.
    routed
        A sink is a key to which at least this share of queries gives half of its attention.
    negligible, full
        Its value's length, over the mean of the others': at most the first is "nop", at least the
        second "broadcast", and "between" lies between them.
    max_bytes, progress
        As in `Attention.row_blocks`.

    s = argmax over keys of the mean over queries of the weights; ratio = ‖v_s‖ / mean of ‖v_j‖ over
    j ≠ s.

    Cost: all rows twice, `B·h·Nq·Nk·d` multiply-adds each time, for every site. InputError where
    values were not kept, or sites differ in batch or heads: choose some.
    """
    every = {"attention": captured} if isinstance(captured, Attention) else captured
    found = [_of(one(every, name), name, max_bytes, progress) for name in every]
    shapes = sorted({tuple(numbers[0].shape) for numbers in found})
    if len(shapes) != 1:
        raise InputError(
            f"kinds compares sites of one batch and one number of heads, got (batch, heads) of "
            f"{', '.join(map(str, shapes)) or 'no site'}: hand over some, {{name: captured[name]}}"
        )
    token, mass, share, least, ratio = (torch.stack(each) for each in zip(*found, strict=True))
    named = tuple(
        tuple(
            tuple(_kind(*pair, routed, negligible, full) for pair in zip(s, r, strict=True))
            for s, r in zip(shares, ratios, strict=True)
        )
        for shares, ratios in zip(share.tolist(), ratio.tolist(), strict=True)
    )
    label = (
        f"the key that most attention goes to; a sink where {routed:.0%} of queries give it half "
        f"of theirs, nop up to {negligible:g} and broadcast from {full:g} of the others' value norm"
    )
    return Kinds(tuple(every), named, token, mass, share, least, ratio, label)


def figure(result: Kinds, *, batch: int = 0) -> NotebookFigure:
    """Site by head: how much the strongest key draws, and what it is where it is a sink."""
    from vistvis.views.head_table import HeadTable, head_tables

    drawn = HeadTable(
        "mean weight on the strongest key",
        result.mass[:, batch],
        "share of a row",
        texts=[scene[batch] for scene in result.kinds],
    )
    title = "What sinks do (Attention sinks)"
    return head_tables([drawn], sites=result.sites, title=title, note=result.label)


def _kind(share: float, ratio: float, routed: float, negligible: float, full: float) -> str:
    if share < routed:
        return ""
    if ratio <= negligible:
        return "nop"
    return "broadcast" if ratio >= full else "between"


def _of(
    a: Attention, name: str, max_bytes: int | None, progress: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token, mass, share of routed queries, least weight and ratio, `(B, h)` each."""
    if a.value is None:
        raise InputError(f"{name} has no values; capture them with capture(…, values=True)")
    mean = received(a, max_bytes=max_bytes, progress=progress) / a.shape[2]
    mass, token = mean.max(-1)
    share = torch.zeros_like(mass)
    least = torch.ones_like(mass)
    for (batch, heads, _), weights in a.row_blocks(max_bytes=max_bytes, progress=progress):
        at = token[batch, heads, None, None].expand(*weights.shape[:3], 1)
        given = weights.detach().gather(3, at)[..., 0]
        share[batch, heads] += (given >= _ROUTED).sum(-1)
        least[batch, heads] = torch.minimum(least[batch, heads], given.amin(-1).double())
    norms = torch.linalg.vector_norm(a.value.detach(), dim=-1, dtype=torch.float64)
    norms = norms.repeat_interleave(a.shape[1] // norms.shape[1], 1)
    own = norms.gather(2, token[..., None])[..., 0]
    ratio = own / ((norms.sum(-1) - own) / (a.shape[3] - 1))
    return token, mass, share / a.shape[2], least, ratio
