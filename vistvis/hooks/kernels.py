"""What reaches an attention kernel: a function mode that is active while one module runs.

`KernelTap` sees the torch functions that a module calls. A call of `scaled_dot_product_attention`
gives its queries and keys. Eager code gives its weights: the tap follows a product of two
activations (scores) through the softmax to the matrix that is multiplied with the values, so that
whatever is done in between (bias, talking heads, gates) is in it.
"""

from __future__ import annotations

import math
import string
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vistvis.attention import Attention
from vistvis.errors import VistvisError

SDPA = F.scaled_dot_product_attention
# Not torch.broadcast_shapes: its first call imports sympy, 36 MB and half a second.
broadcast_shapes = np.broadcast_shapes
_PRODUCTS = {
    torch.matmul, torch.bmm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.bmm, Tensor.baddbmm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_WATCHED = frozenset({SDPA, F.multi_head_attention_forward, *_PRODUCTS, *_SOFTMAX})
_DROPOUT = {F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}


class UnreadableError(VistvisError):
    """Why one kernel call can't be turned into exact weights; the site's name is added later."""


@dataclass(frozen=True)
class Reading:
    """One kernel call of one site: its weights, still lazy, and what it returned.

    `value` `(B, h, Nk, dv)` and `output` `(B, h, Nq, dv)` are None unless they were asked for.
    """

    attention: Attention | None
    source: str
    value: Tensor | None = None
    output: Tensor | None = None
    error: str = ""


def stack_heads(readings: Sequence[Reading]) -> Reading:
    """One reading of a module that calls its kernel once for each head.

    Raises
    ------
    UnreadableError
        If the calls are not alike.
    """
    parts = [reading.attention for reading in readings]
    found = [part for part in parts if part is not None]
    shapes = {(*part.shape, part.weights is None, part.mask is None) for part in found}
    if len(found) < len(parts) or len(shapes) > 1 or found[0].shape[1] != 1:
        raise UnreadableError(f"its {len(parts)} kernel calls are not one for each head")

    def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
        known = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(known, 1) if len(known) == len(tensors) else None

    weights = cat([part.weights for part in found])
    query, key = cat([part.query for part in found]), cat([part.key for part in found])
    if weights is not None:
        attention = Attention.from_weights(weights)
    elif query is None or key is None or len({str(part.scale) for part in found}) > 1:
        raise UnreadableError(f"its {len(parts)} kernel calls are not alike")
    else:
        mask = cat([part.mask for part in found])
        attention = Attention(
            query=query, key=key, scale=found[0].scale, mask=mask, causal=found[0].causal
        )
    value, output = cat([one.value for one in readings]), cat([one.output for one in readings])
    return Reading(attention, readings[0].source, value, output)


def over_tokens(reading: Reading, sizes: tuple[int, ...]) -> Reading:
    """Refuse attention over channels: as many queries as a head has channels, summed over tokens.

    `sizes` is the shape of the module's input, `(B, N, C)`; with others nothing can be told.
    """
    found = reading.attention
    if found is None or len(sizes) != 3:
        return reading
    _, tokens, width = sizes
    _, heads, queries, keys = found.shape
    channels = queries == keys != tokens and heads * queries == width
    if not channels or (found.query is not None and found.query.shape[-1] != tokens):
        return reading
    text = (
        f"its {queries}×{keys} weights are over the channels of a head, not over its {tokens} "
        "tokens (cross-covariance)"
    )
    return Reading(None, reading.source, error=text)


def unpack_groups(reading: Reading, heads: int | None, groups: Any) -> Reading:
    """Undo the packing of grouped heads into the token dimension.

    With one query token, transformers hands the kernel `(B, h / g, g, d)` for h heads in groups of
    g: the same products, with heads where queries belong.
    """
    packed = reading.attention
    if packed is None or packed.query is None or packed.key is None or heads is None:
        return reading
    _, key_heads, count, _ = packed.shape
    same = isinstance(groups, int) and groups > 1 and count == groups
    if not same or key_heads * count != heads or packed.key.shape[1] != key_heads:
        return reading

    def spread(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], heads, 1, tensor.shape[-1])

    mask = packed.mask
    if mask is not None and mask.shape[-2] == count:
        mask = spread(mask.expand(mask.shape[0], key_heads, count, mask.shape[-1]))
    attention = Attention(query=spread(packed.query), key=packed.key, scale=packed.scale, mask=mask)
    value, output = reading.value, reading.output
    if value is not None and output is not None:
        value, output = value.repeat_interleave(count, 1), spread(output)
    return replace(reading, attention=attention, value=value, output=output)


class SdpaCall(NamedTuple):
    """The arguments of one `scaled_dot_product_attention` call, under its names."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


@dataclass(frozen=True)
class Keeping:
    """How tensors are kept: on which device, and whether values and outputs are kept too."""

    device: str | None = None
    values: bool = False
    masks: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, mask: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A mask, kept: one copy serves every site that uses the same one in a pass.

        Masks are as large as a dense matrix, and a copy for each site would be what is avoided.
        """
        # A broadcast dimension is kept as one.
        thin = [
            slice(0, 1) if step == 0 and size > 1 else slice(None)
            for step, size in zip(mask.stride(), mask.shape, strict=True)
        ]
        compact = mask[tuple(thin)] if thin else mask
        mark = (compact.data_ptr(), compact.shape, compact.stride(), compact.dtype, dtype)
        known = self.masks.get(mark)
        # The original is held on to, so its address is its own; compared, because it may have been
        # written into since.
        if known is None or not torch.equal(known[1], compact.to(known[1])):
            made = keep(compact, dtype, self.device, share=True)
            if made.data_ptr() == compact.data_ptr():
                return made.expand(mask.shape)
            known = self.masks[mark] = (compact, made)
        return known[1].expand(mask.shape)


# -- the function mode ----------------------------------------------------------------------------


class KernelTap(TorchFunctionMode):
    """Reads the attention kernel calls of the module that runs while it is active.

    Parameters
    ----------
    heads, batch
        What is known of the module and its input; they settle shapes with folded dimensions.
    keeping
        What to do with the tensors.
    active
        Says whether the calls belong to this tap (False inside a nested site).
    instead
        Functions (of those watched) that are run by another, which reads what they hide.
    heads_at
        Which of its leading dimensions are heads, where sizes may not tell.
    """

    def __init__(
        self,
        *,
        heads: int | None,
        batch: int | None,
        keeping: Keeping,
        active: Callable[[], bool],
        instead: Mapping[Callable[..., Any], Callable[..., Any]],
        heads_at: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.batch, self.keeping, self.active = heads, batch, keeping, active
        self.heads_at = heads_at
        self.readings: list[Reading] = []
        self.problems: list[str] = []
        self._instead, self._flow = instead, _Flow(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Every function of the module comes by here, reading a shape among them: what is of no
        # interest has to leave soon. (A global set: code that compiles itself is traced through
        # here, and Dynamo can't hash what an attribute of a mode holds.)
        kwargs = kwargs or {}
        if func not in _WATCHED and not self._flow.begun:
            return func(*args, **kwargs)
        if func is SDPA:
            return self._sdpa(args, kwargs)
        if func in self._instead and self.active():
            return self._instead[func](*args, **kwargs)
        out = func(*args, **kwargs)
        self._flow.follow(func, args, kwargs, out)
        return out

    def _sdpa(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = SDPA(*args, **kwargs)
        if self.active():
            try:
                self.readings.append(
                    read_sdpa(
                        SdpaCall(*args, **kwargs),
                        out,
                        *(self.heads, self.batch, self.keeping, self.heads_at),
                        autocast_dtype(args[0] if args else kwargs["query"]),
                    )
                )
            except Exception as error:  # the user's forward goes on; raised at access
                self.readings.append(Reading(None, "kernel", error=error_text(error)))
        return out


def read_sdpa(
    call: SdpaCall,
    out: Tensor | None,
    heads: int | None,
    batch: int | None,
    keeping: Keeping,
    heads_at: int | None = None,
    autocast: torch.dtype | None = None,
) -> Reading:
    """Turn one kernel call into an `Attention` over the tensors that the kernel used.

    `autocast` is the dtype that autocast gave to the kernel's inputs, or None.
    """
    query, key = call.query, call.key
    for name, tensor in (("query", query), ("key", key)):
        if tensor.is_nested:
            raise UnreadableError(f"its {name} is a nested tensor; pad the sequences instead")
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise UnreadableError(f"its {name} lives inside a torch.func transform; run it outside")
    if call.dropout_p > 0:
        raise UnreadableError(
            f"dropout is active in the kernel (dropout_p={call.dropout_p:g}), so what it used is "
            "not the softmax; call model.eval()"
        )
    mask = _known_mask(call.attn_mask)
    dtype = autocast
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    if not call.enable_gqa and query.shape[:-2] != key.shape[:-2]:
        query, key = _broadcast(query, key)
    fold = Fold.of(tuple(query.shape[:-2]), heads, batch, heads_at=heads_at)
    if mask is not None and fold.changes:
        mask = fold(mask.expand(*query.shape[:-1], key.shape[-2]))
    if mask is not None and mask.ndim > 4:
        raise UnreadableError(f"its mask {tuple(mask.shape)} has more dimensions than its query")
    attention = Attention(
        query=keep(fold(query), dtype, keeping.device),
        key=keep(fold(key), dtype, keeping.device),
        scale=float(scale),
        mask=None if mask is None else keeping.mask(mask, dtype),
        causal=call.is_causal,
    )
    value = output = None
    if keeping.values and out is not None:
        groups = call.query.shape[-3] // call.value.shape[-3] if call.enable_gqa else 1
        value = call.value.repeat_interleave(groups, -3) if groups > 1 else call.value
        value = fold(value.expand(*call.query.shape[:-2], *value.shape[-2:])).detach()
        output = fold(out).detach()
    return Reading(attention, "kernel", value, output)


def _broadcast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Leading dimensions as the kernel broadcasts them; nothing is copied."""
    lead = broadcast_shapes(query.shape[:-2], key.shape[:-2])
    # One key head serves all query heads as it is.
    single = len(lead) == 2 and key.shape[1] == 1 and key.shape[0] == lead[0]
    return (
        query.expand(*lead, *query.shape[-2:]),
        key if single else key.expand(*lead, *key.shape[-2:]),
    )


def keep(
    tensor: Tensor, dtype: torch.dtype | None, device: str | None, *, share: bool = False
) -> Tensor:
    """A tensor that stays right after the model runs on, without holding more than it has to.

    Copied where it is a small part of a larger storage (which it would keep alive), where it was
    made in inference mode (nothing tells of later writes), or where dtype or device change. All
    else is shared: `Attention` checks for later writes.
    """
    if tensor.dtype == torch.bool or not tensor.is_floating_point():
        dtype = None
    if tensor.dtype == torch.float64:
        dtype = None  # autocast leaves float64 alone
    moved = tensor.detach()
    if dtype is not None or device is not None:
        moved = moved.to(dtype=dtype or tensor.dtype, device=device or tensor.device)
        if moved.data_ptr() != tensor.data_ptr():
            return moved
    needed = moved.numel() * moved.element_size()
    stored = moved.untyped_storage().nbytes()
    if moved.is_inference() or (stored > 1.02 * needed + 1024 and not share):
        return moved.clone(memory_format=torch.contiguous_format)
    return moved


@dataclass(frozen=True)
class Fold:
    """How leading dimensions become `(batch, heads)`: which one is heads, and the target shape."""

    lead: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        lead: tuple[int, ...],
        heads: int | None,
        batch: int | None,
        *,
        heads_at: int | None = None,
    ) -> Fold:
        """Find the head dimension among leading dimensions `lead`.

        `heads_at` says where it is, for classes where sizes may not tell; 0 says that `lead` is
        (batch · heads, windows).

        Raises
        ------
        UnreadableError
            If it can't be told.
        """
        count = len(lead)
        if count == 2 and heads_at == 0 and heads:
            first = lead[0] // heads
            return cls((first, heads, lead[1]), (0, 2, 1), (first * lead[1], heads))
        if count == 2:
            return cls(lead, (0, 1), (lead[0], lead[1]))
        if count == 0 and batch is not None:
            raise UnreadableError("its weights have no batch dimension, though its input has one")
        if count == 0:
            return cls(lead, (), (1, 1))
        if count == 1:
            folded = heads is not None and heads > 1 and lead[0] % heads == 0
            if folded and heads is not None and (batch is None or lead[0] == batch * heads):
                return cls(lead, (0,), (lead[0] // heads, heads))
            return cls(lead, (0,), (lead[0], 1))
        places = [place for place in range(1, count) if lead[place] == heads]
        if heads_at is not None and lead[heads_at] == heads:
            places = [heads_at]
        if not places or (len(places) > 1 and heads != 1):
            raise UnreadableError(
                f"which of its dimensions {lead} are heads is not known (the module says {heads})"
            )
        rest = tuple(dim for dim in range(count) if dim != places[0])
        number = math.prod(lead[dim] for dim in rest)
        return cls(lead, (*rest, places[0]), (number, lead[places[0]]))

    @property
    def changes(self) -> bool:
        return len(self.lead) != 2 or self.order != (0, 1)

    def __call__(self, tensor: Tensor) -> Tensor:
        if not self.changes:
            return tensor
        count = len(self.lead)
        if count == 3 and tensor.ndim == 4:
            tensor = tensor.reshape(*self.lead, *tensor.shape[-2:])
        if tensor.ndim != count + 2:
            raise UnreadableError(f"its tensors have {tensor.ndim} and {count + 2} dimensions")
        if count >= 2:
            tensor = tensor.permute(*self.order, count, count + 1)
        return tensor.reshape(*self.shape, *tensor.shape[-2:])


def _known_mask(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, Tensor) and type(mask) in (Tensor, nn.Parameter):
        return mask
    materialize = getattr(mask, "_materialize", None)  # torch.nn.attention.bias.CausalBias
    if materialize is not None:
        made = materialize(mask.device)
        if type(made) is Tensor:
            return made
    raise UnreadableError(f"its mask is a {type(mask).__name__}, whose meaning is not known")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to the kernel's inputs here, or None."""
    kind = tensor.device.type
    try:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    except RuntimeError:  # a device without autocast
        return None


def error_text(error: Exception) -> str:
    """An error as one line; its type only where the text needs it."""
    text = str(error) if isinstance(error, VistvisError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


# -- eager code -----------------------------------------------------------------------------------


class _Flow:
    """Follows scores to weights to the product with values, through a module's torch functions."""

    def __init__(self, tap: KernelTap) -> None:
        # Weak: a cycle would keep queries and keys until the garbage collector comes round.
        self._tap: KernelTap = weakref.proxy(tap)
        # By id, with a weak reference: an id alone may come back as another tensor's.
        self._scores: dict[int, weakref.ref[Tensor]] = {}
        self._weights: dict[int, weakref.ref[Tensor]] = {}
        self.begun = False
        """Whether there is anything to follow yet."""

    def follow(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        if func in _PRODUCTS:
            self._product(func, list(_tensors((*args, *kwargs.values()))), args, out)
        elif func in _SOFTMAX:
            self._softmax(args, kwargs, out)
        elif self.begun:
            inputs = list(_tensors((*args, *kwargs.values())))
            if any(self._has(self._weights, tensor) for tensor in inputs):
                if func in _DROPOUT and _dropping(func, args, kwargs):
                    self._tap.problems.append("dropout is active on its weights; call model.eval()")
                self._mark(self._weights, out)
            elif any(self._has(self._scores, tensor) for tensor in inputs):
                self._mark(self._scores, out)

    def _softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        scores = kwargs.get("input", args[0] if args else None)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(scores, Tensor) or not self._has(self._scores, scores):
            return
        if dim not in (-1, scores.ndim - 1):
            self._tap.problems.append(
                f"its softmax runs over dimension {dim} of {tuple(scores.shape)}, not over the last"
            )
        self._mark(self._weights, out)

    def _product(
        self, func: Callable[..., Any], tensors: list[Tensor], args: Sequence[Any], out: Any
    ) -> None:
        if func in (torch.baddbmm, Tensor.baddbmm):
            tensors = tensors[1:3]
        if len(tensors) != 2 or not isinstance(out, Tensor):
            return
        first, second = tensors
        if func is Tensor.__rmatmul__:
            first, second = second, first
        taken = [self._has(self._weights, tensor) for tensor in tensors]
        if any(taken):
            if not self._tap.active():
                return
            try:
                equation = args[0] if func is torch.einsum else None
                self._take(first, second, taken[0], out, equation)
            except Exception as error:
                self._tap.readings.append(Reading(None, "softmax", error=error_text(error)))
        elif not any(isinstance(tensor, nn.Parameter) for tensor in tensors):
            self._mark(self._scores, out)

    def _take(
        self, first: Tensor, second: Tensor, weights_first: bool, out: Tensor, equation: Any
    ) -> None:
        value: Tensor | None
        output: Tensor | None
        if isinstance(equation, str):
            weights = _einsum_weights(equation, first, second, weights_first)
            value = output = None
        elif weights_first:
            weights, value, output = first, second, out
        else:
            weights, value, output = second.mT, first.mT, out.mT
        tap = self._tap
        lead = tuple(weights.shape[:-2])
        fold = Fold.of(lead, tap.heads, tap.batch, heads_at=tap.heads_at)
        kept = keep(fold(weights), None, tap.keeping.device)
        reading = Reading(Attention.from_weights(kept), "softmax")
        if tap.keeping.values and value is not None and output is not None:
            value = value.expand(*weights.shape[:-2], *value.shape[-2:])
            reading = replace(reading, value=fold(value).detach(), output=fold(output).detach())
        tap.readings.append(reading)

    @staticmethod
    def _has(marks: dict[int, weakref.ref[Tensor]], tensor: Tensor) -> bool:
        mark = marks.get(id(tensor))
        return mark is not None and mark() is tensor

    def _mark(self, marks: dict[int, weakref.ref[Tensor]], out: Any) -> None:
        for tensor in _tensors((out,)):
            if tensor.ndim >= 2:
                self.begun = True
                marks[id(tensor)] = weakref.ref(tensor)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _dropping(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    third = "train" if func is torch.dropout else "training"
    on = kwargs.get(third, args[2] if len(args) > 2 else True)
    return bool(on) and float(p) > 0


def _einsum_weights(equation: str, first: Tensor, second: Tensor, weights_first: bool) -> Tensor:
    """The weights of `einsum("…qk,…kd->…qd", weights, values)`, as `(…, queries, keys)`."""
    terms, _, result = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    mine, other, weights = (left, right, first) if weights_first else (right, left, second)
    if "..." in equation:
        spare = [letter for letter in string.ascii_letters if letter not in equation]
        dots = "".join(spare[: weights.ndim - len(mine.replace("...", ""))])
        mine, other, result = (term.replace("...", dots) for term in (mine, other, result))
    keys = [letter for letter in mine if letter in other and letter not in result]
    queries = [letter for letter in mine if letter not in other and letter in result]
    if len(keys) != 1 or len(queries) != 1:
        raise UnreadableError(f"einsum({equation!r}) leaves unclear what are queries and what keys")
    lead = [letter for letter in mine if letter not in (keys[0], queries[0])]
    return weights.permute([mine.index(letter) for letter in (*lead, queries[0], keys[0])])
