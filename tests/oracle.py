"""References that share no code with the package: what a module's attention weights are.

`reference_weights` runs a float64 copy of one attention module on its recorded input, and takes the
weights from the module's own eager code (what enters its `attn_drop`, or its softmax), or computes
the softmax in float64 from what a replaced `scaled_dot_product_attention` was called with.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistvis import Attention


def softmax_of(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) in float64, written out; a row without keys is zeros."""
    query, key = query.double(), key.double()
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits = torch.einsum("...qd,...kd->...qk", query, key)
    logits = logits * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = torch.where(allowed, logits, -torch.inf)
    if mask is not None:
        shift = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        logits = logits + shift.double()
    exps = (logits - logits.amax(-1, keepdim=True).clamp_min(-1e300)).exp()
    return exps / exps.sum(-1, keepdim=True).clamp_min(1e-300)


def dense_of(a: Attention, *, also: Tensor | None = None) -> Tensor:
    """What an `Attention` stands for, in float64; `also` is a bool mask that it has besides."""
    if a.weights is not None:
        return a.weights.double()
    seen = torch.ones(a.shape, dtype=torch.bool) if also is None else also.expand(a.shape)
    if a.mask is not None:
        seen = seen & a.mask
    if a.segments is not None:
        of = torch.searchsorted(a.segments, torch.arange(a.shape[2]), right=True)
        seen = seen & (of[:, None] == of[None])
    return softmax_of(a.query, a.key, mask=seen, causal=a.causal, scale=a.scale)  # type: ignore[arg-type]


def record_inputs(
    modules: dict[str, nn.Module], run: Callable[[], Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that each module gets while `run()` runs, copied."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def taker(name: str) -> Any:
        def take(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name] = copy_tensors(args), copy_tensors(kwargs)

        return take

    handles = [
        module.register_forward_pre_hook(taker(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def copy_tensors(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of nested containers of tensors; floating ones may change dtype."""
    if isinstance(value, Tensor):
        made = value.detach().clone()
        return made.to(dtype) if dtype and made.is_floating_point() else made
    if isinstance(value, (tuple, list)):
        return type(value)(copy_tensors(one, dtype) for one in value)
    if isinstance(value, dict):
        return {key: copy_tensors(one, dtype) for key, one in value.items()}
    return value


@contextlib.contextmanager
def replaced_kernels(module: nn.Module, found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Replace SDPA and softmax where they are looked up, and note what they compute."""
    sdpa, soft, method = F.scaled_dot_product_attention, F.softmax, torch.Tensor.softmax
    plain = torch.softmax

    def my_sdpa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        found["sdpa"].append(softmax_of(q, k, mask=attn_mask, causal=is_causal, scale=scale))
        return sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def noting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def note(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            # One softmax may call another: nn.Softmax → F.softmax → Tensor.softmax.
            if not any(out is known for known in found["softmax"]):
                found["softmax"].append(out)
            return out

        return note

    namespaces = [vars(F)]
    for one in module.modules():
        namespace = vars(sys.modules[type(one).__module__])
        if namespace.get("scaled_dot_product_attention") is sdpa:
            namespaces.append(namespace)
    try:
        for namespace in namespaces:
            namespace["scaled_dot_product_attention"] = my_sdpa
        F.softmax, torch.softmax = noting(soft), noting(plain)  # type: ignore[assignment]
        torch.Tensor.softmax = noting(method)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for namespace in namespaces:
            namespace["scaled_dot_product_attention"] = sdpa
        F.softmax, torch.softmax = soft, plain
        del torch.Tensor.softmax


def reference_weights(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], heads: int | None
) -> Tensor:
    """Float64 weights `(B, h, Nq, Nk)` of one attention module on one input."""
    double = copy.deepcopy(module).double()
    double.eval()  # in a line of its own: some modules' `eval` returns nothing
    found: dict[str, list[Tensor]] = {"sdpa": [], "softmax": [], "drop": []}
    for one in double.modules():
        if getattr(one, "fused_attn", None) is True:
            one.fused_attn = False  # type: ignore[assignment]
    drop = getattr(double, "talking_head2", getattr(double, "attn_drop", None))
    if isinstance(drop, nn.Module):
        drop.register_forward_hook(lambda module, inputs, output: found["drop"].append(output))
    with torch.no_grad(), replaced_kernels(double, found):
        double(*copy_tensors(args, torch.float64), **copy_tensors(kwargs, torch.float64))
    size = _first_size(args, kwargs)
    for source in ("drop", "sdpa", "softmax"):
        if len(found[source]) == 1:
            return _heads_second(module, found[source][0].double(), heads, size)
        if len(found[source]) == heads and type(module).__name__ == "CascadedGroupAttention":
            return torch.cat([one[:, None] for one in found[source]], 1)
    raise AssertionError({name: len(values) for name, values in found.items()})


def _first_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    return int(tensors[0].shape[0])


def _heads_second(module: nn.Module, weights: Tensor, heads: int | None, batch: int) -> Tensor:
    """`(…, Nq, Nk)` with heads somewhere in front → `(B, h, Nq, Nk)`."""
    name = type(module).__name__
    if name == "LocallyGroupedAttn":  # (B, windows, h, …)
        return weights.flatten(0, 1)
    nest = type(module).__module__ == "timm.models.nest"
    if weights.ndim == 5 and (name == "MaskUnitAttention" or nest):
        return weights.transpose(1, 2).flatten(0, 1)  # (B, h, windows, …)
    if weights.ndim == 4 and (heads is None or weights.shape[0] != batch * heads):
        return weights
    if weights.ndim == 4:  # HaloNet: (B·h, blocks, …)
        assert heads is not None
        return weights.unflatten(0, (batch, heads)).transpose(1, 2).flatten(0, 1)
    if weights.ndim == 3:
        if heads and weights.shape[0] == batch * heads:
            return weights.unflatten(0, (batch, heads))
        return weights[:, None]
    assert heads is not None
    lead = list(weights.shape[:-2])
    assert lead.count(heads) == 1, f"which of {lead} are {heads} heads?"
    return weights.movedim(lead.index(heads), -3).flatten(0, -4)


# -- making attention sharp ------------------------------------------------------------------------


def sharpen_once(module: nn.Module, factor: float) -> bool:
    """Multiply the logits of an attention module by `factor`; False if it's not known how."""
    with torch.no_grad():
        scale = getattr(module, "logit_scale", None)
        if isinstance(scale, nn.Parameter):
            scale += math.log(factor)
            return True
        for name in ("q_norm", "norm_q", "query_norm"):
            norm = getattr(module, name, None)
            if isinstance(norm, nn.Module) and getattr(norm, "weight", None) is not None:
                norm.weight.mul_(factor)
                if getattr(norm, "bias", None) is not None:
                    norm.bias.mul_(factor)
                return True
        for name in ("q", "q_proj", "query", "to_q", "projq", "wq", "query_proj", "theta"):
            if _scale_layer(getattr(module, name, None), factor):
                return True
        for name in ("in_proj_weight", "qkv_weight"):
            weight = getattr(module, name, None)
            if isinstance(weight, nn.Parameter):
                weight[: weight.shape[0] // 3].mul_(factor)
                return True
        for name in ("qkv", "to_qkv", "qk", "qkvs", "Wqkv", "c_attn", "kv"):
            if _scale_layer(getattr(module, name, None), math.sqrt(factor)):
                return True
    return False


def _scale_layer(layer: nn.Module | None, factor: float) -> bool:
    if isinstance(layer, nn.ModuleList):
        scaled = [_scale_layer(one, factor) for one in layer]
        return bool(scaled) and all(scaled)
    if not isinstance(layer, nn.Module):
        return False
    last = [one for one in layer.modules() if isinstance(getattr(one, "weight", None), Tensor)]
    if not last:
        return False
    for name in ("weight", "bias"):
        parameter = getattr(last[-1], name, None)
        if isinstance(parameter, Tensor):
            parameter.mul_(factor)
    return True


def sharpen(
    modules: dict[str, nn.Module],
    largest: Callable[[], dict[str, float]],
    *,
    low: float = 0.3,
    high: float = 0.95,
    steps: int = 16,
) -> dict[str, float]:
    """Sharpen step by step until every module's largest weight lies between `low` and `high`."""
    stuck: set[str] = set()
    now = largest()
    for _ in range(steps):
        moved = False
        for name, module in modules.items():
            if name not in now or name in stuck or low <= now[name] <= high:
                continue
            # Far from the goal in larger steps, near it in small ones.
            factor = (4.0 if now[name] < 0.05 else 1.5) if now[name] < low else 1 / 1.2
            moved |= sharpen_once(module, factor) or bool(stuck.add(name))
        if not moved:
            break
        now = largest()
    return now


def randomise_zeros(model: nn.Module, size: float = 0.5) -> None:
    """Give parameters that start as zeros (bias tables, gates) values, or they'd go unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            constant = parameter.numel() > 1 and not parameter.count_nonzero()
            table = any(word in name for word in ("bias_table", "rel_pos", "relative_position"))
            if constant or table:
                parameter.normal_(0, size if table or parameter.ndim > 1 else 0.1)
