"""What calls of other kernels mean: flash_attn, xformers, flex_attention, varlen_attn.

Each is told by the names of its parameters, and turned into what `scaled_dot_product_attention`
would get for the same weights, with segments and functions of indices where a mask would be N×N.
An argument whose effect is not known must have its default, or the call is refused.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vistvis.attention.rows import DENSE_LIMIT
from vistvis.hooks.folding import UnreadableError
from vistvis.hooks.indices import kept_function
from vistvis.hooks.readings import KernelReader, Reading, SdpaCall
from vistvis.models.families import FLASH, FLEX, XFORMERS, why_approximate

# Arguments that change how weights are computed or what else is returned, not what they are.
_HARMLESS = {
    *("deterministic", "num_splits", "pack_gqa", "sm_margin", "kernel_options", "op", "training"),
    *("return_attn_probs", "return_softmax_lse", "return_lse", "return_aux", "output_dtype"),
    *("max_seqlen_q", "max_seqlen_k", "max_seqlen", "max_q", "max_k"),
    *("enable_gqa", "rotary_interleaved"),
}
_REASONS = {
    "block_table": "its keys lie in pages of a table",
    "rotary_cos": "it rotates queries and keys itself",
    "s_aux": "its softmax has a sink beside the keys",
}


class Meaning(NamedTuple):
    """A kernel call as `scaled_dot_product_attention` would take it, and what that can't take."""

    call: SdpaCall
    out: Any
    segments: list[int] | None = None
    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None


def read_call(
    name: str,
    kernel: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    reader: KernelReader,
) -> Reading:
    """One call of a kernel; `UnreadableError` where its weights can't be told exactly."""
    approximate = why_approximate(frozenset({name}))
    if approximate:
        raise UnreadableError(approximate)
    arguments = _Arguments(kernel, args, kwargs)
    query, key, value = arguments.tensors()
    used = {"queries": query, "keys": key} | ({"values": value} if reader.keeping.values else {})
    for side, tensor in used.items():
        if tensor.dtype.itemsize < 2:
            raise UnreadableError(f"its {side} are {tensor.dtype}: quantised, with scales apart")
    out = out[0] if isinstance(out, tuple) else out
    meaning = _READERS[name](arguments, query, key, value, out)
    arguments.refuse_rest()
    found = reader.sdpa(meaning.call, meaning.out, None)
    plain = found.attention
    if plain is None or not (meaning.segments or meaning.score_mod or meaning.mask_mod):
        return found
    mods = [
        kept_function(function, reader.keeping) if function else None
        for function in (meaning.score_mod, meaning.mask_mod)
    ]
    attention = plain.replace(segments=meaning.segments, score_mod=mods[0], mask_mod=mods[1])
    return Reading(attention, found.source, found.output)


class _Arguments:
    """The arguments of a call by name; readers take what they know, the rest must be defaults."""

    def __init__(
        self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        signature = inspect.signature(kernel)
        self._defaults = {name: one.default for name, one in signature.parameters.items()}
        self._left: dict[str, Any] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            many = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            self._left.update(value if many else {name: value})

    def take(self, *names: str, default: Any = None) -> Any:
        """The argument that goes by one of these names."""
        for name in names:
            if name in self._left:
                value = self._left.pop(name)
                return default if value is None else value
        return default

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, packed or not."""
        packed = self.take("qkv")
        if packed is not None:
            return tuple(packed.unbind(-3))
        query, pair = self.take("q", "query"), self.take("kv")
        if pair is not None:
            return query, *pair.unbind(-3)
        return query, self.take("k_cache", "k", "key"), self.take("v_cache", "v", "value")

    def refuse_rest(self) -> None:
        for name, value in self._left.items():
            default = self._defaults.get(name, False)
            unset = value is None or value is default
            if name in _HARMLESS or unset or (not isinstance(value, Tensor) and value == default):
                continue
            why = _REASONS.get(name, "its effect on the weights is not known")
            raise UnreadableError(f"its kernel got {name}=…: {why}")


class _Places(NamedTuple):
    """Where tokens lie in their sequences, as functions of their index.

    Counted so that the last query of a sequence lies where its last key lies. `same` tells tokens
    of one sequence, where there are several.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    same: Callable[[Tensor, Tensor], Tensor] | None = None


# -- flash_attn and varlen_attn ------------------------------------------------------------------


def _flash(a: _Arguments, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Meaning:
    """Tensors `(B, N, h, d)`."""
    shift = key.shape[1] - query.shape[1]
    turned = [tensor.transpose(1, 2) for tensor in (query, key, value, out)]
    return _banded(a, *turned, places=_Places(lambda i: i + shift, lambda j: j), even=shift == 0)


def _flash_cached(a: _Arguments, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Meaning:
    """Keys are the filled start of a cache `(B, M, h, d)`, new ones already written into it."""
    new, _, filled = a.take("k"), a.take("v"), a.take("cache_seqlens")
    if isinstance(filled, Tensor):
        lengths = sorted(set(filled.tolist()))
        if len(lengths) > 1:
            raise UnreadableError("its cache is filled to another length in each batch item")
        filled = lengths[0]
    count = key.shape[1] if filled is None else filled + (0 if new is None else new.shape[1])
    # Copies: the cache is written into by code that leaves no trace of it.
    return _flash(a, query, key[:, :count].clone(), value[:, :count].clone(), out)


def _varlen(a: _Arguments, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Meaning:
    """Tensors `(T, h, d)`: sequences one behind the other."""
    bounds = a.take("cu_seqlens_q", "cu_seq_q", "cu_seqlens")
    rows = _checked_bounds(bounds, query.shape[0], "queries")
    columns = _checked_bounds(
        a.take("cu_seqlens_k", "cu_seq_k", default=bounds), key.shape[0], "keys"
    )
    row_sequence, column_sequence = (_sequences(one, query.device) for one in (rows, columns))
    # A query's place: its number in the sequence, from the end of the sequence's keys.
    shifts = torch.tensor([c - r for r, c in zip(rows[1:], columns[1:], strict=True)])
    shift = shifts.to(query.device)[row_sequence]
    places = _Places(
        lambda i: i + shift[i],
        lambda j: j,
        lambda i, j: row_sequence[i] == column_sequence[j],
    )
    even = rows == columns
    starts = [start for start, end in itertools.pairwise(rows) if start < end]
    turned = [tensor.transpose(0, 1)[None] for tensor in (query, key, value, out)]
    return _banded(a, *turned, places=places, even=even, starts=starts if even else None)


def _banded(
    a: _Arguments,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    places: _Places,
    even: bool,
    starts: list[int] | None = None,
) -> Meaning:
    """Tensors `(B, h, N, d)`; `even` where every sequence has as many queries as keys."""
    causal = a.take("causal", "is_causal", default=False)
    left, right = a.take("window_size", default=(-1, -1))
    right = 0 if causal else right
    score_mod = _score_mod(a, places)
    scale, dropout = a.take("softmax_scale", "scale"), a.take("dropout_p", default=0.0)
    call = SdpaCall(query, key, value, dropout_p=dropout, scale=scale, enable_gqa=True)
    if even and left < 0 and right <= 0 and not (starts and score_mod):
        return Meaning(call._replace(is_causal=right == 0), out, starts, score_mod)
    return Meaning(call, out, score_mod=score_mod, mask_mod=_band(places, left, right))


def _band(places: _Places, left: int, right: int) -> Callable[..., Tensor] | None:
    """True for keys at most `left` places before a query and `right` behind; −1 is no limit."""
    if left < 0 and right < 0 and places.same is None:
        return None

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ahead = places.key(j) - places.query(i)
        sees = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            sees = sees & (ahead >= -left)
        if right >= 0:
            sees = sees & (ahead <= right)
        return sees if places.same is None else sees & places.same(i, j)

    return mask_mod


def _score_mod(a: _Arguments, places: _Places) -> Callable[..., Tensor] | None:
    """Capping of scores first, then ALiBi's slope with the distance."""
    cap, slopes = a.take("softcap", default=0.0), a.take("alibi_slopes")
    if not cap and slopes is None:
        return None
    each = slopes is not None and slopes.ndim == 2
    if each and places.same is not None:
        raise UnreadableError("its alibi_slopes differ by sequence; give one for each head, (h,)")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            slope = slopes[b, h] if each else slopes[h]
            score = score - slope * (places.query(i) - places.key(j)).abs()
        return score

    return score_mod


def _checked_bounds(bounds: Any, count: int, what: str) -> list[int]:
    numbers: list[int] = bounds.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(numbers))
    if not rising or numbers[0] != 0 or numbers[-1] != count:
        raise UnreadableError(
            f"its sequences must cover its {count} {what}, and go from {numbers[0]} to "
            f"{numbers[-1]}; leave out what is padding"
        )
    return numbers


def _sequences(bounds: list[int], device: torch.device) -> Tensor:
    """The number of each token's sequence, `(T,)`."""
    lengths = torch.tensor(bounds).diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)


# -- xformers ------------------------------------------------------------------------------------


def _xformers(a: _Arguments, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Meaning:
    """Tensors `(B, N, h, d)`, `(B, N, g, h, d)` for keys that serve h heads, or `(B, N, d)`."""
    bias, scale = a.take("attn_bias"), a.take("scale")
    if query.ndim == 5:
        if isinstance(bias, Tensor):
            bias = bias.flatten(1, 2)
        query, out = query.flatten(2, 3), out.flatten(2, 3)
        # Keys that `expand` gave to all heads of a group are not copied for each.
        key, value = (
            tensor[:, :, :, 0] if tensor.stride(3) == 0 else tensor.flatten(2, 3)
            for tensor in (key, value)
        )
    if query.ndim == 4:
        query, key, value, out = (one.transpose(1, 2) for one in (query, key, value, out))
    call = SdpaCall(query, key, value, dropout_p=a.take("p", default=0.0), scale=scale)
    call = call._replace(enable_gqa=query.ndim == 4)
    kind = type(bias).__name__
    if bias is None or isinstance(bias, Tensor):
        return Meaning(call._replace(attn_mask=bias), out)
    if kind == "LowerTriangularMask":
        return Meaning(call._replace(is_causal=True), out)
    if kind in ("BlockDiagonalMask", "BlockDiagonalCausalMask"):
        rows, columns = ([*info.seqstart_py] for info in (bias.q_seqinfo, bias.k_seqinfo))
        if rows == columns and rows[-1] == query.shape[-2]:
            starts = [start for start, end in itertools.pairwise(rows) if start < end]
            return Meaning(call._replace(is_causal="Causal" in kind), out, starts)
    size = query.shape[-2] * key.shape[-2] * 4
    if not hasattr(bias, "materialize") or size > DENSE_LIMIT:
        raise UnreadableError(f"its bias is a {kind} that can't be made a mask")
    mask = bias.materialize((query.shape[-2], key.shape[-2]), device=query.device)
    return Meaning(call._replace(attn_mask=mask), out)


# -- flex_attention ------------------------------------------------------------------------------


def _flex(a: _Arguments, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Meaning:
    """Tensors `(B, h, N, d)`; keys of one batch item may serve all."""
    score_mod, block_mask = a.take("score_mod"), a.take("block_mask")
    batch = query.shape[0]
    key, value = (tensor.expand(batch, *tensor.shape[1:]) for tensor in (key, value))
    call = SdpaCall(query, key, value, scale=a.take("scale"), enable_gqa=True)
    mask_mod = None if block_mask is None else block_mask.mask_mod
    if getattr(mask_mod, "__name__", "") == "noop_mask":
        if not bool(block_mask.to_dense().bool().all()):
            raise UnreadableError(
                "its block mask leaves out blocks and has no mask_mod that says so; make it with "
                "create_block_mask"
            )
        mask_mod = None
    return Meaning(call, out, score_mod=score_mod, mask_mod=mask_mod)


_READERS: dict[str, Callable[..., Meaning]] = {
    **{name: _varlen if "varlen" in name else _flash for name in FLASH},
    "flash_attn_with_kvcache": _flash_cached,
    "varlen_attn": _varlen,
    **dict.fromkeys(XFORMERS, _xformers),
    **dict.fromkeys(FLEX, _flex),
}
