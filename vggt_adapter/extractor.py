"""Attention of VGGT's frame and global blocks, under the names that VGGT's users know.

A thin naming layer over `vistvis.capture`: it finds the blocks, names them `frame_block_3` and
`global_block_3`, and returns the dicts of the earlier `visualize_attention.py`, with lazy weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from vggt_adapter.inputs import ATTENTION_TYPES, checked_types, images_shape
from vistvis.attention import Attention
from vistvis.errors import CaptureError, InputError, SiteError
from vistvis.hooks.capture import Capture, capture
from vistvis.hooks.results import Sink
from vistvis.models.sites import find_sites
from vistvis.tokens import TokenLayout


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

    As a context manager it clears its hooks at the end, whatever happens inside. SiteError if the
    model has no frame and global blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.aggregator = find_aggregator(model)
        self._capture: Capture | None = None
        self._dense = False

    @property
    def num_blocks(self) -> int:
        """Pairs of a frame block and a global block."""
        return _num_blocks(self.aggregator)

    def register_hooks(
        self,
        block_indices: int | Iterable[int] | None = None,
        attention_types: str | Sequence[str] = ATTENTION_TYPES,
        *,
        rope: bool = True,
        accumulate: bool = False,
        keep: Literal["cpu"] | None = None,
        dense: bool = False,
        sink: Sink | None = None,
    ) -> AttentionExtractor:
        """Watch blocks from the next forward pass on; earlier hooks of this extractor go first.

        Returns the extractor; InputError if a block or an attention type does not exist.

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

        Cost: 1 to 3 % of a forward pass on a CPU, up to 5 % where hooks go on for each pass; memory
        of Q and K, `2 · B·S·P·C` numbers a block.
        """
        names = site_names(self.aggregator, block_indices, attention_types)
        self.clear_hooks()
        self._dense = dense
        self._capture = capture(
            self.aggregator,
            list(names),
            rope=rope,
            accumulate=accumulate,
            keep=keep,
            sink=sink,
            names=names,
        )
        return self

    @property
    def captured(self) -> Capture:
        """Block name → `Attention`, in model order: `frame_block_0`, `global_block_0`, …

        Stays readable after `clear_hooks`, until hooks are registered again. CaptureError if none
        were; its items raise it if no forward pass has run since, or what ran can't be read.
        """
        if self._capture is None:
            raise CaptureError(
                "no hooks are registered: call register_hooks() and then model(images)"
            )
        return self._capture

    def get_attention_maps(self) -> dict[str, dict[str, Any]]:
        """What was captured, in model order: `{"frame_block_0": {...}, "global_block_0": …}`.

        Each holds
        'attn_weights' (a lazy `Attention`, `(B·S, h, P, P)` for frame blocks and
        `(B, h, S·P, S·P)` for global ones; a tensor with `dense=True`; a list of them with
        `accumulate=True`), 'layer_type', 'num_heads', 'num_tokens', and 'rope': False where
        queries and keys were taken before RoPE.

        CaptureError as `captured`; DenseLimitError if a matrix that is to be dense is too large.
        """
        return {
            name: _entry(attention, dense=self._dense) for name, attention in self.captured.items()
        }

    def report(self) -> str:
        """A table of the watched blocks: how often each ran, and what went wrong."""
        return self.captured.report()

    def clear_hooks(self) -> None:
        """Take every hook off the model; what was captured stays readable."""
        if self._capture is not None:
            self._capture.remove()

    def __enter__(self) -> AttentionExtractor:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._capture is not None:
            self._capture.__exit__(kind, error, traceback)


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

    InputError if the block does not exist, or `images` is no batch of pictures; SiteError as
    `AttentionExtractor`. Cost: one forward pass, and memory of Q and K of two blocks.
    """
    images_shape(images)
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
        "patch_start_idx": TokenLayout.from_model(extractor.aggregator, images).patch_start_idx,
    }


def find_aggregator(model: nn.Module) -> nn.Module:
    """What holds the frame and global blocks: the model, or its `aggregator`; else SiteError."""
    for candidate in (model, getattr(model, "aggregator", None)):
        lists = [getattr(candidate, f"{kind}_blocks", None) for kind in ATTENTION_TYPES]
        if isinstance(candidate, nn.Module) and all(isinstance(x, nn.ModuleList) for x in lists):
            return candidate
    children = ", ".join(name for name, _ in model.named_children()) or "no submodules"
    raise SiteError(
        f"a VGGT-like model has aggregator.frame_blocks and aggregator.global_blocks; "
        f"{type(model).__name__} has {children}. For other transformers use vistvis.capture"
    )


def _entry(captured: Attention | list[Attention], *, dense: bool) -> dict[str, Any]:
    passes = captured if isinstance(captured, list) else [captured]
    weights = [attention.dense() if dense else attention for attention in passes]
    site = passes[-1].site
    assert site is not None
    entry: dict[str, Any] = {
        "attn_weights": weights if isinstance(captured, list) else weights[0],
        "layer_type": site.kind,
        "num_heads": passes[-1].num_heads,
        "num_tokens": passes[-1].shape[-1],
    }
    if site.rope is False:
        entry["rope"] = False
    return entry


def _num_blocks(aggregator: nn.Module) -> int:
    return min(len(getattr(aggregator, f"{kind}_blocks")) for kind in ATTENTION_TYPES)


def checked_blocks(aggregator: nn.Module, indices: int | Iterable[int] | None) -> list[int]:
    """Block numbers from 0, in order; None: all. InputError if one does not exist, or for none."""
    count = _num_blocks(aggregator)
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


def site_names(
    aggregator: nn.Module,
    block_indices: int | Iterable[int] | None = None,
    attention_types: str | Sequence[str] = ATTENTION_TYPES,
) -> dict[str, str]:
    """Dotted site name → block name, in the order in which the model runs them.

    InputError as in `register_hooks`; SiteError if a block has not exactly one attention module.
    """
    kinds = checked_types(attention_types)
    blocks = checked_blocks(aggregator, block_indices)
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
