"""What goes through several blocks: attention rollout of one token, never N×N."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from vistvis.analysis.walk import Buffers, walk
from vistvis.attention import Attention
from vistvis.attention.arithmetic import rows_at_once
from vistvis.attention.checks import describe
from vistvis.attention.site import chosen_names
from vistvis.errors import IndexOutOfRange, InputError, LayoutError
from vistvis.progress import progress as bar
from vistvis.tokens import TokenLayout

Fusion = Literal["mean", "max", "min"]

_FUSIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}
_FIX = "choose blocks of one stream of tokens with sites="


def rollout(
    captured: Mapping[str, Attention] | Sequence[Attention],
    query: SupportsIndex,
    *,
    fusion: Fusion = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    sites: str | Sequence[str] | None = None,
    frame: SupportsIndex | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Tensor:
    """The row of attention rollout of one token through all blocks, `(B, N)` float64.

    How much of each input token is in token `query` behind the last block, if every block moved
    `residual · I + (1 − residual) · F` of its input, F being its heads' weights fused into one
    matrix: the row `query` of the product of these matrices, each row divided by its sum (Abnar and
    Zuidema 2020, "Quantifying Attention Flow in Transformers", arXiv 2005.00928, section 3, whose
    fusion is the mean and whose residual is 0.5). Rows sum to 1.

    Parameters
    ----------
    captured
        A capture, a run, or any mapping or sequence of `Attention` in the order of the model.
        Blocks of single frames and of all frames may be mixed: with frames folded into the batch
        (`site.frames_in_batch`), a block is block-diagonal over the frames of its scene.
    query
        The token, counted over all frames, or within `frame`; negative counts from the end.
    fusion
        Over heads, for each row and key: "mean", "max" or "min". Rows of max and min do not sum to
        1 before the division, so that they weigh more or less than `residual` says; the order of
        steps is that of vit-explain (github.com/jacobgil/vit-explain).
    residual
        The share of the skip connection, 0 to 1.
    discard
        The share of the smallest weights of each row of F that are set to zero before the identity
        is added, from 0 to below 1; weights equal to the smallest that stays, stay. It is a share
        of each ROW; vit-explain takes it of the whole matrix, and then divides columns, not rows,
        by the sums of rows, so that its numbers are others wherever rows do not sum to 1.
    sites
        Names or globs of the blocks, where `captured` is a mapping; default all.
    frame
        The frame that `query` is counted in, by the layout of the blocks. Default: `query` counts
        over all tokens that these blocks see.

    Returns
    -------
    One row for each scene. Where all blocks have frames in their batch, each frame is a scene of
    its own: `(B·S, P)`. A row that nothing is left of (`residual=0` and a fused row of zeros) is 0.

    `LayoutError` where blocks do not work on one stream of tokens: windows, cross-attention, tokens
    dropped, merged or reordered, other counts. `InputError`, `IndexOutOfRange` and `SiteError` for
    arguments that can't be. Cost: for the last block one row, then those that the query's share
    has reached, in the end all rows of each block once; memory of one block of rows over all heads
    (`max_bytes`, at least one row of each head; default 8 MiB).
    """
    if fusion not in _FUSIONS:
        raise InputError(f"fusion is one of {', '.join(get_args(Fusion))}, got {fusion!r}")
    if not 0 <= residual <= 1:
        raise InputError(f"residual is a share, 0 to 1, got {residual!r}")
    if not 0 <= discard < 1:
        raise InputError(f"discard is a share of each row, 0 to below 1, got {discard!r}")
    blocks = _blocks(captured, sites)
    scenes, count = _sizes(blocks)
    shares = torch.zeros(scenes, count, dtype=torch.float64)
    shares[:, _token(query, frame, count, blocks)] = 1
    buffers = Buffers()
    for _, block in bar(blocks[::-1], "rollout", shown=progress, delay=0.5):
        batch, tokens = block.shape[0], block.shape[2]
        shares = shares.to(block.device).reshape(batch, tokens)
        if fusion == "mean" and not discard and block._plain and bool((shares != 0).all()):
            # Rows and their mean over heads sum to 1: no row has to be fused, or divided.
            handed = torch.zeros_like(shares)
            for part in walk(block, buffers=buffers, max_bytes=max_bytes):
                of, _, own = part.index
                handed[of] += part.columns(shares[of, None, own]).sum(1) / block.shape[1]
            shares = (residual * shares + (1 - residual) * handed).reshape(scenes, count)
            continue
        behind = torch.zeros_like(shares)
        row_bytes = block.shape[1] * tokens * block.dtype.itemsize
        step = rows_at_once(block.shape[1] * tokens, block.dtype, max_bytes)
        for item in range(batch):
            # What has no share yet needs no row: of the last block one is enough.
            reached = shares[item].nonzero()[:, 0]
            for first in range(0, len(reached), step):
                rows = reached[first : first + step]
                weights = block.rows(rows, batch=item, max_bytes=step * row_bytes)[0].detach()
                fused = _discarded(_FUSIONS[fusion](weights, 0), discard).double()
                # Rows divided by their sums: the shares are divided instead, N numbers for N².
                sums = residual + (1 - residual) * fused.sum(-1)
                parts = shares[item, rows] / sums.masked_fill(sums == 0, torch.inf)
                behind[item] += (1 - residual) * (parts @ fused)
                behind[item, rows] += residual * parts
        shares = behind.reshape(scenes, count)
    return shares


def _discarded(fused: Tensor, share: float) -> Tensor:
    """Rows `(q, N)` without the smallest weights of each; overwrites them."""
    count = int(share * fused.shape[1])
    if not count:
        return fused
    least = fused.kthvalue(count + 1, -1, keepdim=True).values
    return fused.masked_fill_(fused < least, 0.0)


def _blocks(
    captured: Mapping[str, Attention] | Sequence[Attention], sites: str | Sequence[str] | None
) -> list[tuple[str, Attention]]:
    """The chosen blocks under their names, in order."""
    if isinstance(captured, Mapping):
        names = chosen_names(captured, sites)
        named = [(f"site {name!r}", captured[name]) for name in names]
    elif sites is not None:
        raise InputError("sites= chooses from a mapping by name; give the blocks that are meant")
    else:
        named = [(f"block {number}", block) for number, block in enumerate(captured)]
    for name, block in named:
        if not isinstance(block, Attention):
            raise InputError(
                f"rollout goes through blocks of Attention, and {name} is {describe(block)}; of "
                "several passes give those of one"
            )
    if not named:
        raise InputError("rollout goes through one block at least, got none")
    return named


def _sizes(blocks: Sequence[tuple[str, Attention]]) -> tuple[int, int]:
    """Scenes B and tokens N of the stream that all blocks work on."""
    for name, block in blocks:
        if reason := _another_stream(block):
            raise LayoutError(
                f"rollout needs self-attention over all tokens; {name} {reason}; {_FIX}"
            )
    whole = next((one for one in blocks if not _by_frames(one[1])), blocks[0])
    scenes, count = whole[1].shape[0], whole[1].shape[2]
    frame = next(filter(None, (_frame_layout(block) for _, block in blocks)), None)
    for name, block in blocks:
        batch, tokens = block.shape[0], block.shape[2]
        fits = (batch, tokens) == (scenes, count) or (
            _by_frames(block) and batch % scenes == 0 and batch // scenes * tokens == count
        )
        if not fits:
            raise LayoutError(
                f"rollout needs blocks over the same tokens: {whole[0]} has {count} in {scenes} "
                f"batch items, {name} {tokens} in {batch}; {_FIX}"
            )
        own = _frame_layout(block)
        if own is not None and own != frame:
            raise LayoutError(
                f"rollout needs blocks over the same tokens: {name} has {own}, others {frame}; "
                f"{_FIX}"
            )
    return scenes, count


def _another_stream(block: Attention) -> str:
    """Why the keys of a block are not the tokens that its queries are, if they aren't."""
    if block.shape[2] != block.shape[3]:
        return f"has {block.shape[2]} queries and {block.shape[3]} keys"
    site = block.site
    if site is None:
        return ""
    if site.window is not None or site.kind in ("window", "cross"):
        return f"is {site.kind if site.window is None else 'window'} attention"
    if any(one is not None for one in (site.query_order, site.key_order, site.frame_order)):
        return "has its tokens in another order than its layout"
    return ""


def _by_frames(block: Attention) -> bool:
    return block.site is not None and block.site.frames_in_batch


def _frame_layout(block: Attention) -> TokenLayout | None:
    layout = block.query_layout
    return None if layout is None else layout.frame_layout()


def _token(
    query: SupportsIndex,
    frame: SupportsIndex | None,
    count: int,
    blocks: Iterable[tuple[str, Attention]],
) -> int:
    """The query's number among the tokens of the stream."""
    number = operator.index(query)
    if frame is None:
        if not -count <= number < count:
            raise IndexOutOfRange(f"query {number} is outside 0…{count - 1}")
        return number % count
    layouts = (block.query_layout for _, block in blocks)
    layout = next((one for one in layouts if one is not None and one.num_tokens == count), None)
    if layout is None:
        raise LayoutError(
            "frame= needs a block that says where the tokens of all frames lie, and none does; "
            "count query over all tokens"
        )
    within = number + layout.tokens_per_frame if number < 0 else number
    return layout.index(frame=frame, token=within)
