"""Attention of VGGT's frame and global blocks, under the names that VGGT's users know.

A thin naming layer over `vistvis.capture`: it finds the blocks, names them `frame_block_3` and
`global_block_3`, works out from the pictures where each token lies, and returns the dicts of the
earlier `visualize_attention.py`, with lazy weights in them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, SupportsIndex, TypeAlias

import torch
from torch import Tensor, nn

from vistvis.attention import Attention
from vistvis.errors import CaptureError, InputError, SiteError
from vistvis.hooks.capture import Capture, capture
from vistvis.models.sites import find_sites
from vistvis.tokens import TokenLayout

ATTENTION_TYPES = ("frame", "global")

Maps: TypeAlias = dict[str, dict[str, Any]]


class AttentionExtractor:
    """Take queries and keys of chosen blocks while the model runs.

    Works on `vggt_adapter.VGGT`, on the official `VGGT`, and on any model (or aggregator) with
    `frame_blocks` and `global_blocks`.

    >>> extractor = AttentionExtractor(model)
    >>> extractor.register_hooks(block_indices=[0, 12, 23])
    >>> with torch.no_grad():
    ...     model(images)
    >>> extractor.captured["global_block_23"].rows(500)     # (B, h, 1, S·P)
    >>> extractor.clear_hooks()

    As a context manager it clears its hooks at the end, whatever happens inside.

    Raises
    ------
    SiteError
        If the model has no frame and global blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.aggregator = find_aggregator(model)
        self._captured: _Captured | None = None

    @property
    def num_blocks(self) -> int:
        """Pairs of a frame block and a global block."""
        return min(len(_blocks(self.aggregator, kind)) for kind in ATTENTION_TYPES)

    def register_hooks(
        self,
        block_indices: int | Iterable[int] | None = None,
        attention_types: str | Sequence[str] = ATTENTION_TYPES,
        *,
        rope: bool = True,
        accumulate: bool = False,
        keep: Literal["cpu"] | None = None,
        dense: bool = False,
        sink: Callable[[str, Attention], None] | None = None,
    ) -> AttentionExtractor:
        """Watch blocks from the next forward pass on; earlier hooks of this extractor go first.

        Parameters
        ----------
        block_indices
            Blocks, counted within their kind; negative from the end. None: all of them.
        attention_types
            "frame", "global" or both.
        rope
            False takes queries and keys before their rotary embedding, as some papers did. Those
            are not the model's attention; the results say so (`'rope': False`).
        accumulate
            Keep every forward pass: what is captured is then a list per block.
        keep
            "cpu" moves queries and keys off the device while the model runs.
        dense
            `get_attention_maps` gives plain tensors, under the limit of `Attention.dense`, in place
            of lazy ones.
        sink
            Called with `(block name, attention)` as soon as a block has run, in place of keeping
            it: a `vistvis.RunWriter` stores blocks while the model runs on.

        Returns
        -------
        The extractor itself.

        Raises
        ------
        InputError
            If a block or an attention type does not exist.

        Cost: 1 to 3 % of a forward pass on a CPU, up to 5 % where hooks go on for each pass; memory
        of Q and K, `2 · B·S·P·C` numbers a block.
        """
        kinds = _checked_types(attention_types)
        names = site_names(self.aggregator, checked_blocks(self.aggregator, block_indices), kinds)
        self.clear_hooks()
        self._captured = _Captured(
            capture(
                self.aggregator,
                list(names),
                rope=rope,
                accumulate=accumulate,
                keep=keep,
                sink=None if sink is None else lambda site, found: sink(names[site], found),
                layout=token_layout,
                # Blocks go by the names users know, also once they are stored or drawn.
                describe=lambda info: replace(info, name=names[info.name]),
            ),
            {name: site for site, name in names.items()},
            dense=dense,
        )
        return self

    @property
    def captured(self) -> Mapping[str, Attention]:
        """Block name → `Attention`, in model order: `frame_block_0`, `global_block_0`, …

        Stays readable after `clear_hooks`, until hooks are registered again.

        Raises
        ------
        CaptureError
            If no hooks were registered. Its items raise it if no forward pass has run since, or
            if what ran can't be read exactly.
        """
        if self._captured is None:
            raise CaptureError(
                "no hooks are registered: call register_hooks() and then model(images)"
            )
        return self._captured

    def get_attention_maps(self) -> Maps:
        """What was captured, as dicts.

        Returns
        -------
        `{"frame_block_0": {...}, "global_block_0": {...}, ...}` in model order. Each holds
        'attn_weights' (a lazy `Attention`, `(B·S, h, P, P)` for frame blocks and
        `(B, h, S·P, S·P)` for global ones; a tensor with `dense=True`; a list of them with
        `accumulate=True`), 'layer_type', 'num_heads', 'num_tokens', and 'rope': False where
        queries and keys were taken before RoPE.

        Raises
        ------
        CaptureError
            If there is nothing to return: no hooks, or no forward pass since.
        DenseLimitError
            With `dense=True`, if a matrix is larger than the limit.
        """
        captured = self.captured
        assert isinstance(captured, _Captured)
        return {name: _entry(found, dense=captured.dense) for name, found in captured.items()}

    def report(self) -> str:
        """A table of the watched blocks: how often each ran, and what went wrong."""
        captured = self.captured
        assert isinstance(captured, _Captured)
        return captured.capture.report()

    def clear_hooks(self) -> None:
        """Take every hook off the model; what was captured stays readable."""
        if self._captured is not None:
            self._captured.capture.remove()

    def __enter__(self) -> AttentionExtractor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._captured is not None:
            self._captured.capture.__exit__(kind, error, traceback)


def extract_both_attentions(
    model: nn.Module,
    images: Tensor,
    block_idx: int = 23,
    *,
    dense: bool = False,
    rope: bool = True,
    keep: Literal["cpu"] | None = None,
) -> dict[str, Any]:
    """Frame and global attention of one block, in one forward pass without gradients.

    Parameters
    ----------
    model
        As for `AttentionExtractor`; used as it is, in the mode it is in.
    images
        `(S, 3, H, W)` or `(B, S, 3, H, W)` in [0, 1], on the model's device.
    block_idx
        The pair of blocks; negative from the end.
    dense, rope, keep
        As for `AttentionExtractor.register_hooks`.

    Returns
    -------
    `{'frame_attention': {...}, 'global_attention': {...}, 'block_idx', 'patch_start_idx'}`; the
    inner dicts are those of `AttentionExtractor.get_attention_maps`.

    Raises
    ------
    InputError
        If the block does not exist, or `images` is no batch of pictures.
    SiteError
        If the model has no frame and global blocks.

    Cost: one forward pass, and memory of Q and K of two blocks.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise InputError(
            f"images are (S, 3, H, W) or (B, S, 3, H, W), got {tuple(images.shape)}; "
            "load_and_preprocess_images makes them"
        )
    with AttentionExtractor(model) as extractor:
        (block,) = checked_blocks(extractor.aggregator, block_idx)
        extractor.register_hooks(block, rope=rope, keep=keep, dense=dense)
        with torch.no_grad():
            model(images)
        maps = extractor.get_attention_maps()
    return {
        "frame_attention": maps[f"frame_block_{block}"],
        "global_attention": maps[f"global_block_{block}"],
        "block_idx": block,
        "patch_start_idx": _patch_start(extractor.aggregator),
    }


def find_aggregator(model: nn.Module) -> nn.Module:
    """The module that holds the frame and global blocks: the model, or its `aggregator`.

    Raises
    ------
    SiteError
        If there is none; the text says what the model has.
    """
    for candidate in (model, getattr(model, "aggregator", None)):
        if isinstance(candidate, nn.Module) and all(
            isinstance(getattr(candidate, f"{kind}_blocks", None), nn.ModuleList)
            for kind in ATTENTION_TYPES
        ):
            return candidate
    children = ", ".join(name for name, _ in model.named_children()) or "no submodules"
    raise SiteError(
        f"a VGGT-like model has aggregator.frame_blocks and aggregator.global_blocks; "
        f"{type(model).__name__} has {children}. For other transformers use vistvis.capture"
    )


def token_layout(
    aggregator: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TokenLayout | None:
    """Where each token of a forward pass lies, from the pictures that went in.

    None where no argument is a batch of pictures: weights are exact all the same.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim in (4, 5) and value.shape[-3] == 3:
            frames, height, width = value.shape[-4], *value.shape[-2:]
            size = _patch_size(aggregator)
            grid = (height // size[0], width // size[1])
            return TokenLayout(frames, grid, _special_kinds(aggregator), size)
    return None


class _Captured(Mapping[str, Attention]):
    """A capture under block names, frame before global in every pair as the model runs them."""

    def __init__(self, capture: Capture, sites: dict[str, str], *, dense: bool) -> None:
        self.capture, self.sites, self.dense = capture, sites, dense

    def __getitem__(self, name: str) -> Attention:
        if name not in self.sites:
            raise SiteError(f"no block {name!r} was watched: there are {', '.join(self.sites)}")
        return self.capture[self.sites[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, name: object) -> bool:
        return self.sites.get(str(name)) in self.capture

    def __repr__(self) -> str:
        return f"{', '.join(self.sites)} in {self.capture!r}"


def _entry(found: Attention | list[Attention], *, dense: bool) -> dict[str, Any]:
    passes = found if isinstance(found, list) else [found]
    weights = [one.dense() if dense else one for one in passes]
    site = passes[-1].site
    assert site is not None
    entry: dict[str, Any] = {
        "attn_weights": weights if isinstance(found, list) else weights[0],
        "layer_type": site.kind,
        "num_heads": passes[-1].num_heads,
        "num_tokens": passes[-1].shape[-1],
    }
    if site.rope is False:
        entry["rope"] = False
    return entry


def _blocks(aggregator: nn.Module, kind: str) -> nn.ModuleList:
    blocks = getattr(aggregator, f"{kind}_blocks")
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _checked_types(attention_types: str | Sequence[str]) -> list[str]:
    asked = [attention_types] if isinstance(attention_types, str) else list(attention_types)
    wrong = [kind for kind in asked if kind not in ATTENTION_TYPES]
    if wrong or not asked:
        raise InputError(
            f"attention types are {' and '.join(map(repr, ATTENTION_TYPES))}, got {asked!r}"
        )
    return [kind for kind in ATTENTION_TYPES if kind in asked]


def checked_blocks(aggregator: nn.Module, indices: int | Iterable[int] | None) -> list[int]:
    count = min(len(_blocks(aggregator, kind)) for kind in ATTENTION_TYPES)
    if indices is None:
        return list(range(count))
    asked = [indices] if isinstance(indices, SupportsIndex) else list(indices)
    numbers = [operator.index(number) for number in asked]
    wrong = [number for number in numbers if not -count <= number < count]
    if wrong or not numbers:
        raise InputError(
            f"this model has blocks 0…{count - 1} of each kind, got {wrong[0] if wrong else 'none'}"
        )
    return sorted({number % count for number in numbers})


def site_names(aggregator: nn.Module, blocks: list[int], kinds: list[str]) -> dict[str, str]:
    """Dotted site name → block name, in the order in which the model runs them."""
    sites = find_sites(aggregator).names
    names = {}
    for block in blocks:
        for kind in kinds:
            inside = [name for name in sites if name.startswith(f"{kind}_blocks.{block}.")]
            if len(inside) != 1:
                raise SiteError(
                    f"{kind} block {block} has one attention module in a VGGT-like model, here "
                    f"{len(inside)} ({', '.join(inside) or 'none found'}); use vistvis.capture"
                )
            names[inside[0]] = f"{kind}_block_{block}"
    return names


def _patch_size(aggregator: nn.Module) -> tuple[int, int]:
    size = getattr(aggregator, "patch_size", 14)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _patch_start(aggregator: nn.Module) -> int:
    return int(getattr(aggregator, "patch_start_idx", len(_special_kinds(aggregator))))


def _special_kinds(aggregator: nn.Module) -> tuple[str, ...]:
    registers = getattr(aggregator, "register_token", None)
    kinds = ["camera"] if hasattr(aggregator, "camera_token") else []
    kinds += ["register"] * (registers.shape[2] if isinstance(registers, Tensor) else 0)
    start = getattr(aggregator, "patch_start_idx", len(kinds))
    # A fork with other special tokens: their number is what counts, their names are unknown.
    return tuple(kinds) if start == len(kinds) else ("special",) * int(start)
