"""Settling what the kernel calls of one run mean together: one reading, or the reason why none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vistvis.attention import Attention
from vistvis.errors import CaptureError
from vistvis.hooks.folding import UnreadableError
from vistvis.hooks.projections import ProjectionTap
from vistvis.hooks.readings import Notes, Reading
from vistvis.hooks.reasons import why_unseen
from vistvis.models.sites import Site


class SiteRun(NamedTuple):
    """One run of a site: what it showed, the shapes of what it got and returned where those tell
    something, and its projections where those were asked for."""

    site: Site
    notes: Notes
    sizes: tuple[int, ...] = ()
    returned: tuple[int, ...] = ()
    before: ProjectionTap | None = None


def settle(run: SiteRun, source: str | None) -> list[tuple[Reading, Attention]]:
    """The readings of a run of a site, and their attention; `CaptureError` if there is none.

    `source` takes only what was read so; None takes kernels before softmaxes.
    """
    readings = [_over_tokens(reading, run.sizes) for reading in run.notes.readings]
    reading = _unpack_groups(_one(run.site, readings, run.notes.problems, source), run.site)
    if reading.attention is None:
        raise CaptureError(reading.error)
    _check_whole(reading.attention, run.sizes, run.returned)
    return [(reading, reading.attention)]


def _one(site: Site, readings: list[Reading], problems: list[str], source: str | None) -> Reading:
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
        return readings[0]
    if site.traits.head_by_head and len(readings) == site.heads:
        return _stack_heads(readings)
    if site.traits.two_calls and len(readings) == 2:
        raise CaptureError(site.traits.two_calls)
    raise CaptureError(
        f"made {len(readings)} attention kernel calls in one run, and which is meant is "
        "not known; choose one of its submodules if each makes one call"
    )


def _stack_heads(readings: Sequence[Reading]) -> Reading:
    """One reading of a module that calls its kernel once for each head."""
    parts = [reading.attention for reading in readings if reading.attention is not None]
    shapes = {(*part.shape, part.weights is None, part.mask is None) for part in parts}
    if len(parts) < len(readings) or len(shapes) > 1 or parts[0].shape[1] != 1:
        raise UnreadableError(f"its {len(readings)} kernel calls are not one for each head")

    def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
        held = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(held, 1) if len(held) == len(tensors) else None

    weights = cat([part.weights for part in parts])
    if weights is not None:
        attention: Attention = Attention.from_weights(weights)
    elif len({str(part.scale) for part in parts}) > 1:
        raise UnreadableError(f"its {len(readings)} kernel calls are not alike")
    else:
        attention = Attention(
            query=torch.cat([part.query for part in parts], 1),
            key=torch.cat([part.key for part in parts], 1),
            scale=parts[0].scale,
            mask=cat([part.mask for part in parts]),
            causal=parts[0].causal,
        )
    value, output = cat([one.value for one in readings]), cat([one.output for one in readings])
    return Reading(attention, readings[0].source, value, output)


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
    attention = Attention(query=spread(packed.query), key=packed.key, scale=packed.scale, mask=mask)
    value, output = reading.value, reading.output
    if value is not None and output is not None:
        value, output = value.repeat_interleave(count, 1), spread(output)
    return replace(reading, attention=attention, value=value, output=output)
