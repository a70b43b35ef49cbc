"""`Attention` as tensors by name and facts beside them, and back: the one way it is stored.

Queries and keys are kept as they are, with `value`, `mask`, `scale` and `segments` where there are
such tensors; a number `scale` and `causal` are facts. Attention that was given as weights is that
tensor, perhaps with `value`, without facts. The orders of a site are tensors too. Files of a single
site (`formats`) have the facts in their header, runs in their manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vistvis.attention import Attention, GivenWeights, SiteInfo, TokenOrder
from vistvis.attention.arithmetic import unexpanded
from vistvis.errors import InputError, StoreError

_ORDERS = ("query_order", "query_members", "key_order", "key_members", "frame_order")
_SUMS = ("row_max", "row_sum")
# Which tensors a stored site has at least, and at most.
HOLDINGS = {
    "qk": (
        {"query", "key"},
        {"query", "key", "value", "mask", "scale", "segments", *_ORDERS, *_SUMS},
    ),
    "weights": ({"weights"}, {"weights", "value", *_ORDERS}),
}


def check_storable(attention: Attention) -> None:
    """`StoreError` for attention that is made by functions of indices: a file can't hold them."""
    if attention.score_mod or attention.mask_mod:
        site = attention.site
        name = f"site {site.name!r}" if site else "this attention"
        raise StoreError(
            f"{name} has functions of indices (score_mod, mask_mod), which runs and files can't "
            "hold; store its dense weights (Attention.from_weights), or leave the site out"
        )


def tensors_of(attention: Attention) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that hold an `Attention`, none of them copied, and the facts they do not say.

    `{"query": (B, h, Nq, d), "key": (B, h_k, Nk, d)}`, perhaps with a `mask` that broadcasts to
    `(B, h, Nq, Nk)`, a `scale` `(h,)` and `segments` `(n,)`, and the facts `scale` (None where it
    is a tensor) and `causal`; or `{"weights": (B, h, Nq, Nk)}` and no facts. Either with `value`
    `(B, h_v, Nk, dv)` where that was kept, and the orders of its site, `(M,)` or `(B, M)`, and
    `frame_order` `(B, S)`. `StoreError` as `check_storable`.
    """
    check_storable(attention)
    tensors = _order_tensors(attention.site)
    if attention.value is not None:
        tensors["value"] = attention.value
    if isinstance(attention, GivenWeights):
        return {"weights": attention.weights, **tensors}, {}
    tensors |= {"query": attention.query, "key": attention.key}
    if attention.mask is not None:
        tensors["mask"] = unexpanded(attention.mask)
    if attention.segments is not None:
        tensors["segments"] = attention.segments
    facts: dict[str, Any] = {"scale": None, "causal": attention.causal}
    if isinstance(attention.scale, Tensor):
        tensors["scale"] = attention.scale
    else:
        facts["scale"] = float(attention.scale)
    return tensors, facts


def attention_of(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], site: SiteInfo | None
) -> Attention:
    """The reverse of `tensors_of`; facts that are not there have `Attention`'s defaults.

    `row_max` and `row_sum` `(B, h, Nq)` are what `log_sum_exp` would compute; with them it need
    not. InputError if the tensors do not fit together.
    """
    site, value = site and _with_orders(site, tensors), tensors.get("value")
    if "query" not in tensors:
        return Attention.from_weights(tensors["weights"], value=value, site=site)
    attention = Attention(
        query=tensors["query"],
        key=tensors["key"],
        scale=tensors.get("scale", facts.get("scale")),
        mask=tensors.get("mask"),
        causal=bool(facts.get("causal")),
        segments=tensors.get("segments"),
        value=value,
        site=site,
    )
    sums = [tensors[name] for name in _SUMS if name in tensors]
    if sums:
        if len(sums) != 2 or any(
            one.shape != attention.shape[:3] or one.dtype != attention.dtype for one in sums
        ):
            raise InputError(f"{' and '.join(_SUMS)} are (B, h, Nq) both, in {attention.dtype}")
        attention._kept = torch.stack(sums)
    return attention


def _order_tensors(site: SiteInfo | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {}
    if site is not None:
        tensors["frame_order"] = site.frame_order
        for side in ("query", "key"):
            if order := getattr(site, f"{side}_order"):
                tensors |= {f"{side}_order": order.tokens, f"{side}_members": order.members}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _with_orders(site: SiteInfo, tensors: Mapping[str, Tensor]) -> SiteInfo:
    orders: dict[str, Any] = {"frame_order": tensors.get("frame_order")}
    for side in ("query", "key"):
        tokens, members = tensors.get(f"{side}_order"), tensors.get(f"{side}_members")
        if tokens is None and members is not None:
            raise InputError(f"{side}_members go with a {side}_order")
        orders[f"{side}_order"] = None if tokens is None else TokenOrder(tokens, members)
    return replace(site, **orders)
