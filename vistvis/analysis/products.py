"""Products before the softmax: logits, Gram matrices, and all pairs of patches of two frames."""

from __future__ import annotations

import operator
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from vistvis.analysis.matching import chosen, frames_of
from vistvis.attention import DENSE_LIMIT, Attention
from vistvis.attention.rows import Selection
from vistvis.errors import InputError


def logits(
    a: Attention,
    queries: Selection,
    *,
    batch: Selection = None,
    heads: Selection = None,
    max_bytes: int = DENSE_LIMIT,
) -> Tensor:
    """What enters the softmax, `scale · q·k + mask`, of chosen queries: `(B', h', Q, Nk)`.

    It is `Attention.logits`; a key that takes no part has −inf. Cost: `B'·h'·Q·Nk·d` multiply-adds.
    InputError for attention made from weights; DenseLimitError above `max_bytes`.
    """
    return a.logits(queries, batch=batch, heads=heads, max_bytes=max_bytes)


def gram(
    a: Attention,
    side: Literal["query", "key"],
    *,
    tokens: Selection = None,
    batch: Selection = None,
    heads: Selection = None,
    max_bytes: int = DENSE_LIMIT,
) -> Tensor:
    """Rows of the Gram matrix of one side, q·qᵀ or k·kᵀ: `(B', h', T, N)`, in the dtype of weights.

    They are not scaled and not masked: what entered the dot product with itself, after norm and
    rotary embedding. `tokens` are captured ones of that side; None takes all of them, N×N, where
    that fits into `max_bytes`. Keys have their own heads: with grouped heads h is fewer.

    Cost: `B'·h'·T·N·d` multiply-adds. InputError for another side, or attention made from weights;
    DenseLimitError above `max_bytes`.
    """
    if side not in ("query", "key"):
        raise InputError(f'gram is of the "query" or the "key" side, got {side!r}')
    vectors = _vectors(a, "a Gram matrix")[side == "key"]
    itself = Attention(query=vectors, key=vectors, scale=1.0, site=a.site)
    return itself.logits(tokens, batch=batch, heads=heads, max_bytes=max_bytes)


def cost_volume(
    a: Attention,
    frame: SupportsIndex,
    key_frame: SupportsIndex,
    *,
    batch: Selection = None,
    heads: Selection = None,
    max_bytes: int = DENSE_LIMIT,
) -> Tensor:
    """`scale · q·k` of every patch of one frame with every one of another, without any mask.

    Returns `(B', h', rows, cols, rows', cols')`, in the dtype of weights: queries of `frame`, keys
    of `key_frame`, counted as in `correspondence`. NaN where the model dropped a patch; patches
    that it merged share a token.

    Cost: `B'·h'·P·P'·d` multiply-adds. LayoutError as in `correspondence`; InputError for attention
    made from weights; DenseLimitError above `max_bytes`.
    """
    vectors = _vectors(a, "a cost volume")
    sides = frames_of(a, frame, key_frame)
    items = chosen(batch, a.shape[0], "batch")
    taken, gone = [], []
    for side, number, every in zip(sides, (frame, key_frame), vectors, strict=True):
        tokens = side.patches(operator.index(number)).expand(a.shape[0], -1)[items].to(a.device)
        index = tokens.clamp_min(0)[:, None, :, None]
        taken.append(every[items].gather(2, index.expand(-1, every.shape[1], -1, every.shape[3])))
        gone.append(tokens < 0)
    pairs = Attention(query=taken[0], key=taken[1], scale=a.scale, site=a.site)
    volume = pairs.logits(None, heads=heads, max_bytes=max_bytes)
    volume.masked_fill_(gone[0][:, None, :, None] | gone[1][:, None, None], torch.nan)
    query, key = (side.layout.grid for side in sides)
    return volume.reshape(*volume.shape[:2], *query, *key)


def _vectors(a: Attention, what: str) -> tuple[Tensor, Tensor]:
    """Queries and keys, as long as there are any and nobody wrote into them."""
    a.check_unwritten()
    if a.weights is not None:
        name = f"site {a.site.name!r}" if a.site else "this attention"
        raise InputError(
            f"{what} needs queries and keys, and {name} was made from weights alone; capture it at "
            'its kernel (source="kernel")'
        )
    return a.query, a.key
