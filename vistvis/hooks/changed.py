"""Kernel calls that are changed on purpose: what runs in place of one, and what its weights are.

A changed call goes through `torch.overrides` as the kernel's own do, so that whoever watches the
module sees one call, and what was changed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vistvis.attention import Attention
from vistvis.hooks.folding import Fold, UnreadableError
from vistvis.hooks.readings import SDPA, KernelReader, Reading, SdpaCall

# Rows at once where causal attention needs a mask of its own: never all of them.
_CAUSAL_ROWS = 256


@dataclass(frozen=True, eq=False)
class Cut:
    """Keys that some queries don't see, in some heads (None: in all).

    `queries` `(Nq,)` and `keys` `(Nk,)` put tokens into groups, and `sees` says which group of
    queries sees which group of keys. On the CPU.
    """

    queries: Tensor
    keys: Tensor
    sees: Tensor
    heads: frozenset[int] | None = None

    def holds(self, head: int) -> bool:
        return self.heads is None or head in self.heads

    @property
    def hides(self) -> bool:
        """Whether some query has less to see."""
        rows, columns = (torch.unique(side) for side in (self.queries, self.keys))
        return not bool(self.sees[rows][:, columns].all())

    @property
    def segments(self) -> Tensor | None:
        """The starts of blocks of tokens that see only themselves, if that is what it is."""
        same = torch.equal(self.queries, self.keys) and bool((self.keys.diff() >= 0).all())
        if not same or not torch.equal(self.sees, torch.eye(len(self.sees)).bool()):
            return None
        return torch.cat((torch.zeros(1).long(), self.keys.diff().nonzero()[:, 0] + 1))


@dataclass(frozen=True, eq=False)
class Change:
    """What is changed in one kernel call.

    `modes` says by head what its output becomes: "uniform" is the mean of the values that a query
    sees, "zero" is zeros, "mean" is the mean of its outputs over all queries. `fold` tells which
    dimension is heads.
    """

    fold: Fold
    text: str
    modes: Mapping[int, str] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()

    def then(self, later: Change) -> Change:
        """Both: cuts add up, and of two modes of one head the later holds."""
        modes, text = {**self.modes, **later.modes}, f"{self.text}; {later.text}"
        return replace(later, text=text, modes=modes, cuts=self.cuts + later.cuts)

    @property
    def weighing(self) -> Change:
        """The change of the weights alone, without "mean", which changes what comes after them."""
        return replace(self, modes={h: m for h, m in self.modes.items() if m != "mean"})

    def heads(self, mode: str, like: Tensor) -> Tensor | None:
        """True for heads of a mode, `(h, 1, 1)` on a tensor's device; None if there are none."""
        chosen = [head for head, its_mode in self.modes.items() if its_mode == mode]
        if not chosen:
            return None
        flags = torch.zeros(self.fold.shape[1], dtype=torch.bool)
        flags[chosen] = True
        return flags.to(like.device)[:, None, None]

    def averaged(self, out: Tensor) -> Tensor:
        """The output with heads of mode "mean" replaced by their mean over the queries."""
        chosen = self.heads("mean", out)
        if chosen is None:
            return out
        folded = self.fold(out)
        made = torch.where(chosen, folded.mean(-2, keepdim=True), folded)
        return self.fold.back(made, tuple(out.shape[:-2]))


def changed_attention(call: SdpaCall, change: Change) -> Tensor:
    """`scaled_dot_product_attention` with a change; no mask of all queries and keys is made.

    Cuts: queries that see the same keys are a group, and the kernel runs for each group on the keys
    that it sees. A query that sees none gets zeros. Cost: that of the kernel, less what is cut;
    memory of a copy of the values and keys of the largest group where they don't lie together.
    """
    tensors = call[:3]
    if has_torch_function(tensors):
        out: Tensor = handle_torch_function(changed_attention, tensors, call, change)
        return out
    lead, fold = tuple(call.query.shape[:-2]), change.fold
    call = _folded(call, fold)
    uniform, zero = (change.heads(mode, call.query) for mode in ("uniform", "zero"))
    if uniform is not None:  # logits of 0, so equal weights
        call = call._replace(query=call.query.masked_fill(uniform, 0.0))
    out = _by_heads(call, change.cuts)
    if zero is not None:
        out = out.masked_fill(zero, 0.0)
    return change.averaged(fold.back(out, lead))


def _folded(call: SdpaCall, fold: Fold) -> SdpaCall:
    """The call with heads in the second dimension of four."""
    if not fold.changes:
        return call
    lead, mask = call.query.shape[:-2], call.attn_mask
    key, value = (one.expand(*lead, *one.shape[-2:]) for one in (call.key, call.value))
    if mask is not None:
        mask = fold(mask.expand(*call.query.shape[:-1], key.shape[-2]))
    return call._replace(
        query=fold(call.query), key=fold(key), value=fold(value), attn_mask=mask, enable_gqa=False
    )


def _by_heads(call: SdpaCall, cuts: tuple[Cut, ...]) -> Tensor:
    """Heads that the same cuts hold for run together."""
    count = call.query.shape[-3]
    together: dict[tuple[Cut, ...], list[int]] = {}
    for head in range(count):
        together.setdefault(tuple(cut for cut in cuts if cut.holds(head)), []).append(head)
    if len(together) == 1:
        return _by_groups(call, *together)
    parts = [_by_groups(_of_heads(call, heads), own) for own, heads in together.items()]
    order = torch.tensor([head for heads in together.values() for head in heads])
    return _ordered(torch.cat(parts, -3), -3, order)


def _of_heads(call: SdpaCall, heads: Sequence[int]) -> SdpaCall:
    count, chosen = call.query.shape[-3], torch.tensor(heads)

    def pick(tensor: Tensor) -> Tensor:
        """Of keys, values or a mask, which may have fewer heads than there are queries'."""
        own = tensor.shape[-3] if tensor.ndim > 2 else 1
        return tensor if own == 1 else _some(tensor, -3, chosen // (count // own))

    mask = None if call.attn_mask is None else pick(call.attn_mask)
    key, value = (pick(one) for one in (call.key, call.value))
    query = _some(call.query, -3, chosen)
    return call._replace(query=query, key=key, value=value, attn_mask=mask, enable_gqa=False)


def _by_groups(call: SdpaCall, cuts: tuple[Cut, ...]) -> Tensor:
    """Queries that see the same keys run together, on those."""
    if not cuts:
        return kernel(call)
    groups = list(_groups(cuts))
    parts = [part for rows, keys in groups for part in _attend(call, rows, keys)]
    return _ordered(torch.cat(parts, -2), -2, torch.cat([rows for rows, _ in groups]))


def _groups(cuts: tuple[Cut, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of every group of queries, and the keys that it sees."""
    kinds, kind_of = torch.unique(
        torch.stack([c.queries for c in cuts]), dim=1, return_inverse=True
    )
    seen = torch.stack(
        [cut.sees[own][:, cut.keys] for cut, own in zip(cuts, kinds, strict=True)]
    ).all(0)  # (kinds of queries, Nk)
    tables, table_of = torch.unique(seen, dim=0, return_inverse=True)
    group_of = table_of[kind_of]
    for group, table in enumerate(tables):
        yield (group_of == group).nonzero()[:, 0], table.nonzero()[:, 0]


def _attend(call: SdpaCall, rows: Tensor, keys: Tensor) -> Iterator[Tensor]:
    mask = call.attn_mask
    if not len(keys):
        like = kernel(_of_tokens(call, rows[:1], torch.tensor([0])))
        yield like.new_zeros(*like.shape[:-2], len(rows), like.shape[-1])
        return
    whole = len(rows) == call.query.shape[-2] and len(keys) == call.key.shape[-2]
    if not call.is_causal or whole:
        yield kernel(_of_tokens(call, rows, keys))
        return
    for some in torch.split(rows, _CAUSAL_ROWS):
        mask = (keys <= some[:, None]).to(call.query.device)
        part = _of_tokens(call._replace(attn_mask=None, is_causal=False), some, keys)
        yield kernel(part._replace(attn_mask=mask))


def _of_tokens(call: SdpaCall, rows: Tensor, keys: Tensor) -> SdpaCall:
    mask = call.attn_mask
    if mask is not None:
        for dim, chosen in ((-2, rows), (-1, keys)):
            mask = mask if mask.shape[dim] == 1 else _some(mask, dim, chosen)
    return call._replace(
        query=_some(call.query, -2, rows),
        key=_some(call.key, -2, keys),
        value=_some(call.value, -2, keys),
        attn_mask=mask,
    )


def _some(tensor: Tensor, dim: int, chosen: Tensor) -> Tensor:
    """Some of a dimension, without a copy where they lie together."""
    first, count = int(chosen[0]), len(chosen)
    if torch.equal(chosen, torch.arange(first, first + count)):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, chosen.to(tensor.device))


def _ordered(tensor: Tensor, dim: int, places: Tensor) -> Tensor:
    """Parts that belong at `places`, put there."""
    return _some(tensor, dim, places.argsort())


def kernel(call: SdpaCall) -> Tensor:
    """The call as it is."""
    more: dict[str, Any] = {"enable_gqa": True} if call.enable_gqa else {}
    out: Tensor = SDPA(*call[:6], scale=call.scale, **more)
    return out


def changed_reading(
    reader: KernelReader, call: SdpaCall, change: Change, out: Tensor, autocast: torch.dtype | None
) -> Reading:
    """What a changed call means; `out` is what it gave without "mean"."""
    reading = reader.sdpa(call, out, autocast)
    plain = reading.attention
    if plain is None:
        raise UnreadableError("its changed kernel call could not be read")
    parts = _seen(change, plain)
    uniform = change.heads("uniform", plain.query)
    if uniform is not None:
        scale = torch.as_tensor(plain.scale, dtype=torch.float64, device=plain.device)
        parts["scale"] = scale.expand(len(uniform)).masked_fill(uniform[:, 0, 0], 0.0)
    if parts:
        reading = replace(reading, attention=plain.replace(**parts))
    return replace(reading, intervened=change.text)


def _seen(change: Change, plain: Attention) -> dict[str, Any]:
    """Which keys take part after a change, as `Attention` takes it: in a small mask if one says it,
    since that can be stored, else as a function of indices."""
    heads, cuts = plain.shape[1], change.cuts
    zero = change.heads("zero", plain.query)
    if zero is None and not cuts:
        return {}
    if zero is None and len(cuts) == 1 and cuts[0].heads is None:
        segments = cuts[0].segments
        if segments is not None:
            return {"segments": segments}
    alive = torch.ones(heads, dtype=torch.bool) if zero is None else ~zero.cpu()[:, 0, 0]
    tables = [_table(cut, heads) for cut in cuts]
    if plain.mask is None and all(len(table[1]) == 1 for table in tables):
        mask = _together(alive, [~own | sees[0, keys] for own, sees, _, keys in tables])
        return {"mask": mask[:, :, None]}
    if plain.mask is None and all(table[1].shape[1] == 1 for table in tables):
        mask = _together(alive, [~own | sees[rows, 0] for own, sees, rows, _ in tables])
        return {"mask": mask[..., None]}
    return {"mask_mod": _function(alive, tables, plain.device)}


def _table(cut: Cut, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads that a cut holds for, `(h, 1)`, and what it says."""
    own = torch.tensor([cut.holds(head) for head in range(heads)])[:, None]
    return own, cut.sees, cut.queries, cut.keys


def _together(alive: Tensor, seen: Sequence[Tensor]) -> Tensor:
    """`(1, h, N)`, or `(1, 1, N)` where all heads see the same; N is 1 without cuts."""
    mask = alive[:, None]
    for one in seen:
        mask = mask & one
    same = torch.equal(mask, mask[:1].expand_as(mask))
    return (mask[:1] if same else mask)[None]


def _function(
    alive: Tensor, tables: Sequence[tuple[Tensor, ...]], device: torch.device
) -> Callable[..., Tensor]:
    alive = alive.to(device)
    moved = [tuple(part.to(device) for part in table) for table in tables]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = alive[h]
        for own, sees, rows, keys in moved:
            seen = seen & (~own[h, 0] | sees[rows[i], keys[j]])
        return seen

    return mask_mod
