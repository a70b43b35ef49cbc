"""A site's queries and keys as a page carries them: a header in JSON and one binary.

Each tensor is written so that it packs well and decodes fast: halves are cut into a plane of low
bytes and one of high bytes (the high ones repeat), queries and keys are transposed to
`(B, h, d, N)` (neighbouring tokens are alike), and all is deflated. `assets/explorer/decode.js`
is the other half.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistvis.attention import Attention, SiteInfo
from vistvis.attention.arithmetic import unexpanded
from vistvis.attention.order import TokenOrder
from vistvis.errors import InputError

# Where rows of the rounded queries and keys lie further apart than this, float32 goes out.
LARGEST_DIFFERENCE = 1e-3
ROWS_MEASURED = 64
_LEVEL = 6
_CHUNK = 2**24


@dataclass(frozen=True)
class PackedSite:
    """One site: `header` is plain data for JSON, `data` what its `tensors` point into."""

    header: dict[str, Any]
    data: bytes


def pack_site(name: str, attention: Attention) -> PackedSite:
    """A site, for the page.

    Queries and keys go out as float16, unless a value leaves its range or the rows of the rounded
    ones lie further than `LARGEST_DIFFERENCE` from those of the given ones, measured on
    `ROWS_MEASURED` rows; then as float32. `header["difference"]` is what was measured. InputError
    for attention with functions of indices, which a browser can't call.

    Cost: maxima and sums of all rows in float64, `B·h·Nq·Nk·d` multiply-adds; beside what goes
    out, one head in float64 and some 16 MB are held.
    """
    if attention.score_mod or attention.mask_mod:
        raise InputError(f"{name}: a function of indices computes its mask, which no page can call")
    header: dict[str, Any] = {
        "name": name,
        "shape": list(attention.shape),
        "site": None if attention.site is None else attention.site.to_dict(),
        "causal": attention.causal,
        "groups": attention.groups,
    }
    tensors: dict[str, Tensor] = {}
    if attention.weights is not None:
        tensors["weights"] = attention.weights.float()
    else:
        rounded, header["difference"] = _rounded(attention)
        header["dtype"] = str(rounded.query.dtype).removeprefix("torch.")
        scale = rounded.scale
        header["scale"] = scale.tolist() if isinstance(scale, Tensor) else float(scale)
        tensors["query"], tensors["key"] = rounded.query.mT, rounded.key.mT
        tensors["rows"] = _maximum_and_sum(rounded)
        if rounded.mask is not None:
            tensors["mask"] = _sent_mask(rounded.mask)
        if rounded.segments is not None:
            tensors["segments"] = rounded.segments.int()
    if attention.site is not None:
        tensors |= _orders(attention.site)
    data = bytearray()
    header["tensors"] = {}
    for key, tensor in tensors.items():
        packed = b"".join(_deflated(tensor))
        header["tensors"][key] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "start": len(data),
            "bytes": len(packed),
        }
        data += packed
    header["crc32"] = zlib.crc32(data)
    return PackedSite(header, bytes(data))


def packed_bytes(attention: Attention) -> int:
    """About how many bytes of data `pack_site` gives, by packing one head of each tensor."""
    if attention.weights is not None:
        tensors = [attention.weights]
    else:
        both = [attention.query.detach().cpu(), attention.key.detach().cpu()]
        largest = max((float(one.abs().max()) for one in both if one.numel()), default=0.0)
        half = largest <= torch.finfo(torch.float16).max
        tensors = [one.to(torch.float16 if half else torch.float32).mT for one in both]
        if attention.mask is not None:
            tensors.append(_sent_mask(attention.mask))
    size = 0.0 if attention.weights is not None else 7.0 * math.prod(attention.shape[:3])  # rows
    for tensor in tensors:
        if tensor.numel():
            one = tensor.flatten(0, -3)[0]
            ratio = sum(map(len, _deflated(one))) / (one.numel() * one.itemsize)
            size += ratio * tensor.numel() * tensor.itemsize
    return round(size)


def _sent_mask(mask: Tensor) -> Tensor:
    """A mask as it goes out, of four dimensions without what `expand` repeated: bytes, or float32.

    What leaves the range of float32 hides a key as it did before.
    """
    mask = unexpanded(mask.detach().cpu()[(None,) * (4 - mask.ndim)])
    if mask.dtype == torch.bool:
        return mask.to(torch.uint8)
    lowest = torch.finfo(torch.float32).min
    return torch.where(mask.isneginf(), mask, mask.clamp(min=lowest)).float()


def _rounded(attention: Attention) -> tuple[Attention, float]:
    """The attention with halves for queries and keys, or floats; and how far its rows lie apart."""
    attention = attention.detach().cpu()
    mask = attention.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = _sent_mask(mask)  # maxima and sums must be of what goes out
    for dtype in (torch.float16, torch.float32):
        query, key = attention.query.to(dtype), attention.key.to(dtype)
        if dtype == torch.float16 and not bool(query.isfinite().all() and key.isfinite().all()):
            continue
        rounded = Attention(
            query=query,
            key=key,
            scale=attention.scale,
            mask=mask,
            causal=attention.causal,
            segments=attention.segments,
            site=attention.site,
        )
        difference = _difference(attention, rounded)
        if difference <= LARGEST_DIFFERENCE:
            break
    return rounded, difference


def _difference(one: Attention, other: Attention) -> float:
    """The largest difference of a weight in some rows of both, spread over heads and queries."""
    batch, heads, queries, _ = one.shape
    generator = np.random.default_rng(0)
    largest = 0.0
    for _ in range(ROWS_MEASURED if min(one.shape) else 0):
        b, h, q = (int(generator.integers(n)) for n in (batch, heads, queries))
        rows = (a.rows([q], batch=b, heads=h) for a in (one, other))
        first, second = (row.double() for row in rows)
        largest = max(largest, float((first - second).abs().max()))
    return largest


def _maximum_and_sum(attention: Attention) -> Tensor:
    """Of every row, `(2, B, h, Nq)` float32, from logits in float64.

    The maximum is rounded to a whole number, which packs well, and the sum is that of
    exp(logit − maximum) with the rounded one: both together are as exact as the sum alone.
    """
    out = torch.empty(2, *attention.shape[:3])
    for (b, h, q), logits in _logit_blocks(attention):
        maximum = (
            logits.amax(-1).round().float() if logits.shape[-1] else logits.new_zeros(()).float()
        )
        maximum = torch.where(maximum.isinf(), 0.0, maximum)
        out[0, b, h, q] = maximum
        out[1, b, h, q] = (logits - maximum.double()[..., None]).exp().sum(-1).float()
    return out


def _logit_blocks(attention: Attention) -> Iterator[tuple[tuple[int, int, slice], Tensor]]:
    batch, heads, queries, keys = attention.shape
    step = max(1, _CHUNK // 8 // max(1, keys))
    for b in range(batch):
        for h in range(heads):
            head = _one_head(attention, b, h)
            for start in range(0, queries, step):
                rows = slice(start, min(start + step, queries))
                yield (b, h, rows), head.logits(rows)[0, 0]


def _one_head(attention: Attention, batch: int, head: int) -> Attention:
    """One head in float64: all of them would be four times what goes out."""
    at, key_head = slice(batch, batch + 1), head // attention.groups
    scale, mask = attention.scale, attention.mask
    if mask is not None:
        mask = mask.expand(attention.shape)[at, head : head + 1]
        mask = mask if mask.dtype == torch.bool else mask.double()
    return Attention(
        query=attention.query[at, head : head + 1].double(),
        key=attention.key[at, key_head : key_head + 1].double(),
        scale=scale.reshape(-1)[head].item() if isinstance(scale, Tensor) else scale,
        mask=mask,
        causal=attention.causal,
        segments=attention.segments,
        site=attention.site,
    )


def _orders(site: SiteInfo) -> dict[str, Tensor]:
    """What says which original tokens captured ones are."""
    tensors: dict[str, Tensor] = {}
    for side in ("query", "key"):
        order: TokenOrder | None = getattr(site, f"{side}_order")
        if order is not None:
            tensors[f"{side}_tokens"] = order.tokens.int()
            if order.members is not None:
                tensors[f"{side}_members"] = order.members.int()
    if site.frame_order is not None:
        tensors["frame_order"] = site.frame_order.int()
    return tensors


def _deflated(tensor: Tensor) -> Iterator[bytes]:
    """The tensor's bytes, those of one place in a number together, deflated."""
    packer = zlib.compressobj(_LEVEL)
    matrices = tensor.detach().cpu()
    matrices = matrices.flatten(0, -3) if tensor.ndim > 2 else matrices[None]
    for place in range(tensor.itemsize):
        for matrix in matrices:  # laid out one at a time: all of them transposed would be a copy
            array = np.ascontiguousarray(matrix.numpy()).reshape(-1)
            planes = array.view(np.uint8).reshape(-1, array.itemsize)
            for start in range(0, len(planes), _CHUNK):
                yield packer.compress(planes[start : start + _CHUNK, place].tobytes())
    yield packer.flush()
