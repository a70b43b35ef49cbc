"""How tokens moved between two blocks: rows of one tensor that are found again in another."""

from __future__ import annotations

import torch
from torch import Tensor

from vistvis.hooks.folding import UnreadableError

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_rows(before: Tensor, after: Tensor) -> bool:
    """Whether both hold the same numbers in the same order, however batch and tokens are folded."""
    if before.shape[-1] != after.shape[-1] or before.numel() != after.numel():
        return False
    if before.dtype != after.dtype or before.device != after.device:
        return False
    plain = before.is_contiguous() and after.is_contiguous()
    if plain and before.data_ptr() == after.data_ptr():
        return True
    return torch.equal(_bits(before).reshape(-1), _bits(after).reshape(-1))


def sources(before: Tensor, after: Tensor, *, frames: int, ids: Tensor) -> Tensor | None:
    """Which row of `before` `(B, M, C)` each of `after` `(B, m, C)` is, `(B, m)`; −1: a new one.

    None if most rows are new. `ids` `(B, M)` are what the rows of `before` are called: alike rows
    of different names are an `UnreadableError`, unless whole frames that moved tell them apart.
    """
    marks, wanted = _marks(before), _marks(after)
    parts = [_sources(*each, frames) for each in zip(marks, wanted, ids, strict=True)]
    found = torch.stack([part[0] for part in parts])
    if 2 * int((found >= 0).sum()) <= int((~_constant(_sample(after))).sum()):
        return None
    again = before.gather(1, found.clamp_min(0)[..., None].expand(-1, -1, before.shape[-1]))
    alike = (_bits(again) == _bits(after)).all(-1)
    # A row of one number is padding, which is no token.
    padding = _constant(after)
    if 2 * int((alike & ~padding).sum()) <= int((~padding).sum()):
        return None
    if bool((torch.stack([part[1] for part in parts]) & ~padding).any()):
        raise UnreadableError("tokens were moved, and some of them are alike")
    moved = torch.stack([part[2] for part in parts])
    return torch.where((alike & ~padding) | moved, found, -1)


def _sources(
    before: Tensor, after: Tensor, ids: Tensor, frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources of one sample by the rows' marks, which of them are in doubt, and which moved along
    with their frame."""
    # Copies stand together, with their names in order: the first and the last say if they differ.
    by_name = ids.argsort(stable=True)
    order = by_name[before[by_name].argsort(stable=True)]
    ranked = before[order]
    low = torch.searchsorted(ranked, after)
    copies = torch.searchsorted(ranked, after, right=True) - low
    twins, turn = after.sort(stable=True)
    nth = torch.empty_like(turn)
    nth[turn] = torch.arange(len(after), device=after.device) - torch.searchsorted(twins, twins)
    known = nth < copies
    found = torch.where(known, order[(low + nth).clamp_max(len(order) - 1)], -1)
    last = (low + copies - 1).clamp(0, len(order) - 1)
    first = low.clamp_max(len(order) - 1)
    doubt = known & (ids[order[first]] != ids[order[last]])
    single = known & (copies == 1)
    whole = _whole_frames(found, single, frames) if len(after) == len(before) else None
    if whole is not None:
        return whole, torch.zeros_like(doubt), torch.ones_like(doubt)
    return found, doubt, torch.zeros_like(doubt)


def _whole_frames(found: Tensor, single: Tensor, frames: int) -> Tensor | None:
    """Sources if frames were only moved whole, told by the rows that exist once in each."""
    if len(found) % frames:
        return None
    count = len(found) // frames
    found, single = found.view(frames, count), single.view(frames, count)
    place = torch.arange(count, device=found.device)
    source = found.gather(1, single.int().argmax(1, keepdim=True)) // count
    moved = bool(((found == source * count + place) | ~single).all())
    most = bool((2 * single.sum(1) > count).all())
    if not moved or not most or len(set(source.flatten().tolist())) < frames:
        return None
    return (source * count + place).flatten()


def _sample(rows: Tensor) -> Tensor:
    """Some columns: enough to tell rows apart, and most of the time to see that all are new."""
    return rows[..., :: max(1, rows.shape[-1] // 32)]


def _constant(rows: Tensor) -> Tensor:
    return (rows == rows[..., :1]).all(-1)


def _bits(rows: Tensor) -> Tensor:
    return rows.detach().contiguous().view(_BITS[rows.element_size()])


def _marks(rows: Tensor) -> Tensor:
    """A number for each row, `(B, M)`: alike rows have the same, others hardly ever."""
    rows = _sample(rows)
    # A generator of its own: the model's random numbers stay what they are.
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, rows.shape[-1:], generator=generator) | 1
    return (_bits(rows).long() * factors.to(rows.device)).sum(-1)
