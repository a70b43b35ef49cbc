"""`Attention` as tensors by name and facts beside them, and back: the one way it is stored.

Queries and keys are kept as they are, with `mask` and `scale` where there are such tensors; a
number `scale` and `causal` are facts. Attention that was given as weights is one tensor, without
facts. Files of a single site (`formats`) have the facts in their header, runs in their manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistvis.attention import Attention, GivenWeights, SiteInfo
from vistvis.attention.arithmetic import unexpanded
from vistvis.errors import StoreError

# Which tensors a stored site has at least, and at most.
HOLDINGS = {
    "qk": ({"query", "key"}, {"query", "key", "mask", "scale"}),
    "weights": ({"weights"}, {"weights"}),
}


def check_storable(attention: Attention) -> None:
    """`StoreError` for attention of which the files here would hold only a part."""
    site = attention.site
    parts = {
        "segments": attention.segments is not None,
        "functions of indices (score_mod, mask_mod)": attention.score_mod or attention.mask_mod,
        "an order of tokens": site and (site.query_order or site.key_order),
        "an order of frames": site and site.frame_order is not None,
        "queries of later frames than the first (a cache)": site and site.first_frame,
    }
    for what, there in parts.items():
        if there:
            name = f"site {site.name!r}" if site else "this attention"
            raise StoreError(
                f"{name} has {what}, which runs and files don't hold yet; keep it in memory, or "
                "leave the site out"
            )


def tensors_of(attention: Attention) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that hold an `Attention`, none of them copied, and the facts they do not say.

    `{"query": (B, h, Nq, d), "key": (B, h_k, Nk, d)}`, perhaps with a `mask` that broadcasts to
    `(B, h, Nq, Nk)` and a `scale` `(h,)`, and the facts `scale` (None where it is a tensor) and
    `causal`; or `{"weights": (B, h, Nq, Nk)}` and no facts. `StoreError` as `check_storable`.
    """
    check_storable(attention)
    if isinstance(attention, GivenWeights):
        return {"weights": attention.weights}, {}
    tensors = {"query": attention.query, "key": attention.key}
    if attention.mask is not None:
        tensors["mask"] = unexpanded(attention.mask)
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

    InputError if the tensors do not fit together.
    """
    if "query" not in tensors:
        return Attention.from_weights(tensors["weights"], site=site)
    return Attention(
        query=tensors["query"],
        key=tensors["key"],
        scale=tensors.get("scale", facts.get("scale")),
        mask=tensors.get("mask"),
        causal=bool(facts.get("causal")),
        site=site,
    )
