"""Where a model reorders, drops or merges tokens: which original tokens the captured ones are.

Measured in the pass itself. From block to block tokens are followed by their numbers, positions
that rotary embeddings get are a witness of the place in the frame, and merging functions give their
map.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vistvis.errors import CaptureError
from vistvis.hooks.merging import Merge, merging_functions
from vistvis.hooks.moves import same_rows, sources
from vistvis.hooks.origins import Placing, Tokens
from vistvis.hooks.patching import Forward
from vistvis.hooks.positions import places, position_tensors
from vistvis.models.families import ATTENTION_CLASS
from vistvis.models.sites import Site
from vistvis.tokens import TokenLayout

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
# A block that some tokens bypass (registers attend alone) leaves them as the block before did.
_REMEMBERED = 2


class Orders(threading.local):
    """Follows tokens through the blocks of a model; of each thread its own."""

    def __init__(self) -> None:
        self._layout: TokenLayout | None = None
        self._watching = False
        self._recent: list[tuple[Tensor, Tokens]] = []
        self._running: tuple[tuple[Tensor, Tokens, Args], ...] = ()
        self._places: dict[Any, tuple[Tensor, Tensor | None, bool]] = {}
        self._merge: Merge | None = None

    @classmethod
    def listeners(
        cls, model: nn.Module, sites: Sequence[Site]
    ) -> Iterator[tuple[Any, Callable[..., Any], str]]:
        """What has to be listened to: `(module, what runs instead, name of its method)`."""
        for block in _blocks(model, [site.module for site in sites]):
            yield block, cls._run_block, "forward"
        functions = {
            (id(owner), name): owner
            for site in sites
            for owner, name in merging_functions(site.module)
        }
        for (_, name), owner in functions.items():
            yield owner, cls._run_merge, name

    @contextmanager
    def passing(self, layout: TokenLayout | None) -> Iterator[None]:
        """A pass of the model: blocks inside it hand on their tokens."""
        outer = self._layout, self._watching, self._recent, self._running, self._places
        self._layout, self._watching, self._recent, self._running = layout, True, [], ()
        self._places = {}
        try:
            yield
        finally:
            self._layout, self._watching, self._recent, self._running, self._places = outer
            self._merge = None

    def of(self, site: Site, args: Args, kwargs: Kwargs) -> Placing | None:
        """Whose tokens a site got that has just run; None if nothing is known."""
        merge, self._merge = self._merge, None
        x = _token_tensor(args, kwargs)
        if x is None or not self._watching:
            return None
        batch, count = x.shape[:2]
        positions = position_tensors(args, kwargs)
        others = _others(x, args)
        crossing = site.kind == "cross" or (others and others[0] is not x)
        block = self._running[-1] if self._running else None
        if block is None or block[0].shape[:2] != x.shape[:2]:
            placed = self._seen(self._fresh(x), x, positions)
        else:
            # What attention modules alone get holds for the rest of the block.
            placed = self._seen(block[1], x, positions)
            self._running = (*self._running[:-1], (block[0], placed, block[2]))
            if placed.ids is not None and _others(block[0], block[2]):
                placed = replace(placed, ids=None, lost=True)  # which of them it got is not known
        keys = self._crossed(others, args, kwargs) if crossing else placed
        return Placing(batch, count, placed, keys, merge)

    # -- listeners -------------------------------------------------------------------------------

    def _run_merge(self, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        out = original(*args, **kwargs)
        self._merge = Merge.of(args, out)
        return out

    def _run_block(self, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        x = _token_tensor(args, kwargs) if self._watching else None
        if x is None:
            return original(*args, **kwargs)
        outer = self._running
        self._running = (*outer, (x, self._entering(x, args, kwargs), args))
        try:
            out = original(*args, **kwargs)
            tokens = self._running[-1][1]
        finally:
            self._running = outer
        self._remember(tokens, x, out)
        return out

    # -- following -------------------------------------------------------------------------------

    def _entering(self, x: Tensor, args: Args, kwargs: Kwargs) -> Tokens:
        """Whose tokens enter a block; what goes wrong here never breaks the forward."""
        with torch.no_grad():
            try:
                tokens = self._followed(x)
            except Exception:
                tokens = replace(self._fresh(x), lost=True)
        return self._seen(tokens, x, position_tensors(args, kwargs))

    def _remember(self, tokens: Tokens, x: Tensor, out: Any) -> None:
        y = _token_tensor(out if isinstance(out, (tuple, list)) else (out,), {})
        if y is None:
            return
        if y.shape[:2] != x.shape[:2]:
            tokens = Tokens(y.shape[0], y.shape[1], tokens.layout, lost=True)
        self._recent = [(y.detach(), tokens), *self._recent][:_REMEMBERED]

    def _followed(self, x: Tensor) -> Tokens:
        """Tokens of one of the last outputs, found again in this input; else a new beginning."""
        total = x.shape[0] * x.shape[1]
        for before, tokens in self._recent:
            if total == tokens.samples * tokens.count and same_rows(before, x):
                return replace(tokens, lost=tokens.lost or bool(tokens.problem), problem="")
        known = [pair for pair in self._recent if not (pair[1].lost or pair[1].problem)]
        for before, tokens in known:
            found = _found(x, [before], [tokens])
            if found is not None:
                return found
        # Some by this block and some by the one before (registers that attended alone).
        if len(known) > 1 and len({(t.samples, t.layout) for _, t in known}) == 1:
            found = _found(x, [before for before, _ in known], [tokens for _, tokens in known])
            if found is not None:
                return found
        fresh = self._fresh(x)
        # All numbers are new (a norm, an added embedding): tokens stay, as they mostly do; where
        # they had been moved, nothing says if they were put back. A part of them in their order
        # was no move: this is another beginning.
        if not self._recent or not _unclear(self._recent[0][1], total):
            return fresh
        return replace(fresh, lost=True)

    def _fresh(self, x: Tensor) -> Tokens:
        """Tokens in the order of the layout, where their number fits it."""
        (batch, count), layout = x.shape[:2], self._layout
        if layout is not None:
            frames, each = layout.frames, layout.tokens_per_frame
            if count == layout.num_tokens:
                return Tokens(batch, count, layout)
            if count == each and batch % frames == 0:
                return Tokens(batch // frames, frames * each, layout)
            if count == each:
                return Tokens(batch, each, layout.frame_layout())
        return Tokens(batch, count)

    def _seen(self, tokens: Tokens, x: Tensor, positions: Sequence[Tensor]) -> Tokens:
        """The same tokens with what positions say of their places."""
        fitting = [pos for pos in positions if pos.shape[-2] == x.shape[1]]
        fitting = [pos for pos in fitting if pos.ndim == 2 or pos.shape[0] in (1, len(x))]
        if not fitting or self._layout is None or tokens.problem:
            return tokens
        try:
            with torch.no_grad():
                return self._placed(tokens, fitting[0].detach().expand(len(x), -1, -1))
        except CaptureError as error:
            return replace(tokens, problem=str(error))
        except Exception:  # positions that can't be looked at (inside a transform) say nothing
            return tokens

    def _placed(self, tokens: Tokens, pos: Tensor) -> Tokens:
        layout, (batch, count) = self._layout, pos.shape[:2]
        assert layout is not None
        each = layout.tokens_per_frame
        if count < each:
            within = places(pos, layout) if tokens.ids is None else None
            if within is None:
                return tokens
            return Tokens(batch, count, layout.frame_layout(), within)
        if count not in (each, layout.num_tokens):
            return tokens
        # All blocks of a pass get the same positions, and looking costs.
        mark = (pos.data_ptr(), pos.shape, pos.stride(), 0 if pos.is_inference() else pos._version)
        if mark not in self._places:
            if count == layout.num_tokens:
                first = len(layout.before)
                pos = pos[:, first : first + layout.frames * each]
            within = places(pos.reshape(-1, each, 2), layout)
            plain = within is None or bool((within == torch.arange(each, device=pos.device)).all())
            # The positions are held on to, so their address is their own.
            self._places[mark] = pos, within, plain
        _, within, plain = self._places[mark]
        if within is None or (plain and tokens.ids is None and not tokens.lost):
            return tokens
        return _placed(tokens, within)

    def _crossed(self, others: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Tokens | None:
        """Tokens of the other side, where it has positions of its own."""
        positions = position_tensors(args, kwargs)
        if len(positions) < 2 or not others:
            return None
        return self._seen(self._fresh(others[0]), others[0], positions[-1:])


def _placed(tokens: Tokens, within: Tensor) -> Tokens:
    """Tokens whose places in their frames `(R, P)` are known."""
    layout = tokens.layout
    if layout is None:
        return tokens
    each, first = layout.tokens_per_frame, len(layout.before)
    if tokens.lost:
        # Positions say where in a frame, not in which.
        if layout.frames > 1:
            return tokens
        tokens = replace(tokens, lost=False, ids=None)
    ids = tokens.numbers(within.device).clone()
    # Frames alone, or between tokens of no frame.
    start = first if tokens.count == layout.num_tokens else 0
    inner = ids[:, start : start + layout.frames * each]
    frame = (inner.reshape(-1, each) - first) // each
    if bool((frame != frame[:, :1]).any()):
        return tokens
    inner.copy_((first + frame * each + within).reshape(inner.shape))
    return tokens.moved(ids)


def _found(x: Tensor, before: Sequence[Tensor], known: Sequence[Tokens]) -> Tokens | None:
    """The tokens of `x`, as far as they are rows of these outputs; None if most are new."""
    first, layout = known[0], known[0].layout
    total, samples, width = x.shape[0] * x.shape[1], first.samples, x.shape[-1]
    if len(x) % samples or total > sum(tokens.count for tokens in known) * samples:
        return None
    if any(
        one.shape[-1] != width or one.dtype != x.dtype or one.device != x.device for one in before
    ):
        return None
    rows = torch.cat([one.reshape(samples, -1, width) for one in before], 1)
    ids = torch.cat([tokens.numbers(x.device) for tokens in known], 1)
    # Frames can move whole where all of them are there.
    frames = layout.frames if layout and ids.shape[1] % layout.frames == 0 else 1
    found = sources(rows, x.detach().reshape(samples, -1, width), frames=frames, ids=ids)
    if found is None:
        return None
    return first.moved(torch.where(found < 0, -1, ids.gather(1, found.clamp_min(0))))


def _unclear(tokens: Tokens, total: int) -> bool:
    """Whether tokens were moved, so that nothing is known of `total` others after them."""
    ids = tokens.ids
    if ids is None:
        return tokens.lost or bool(tokens.problem)
    return total == ids.numel() or bool((ids[:, 1:] < ids[:, :-1]).any())


def _is_token_tensor(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.ndim != 3:
        return False
    return value.is_floating_point() and value.device.type != "meta"


def _others(x: Tensor, args: Args) -> list[Tensor]:
    """Token tensors beside `x` among the arguments, of its width."""
    tensors = [value for value in args if _is_token_tensor(value)]
    return [value for value in tensors[1:] if value.shape[-1] == x.shape[-1]]


def _token_tensor(args: Sequence[Any], kwargs: Kwargs) -> Tensor | None:
    """The first tensor `(batch, token, width)` among arguments or results."""
    return next((value for value in (*args, *kwargs.values()) if _is_token_tensor(value)), None)


def _blocks(model: nn.Module, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """Blocks that attention modules lie in, and those beside them in the lists of one owner."""
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    owners: dict[nn.Module, None] = {}
    stacks: dict[nn.Module, None] = {}
    for attention in attentions:
        block = parents.get(attention)
        while block in parents and not isinstance(parents[block], (nn.ModuleList, nn.Sequential)):
            block = parents[block]
        if block in parents:
            stacks[parents[block]] = None
            if parents[block] in parents:
                owners[parents[parents[block]]] = None
    beside = [c for owner in owners for c in owner.children() if isinstance(c, nn.ModuleList)]
    blocks = {block: None for stack in (*stacks, *beside) for block in stack.children()}
    return [
        block
        for block in blocks
        if any(ATTENTION_CLASS.search(type(module).__name__) for module in block.modules())
    ]
