"""Geometric understanding of VGGT: which heads match, and what is lost without them.

Bratulić, Mittal, Brox, Rupprecht: "On Geometric Understanding and Learned Data Priors in VGGT",
arXiv 2512.11508 (version 2: "… and Learned Priors in Feed-forward 3D Reconstruction Models"). Its
abstract and a detailed summary were read, not the text itself, and no code of the authors was to be
had: nothing here was compared with theirs.

Of VGGT-1B: all 24 global blocks and their 16 heads. A patch's match is the patch of the other view
that gets the maximum of its attention (the same before and after the softmax, RoPE included), and a
hit where that is the true one; heads of blocks 10–16 match. Knock-outs set the products q·k of
heads to zero ("whole head"): their softmax is even, `mode="uniform"`. The heads that match best,
several of one block or fewer of several blocks, are compared with random ones of early and late
blocks; the paper measures the Sampson distance of the cameras that the model then predicts, and
finds it lost with the first (four heads of one block are enough) and kept with the others. Here it
is the share of patches that the model's last tokens still match: a model without a camera head has
it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn

from vistvis.analysis import match_rate as rate_of
from vistvis.errors import InputError
from vistvis.intervention import KnockoutTable, Truth, knockout_table
from vistvis.recipes.sites import Captured, take_all

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

Head = tuple[str, int]


@dataclass(frozen=True, eq=False)
class MatchRates:
    """How often each head points at the true match; L blocks."""

    blocks: tuple[int, ...]
    rate: Tensor
    """`(L, B, h)` float64, 0…1; NaN where nothing was counted."""
    counted: Tensor
    """`(L, B)` int64: how many true matches."""
    label: str


@dataclass(frozen=True, eq=False)
class Knockouts:
    """What is left of matching without single heads, and without several at once."""

    table: KnockoutTable
    order: tuple[tuple[Head, float], ...]
    """Heads of global blocks with how often each points right by itself, the best first."""
    groups: Mapping[str, tuple[Head, ...]]
    """The heads that were knocked out together; `table.groups` has their rates."""
    label: str


def match_rate(
    captured: Captured,
    frame: SupportsIndex,
    key_frame: SupportsIndex,
    truth: Any,
    *,
    within: float = 0.0,
    pixels: float | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> MatchRates:
    """How often the strongest patch of another view is the true match, of every head.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture`, `open_run` or the extractor of `vggt_adapter`), of which
        every global block is taken, or one global `Attention`.
    frame, key_frame
        From which view, and in which; exchanged (with their truth) for the reverse direction.
    truth, within, pixels, max_bytes, progress
        As in `analysis.match_rate`: known matches, a disparity map, or a fundamental matrix. The
        paper takes the true patch alone, `within=0`, or either of two where the place lies between.

    Cost: P rows of every head of every global block. SiteError where there is none, LayoutError
    where its tokens are not all frames in order; InputError as `analysis.match_rate`.
    """
    found = take_all(captured)
    rates = [
        rate_of(
            taken.attention,
            frame,
            key_frame,
            truth,
            within=within,
            pixels=pixels,
            max_bytes=max_bytes,
            progress=progress,
        )
        for taken in found.values()
    ]
    shapes = {tuple(one.rate.shape) for one in rates}
    if len(shapes) != 1:
        raise InputError(f"blocks are of one batch and number of heads, got {sorted(shapes)}")
    label = (
        f"strongest patch of view {int(key_frame)} in the rows of view {int(frame)}'s patches "
        f"({next(iter(found.values())).rope}): share within {within:g} patches of the true one"
    )
    return MatchRates(
        tuple(found),
        torch.stack([one.rate for one in rates]),
        torch.stack([one.counted for one in rates]),
        label,
    )


def knockout(
    model: nn.Module,
    images: Tensor,
    *,
    truth: Truth | None = None,
    count: int = 4,
    seed: int = 0,
    sites: Any = "global_*",
    max_bytes: int | None = None,
    progress: bool | None = False,
) -> Knockouts:
    """Make heads attend evenly, alone and together, and match again.

    Parameters
    ----------
    model, images, truth, max_bytes, progress
        As in `intervention.knockout_table`.
    count
        How many heads are knocked out together, at most.
    seed
        Of the random groups.
    sites
        Whose heads are knocked out alone: all global blocks. On VGGT-1B that is 384 forwards; name
        some blocks for fewer.

    Groups: "best of one block", the `count` best heads of the block where these point right most
    often; "best of all"; "random early" and "random late", of the first and the last quarter of
    the global blocks, without those of the first two.

    Cost: one forward for each head and group, and three more, as `knockout_table`. InputError,
    SiteError and LayoutError as there, and for a count below 1.
    """
    if count < 1:
        raise InputError(f"count is how many heads are knocked out together, got {count}")
    kept: dict[str, Any] = {}

    def grouped(own: Mapping[Head, float]) -> Mapping[str, Sequence[Head]]:
        kept.update(own=own, groups=_groups(own, count, seed))
        groups: Mapping[str, Sequence[Head]] = kept["groups"]
        return groups

    table = knockout_table(
        model,
        images,
        mode="uniform",
        sites=sites,
        truth=truth,
        groups=grouped,
        max_bytes=max_bytes,
        progress=progress,
    )
    order = sorted(kept["own"].items(), key=lambda one: -one[1])
    source = "true matches" if table.truth else "the matches of the undisturbed tokens"
    label = (
        f"heads made to attend evenly; share of {table.counted} patches that the last tokens match "
        f"within one patch, of {source}. The paper measures predicted cameras, on other scenes"
    )
    return Knockouts(table, tuple(order), kept["groups"], label)


def figure(result: MatchRates | Knockouts, *, batch: int = 0) -> NotebookFigure:
    """Block by head: how often each points right, and what its knock-out costs."""
    from vistvis.views.head_table import HeadTable, head_tables

    if isinstance(result, MatchRates):
        rates = HeadTable("right matches", 100 * result.rate[:, batch], "per cent of patches")
        return head_tables(
            [rates],
            sites=[f"global block {number}" for number in result.blocks],
            title="Heads that match (geometric understanding of VGGT)",
            note=result.label,
        )
    plain = result.table.undisturbed.tokens
    together = "; ".join(
        f"{name} (of {len(result.groups[name])}) {100 * (rates.tokens - plain):+.1f}"
        for name, rates in result.table.groups.items()
    ).replace("-", "−")
    return knockout_figure(
        result.table,
        title="What knock-outs cost (geometric understanding of VGGT)",
        note=f"{result.label}. Together: {together} points.",
    )


def knockout_figure(table: KnockoutTable, *, title: str, note: str) -> NotebookFigure:
    """Site by head: the change of both rates, and how often each head itself points right."""
    from vistvis.views.head_table import HeadTable, head_tables

    (site, head), plain = table.pointing, table.undisturbed
    points = "percentage points"
    drawn = [
        HeadTable(
            f"token matches: {100 * plain.tokens:.1f} % undisturbed, change",
            100 * table.grid(lambda one: one.rates.tokens - plain.tokens),
            points,
            "{:+.1f}",
            changes=True,
        ),
        HeadTable(
            f"pointing head ({site}, head {head}): {100 * plain.pointing:.1f} %, change",
            100 * table.grid(lambda one: one.rates.pointing - plain.pointing),
            points,
            "{:+.1f}",
            changes=True,
        ),
        HeadTable(
            "how often each head itself points right, undisturbed",
            100 * table.grid(lambda one: one.own),
            "per cent of patches",
        ),
    ]
    note = (
        f"{note} Columns are heads. Where no global block sees another frame, tokens match "
        f"{100 * table.within_frames.tokens:.1f} %."
    )
    return head_tables(drawn, sites=table.sites, title=title, note=note)


def _groups(own: Mapping[Head, float], count: int, seed: int) -> dict[str, tuple[Head, ...]]:
    """Which heads go together, from how often each points right by itself."""
    best = sorted(own, key=lambda head: -own[head])
    names = list(dict.fromkeys(name for name, _ in own))  # in the order in which they run
    of_block = {name: [head for head in best if head[0] == name][:count] for name in names}

    def right(heads: Iterable[Head]) -> float:
        rates = [own[head] for head in heads]
        return sum(rates) / len(rates)

    groups = {
        "best of one block": tuple(max(of_block.values(), key=right)),
        "best of all": tuple(best[:count]),
    }
    taken = {head for heads in groups.values() for head in heads}
    generator = torch.Generator().manual_seed(seed)
    quarter = max(1, len(names) // 4)
    for group, some in (("random early", names[:quarter]), ("random late", names[-quarter:])):
        free = [head for head in own if head[0] in some and head not in taken]
        if free:
            chosen = torch.randperm(len(free), generator=generator)[:count].tolist()
            groups[group] = tuple(free[n] for n in sorted(chosen))
    return groups
