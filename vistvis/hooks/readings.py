"""What one kernel call means: its tensors turned into an `Attention`, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistvis.attention import Attention
from vistvis.attention.arithmetic import unexpanded
from vistvis.errors import VistvisError
from vistvis.hooks.folding import Fold, UnreadableError

SDPA = F.scaled_dot_product_attention


class Mark(NamedTuple):
    """Where a tensor lies in memory; holds on to the memory, so that nothing else comes there."""

    storage: torch.UntypedStorage
    itemsize: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Mark:
        storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
        return cls(storage, tensor.itemsize, offset, tuple(tensor.shape), tensor.stride())

    def same_place(self, other: Mark) -> bool:
        return self.storage.data_ptr() == other.storage.data_ptr() and self[1:] == other[1:]


@dataclass(frozen=True)
class Reading:
    """One kernel call of one site: its weights, still lazy, and if asked for what it returned.

    `lead` and `marks` tell calls that are parts of one: leading dimensions before they were folded,
    and where the queries and keys (of weights: the values) lay. `scores` are, for weights, which
    product they were made of, and whether it was turned round before.
    """

    attention: Attention | None
    source: str
    output: Tensor | None = None  # (B, h, Nq, dv)
    error: str = ""
    lead: tuple[int, ...] = ()
    marks: tuple[Mark, ...] = ()
    scores: tuple[object, bool] | None = None
    intervened: str = ""  # what was changed on purpose, if something was


@dataclass
class Notes:
    """What one run of a module showed: its kernel calls, and what forbids to trust them."""

    readings: list[Reading] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self, source: str, read: Callable[[], Reading]) -> None:
        """Add a reading; what goes wrong is kept, because the user's forward goes on."""
        try:
            self.readings.append(self._sharing_keys(read()))
        except Exception as error:
            self.readings.append(Reading(None, source, error=error_text(error)))

    def _sharing_keys(self, reading: Reading) -> Reading:
        """Without a copy of keys of its own, where they are those of the call before."""
        now, before = reading.attention, self.readings[-1].attention if self.readings else None
        if now is None or before is None or now.weights is not None or before.weights is not None:
            return reading
        if now.key is before.key or not _equal(now.key, before.key):
            return reading
        shared = {"key": before.key}
        if now.value is not None and before.value is not None and _equal(now.value, before.value):
            shared["value"] = before.value
        return replace(reading, attention=now.replace(**shared))


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
    outputs: bool = False
    masks: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, mask: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A mask, kept: one copy, as large as a dense matrix, serves all that use it in a pass."""
        compact = unexpanded(mask)
        mark = (compact.data_ptr(), compact.shape, compact.stride(), compact.dtype, dtype)
        copy = self.masks.get(mark)
        # The original is held on to, so its address is its own; compared, because it may have been
        # written into since.
        if copy is None or not torch.equal(copy[1], compact.to(copy[1])):
            made = keep(compact, dtype, self.device, share=True)
            if made.data_ptr() == compact.data_ptr():
                return made.expand(mask.shape)
            copy = self.masks[mark] = (compact, made)
        return copy[1].expand(mask.shape)


class KernelReader(NamedTuple):
    """Reads kernel calls of one module run; `heads`, `batch`, `heads_at` as in `Fold.of`."""

    keeping: Keeping
    heads: int | None = None
    batch: int | None = None
    heads_at: int | None = None

    def sdpa(self, call: SdpaCall, out: Tensor | None, autocast: torch.dtype | None) -> Reading:
        """A call of the fused kernel; `autocast` is as `autocast_dtype` gives it."""
        query, key, keeping = call.query, call.key, self.keeping
        for name, tensor in (("query", query), ("key", key)):
            if tensor.is_nested:
                raise UnreadableError(f"its {name} is a nested tensor; pad the sequences instead")
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                raise UnreadableError(
                    f"its {name} lives inside a torch.func transform; run it outside"
                )
        if call.dropout_p > 0:
            raise UnreadableError(
                f"dropout is active in the kernel (dropout_p={call.dropout_p:g}), so what it used "
                "is not the softmax; call model.eval()"
            )
        mask = _plain_mask(call.attn_mask)
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        if not call.enable_gqa and query.shape[:-2] != key.shape[:-2]:
            query, key = _broadcast(query, key)
        fold = self._fold(query)
        if mask is not None and fold.changes:
            mask = fold(mask.expand(*query.shape[:-1], key.shape[-2]))
        if mask is not None and mask.ndim > 4:
            raise UnreadableError(
                f"its mask {tuple(mask.shape)} has more dimensions than its query"
            )
        value = None
        if keeping.values:
            value = call.value if call.enable_gqa else _led(call.value, query.shape[:-2])
            value = keep(fold(value), autocast, keeping.device)
        attention = Attention(
            query=keep(fold(query), autocast, keeping.device),
            key=keep(fold(key), autocast, keeping.device),
            scale=float(scale),
            mask=None if mask is None else keeping.mask(mask, autocast),
            causal=call.is_causal,
            value=value,
        )
        return Reading(
            attention,
            "kernel",
            None if out is None or not keeping.outputs else fold(out).detach(),
            lead=tuple(query.shape[:-2]),
            marks=(Mark.of(call.query), Mark.of(call.key)),
        )

    def weights(
        self,
        weights: Tensor,
        value: Tensor | None = None,
        output: Tensor | None = None,
        source: str = "softmax",
    ) -> Reading:
        """Weights `(…, Nq, Nk)` that eager code multiplies with its values."""
        fold, keeping, lead = self._fold(weights), self.keeping, tuple(weights.shape[:-2])
        marks = () if value is None or value.ndim != weights.ndim else (Mark.of(value),)
        kept = None
        if keeping.values and value is not None:
            kept = keep(fold(_led(value, lead)), None, keeping.device)
        attention = Attention.from_weights(keep(fold(weights), None, keeping.device), value=kept)
        out = None if output is None or not keeping.outputs else fold(output).detach()
        return Reading(attention, source, out, lead=lead, marks=marks)

    def _fold(self, tensor: Tensor) -> Fold:
        return Fold.of(tuple(tensor.shape[:-2]), self.heads, self.batch, self.heads_at)


def keep(
    tensor: Tensor, dtype: torch.dtype | None, device: str | None, *, share: bool = False
) -> Tensor:
    """A tensor that stays right after the model runs on, without holding more than it has to.

    Copied where it is a small part of a larger storage (which it would keep alive), where it was
    made in inference mode (nothing tells of later writes), or where dtype or device change. All
    else is shared: `Attention` checks for later writes.
    """
    # Autocast leaves float64 alone, and masks of bool.
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        dtype = None
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


def _equal(first: Tensor, second: Tensor) -> bool:
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and first.device == second.device and torch.equal(first, second)


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


def _broadcast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Leading dimensions as the kernel broadcasts them; nothing is copied."""
    # Not torch.broadcast_shapes: its first call imports sympy, 36 MB and half a second.
    lead = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return query.expand(*lead, *query.shape[-2:]), _led(key, lead)


def _led(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """Keys or values as they meet weights of these leading dimensions; nothing is copied."""
    # One head serves all query heads as it is.
    if len(lead) == 2 and tensor.shape[:-2] == (lead[0], 1):
        return tensor
    try:
        return tensor.expand(*lead, *tensor.shape[-2:])
    except RuntimeError as error:
        raise UnreadableError(
            f"its values {tuple(tensor.shape)} are of more items than its weights, {tuple(lead)}; "
            "leave out values=True (and verify=True)"
        ) from error


def _plain_mask(mask: Any) -> Tensor | None:
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
