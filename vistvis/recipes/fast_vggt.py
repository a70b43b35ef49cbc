"""FastVGGT: one token's map over every view, as the figures that show how alike tokens are.

Shen, Zhang, Qu, Cao: "FastVGGT: Training-Free Acceleration of Visual Geometry
Transformer", arXiv 2509.02560. The formula as in the authors' code,
github.com/mystorm16/FastVGGT, `vggt/layers/attention.py`, lines 77–160, commit a4dd237.

Of VGGT-1B: every global block from `--merging` on (0 in their call), so none is the paper's own;
the default here is the first, `global_block_0`. q and k are those after norm and RoPE. This is not
attention: no scale, no softmax, and each view has a scale of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from vistvis.recipes.scaling import min_max
from vistvis.recipes.sites import Captured, plain, take
from vistvis.tokens import TokenPlace
from vistvis.views.maps import scene_of

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

BLOCK = 0


@dataclass(frozen=True, eq=False)
class Maps:
    """How one token's products run over the patches of every view."""

    maps: Tensor
    """`(B, S, rows, cols)` float64, or `(B, S, H, W)` where a size was asked for; 0…1 in each."""
    products: Tensor
    """`(B, S, rows, cols)` float64: the mean over heads of q·k, not scaled."""
    place: TokenPlace
    label: str


def maps(
    captured: Captured,
    query: SupportsIndex | str | None = None,
    *,
    block: int | None = None,
    size: tuple[int, int] | None = None,
) -> Maps:
    """The mean over heads of q·k of one token with every patch, min–max scaled in each view.

    Parameters
    ----------
    captured
        A mapping of sites (of `capture`, `open_run` or the extractor of `vggt_adapter`), or one
        global `Attention`.
    query
        A token, by its number or in words (`parse_query`); None: the middle patch of frame 0. The
        authors draw tokens 0, `rows · cols` and `10 · rows · cols`.
    block
        A global block; None: 0.
    size
        `(height, width)` in pixels to enlarge to, bilinearly, before scaling, as the authors do.

    (q·k̄ − min) / (max − min) in each view; 0 where all of a view is alike.

    Cost: one row of every head. SiteError where there is no such block, LayoutError where its
    tokens are not all frames in order, IndexOutOfRange for a token that does not exist, InputError
    for attention with a mask or of weights alone.
    """
    taken = take(captured, block, BLOCK)
    plain(taken, "maps")
    place = scene_of(taken.layout, query).place
    one = taken.query()[:, :, place.token].double()
    products = torch.einsum("bhd,bhnd->bn", one, taken.key().double()) / one.shape[1]
    laid = taken.layout.maps(products.detach())
    large = laid
    if size is not None:
        large = torch.nn.functional.interpolate(laid, size=size, mode="bilinear")
    label = (
        f"{taken.text}: q·k of token {place.token}, mean of heads, neither scaled nor through a "
        f"softmax ({taken.rope}), min–max in each view: not attention"
    )
    return Maps(min_max(large, 2, 3), laid, place, label)


def figure(result: Maps, *, batch: int = 0, images: Any = None) -> NotebookFigure:
    """The maps of all views in one scale from 0 to 1; `images` as of `robust_vggt.figure`."""
    from vistvis.recipes.drawing import frame_maps

    shown = result.maps[batch]
    return frame_maps(
        shown,
        title=f"q·k of {result.place} (FastVGGT)",
        note=result.label,
        unit="q·k, least to most of the view",
        names=[f"view {view}" for view in range(len(shown))],
        images=images,
    )
