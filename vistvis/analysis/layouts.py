"""Statistics that need to know where tokens lie: in which frame, and whether they are patches."""

from __future__ import annotations

import torch
from torch import Tensor

from vistvis.analysis.rows import by_rows
from vistvis.attention import Attention
from vistvis.errors import LayoutError
from vistvis.tokens import TokenLayout


def special_mass(
    a: Attention, *, max_bytes: int | None = None, progress: bool = False
) -> dict[str, Tensor]:
    """What each query gives to special tokens, by their kind: `{kind: (B, h, Nq)}` float64.

    Kinds come in the order of the key layout; without special tokens the dict is empty.
    LayoutError if the site does not say where its keys lie. Cost: all rows once.
    """
    layout = _layout(a, "key")
    places = [layout.locate(token) for token in range(layout.num_tokens)]
    kinds = list(dict.fromkeys(place.kind for place in places if not place.is_patch))
    if not kinds:
        return {}
    members = torch.tensor([[place.kind == kind for kind in kinds] for place in places])
    chosen = members.to(a.device, torch.float64)
    masses = by_rows(
        a,
        lambda weights: weights.double() @ chosen,
        len(kinds),
        max_bytes=max_bytes,
        progress=progress,
    )
    return {kind: masses[..., number] for number, kind in enumerate(kinds)}


def frame_mass(a: Attention, *, max_bytes: int | None = None, progress: bool = False) -> Tensor:
    """Mean mass that a token of one frame gives to another frame, `(B, h, S_q, S_k, 2, 2)` float64.

    The last two dimensions tell special tokens (0) and patches (1) apart, of the query's frame and
    of the key's: `[b, h, 1, 0, 1, 0]` is what a patch of frame 1 gives to all special tokens of
    frame 0, on average. NaN where a frame has no tokens of that kind among the queries. Where
    frames are folded into the batch, S is 1 on both sides. Tokens of no frame are left out.

    LayoutError if the site does not say where its tokens lie. Cost: all rows once.
    """
    groups = [_groups(_layout(a, side)).to(a.device) for side in ("query", "key")]
    query, key = (torch.nn.functional.one_hot(g + 1)[:, 1:].double() for g in groups)
    frames = [_layout(a, side).frames for side in ("query", "key")]
    query, key = (_filled(one, 2 * count) for one, count in zip((query, key), frames, strict=True))
    total = torch.zeros(
        *a.shape[:2], query.shape[1], key.shape[1], dtype=torch.float64, device=a.device
    )
    for (batch, heads, rows), weights in a.row_blocks(max_bytes=max_bytes, progress=progress):
        masses = weights.detach().double() @ key  # (b, h, q, 2·S_k)
        total[batch, heads] += query[rows].T @ masses
    mean = total / query.sum(0)[:, None]
    mean[:, :, query.sum(0) == 0] = torch.nan
    split = mean.view(*a.shape[:2], frames[0], 2, frames[1], 2)
    return split.transpose(3, 4)


def distance(a: Attention, *, max_bytes: int | None = None, progress: bool = False) -> Tensor:
    """Mean distance to what a patch attends to in its own frame, `(B, h, Nq)` float64, in patches.

    Σ p·|place of key − place of query| / Σ p over the patches of the query's frame; Euclidean, in
    steps of the grid (Dosovitskiy et al., "An Image Is Worth 16x16 Words", figure 7, has it in
    pixels). NaN for special tokens, and where nothing is given to that frame's patches.

    LayoutError if the site does not say where its tokens lie, or both sides have grids of their
    own. Cost: all rows once, and a table of `Nq · rows · cols` distances for each block.
    """
    query, key = _layout(a, "query"), _layout(a, "key")
    if query.grid != key.grid or query.frames != key.frames:
        raise LayoutError(f"distances are within one frame; queries are {query}, keys {key}")
    (own, spot), (other, places) = (_spots(one, a.device) for one in (query, key))
    out = torch.full(a.shape[:3], torch.nan, dtype=torch.float64, device=a.device)
    for index, weights in a.row_blocks(max_bytes=max_bytes, progress=progress):
        rows = index[2]
        same = (own[rows, None] == other[None]) & (own[rows, None] >= 0)
        within = weights.detach().double() * same
        # Only where both are patches; elsewhere the weight is zero.
        far = torch.where(same, torch.cdist(spot[rows], places), 0.0)
        out[index] = (within * far).sum(-1) / within.sum(-1)
    return out


def _layout(a: Attention, side: str) -> TokenLayout:
    """The layout of a side, whose tokens have to lie as it says."""
    layout = a.query_layout if side == "query" else a.key_layout
    name = a.site.name if a.site else "this attention"
    count = a.shape[2] if side == "query" else a.shape[3]
    if layout is None:
        raise LayoutError(f"{name} does not say where its {side} tokens lie; give it a layout")
    if a.site is not None and getattr(a.site, f"{side}_order") is not None:
        raise LayoutError(f"{name} has its {side} tokens in another order than its layout")
    if layout.num_tokens != count:
        raise LayoutError(f"{name} has {count} {side} tokens, its layout {layout.num_tokens}")
    return layout


def _groups(layout: TokenLayout) -> Tensor:
    """Of each token, 2 · frame, and 1 more for a patch; −1 for a token of no frame."""
    places = (layout.locate(token) for token in range(layout.num_tokens))
    return torch.tensor([-1 if p.frame is None else 2 * p.frame + p.is_patch for p in places])


def _filled(members: Tensor, count: int) -> Tensor:
    """With columns of zeros for the last groups, where no token is of them."""
    return torch.nn.functional.pad(members, (0, count - members.shape[1]))


def _spots(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token its frame, −1 if it is no patch, and its place on the grid `(N, 2)`."""
    places = [layout.locate(token) for token in range(layout.num_tokens)]
    frames = [place.frame if place.is_patch else -1 for place in places]
    spots = [(place.row or 0, place.col or 0) for place in places]
    return torch.tensor(frames, device=device), torch.tensor(spots, device=device).double()
