"""Settling what the kernel calls of one run mean together: one reading, or the reason why none."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vistvis.attention import Attention
from vistvis.errors import CaptureError
from vistvis.hooks.folding import UnreadableError
from vistvis.hooks.joining import join, join_heads, seen_text
from vistvis.hooks.origins import Placing
from vistvis.hooks.projections import ProjectionTap
from vistvis.hooks.readings import Notes, Reading
from vistvis.hooks.reasons import why_unseen
from vistvis.models.sites import Site


class SiteRun(NamedTuple):
    """One run of a site: what it showed, the shapes of what it got and returned where those tell
    something, its projections where those were asked for, and whose tokens it got."""

    site: Site
    notes: Notes
    sizes: tuple[int, ...] = ()
    returned: tuple[int, ...] = ()
    before: ProjectionTap | None = None
    placing: Placing | None = None


def settle(run: SiteRun, source: str | None) -> list[tuple[Reading, Attention]]:
    """The readings of a run of a site, with their attention; `CaptureError` if there is none.

    One, or two where a module attends in both directions. `source` takes only what was read so;
    None takes kernels before softmaxes.
    """
    settled = []
    for reading in _meant(run, source):
        # A sink takes its share after the kernel (from its log-sum-exp), which has no place for it.
        if reading.source == "kernel" and isinstance(
            getattr(run.site.module, "sinks", None), Tensor
        ):
            raise CaptureError(
                "its softmax has a sink beside the keys (.sinks), which its kernel does not show; "
                'load the model with attn_implementation="eager"'
            )
        reading = _unpack_groups(_over_tokens(reading, run.sizes), run.site)
        if reading.attention is None:
            raise CaptureError(reading.error)
        settled.append((reading, reading.attention))
    _check_whole(settled[0][1], run.sizes, run.returned)
    return settled


def _meant(run: SiteRun, source: str | None) -> list[Reading]:
    site, readings, problems = run.site, run.notes.readings, run.notes.problems
    sources = {reading.source for reading in readings}
    only = source or ("kernel" if "kernel" in sources else None)
    if only and sources:
        readings = [reading for reading in readings if reading.source == only]
        if not readings:
            raise CaptureError(
                f'source="{source}" was asked for, and this module shows only '
                f"{' and '.join(sorted(sources))}"
            )
    if problems and not any(reading.source == "kernel" for reading in readings):
        raise CaptureError(problems[0])
    if not readings:
        raise CaptureError(why_unseen(site))
    if len(readings) == 1:
        return readings
    if site.traits.head_by_head and len(readings) == site.heads:
        return [join_heads(readings)]
    if site.traits.two_calls and len(readings) == 2:
        raise CaptureError(site.traits.two_calls)
    for reading in readings:
        if reading.error:
            return [reading]
    joined = join(site, run.sizes, readings)
    if joined is not None:
        return [joined]
    if len(readings) == 2 and _are_both_directions(*readings):
        return readings
    raise CaptureError(
        f"made {len(readings)} attention kernel calls in one run, of {seen_text(readings)}; which "
        "is meant is not known: choose one of its submodules if each makes one call"
    )


def _are_both_directions(first: Reading, second: Reading) -> bool:
    """Whether queries of one call are keys of the other, and the other way round."""
    there, back = first.attention, second.attention
    if there is None or back is None or there.shape[2:] != back.shape[:1:-1]:
        return False
    if there.weights is not None or back.weights is not None:
        if first.scores is None or second.scores is None:
            return False
        (scores, turned), (others, other_turned) = first.scores, second.scores
        return scores is others and turned != other_turned
    swapped = torch.equal(there.query, back.key) and torch.equal(there.key, back.query)
    return swapped and not (
        there.query.shape == back.query.shape and torch.equal(there.query, back.query)
    )


def _check_whole(attention: Attention, sizes: tuple[int, ...], returned: tuple[int, ...]) -> None:
    """Refuse a kernel call for some of the queries only: row 5 would be another token's."""
    # A module that pools its queries returns fewer, windows hold them all, and merged tokens are
    # fewer on both sides.
    batch, _, queries, keys = attention.shape
    fewer = len(sizes) == 3 and batch * queries < sizes[0] * sizes[1]
    if fewer and sizes[:2] == returned[:2] and queries < keys:
        raise UnreadableError(
            f"its kernel saw {queries} of the {sizes[1]} queries that the module got; the rest is "
            "attended by other code (sparse or custom), and which tokens these are is not known: "
            "switch that off"
        )


def _over_tokens(reading: Reading, sizes: tuple[int, ...]) -> Reading:
    """Refuse attention over channels: each head's queries are its channels, summed over tokens."""
    attention = reading.attention
    if attention is None or len(sizes) != 3:  # nothing is told by other inputs than (B, N, C)
        return reading
    _, tokens, width = sizes
    _, heads, queries, keys = attention.shape
    channels = queries == keys != tokens and heads * queries == width
    if not channels or (attention.weights is None and attention.query.shape[-1] != tokens):
        return reading
    text = (
        f"its {queries}×{keys} weights are over the channels of a head, not over its {tokens} "
        "tokens (cross-covariance)"
    )
    return Reading(None, reading.source, error=text)


def _unpack_groups(reading: Reading, site: Site) -> Reading:
    """Undo the packing of grouped heads into the token dimension.

    With one query token, transformers hands the kernel `(B, h / g, g, d)` for h heads in groups of
    g: the same products, with heads where queries belong.
    """
    packed = reading.attention
    if packed is None or packed.weights is not None:
        return reading
    _, key_heads, count, _ = packed.shape
    groups = getattr(site.module, "num_key_value_groups", 1)
    if count == 1 or count != groups or key_heads * count != site.heads or packed.groups > 1:
        return reading

    def spread(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "b k g d -> b (k g) 1 d")

    mask = packed.mask
    if mask is not None and mask.shape[-2] == count:
        mask = spread(mask.expand(mask.shape[0], key_heads, count, mask.shape[-1]))
    attention = packed.replace(query=spread(packed.query), mask=mask)
    output = None if reading.output is None else spread(reading.output)
    return replace(reading, attention=attention, output=output)
