"""Which captured attention a recipe is about, and what it has to be for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vistvis.attention import Attention
from vistvis.errors import InputError, LayoutError, SiteError
from vistvis.hooks.capture import Capture
from vistvis.names import few
from vistvis.store import Run
from vistvis.tokens import TokenLayout

Captured: TypeAlias = "Mapping[str, Attention] | Attention"

# How many pairs of frame and global blocks VGGT-1B has: papers number their blocks within these.
PAPER_DEPTH = 24


@dataclass(frozen=True, eq=False)
class Taken:
    """One global attention, in frame order, and where it comes from in words."""

    attention: Attention
    layout: TokenLayout
    text: str

    @property
    def rope(self) -> str:
        """What the label says of rotary embeddings."""
        site = self.attention.site
        before = site is not None and site.rope is False
        return "before RoPE, so not the model's own softmax" if before else "as in the kernel"

    def query(self) -> Tensor:
        """`(B, h, N, d)`."""
        return self.attention.query

    def key(self) -> Tensor:
        """`(B, h, N, d)`: of grouped heads, each key head as often as it is used."""
        return self.attention.key.repeat_interleave(self.attention.groups, 1)

    def patches(self, frame: int) -> slice:
        """The tokens that are a frame's patches."""
        first = self.layout.index(frame=frame, patch=0)
        return slice(first, first + self.layout.num_patches)

    def patch_tokens(self) -> Tensor:
        """All patches, frame after frame, `(S · rows · cols,)`."""
        parts = [range(self.layout.num_tokens)[self.patches(f)] for f in range(self.layout.frames)]
        return torch.tensor([token for part in parts for token in part])


def blocks(captured: Mapping[str, Attention], kind: str = "global") -> dict[int, str]:
    """Block number → name of the captured sites of a kind; nothing of a run is read for it."""
    found: dict[int, str] = {}
    describe = _describing(captured)
    for name in captured:
        site = describe(name)
        if site is not None and site.kind == kind and site.block is not None:
            found.setdefault(site.block, name)
    return dict(sorted(found.items()))


def scaled(block: int, found: Collection[int]) -> int:
    """The block at the same relative depth as one of 24, where fewer were captured."""
    depth = max(found) + 1
    return block if block in found else block * depth // PAPER_DEPTH


def take(captured: Captured, block: int | None, usual: int) -> Taken:
    """The global attention of a block; None is the paper's, `usual` of 24.

    Where that was not captured, it is the one at the same relative depth, ⌊usual · D / 24⌋ of the D
    blocks up to the last captured one; the text says so. One `Attention` is taken as it is.
    """
    if isinstance(captured, Attention):
        if block is not None:
            raise InputError("block= chooses among several sites; one Attention is taken as it is")
        name = captured.site.name if captured.site else "one attention"
        return Taken(captured, layout_of(captured), name)
    found = blocks(captured)
    if not found:
        raise SiteError(
            f"this needs a global block, and what was captured has none: {few(list(captured))}"
        )
    number = scaled(usual, found) if block is None else block
    if number not in found:
        paper = f" (global block {usual} of 24 in the paper)" if block is None else ""
        raise SiteError(
            f"no global block {number}{paper} was captured, there are "
            f"{', '.join(map(str, found))}: capture it, or choose one with block="
        )
    attention = one(captured, found[number])
    told = f"; the paper takes global block {usual} of 24" if number != usual else ""
    return Taken(attention, layout_of(attention), f"{found[number]}{told}")


def take_all(captured: Captured) -> dict[int, Taken]:
    """Every captured global block, by number; nothing of a run is read before it is looked at."""
    if isinstance(captured, Attention):
        number = captured.site.block if captured.site else None
        return {number or 0: take(captured, None, 0)}
    found = blocks(captured)
    if not found:
        raise SiteError(
            f"this needs global blocks, and what was captured has none: {few(list(captured))}"
        )
    return {number: take(captured, number, number) for number in found}


def layout_of(a: Attention) -> TokenLayout:
    """The layout of both sides, whose tokens lie in its order."""
    site, name = a.site, a.site.name if a.site else "this attention"
    layout = a.key_layout
    if site is None or layout is None or a.query_layout != layout:
        raise LayoutError(
            f"{name} has to say where its tokens lie, alike for queries and keys; it has queries "
            f"{a.query_layout} and keys {layout}: capture(model, layout=…) says it"
        )
    if site.query_order is not None or site.key_order is not None:
        raise LayoutError(
            f"{name} has its tokens reordered or merged, and this is about tokens frame by frame: "
            "switch that off in the model"
        )
    if site.frames_in_batch or a.shape[2:] != (layout.num_tokens, layout.num_tokens):
        raise LayoutError(
            f"{name} has {a.shape[2]} queries and {a.shape[3]} keys, and all frames in one "
            f"sequence are {layout.num_tokens} tokens: take a global block"
        )
    return layout


def plain(taken: Taken, what: str) -> None:
    """As `plain_attention`."""
    a = taken.attention
    plain_attention(a, a.site.name if a.site else "this attention", what)


def plain_attention(a: Attention, name: str, what: str) -> None:
    """Refuse attention whose logits are more than scale · q·k, or that has none."""
    if a.weights is not None:
        raise InputError(f"{what} needs queries and keys, and {name} has weights alone")
    if a.causal or any(x is not None for x in (a.mask, a.segments, a.score_mod, a.mask_mod)):
        raise InputError(f"{what} is defined without masks, and {name} has one")


def one(captured: Mapping[str, Attention], name: str) -> Attention:
    """The attention of a site, of one pass."""
    found = captured[name]
    if not isinstance(found, Attention):
        raise InputError(f"{name} holds several passes: hand over one of them")
    return found


def frame_of(taken: Taken, frame: int, name: str = "frame") -> int:
    """A frame that exists."""
    count = taken.layout.frames
    if not 0 <= frame < count:
        raise LayoutError(f"{name} is one of 0…{count - 1}, got {frame}")
    return frame


def _describing(captured: Mapping[str, Attention]) -> Callable[[str], Any]:
    """What tells kind and block of a site, without reading it or raising for a broken one."""
    if isinstance(captured, Run):
        return lambda name: captured.record(name).site
    if isinstance(captured, Capture):
        return {site.name: site for site in captured.sites}.get
    return lambda name: one(captured, name).site
