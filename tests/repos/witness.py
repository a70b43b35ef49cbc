"""Every softmax and every attention kernel of a process, seen below all names.

The operators of torch itself are watched, under every function and method that leads there: a
kernel that is imported by name, bound to a method or called by a plain object is seen as well. It
shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

GLOBAL = nn.modules.module


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: its weights in float64, and what they were computed from."""

    module: str
    """The innermost running module."""
    op: str
    weights: Tensor
    """`(…, Nq, Nk)`, heads and batch in front, in float64."""
    inputs: tuple[Tensor, ...]
    """Queries and keys `(…, N, d)`, or only the logits `(…, Nq, Nk)`, in float64."""

    def answers(self, other: Call) -> tuple[Tensor, Tensor]:
        """How much each query and each key of `other` differs, summed over the last dimension."""
        changes = [
            (a - b).nan_to_num(0, 0, 0).abs()
            for a, b in zip(self.inputs, other.inputs, strict=True)
        ]
        if len(changes) == 2:
            return changes[0].sum(-1), changes[1].sum(-1)
        # One changed token changes one row or one column; what all share belongs to the other side.
        change = changes[0]
        rows = (change - change.median(-2, keepdim=True).values).abs().sum(-1)
        columns = (change - change.median(-1, keepdim=True).values).abs().sum(-2)
        return rows, columns


def _fused(
    query: Tensor, key: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None
) -> dict[str, Any]:
    query, key = query.double(), key.double()
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = torch.einsum("...qd,...kd->...qk", query, key) * factor
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -math.inf)
    elif mask is not None:
        logits = logits + mask.double()
    return {"weights": _softmax(logits, -1), "inputs": (query, key)}


def _softmax(logits: Tensor, dim: int) -> Tensor:
    exps = (logits - logits.amax(dim, keepdim=True).clamp_min(-1e300)).exp()
    return exps / exps.sum(dim, keepdim=True).clamp_min(1e-300)


def _read(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What one operator of torch computes, if it is a softmax or an attention kernel."""
    if op in ("_softmax", "_safe_softmax"):
        if args[0].ndim < 2:
            return None
        logits, dim = args[0].double(), int(args[1]) % args[0].ndim
        # Keys last; where heads are behind them, queries go along.
        moved = (dim - 1, dim) if dim > 1 else (dim,)
        logits = logits.movedim(moved, (-2, -1)[-len(moved) :])
        return {"weights": _softmax(logits, -1), "inputs": (logits,)}
    if op.startswith("_scaled_dot_product"):
        if "attn_mask" in kwargs or op.endswith("for_cpu"):
            mask, causal = kwargs.get("attn_mask"), args[4] if len(args) > 4 else False
        else:
            raise NotImplementedError(f"the witness does not read {op}")
        scale = kwargs.get("scale")
        return _fused(args[0], args[1], mask=mask, causal=bool(causal), scale=scale)
    if op == "_native_multi_head_attention":
        query, key, _, width, heads, weight, bias = args[:7]
        mask = args[9] if len(args) > 9 else kwargs.get("mask")
        assert mask is None, "the witness reads no mask of the native multi-head attention"
        sides = []
        for at, tokens in enumerate((query, key)):
            part = slice(at * width, (at + 1) * width)
            side = tokens.double() @ weight[part].double().T + bias[part].double()
            sides.append(side.unflatten(-1, (heads, -1)).transpose(-3, -2))
        return _fused(*sides, mask=None, causal=False, scale=None)
    if "attention" in op and "backward" not in op:
        raise NotImplementedError(f"the witness does not read {op}")
    return None


class Witness(TorchDispatchMode):
    """Notes the kernel calls of what runs within it, in order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = [""]
        self._handles: list[Any] = []

    def __enter__(self) -> Witness:
        # Hooks of the process, not of the model: modules are left as they are.
        self._handles = [
            GLOBAL.register_module_forward_pre_hook(self._enter),
            GLOBAL.register_module_forward_hook(self._leave, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(self._names.get(module, self._running[-1]))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = _read(func._schema.name.rpartition("::")[2], args, kwargs)
        if read is not None:
            self.calls.append(Call(self._running[-1], str(func), **read))
        return func(*args, **kwargs)


def witnessed(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], Any]:
    """The kernel calls of a run, and what the run returned."""
    with torch.no_grad(), Witness(model) as witness:
        output = run()
    return witness.calls, output
