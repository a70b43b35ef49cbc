"""Several kernel calls of one run, put together where they are provably slices of one tensor.

The proof is where their tensors lay in memory when the kernel got them: one storage, the same
strides, one behind the other, from the first to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vistvis.attention import Attention
from vistvis.attention.arithmetic import unexpanded
from vistvis.hooks.folding import Fold, UnreadableError
from vistvis.hooks.readings import Mark, Reading
from vistvis.models.sites import Site

Tensors = list[Tensor]


def join(site: Site, sizes: tuple[int, ...], readings: Sequence[Reading]) -> Reading | None:
    """One reading of calls that together are one, or None; `sizes` are those of the site's input.

    Chunks of the queries on the same keys are one `Attention`; calls on ranges of tokens are one in
    segments; calls on parts of the batch or on heads are put side by side.
    """
    parts = _attentions(readings)
    marks = [reading.marks for reading in readings]
    leads = {(len(reading.lead), len(reading.marks)) for reading in readings}
    if len(parts) < len(readings) or not all(marks) or len(leads) > 1:
        return None
    batch, tokens = sizes[:2] if len(sizes) == 3 else (0, 0)
    columns = list(zip(*marks, strict=True))
    if len(columns) > 1 and _are_slices(columns[0], -2, tokens):  # a kernel's queries and keys
        if _are_slices(columns[1], -2, tokens):
            return _in_segments(readings) if all(p.mask is None for p in parts) else None
        return _on_same_keys(readings, columns[1])
    lead = readings[0].lead
    if len(lead) == 1:
        return _of_single_dimension(site, batch, readings, columns)
    if parts[0].shape[:2] == lead:
        for dim, whole in ((0, batch), (1, site.heads or 0)):
            if all(_are_slices(column, dim, whole) for column in columns):
                return _combined(readings, lambda tensors, dim=dim: torch.cat(tensors, dim))  # type: ignore[misc]
    return None


def join_heads(readings: Sequence[Reading]) -> Reading:
    """One reading of a module that calls its kernel once for each head, on other tensors each."""
    parts = _attentions(readings)
    shapes = {(*part.shape, part.weights is None, part.mask is None) for part in parts}
    if len(parts) < len(readings) or len(shapes) > 1 or parts[0].shape[1] != 1:
        raise UnreadableError(f"its {len(readings)} kernel calls are not one for each head")
    return _combined(readings, lambda tensors: torch.cat(tensors, 1))


def seen_text(readings: Sequence[Reading]) -> str:
    """What several calls that are no one were, for a message."""
    shapes = [part.shape for part in _attentions(readings)]
    queries, keys = ([shape[side] for shape in shapes] for side in (2, 3))
    some = ", ".join(map(str, queries[:6])) + (", …" if len(queries) > 6 else "")
    of_keys = f"{keys[0]}" if len(set(keys)) == 1 else f"{min(keys)} to {max(keys)}"
    return (
        f"{some} queries on {of_keys} keys, which are no slices of one tensor, in order and "
        "covering it"
    )


def _are_slices(marks: Sequence[Mark], dim: int, whole: int) -> bool:
    """Whether tensors are slices along `dim` of one, in order, and cover it."""
    first = marks[0]
    dim %= len(first.shape)
    step, at = first.strides[dim], first.offset
    for mark in marks:
        there = first._replace(offset=at, shape=_with(first.shape, dim, mark.shape[dim]))
        if not mark.same_place(there):
            return False
        at += mark.shape[dim] * step
    return _covers(first, step, sum(mark.shape[dim] for mark in marks), whole)


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _are_items(marks: Sequence[Mark], whole: int) -> bool:
    """Whether tensors are all items along a dimension of one that they don't have themselves."""
    first = marks[0]
    step = marks[1].offset - first.offset
    places = (first._replace(offset=first.offset + i * step) for i in range(len(marks)))
    evenly = all(map(Mark.same_place, marks, places))
    return evenly and _covers(first, step, len(marks), whole)


def _covers(first: Mark, step: int, count: int, whole: int) -> bool:
    """Whether `count` items, `step` apart from `first` on, are all that there are.

    `whole` is how many those are, from the module's input, which goes before all: pictures that lie
    behind each other look like windows of one sequence. Where it does not say (0), it is as many as
    memory has, up to where the next wider stride begins.
    """
    if step <= 0 or whole:
        return step > 0 and count == whole
    wider = [s for s, n in zip(first.strides, first.shape, strict=True) if n > 1 and s > step]
    there = min(wider, default=first.storage.nbytes() // first.itemsize) // step
    return count == there and first.offset // step % there == 0


def _attentions(readings: Sequence[Reading]) -> list[Attention]:
    return [reading.attention for reading in readings if reading.attention is not None]


def _on_same_keys(readings: Sequence[Reading], marks: Sequence[Mark]) -> Reading | None:
    """Chunks of the queries; `marks` are those of their keys."""
    parts, first = _attentions(readings), marks[0]
    if parts[0].causal or any(part.key is not parts[0].key for part in parts):
        return None
    # Equal keys in other memory may be those of another window; those of all tokens can't.
    in_one_place = all(mark.same_place(first) for mark in marks)
    if not in_one_place and parts[0].shape[3] < sum(part.shape[2] for part in parts):
        return None
    return _combined(readings, lambda tensors: torch.cat(tensors, 2), along=(2,), keys=True)


def _in_segments(readings: Sequence[Reading]) -> Reading:
    lengths = [part.shape[2] for part in _attentions(readings)]
    starts = torch.tensor([0, *accumulate(lengths[:-1])])
    return _combined(readings, lambda tensors: torch.cat(tensors, 2), segments=starts)


def _of_single_dimension(
    site: Site, batch: int, readings: Sequence[Reading], columns: Sequence[Sequence[Mark]]
) -> Reading | None:
    """Calls on `(n, N, d)`: slices of batch · heads, or items of a batch or heads, one by one."""
    heads = site.heads or 0
    if all(_are_slices(column, 0, batch * heads) for column in columns):

        def cat(tensors: Tensors) -> Tensor:
            made = torch.cat(_unfolded(tensors))
            return Fold.of((len(made),), site.heads, batch or None, site.traits.heads_at)(made)

        return _combined(readings, cat)
    first, second = columns[0][:2]
    # Heads of one token lie closer together than items of a batch.
    by_heads = second.offset - first.offset < first.strides[0] or first.shape[0] == batch != heads
    if not all(_are_items(column, heads if by_heads else batch) for column in columns):
        return None
    return _combined(readings, lambda tensors: torch.stack(_unfolded(tensors), int(by_heads)))


def _unfolded(tensors: Tensors) -> Tensors:
    return [tensor.reshape(-1, *tensor.shape[2:]) for tensor in tensors]


def _combined(
    readings: Sequence[Reading],
    cat: Callable[[Tensors], Tensor],
    *,
    along: tuple[int, ...] = (0, 1),
    keys: bool = False,
    segments: Tensor | None = None,
) -> Reading:
    """The parts put together by `cat`, which works along some dimensions; on one set of `keys`."""
    parts = _attentions(readings)
    first = parts[0]
    for part in parts:
        part.check_unwritten()

    def whole(tensors: Sequence[Tensor | None]) -> Tensor | None:
        held = [tensor for tensor in tensors if tensor is not None]
        return cat(held) if len(held) == len(tensors) else None

    if keys:  # on one set of values too, or which are meant is not known
        value = first.value if all(part.value is first.value for part in parts) else None
    else:
        value = whole([part.value for part in parts])
    if first.weights is not None:
        weights = cat([part.weights for part in parts if part.weights is not None])
        attention = Attention.from_weights(weights, value=value)
    else:
        if len({(str(part.scale), part.causal, part.mask is None) for part in parts}) > 1:
            raise UnreadableError(f"its {len(parts)} kernel calls are not alike")
        attention = Attention(
            query=cat([part.query for part in parts]),
            key=first.key if keys else cat([part.key for part in parts]),
            scale=first.scale,
            mask=_mask(parts, cat, along),
            causal=first.causal,
            segments=segments,
            value=value,
        )
    return Reading(attention, readings[0].source, whole([one.output for one in readings]))


def _mask(
    parts: Sequence[Attention], cat: Callable[[Tensors], Tensor], along: tuple[int, ...]
) -> Tensor | None:
    masks = [unexpanded(part.mask) for part in parts if part.mask is not None]
    if not masks:
        return None
    masks = [mask.reshape((1,) * (4 - mask.ndim) + mask.shape) for mask in masks]
    first = masks[0]
    serves_all = all(first.shape[dim] == 1 for dim in along)
    if serves_all and all(torch.equal(mask, first) for mask in masks):
        return first
    most = [max(mask.shape[dim] for mask in masks) for dim in range(4)]
    return cat(
        [
            mask.expand([part.shape[d] if d in along else most[d] for d in range(4)])
            for mask, part in zip(masks, parts, strict=True)
        ]
    )
