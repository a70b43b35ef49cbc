"""Attention of VGGT and its relatives, block by block, under the names that VGGT's users know.

A thin naming layer over `vistvis.capture`: it finds the blocks, names them `frame_block_3` and
`global_block_3`, and returns the dicts of the earlier `visualize_attention.py`, with lazy weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vggt_adapter.blocks import Block, chosen_blocks, find_blocks, pair_of, watched_part
from vggt_adapter.inputs import images_shape
from vistvis.attention import Attention
from vistvis.errors import CaptureError
from vistvis.hooks.capture import Capture, capture
from vistvis.hooks.results import Sink


class AttentionExtractor:
    """Take queries and keys of chosen blocks while the model runs.

    Works on `vggt_adapter.VGGT`, on the official `VGGT` (whole, or its aggregator), and on every
    multi-view family that `vistvis.models.families` knows: VGGT-Ω, StreamVGGT, FastVGGT, Pi3, Depth
    Anything 3, MapAnything, DUSt3R, … A block is named by its kind and its number within the kind:
    `frame_block_3`, `global_block_3`, `register_block_2`, `cross_block_0`. Where a kind fills two
    lists, as the two decoders of DUSt3R, those of the second name it: `cross_block_0_dec_blocks2`.

    >>> extractor = AttentionExtractor(model)
    >>> extractor.register_hooks(block_indices=[0, 12, 23])
    >>> with torch.no_grad():
    ...     model(images)
    >>> extractor.captured["global_block_23"].rows(500)     # (B, h, 1, S·P)
    >>> extractor.clear_hooks()

    As a context manager it clears its hooks at the end, whatever happens inside. SiteError for a
    model of no known family; it says what `vistvis.capture` needs to know of such a one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.watched = watched_part(model)
        self.blocks = find_blocks(self.watched)
        self._capture: Capture | None = None
        self._dense = False

    @property
    def num_blocks(self) -> int:
        """Pairs of a frame block and a global block: one more than the largest number."""
        return 1 + max(block.number for block in self.blocks)

    @property
    def attention_types(self) -> list[str]:
        """What the model has of "frame", "global", "register" and "cross"."""
        return list(dict.fromkeys(block.kind for block in self.blocks))

    def register_hooks(
        self,
        block_indices: int | Iterable[int] | None = None,
        attention_types: str | Sequence[str] | None = None,
        *,
        rope: bool = True,
        accumulate: bool = False,
        keep: Literal["cpu"] | None = None,
        dense: bool = False,
        values: bool = False,
        sink: Sink | None = None,
    ) -> AttentionExtractor:
        """Watch blocks from the next forward pass on; earlier hooks of this extractor go first.

        Returns the extractor; InputError if a block or an attention type does not exist; it names
        those that do.

        Parameters
        ----------
        block_indices
            Blocks, counted within their kind; negative from the end. None: all of them.
        attention_types
            "frame", "global", "register", "cross", or several; None: all that the model has (then a
            block of a number need not be there in every type).
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
        values
            Keep V too, as `Attention.value`.
        sink
            Called with `(block name, attention)` as soon as a block has run, in place of keeping
            it: a `vistvis.RunWriter` stores blocks while the model runs on.

        Cost: 1 to 3 % of a forward pass on a CPU, up to 5 % where hooks go on for each pass; memory
        of Q and K, `2 · B·S·P·C` numbers a block.
        """
        chosen = chosen_blocks(self.blocks, block_indices, attention_types)
        options = {"rope": rope, "accumulate": accumulate, "keep": keep, "values": values}
        self._watch(chosen, dense, **options, sink=sink)
        return self

    def _watch(self, blocks: Sequence[Block], dense: bool, **options: Any) -> None:
        names = {block.path: block.name for block in blocks}
        self.clear_hooks()
        self._dense = dense
        self._capture = capture(self.watched, list(names), names=names, **options)

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
        `accumulate=True`), 'layer_type', 'num_heads', 'num_tokens' (of the keys), and 'rope': False
        where queries and keys were taken before RoPE.

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
    images: Tensor | Sequence[Any],
    block_idx: int = 23,
    *,
    dense: bool = False,
    rope: bool = True,
    keep: Literal["cpu"] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Frame and global attention of one block, in one forward pass without gradients.

    Parameters
    ----------
    model
        As for `AttentionExtractor`; used as it is, in the mode it is in.
    images
        `(S, 3, H, W)` or `(B, S, 3, H, W)`, on the model's device and as it takes them (VGGT: in
        [0, 1]; Pi3 and Depth Anything 3 take the second form only); or a list of views, for models
        that take such.
    block_idx
        The pair of blocks; negative from the end. Where a model numbers all blocks in one row
        (Depth Anything 3), the global one; the frame one is then the last before it.
    dense, rope, keep
        As for `AttentionExtractor.register_hooks`.
    dtype
        Run under autocast in this dtype, for example `torch.bfloat16`; None: as the model is.

    Returns
    -------
    `{'frame_attention': {...}, 'global_attention': {...}, 'block_idx', 'patch_start_idx'}`; the
    inner dicts are those of `AttentionExtractor.get_attention_maps`.

    InputError if the model has no frame and global block of this number, or `images` is no batch of
    pictures; SiteError as `AttentionExtractor`. Cost: one forward pass, and memory of Q and K of
    two blocks.
    """
    if isinstance(images, Tensor):
        images_shape(images)
    with AttentionExtractor(model) as extractor:
        frame, together = pair_of(extractor.blocks, block_idx)
        extractor._watch((frame, together), dense, rope=rope, keep=keep)
        device = next((weights.device.type for weights in model.parameters()), "cpu")
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
            model(images)
        maps, site = extractor.get_attention_maps(), extractor.captured[frame.name].site
    layout = site.key_layout if site else None
    return {
        "frame_attention": maps[frame.name],
        "global_attention": maps[together.name],
        "block_idx": together.number,
        "patch_start_idx": layout.patch_start_idx if layout else None,
    }


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
