"""Kernels that need a GPU, by name, signature and meaning, computed in float64 with plain loops.

They share no code with the package. Each call leaves its weights in `SEEN`, `(B, h, Nq, Nk)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SEEN: list[Tensor] = []


def one_sequence(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """Weights `(h, Nq, Nk)` of `(Nq, h, d)` and `(Nk, h_k, d)`, the last query at the last key."""
    (count, heads, width), keys = query.shape, key.shape[0]
    logits = torch.full((heads, count, keys), -math.inf, dtype=torch.float64)
    for h in range(heads):
        k = key[:, h * key.shape[1] // heads].double()
        for i in range(count):
            place = keys - count + i
            for j in range(keys):
                early = window[0] >= 0 and j < place - window[0]
                late = (causal and j > place) or (0 <= window[1] < j - place)
                if early or late:
                    continue
                value = float(query[i, h].double() @ k[j]) * (scale or width**-0.5)
                if softcap:
                    value = softcap * math.tanh(value / softcap)
                if slopes is not None:
                    value -= float(slopes[h]) * abs(place - j)
                logits[h, i, j] = value
    return torch.softmax(logits, -1).nan_to_num(0.0)


def times(weights: Tensor, value: Tensor) -> Tensor:
    """Weights `(h, Nq, Nk)` times values `(Nk, h_k, d)`: `(Nq, h, d)`."""
    each = value.repeat_interleave(weights.shape[0] // value.shape[1], 1)
    return torch.einsum("hij,jhd->ihd", weights, each.double()).to(value)


def _dense(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, **how: Any) -> Tensor:
    per = [slopes[b] if slopes is not None and slopes.ndim == 2 else slopes for b in range(len(q))]
    weights = [one_sequence(q[b], k[b], slopes=per[b], **how) for b in range(len(q))]
    SEEN.append(torch.stack(weights))
    return torch.stack([times(one, v[b]) for b, one in enumerate(weights)])


def _packed(
    q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], columns: Sequence[int], **how: Any
) -> Tensor:
    whole = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=torch.float64)
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=v.dtype)
    for n in range(len(rows) - 1):
        a, b = slice(rows[n], rows[n + 1]), slice(columns[n], columns[n + 1])
        whole[:, a, b] = one_sequence(q[a], k[b], **how)
        out[a] = times(whole[:, a, b], v[b])
    SEEN.append(whole[None])
    return out


# -- flash_attn ----------------------------------------------------------------------------------


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
    out = _dense(q, k, v, alibi_slopes, **how)
    return (out, out.sum(-1).transpose(1, 2), None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return _dense(*qkv.unbind(2), alibi_slopes, scale=softmax_scale, causal=causal)


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return _dense(q, *kv.unbind(2), alibi_slopes, scale=softmax_scale, causal=causal)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    how = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
    rows, columns = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return _packed(q, k, v, rows, columns, slopes=alibi_slopes, **how)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    bounds = cu_seqlens.tolist()
    return _packed(*qkv.unbind(1), bounds, bounds, scale=softmax_scale, causal=causal)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    count = k_cache.shape[1]
    if cache_seqlens is not None:
        count = int(cache_seqlens if isinstance(cache_seqlens, int) else cache_seqlens[0])
        if k is not None:  # written without a trace, as an extension does
            new = slice(count, count + k.shape[1])
            k_cache.detach().numpy()[:, new] = k.detach().numpy()
            v_cache.detach().numpy()[:, new] = v.detach().numpy()
            count += k.shape[1]
    return _dense(q, k_cache[:, :count], v_cache[:, :count], scale=softmax_scale, causal=causal)


# -- torch, SageAttention ------------------------------------------------------------------------


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    rows, columns = cu_seq_q.tolist(), cu_seq_k.tolist()
    return _packed(query, key, value, rows, columns, scale=scale, window=window_size)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **kwargs):
    rounded = (one.bfloat16() for one in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*rounded).to(q)


# -- xformers ------------------------------------------------------------------------------------


class LowerTriangularMask:
    """Counted from the first key."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return torch.full(shape, -math.inf, dtype=dtype, device=device).triu(1)


class LowerTriangularFromBottomRightMask:
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        made = torch.full(shape, -math.inf, dtype=dtype, device=device)
        return made.triu(1 + shape[-1] - shape[-2])


class BlockDiagonalMask:
    def __init__(self, rows: Sequence[int], columns: Sequence[int]) -> None:
        self.q_seqinfo = SimpleNamespace(seqstart_py=[*rows])
        self.k_seqinfo = SimpleNamespace(seqstart_py=[*columns])

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        made = torch.full(shape, -math.inf, dtype=dtype, device=device)
        rows, columns = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        for n in range(len(rows) - 1):
            a, b = slice(rows[n], rows[n + 1]), slice(columns[n], columns[n + 1])
            made[..., a, b] = self.block(made[..., a, b])
        return made

    def block(self, part: Tensor) -> Tensor:
        return torch.zeros_like(part)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    def block(self, part: Tensor) -> Tensor:
        return torch.full_like(part, -math.inf).triu(1)


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):  # fmt: skip
    shape = query.shape
    if query.ndim == 3:
        query, key, value = (one[:, :, None] for one in (query, key, value))
    if query.ndim == 5:
        query, key, value = (one.flatten(2, 3) for one in (query, key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double())
    scores = scores * (scale or query.shape[-1] ** -0.5)
    if attn_bias is not None:
        if not isinstance(attn_bias, Tensor):
            attn_bias = attn_bias.materialize(scores.shape[-2:])
        flat = attn_bias.flatten(1, 2) if attn_bias.ndim == 5 else attn_bias
        scores = scores + (flat[:, None] if flat.ndim == 3 else flat)
    SEEN.append(torch.softmax(scores, -1))
    return torch.einsum("bhij,bjhd->bihd", SEEN[-1], value.double()).to(value).reshape(shape)


def package(name: str, *things: Any) -> ModuleType:
    """A module that holds some of the functions above."""
    made = ModuleType(name)
    vars(made).update({thing.__name__: thing for thing in things})
    return made
