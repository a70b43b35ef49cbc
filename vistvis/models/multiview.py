"""Multi-view families: which blocks see a frame and which see all, and how tokens are laid out.

Kinds come from the list that a block is in, from its number, or from a list of types: never from
how many tokens it gets, since a frame block, a register block and an encoder can have the same.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import Tensor

from vistvis.models.family import (
    Blocks,
    Family,
    Inputs,
    Role,
    grid_of,
    has,
    patch_of,
    special_tokens,
)
from vistvis.models.places import (
    Place,
    all_frames,
    between,
    cached_frames,
    one_frame,
    one_picture,
    one_side,
    special_only,
    with_special,
)
from vistvis.tokens import TokenLayout

PLACES: dict[str, Place] = {"frame": one_frame, "global": all_frames, "register": special_only}


def _role(kind: str, block: int) -> Role:
    return Role(kind, block, PLACES[kind])


def _encoder(path: str, encoder: Any, views: Literal["b s", "s b"] = "b s") -> Blocks:
    """A ViT in front, which sees single pictures with special tokens of its own."""
    if getattr(encoder, "blocks", None) is not None:
        place = one_picture(special_tokens(encoder), patch_of(encoder), views=views)
        yield path, Role(place=place)


def _layout(
    module: Any, inputs: Inputs, special: tuple[str, ...], behind: tuple[str, ...] = ()
) -> TokenLayout | None:
    scene, patch = inputs.scene(), patch_of(module)
    if scene is None or patch is None:
        return None
    return TokenLayout(scene.frames, grid_of(scene.size, patch), special, patch, behind)


# -- VGGT, StreamVGGT, FastVGGT, sparse-vggt, VGGT-Ω ---------------------------------------------


def _vggt_blocks(model: Any) -> Blocks:
    yield from _encoder("patch_embed", getattr(model, "patch_embed", None))
    every = cached_frames if any(map(_caches, model.global_blocks[:1])) else all_frames
    for block in range(max(len(model.frame_blocks), len(model.global_blocks))):
        if block < len(model.frame_blocks):
            yield f"frame_blocks.{block}", _role("frame", block)
        if block < len(model.global_blocks):
            yield f"global_blocks.{block}", Role("global", block, every)


def _caches(block: Any) -> bool:
    """Whether a block takes keys of earlier steps."""
    return any(
        "past_key_values" in inspect.signature(type(module).forward).parameters
        for module in block.modules()
    )


def _omega_blocks(model: Any) -> Blocks:
    # Both kinds of inter-frame blocks go by their place in the one list: block i follows frame
    # block i.
    yield from _encoder("patch_embed", getattr(model, "patch_embed", None))
    for block, kind in enumerate(model.inter_frame_attention_types):
        yield f"frame_blocks.{block}", _role("frame", block)
        if kind in PLACES:
            yield f"inter_frame_blocks.{block}", _role(kind, block)


def _vggt_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    registers = getattr(model, "register_token", None)
    kinds = ["camera"] if hasattr(model, "camera_token") else []
    kinds += ["register"] * (registers.shape[2] if isinstance(registers, Tensor) else 0)
    start = getattr(model, "patch_start_idx", getattr(model, "patch_token_start", len(kinds)))
    # A fork with other special tokens: their number is what counts, their names are unknown.
    special = tuple(kinds) if int(start) == len(kinds) else ("special",) * int(start)
    return _layout(model, inputs, special)


# -- Pi3 -----------------------------------------------------------------------------------------


def _pi3_blocks(model: Any) -> Blocks:
    """Even blocks see a frame, odd ones all frames; each kind is counted by itself."""
    yield from _encoder("encoder", model.encoder)
    for index in range(len(model.decoder)):
        yield f"decoder.{index}", _role("global" if index % 2 else "frame", index // 2)
    for name in ("point_decoder", "conf_decoder", "camera_decoder"):
        if hasattr(model, name):
            yield name, Role(place=one_frame)


def _pi3_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    return _layout(model, inputs, ("register",) * int(model.patch_start_idx))


# -- Depth Anything 3 ----------------------------------------------------------------------------


def _depth_anything_blocks(model: Any) -> Blocks:
    """Odd blocks from `alt_start` on see all frames; all go by the model's own number."""
    start = int(model.alt_start)
    for block in range(len(model.blocks)):
        every = start >= 0 and block >= start and block % 2 == 1
        role = _role("global" if every else "frame", block)
        # The slot of the cls token holds a camera token from `alt_start` on.
        first = "camera" if 0 <= start <= block else "cls"
        special = (first, *_depth_anything_special(model)[1:])
        yield f"blocks.{block}", Role(role.kind, block, with_special(special, role.place))


def _depth_anything_special(model: Any) -> tuple[str, ...]:
    registers = getattr(model, "register_tokens", None)
    count = int(registers.shape[1]) if isinstance(registers, Tensor) else 0
    return ("camera" if int(model.alt_start) >= 0 else "cls", *["register"] * count)


def _depth_anything_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    return _layout(model, inputs, _depth_anything_special(model))


# -- MapAnything ---------------------------------------------------------------------------------


def _sharing_blocks(model: Any) -> Blocks:
    """UniCeption's information sharing: even blocks see all views, odd ones one; or all see all.

    Each kind is counted by itself. In the crossing variant every view has a branch, whose keys are
    the views of all the others.
    """
    blocks = getattr(model, "self_attention_blocks", ())
    alternating = "Alternating" in type(model).__name__
    for index in range(len(blocks)):
        kind = "frame" if alternating and index % 2 else "global"
        yield f"self_attention_blocks.{index}", _role(kind, index // 2 if alternating else index)
    branches = getattr(model, "multi_view_branches", ())
    depth = max(map(len, branches), default=0)
    for block in range(depth):
        for view in range(len(branches)):
            path = f"multi_view_branches.{view}.{block}"
            yield f"{path}.attn", Role("self", block, between(view, view))
            yield f"{path}.cross_attn", Role("cross", block, between(view, None))


def _map_anything_blocks(model: Any) -> Blocks:
    vit = getattr(model.encoder, "model", model.encoder)
    path = "encoder.model" if vit is not model.encoder else "encoder"
    yield from _encoder(path, vit, "s b")
    for name, role in _sharing_blocks(model.info_sharing):
        yield f"info_sharing.{name}", role


def _map_anything_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    scene, patch = inputs.scene(), patch_of(model.encoder)
    behind: tuple[str, ...] | None = ()
    if getattr(model, "use_register_tokens_from_encoder", False):
        behind = special_tokens(getattr(model.encoder, "model", model.encoder))
    if scene is None or patch is None or behind is None:
        return None
    return TokenLayout(
        scene.frames,
        grid_of(scene.size, patch),
        patch_size=patch,
        behind=behind,
        after=("scale",) if hasattr(model, "scale_token") else (),
    )


# -- CroCo, DUSt3R, MASt3R, CUT3R ----------------------------------------------------------------


def _croco_blocks(model: Any) -> Blocks:
    """Decoder blocks: `attn` of one picture, `cross_attn` from it to the other one."""
    # CroCo's runs once for each picture, the others' for both together.
    views: Literal["s b"] | None = "s b" if hasattr(model, "dec_blocks2") else None
    yield "enc_blocks", Role("self", place=one_picture((), patch_of(model), views=views))
    for block in range(len(model.dec_blocks)):
        for view, name in enumerate(("dec_blocks", "dec_blocks2")):
            if hasattr(model, name):
                yield f"{name}.{block}.attn", Role("self", block, between(view, view))
                cross = Role("cross", block, between(view, 1 - view))
                yield f"{name}.{block}.cross_attn", cross


def _croco_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    patch, scene = patch_of(model), inputs.scene_of_views()
    if patch is None or scene is None or scene.frames != 2 or _transposed(model, inputs):
        return None
    return TokenLayout(2, grid_of(scene.size, patch), patch_size=patch)


def _transposed(model: Any, inputs: Inputs) -> bool:
    """Whether pictures of portrait format lie transposed in the batch: grids differ then."""
    if "ManyAR" not in type(model.patch_embed).__name__:
        return False
    for view in inputs.views():
        shapes = view.get("true_shape") if isinstance(view, dict) else None
        if shapes is not None and bool((shapes[..., 0] > shapes[..., 1]).any()):
            return True
    return False


def _cut3r_blocks(model: Any) -> Blocks:
    """Image blocks see one view and the state, state blocks the state and one view.

    A view a run: which one only the number of the run tells. Masked views are not encoded.
    """
    patch = patch_of(model)
    image = one_picture(_cut3r_special(model), patch, views=None)
    yield "enc_blocks", Role("self", place=one_picture((), patch, views=None))
    for block in range(len(model.dec_blocks)):
        crossing = f"dec_blocks_state.{block}.cross_attn"
        yield crossing, Role("cross", block, one_side("key", image))
        yield f"dec_blocks.{block}.attn", Role("self", block, image)
        crossing = f"dec_blocks.{block}.cross_attn"
        yield crossing, Role("cross", block, one_side("query", image))


def _cut3r_special(model: Any) -> tuple[str, ...]:
    return ("pose",) if getattr(model, "pose_token", None) is not None else ()


def _cut3r_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    if _transposed(model, inputs):
        return None
    return _layout(model, inputs, _cut3r_special(model))


def _no_layout(model: Any, inputs: Inputs) -> TokenLayout | None:
    return None


MULTIVIEW = (
    Family(
        "VGGT-Ω",
        has("frame_blocks", "inter_frame_blocks", "inter_frame_attention_types"),
        _omega_blocks,
        _vggt_layout,
    ),
    Family("VGGT", has("frame_blocks", "global_blocks"), _vggt_blocks, _vggt_layout),
    Family("Pi3", has("decoder", "encoder", "patch_start_idx"), _pi3_blocks, _pi3_layout),
    Family(
        "Depth Anything 3",
        has("blocks", "alt_start"),
        _depth_anything_blocks,
        _depth_anything_layout,
    ),
    Family(
        "MapAnything", has("info_sharing", "encoder"), _map_anything_blocks, _map_anything_layout
    ),
    Family(
        "UniCeption",
        has("self_attention_blocks", "distinguish_ref_and_non_ref_views"),
        _sharing_blocks,
        _no_layout,
    ),
    Family("UniCeption", has("multi_view_branches"), _sharing_blocks, _no_layout),
    Family(
        "CUT3R", has("enc_blocks", "dec_blocks", "dec_blocks_state"), _cut3r_blocks, _cut3r_layout
    ),
    Family("DUSt3R, CroCo", has("enc_blocks", "dec_blocks"), _croco_blocks, _croco_layout),
)
