"""Families whose tokens are not only rows of patches: text beside the picture, levels, groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistvis.attention.order import TokenOrder
from vistvis.models.family import Blocks, Family, Inputs, Role, grid_of, has, patch_of
from vistvis.models.places import (
    UNKNOWN,
    Place,
    Placement,
    Sizes,
    all_frames,
    one_frame,
    one_side,
)
from vistvis.tokens import TokenLayout

# -- diffusers: Flux, SD3, UNet ------------------------------------------------------------------


def _text(inputs: Inputs) -> tuple[str, ...] | None:
    states = inputs.argument("encoder_hidden_states", 1)
    return ("text",) * int(states.shape[1]) if isinstance(states, Tensor) else None


def _flux_blocks(model: Any) -> Blocks:
    yield "transformer_blocks", Role(place=all_frames)
    yield "single_transformer_blocks", Role(place=all_frames)


def _flux_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    """Text, then the picture, whose ids `(picture, row, col)` must be in reading order."""
    text, ids = _text(inputs), inputs.argument("img_ids", 4)
    if text is None or not isinstance(ids, Tensor):
        return None
    ids = ids.reshape(-1, ids.shape[-1])
    frames, rows, cols = (len(set(numbers)) for numbers in ids.T.tolist())
    patch = int(getattr(model.config, "patch_size", 1))
    layout = TokenLayout(frames, (rows, cols), patch_size=(patch, patch), before=text)
    places = torch.cartesian_prod(*(torch.arange(count) for count in (frames, rows, cols)))
    return layout if torch.equal(places.to(ids), ids) else None


def _sd3_blocks(model: Any) -> Blocks:
    for block in range(len(model.transformer_blocks)):
        yield f"transformer_blocks.{block}.attn", Role(place=all_frames)
        yield f"transformer_blocks.{block}.attn2", Role(place=one_frame)


def _sd3_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    """The picture, then text."""
    text, latents, patch = _text(inputs), inputs.pictures(), patch_of(model.pos_embed)
    if text is None or latents is None or patch is None:
        return None
    grid = grid_of((latents.shape[-2], latents.shape[-1]), patch)
    return TokenLayout(1, grid, patch_size=patch, after=text)


def _unet_blocks(model: Any) -> Blocks:
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("attn1", "attn2"):
            crosses = getattr(module, "is_cross_attention", last == "attn2")
            place = one_side("query", _level) if crosses else _level
            yield name, Role("cross" if crosses else "self", place=place)


def _level(layout: TokenLayout, sizes: Sizes) -> Placement:
    """The picture at the resolution that has so many tokens; each level halves the one before."""
    rows, cols = layout.grid
    down, across = layout.patch_size
    while (rows, cols) != (1, 1) and rows * cols != sizes.queries:
        rows, cols, down, across = (rows + 1) // 2, (cols + 1) // 2, 2 * down, 2 * across
    level = TokenLayout(1, (rows, cols), patch_size=(down, across))
    return Placement(level, level) if sizes.are(rows * cols, rows * cols) else UNKNOWN


def _unet_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    latents = inputs.pictures()
    if latents is None:
        return None
    return TokenLayout(1, (latents.shape[-2], latents.shape[-1]), patch_size=(1, 1))


# -- Qwen2-VL, Qwen2.5-VL ------------------------------------------------------------------------


def _knows_qwen(model: Any) -> bool:
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    return kind.startswith(("qwen2_vl", "qwen2_5_vl")) and hasattr(model, "spatial_merge_size")


def _qwen_blocks(model: Any) -> Blocks:
    merge, window = int(model.spatial_merge_size), None
    if hasattr(model, "window_size"):
        window = int(model.window_size) // merge // int(model.patch_size)
    full = getattr(model, "fullatt_block_indexes", range(len(model.blocks)))
    for block in range(len(model.blocks)):
        kind = "self" if block in full else "window"
        yield f"blocks.{block}", Role(kind, block, in_groups(merge, window))


def in_groups(merge: int, window: int | None) -> Place:
    """Patches in groups of `merge × merge`, and groups in windows of `window × window`.

    Both lie in reading order; windows at the border are smaller.
    """

    def place(layout: TokenLayout, sizes: Sizes) -> Placement:
        (rows, cols), frames = layout.grid, layout.frames
        if rows % merge or cols % merge or not sizes.are(layout.num_tokens, layout.num_tokens):
            return UNKNOWN
        down, across = rows // merge, cols // merge
        tokens = torch.arange(layout.num_tokens).view(frames, down, merge, across, merge)
        groups = tokens.transpose(2, 3).reshape(frames, down * across, merge * merge)
        if window is not None:
            row, col = torch.arange(down) // window, torch.arange(across) // window
            number = (row[:, None] * across + col).flatten()
            groups = groups[:, number.argsort(stable=True)]
        order = TokenOrder(groups.flatten())
        return Placement(layout, layout, query_order=order, key_order=order)

    return place


def _qwen_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    """All pictures and time steps as frames; None where grids differ."""
    given = [inputs.argument(name) for name in ("image_grid_thw", "video_grid_thw")]
    given = [grids for grids in (inputs.argument("grid_thw", 1), *given) if grids is not None]
    patch = patch_of(model)
    if len(given) != 1 or not isinstance(given[0], Tensor) or patch is None:
        return None
    grids = {(rows, cols) for _, rows, cols in given[0].tolist()}
    if len(grids) != 1:
        return None
    return TokenLayout(int(given[0][:, 0].sum()), grids.pop(), patch_size=patch)


MIXED = (
    Family(
        "Flux",
        has("transformer_blocks", "single_transformer_blocks", "context_embedder", "x_embedder"),
        _flux_blocks,
        _flux_layout,
    ),
    Family(
        "SD3", has("transformer_blocks", "context_embedder", "pos_embed"), _sd3_blocks, _sd3_layout
    ),
    Family(
        "UNet", has("conv_in", "down_blocks", "mid_block", "up_blocks"), _unet_blocks, _unet_layout
    ),
    Family("Qwen2-VL", _knows_qwen, _qwen_blocks, _qwen_layout),
)
