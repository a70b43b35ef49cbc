"""The alternating blocks of a multi-view model, under the names that VGGT's users know."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from torch import nn

from vistvis.errors import InputError, LayoutError, SiteError
from vistvis.models.families import blocks_of, parts_of
from vistvis.models.layouts import layout_from_model
from vistvis.models.sites import find_sites

TYPES = ("frame", "global", "register", "cross")


@dataclass(frozen=True)
class Block:
    """One attention module: `name` is `global_block_3`, `path` its dotted name."""

    path: str
    kind: str
    number: int
    name: str


def watched_part(model: nn.Module) -> nn.Module:
    """What hooks go on: the `aggregator`, where that alone has the blocks; else the model.

    An aggregator is also called by itself: by VGGT's users, and frame by frame by StreamVGGT.
    """
    aggregator = getattr(model, "aggregator", None)
    return aggregator if isinstance(aggregator, nn.Module) and blocks_of(aggregator) else model


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model of a known family, in the order in which they run.

    Of a kind that fills several lists, the blocks of the first have plain names, and those of the
    others add the first part of their path which differs: `cross_block_0` and
    `cross_block_0_dec_blocks2`.
    In a model of single pictures all self-attention is "frame" attention, counted as sites are.
    `SiteError` for a model of no known family, which says how to capture it all the same, and where
    a block has not exactly one attention module.
    """
    found = blocks_of(model)
    if not found and (single := _of_single_pictures(model)):
        return single
    if not found:
        children = ", ".join(name for name, _ in model.named_children()) or "no submodules"
        raise SiteError(
            f"{type(model).__name__} (it has {children}) is of no family whose frame, global, "
            "register or cross blocks are known. vistvis.capture(model, layout=TokenLayout(frames, "
            "(rows, cols), special=(…), patch_size=…)) needs the number of pictures, their grid of "
            "patches, the special tokens of a picture and the patch size in pixels; "
            "vistvis.trace_layout(model, images) measures them"
        )
    sites = find_sites(model).names
    first: dict[str, str] = {}
    blocks = []
    for block, kind, number in found:
        inside = [name for name in sites if f"{name}.".startswith(f"{block}.")]
        if len(inside) != 1:
            raise SiteError(
                f"{kind} block {number} ({block}) has one attention module, here {len(inside)} "
                f"({', '.join(inside) or 'none found'}); use vistvis.capture"
            )
        name, own = f"{kind}_block_{number}", _list_of(block)
        plain = first.setdefault(kind, own)
        if own != plain:
            parts = zip(own.split("."), plain.split("."), strict=False)
            name += "_" + next(mine for mine, other in parts if mine != other)
        blocks.append(Block(inside[0], kind, number, name))
    return blocks


def _of_single_pictures(model: nn.Module) -> list[Block]:
    known = list(parts_of(model))
    if not known and _has_layout(model):
        known = [""]
    numbers: Counter[str] = Counter()
    blocks = []
    for site in find_sites(model):
        kind = {"self": "frame", "cross": "cross"}.get(site.kind)
        inside = any(not part or f"{site.path}.".startswith(f"{part}.") for part in known)
        if kind and inside and not site.refused:
            name = f"{kind}_block_{numbers[kind]}"
            blocks.append(Block(site.path, kind, numbers[kind], name))
            numbers[kind] += 1
    return blocks


def _has_layout(model: nn.Module) -> bool:
    try:
        layout_from_model(model, (1, 3, 672, 672))  # a size that has whole patches of most sizes
    except LayoutError:
        return False
    return True


def pair_of(blocks: Sequence[Block], index: int) -> tuple[Block, Block]:
    """The global block of a number, and the last frame block up to that number.

    That is the one of the same number, but for models that number all blocks in one row (Depth
    Anything 3: 8 and 9). `InputError` if the model has no such global block, or no frame blocks.
    """
    missing = {"frame", "global"} - {block.kind for block in blocks}
    if missing:
        kinds = dict.fromkeys(block.kind for block in blocks)
        raise InputError(
            f"this model has no {' and no '.join(sorted(missing))} blocks, only "
            f"{' and '.join(kinds)} blocks; take those with AttentionExtractor"
        )
    together = chosen_blocks(blocks, index, "global")[0]
    # Of the list that has the plain names: of two networks, the one that has global blocks.
    frames = {b.number: b for b in blocks if b.name == f"frame_block_{b.number}"}
    return frames[max(number for number in frames if number <= together.number)], together


def chosen_blocks(
    blocks: Sequence[Block],
    block_indices: int | Iterable[int] | None = None,
    attention_types: str | Sequence[str] | None = None,
) -> list[Block]:
    """Those of some numbers, counted within their kind, negative from the end, and of some types.

    None: all. `InputError` if the model has no block of a type, or a type that is asked for by name
    has no block of a number (without names: if no type has).
    """
    numbers = {kind: sorted({b.number for b in blocks if b.kind == kind}) for kind in TYPES}
    numbers = {kind: of_kind for kind, of_kind in numbers.items() if of_kind}
    kinds = list(numbers)
    if attention_types is not None:
        kinds = [attention_types] if isinstance(attention_types, str) else list(attention_types)
    if not kinds or any(kind not in numbers for kind in kinds):
        raise InputError(
            f"attention types of this model are {' and '.join(map(repr, numbers))}, got {kinds!r}"
        )
    if block_indices is None:
        return [block for block in blocks if block.kind in kinds]
    asked = [block_indices] if isinstance(block_indices, SupportsIndex) else list(block_indices)
    chosen: set[tuple[str, int]] = set()
    for index in map(operator.index, asked):
        having = {kind: _number(numbers[kind], index) for kind in kinds}
        missing = [kind for kind, number in having.items() if number is None]
        if missing and (attention_types is not None or len(missing) == len(kinds)):
            raise InputError(f"this model has {_text(numbers, kinds)}, got {index}")
        chosen.update((kind, number) for kind, number in having.items() if number is not None)
    if not chosen:
        raise InputError(f"this model has {_text(numbers, kinds)}, got none")
    return [block for block in blocks if (block.kind, block.number) in chosen]


def _list_of(block: str) -> str:
    """The dotted name of the list that a block lies in: what stands before its last number."""
    return ".".join(re.split(r"\.(?=\d+(?:\.|$))", block)[:-1])


def _number(numbers: Sequence[int], index: int) -> int | None:
    if index >= 0:
        return index if index in numbers else None
    return numbers[index] if -index <= len(numbers) else None


def _text(numbers: dict[str, list[int]], kinds: Sequence[str]) -> str:
    texts = {}
    for kind in kinds:
        of_kind = numbers[kind]
        gapless = of_kind == list(range(len(of_kind)))
        texts[kind] = f"0…{of_kind[-1]}" if gapless else ", ".join(map(str, of_kind))
    if len(kinds) > 1 and len(set(texts.values())) == 1:
        return f"blocks {texts[kinds[0]]} of each kind"
    return "; ".join(f"{kind} blocks {text}" for kind, text in texts.items())
