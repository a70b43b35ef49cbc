"""What sites of every family are called, counted and laid out, or that nothing can be said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixed import Levels, Qwen
from multiview import (
    PATCH,
    WIDTH,
    Croco,
    Cut3r,
    DepthAnything,
    Dino,
    Dust3r,
    ManyARPatchEmbed,
    MapAnything,
    Omega,
    Pi3,
    Stream,
)
from multiview_cases import (
    CASES,
    COLS,
    FRAMES,
    ROWS,
    Case,
    as_views,
    calm,
    captured,
    pictures,
    views,
)
from torch import nn
from zoo import VGGTLike

import vistvis
from vistvis import TokenLayout
from vistvis.errors import LayoutError
from vistvis.models.families import blocks_of
from vistvis.models.layouts import layout_of_inputs
from vistvis.models.places import UNKNOWN, Sizes, all_frames, by_count, cached_frames
from vistvis.models.sites import find_sites


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def kinds(model: nn.Module) -> list[tuple[str, int]]:
    return [(kind, block) for _, kind, block in blocks_of(model)]


def test_kinds_and_numbers_of_blocks() -> None:
    pairs = [("frame", 0), ("global", 0), ("frame", 1), ("global", 1)]
    assert kinds(VGGTLike()) == pairs
    assert kinds(Pi3()) == pairs
    assert kinds(Omega()) == [("frame", 0), ("global", 0), ("frame", 1), ("register", 1)]
    # By the model's own number: users know that block 3 is a global one.
    alternating = [("frame", 0), ("global", 1), ("frame", 2), ("global", 3)]
    assert kinds(DepthAnything().da3) == alternating
    assert kinds(DepthAnything().da3_metric) == [("frame", block) for block in range(4)]
    assert kinds(MapAnything()) == [("global", 0), ("frame", 0), ("global", 1), ("frame", 1)]
    assert kinds(MapAnything().info_sharing) == kinds(MapAnything())
    crossing = [path for path, kind, _ in blocks_of(Dust3r()) if kind == "cross"]
    assert crossing == [
        f"{name}.{i}.cross_attn" for i in (0, 1) for name in ("dec_blocks", "dec_blocks2")
    ]
    assert blocks_of(nn.TransformerEncoderLayer(8, 2)) == []
    assert blocks_of(Dino()) == []


def test_sites_have_the_kind_that_the_family_says() -> None:
    assert {site.name: (site.kind, site.block) for site in find_sites(Omega())} == {
        "aggregator.patch_embed.blocks.0.attn": ("self", 0),
        "aggregator.frame_blocks.0.attn": ("frame", 0),
        "aggregator.frame_blocks.1.attn": ("frame", 1),
        "aggregator.inter_frame_blocks.0.attn": ("global", 0),
        "aggregator.inter_frame_blocks.1.attn": ("register", 1),
        "camera_head.trunk.0.attn": ("self", 0),
    }
    compiled = nn.Module()  # as torch.compile wraps a model
    compiled._orig_mod = Pi3()
    sites = find_sites(compiled)
    pairs = [(site.kind, site.block) for site in sites if site.name.startswith("decoder.")]
    assert pairs == kinds(Pi3())


def test_every_part_has_the_tokens_of_its_own() -> None:
    """An encoder has a cls token and no camera, a camera head has no patches."""
    case = Case(Omega())
    seen = captured(case, pictures())
    encoder = seen["aggregator.patch_embed.blocks.0.attn"].site
    assert encoder.key_layout == TokenLayout(
        1, (ROWS, COLS), ("cls", "register", "register"), PATCH
    )
    assert encoder.frames_in_batch
    outer = seen["aggregator.frame_blocks.0.attn"].site.key_layout
    assert outer == TokenLayout(1, (ROWS, COLS), ("camera", "register", "register"), PATCH)
    # Of the head nothing is described; what the pass shows may be that they are special tokens.
    (head,) = (site for site in find_sites(case.model) if site.name.startswith("camera_head"))
    layout = TokenLayout.from_model(case.model, pictures())
    for count in (9, layout.tokens_per_frame, layout.num_tokens):
        assert head.role is not None
        assert head.role.place(layout, Sizes(2, count, count)) == UNKNOWN


def test_a_register_block_that_has_as_many_tokens_as_a_frame() -> None:
    """S · 3 = 3 + h · w: the list of types says what it is, a count would say a frame block."""
    case, images = Case(Omega()), pictures(frames=3, rows=2, cols=3)
    seen = captured(case, images)
    attention = seen["aggregator.inter_frame_blocks.1.attn"]
    frame = seen["aggregator.frame_blocks.1.attn"]
    assert attention.shape[2:] == frame.shape[2:] == (9, 9)
    layout = TokenLayout(3, (2, 3), ("camera", "register", "register"), PATCH)
    site = attention.site
    assert site.kind == "register"
    assert site.key_layout == site.query_layout == layout
    names = [str(layout.locate(int(token))) for token in site.key_order.tokens]
    assert names[3] == "token 9 (frame 1, token 0, camera)"
    assert [layout.locate(int(token)).kind for token in site.key_order.tokens] == 3 * [
        *("camera", "register", "register")
    ]
    # The same by count alone: a frame, whose tokens from the fourth on would be drawn as patches.
    sizes = Sizes(attention.shape[0], *attention.shape[2:])
    assert by_count(layout, sizes).key_layout == layout.frame_layout()


def test_special_tokens_of_a_register_block_are_those_of_their_frame() -> None:
    case = Case(calm(Omega()))
    images = pictures()
    before = captured(case, images)["aggregator.inter_frame_blocks.1.attn"]
    for frame in range(FRAMES):
        changed = images.clone()
        changed[:, frame] += 3
        after = captured(case, changed)["aggregator.inter_frame_blocks.1.attn"]
        answer = (after.key - before.key).norm(dim=-1).sum((0, 1))
        places = [after.site.key_layout.locate(int(t)) for t in after.site.key_order.tokens]
        assert places[int(answer.argmax())].frame == frame
        assert places[int(answer.roll(3).argmax())].frame != frame  # a frame further is found out


def test_special_tokens_behind_and_a_scale_token_at_the_end() -> None:
    seen = captured(Case(MapAnything(), views), pictures())
    every = seen["info_sharing.self_attention_blocks.0.attn"].site
    layout = TokenLayout(3, (ROWS, COLS), (), (PATCH, PATCH), ("cls", "register"), (), ("scale",))
    assert every.query_layout == every.key_layout == layout
    assert layout.locate(layout.num_tokens - 1).kind == "scale"
    one = seen["info_sharing.self_attention_blocks.1.attn"].site
    assert one.key_layout == replace(layout, frames=1, after=())
    assert one.frames_in_batch
    assert not seen["encoder.model.blocks.0.attn"].site.frames_in_batch  # views of 2 scenes
    alone = captured(Case(MapAnything(), views), pictures(batch=1))
    assert alone["encoder.model.blocks.0.attn"].site.frames_in_batch


def test_an_entry_beside_forward_is_a_pass_too() -> None:
    model, images = MapAnything(), pictures()
    with torch.no_grad(), vistvis.capture(model) as seen:
        model.infer(as_views(images))
    site = seen["info_sharing.self_attention_blocks.0.attn"].site
    assert site.key_layout == TokenLayout.from_model(model, as_views(images))


def test_text_before_and_after_the_picture() -> None:
    flux_layout = captured(CASES["Flux"](), pictures(1))[
        "transformer_blocks.0.attn"
    ].site.key_layout
    assert [flux_layout.locate(i).kind for i in (0, 4, 5)] == ["text", "text", "patch"]
    sd3_layout = captured(CASES["SD3"](), pictures(1))["transformer_blocks.0.attn"].site.key_layout
    assert [sd3_layout.locate(i).kind for i in (0, 7, 8)] == ["patch", "patch", "text"]


def test_a_picture_at_two_resolutions_and_text_across() -> None:
    text = torch.randn(2, 5, WIDTH)
    case = Case(Levels(), lambda model, x: model(x[:, 0, :, :6, :10], text), frames=1)
    sites = {name: a.site for name, a in captured(case, pictures(1)).items()}
    assert sites["down_blocks.attn1"].key_layout == TokenLayout(1, (6, 10), (), 1)
    assert sites["mid_block.attn1"].key_layout == TokenLayout(1, (3, 5), (), 2)
    crossing = sites["mid_block.attn2"]
    assert crossing.kind == "cross"
    assert crossing.query_layout == TokenLayout(1, (3, 5), (), 2)
    assert crossing.key_layout is None


def test_the_first_token_of_depth_anything_is_cls_and_then_camera() -> None:
    seen = captured(Case(DepthAnything()), pictures())
    firsts = [
        seen[f"{model}.backbone.pretrained.blocks.{block}.attn"].site.key_layout.special
        for model, block in (("da3", 0), ("da3", 1), ("da3", 2), ("da3_metric", 2))
    ]
    assert firsts == [("cls",), ("camera",), ("camera",), ("cls",)]


def test_cross_attention_has_the_picture_of_each_side() -> None:
    seen = captured(CASES["DUSt3R"](), pictures(2, 1))
    layout = TokenLayout(2, (ROWS, COLS), (), PATCH)
    for name, frames in (("dec_blocks.1", (0, 1)), ("dec_blocks2.1", (1, 0))):
        site = seen[f"{name}.cross_attn"].site
        assert site.kind == "cross"
        assert site.query_layout == site.key_layout == layout
        orders = (site.query_order, site.key_order)
        assert tuple(layout.locate(int(o.tokens[0])).frame for o in orders) == frames
        own = seen[f"{name}.attn"].site
        assert (own.kind, own.query_order) == ("self", site.query_order)


def test_keys_of_earlier_frames() -> None:
    """Streaming: one frame asks, all frames so far answer; `first_frame` says which one asks."""
    model, images = calm(Stream()), pictures(batch=1)
    with torch.no_grad(), vistvis.capture(model, "**.global_blocks.*", accumulate=True) as seen:
        model.inference(as_views(images))
    steps = seen["aggregator.global_blocks.0"]
    assert [step.shape[2:] for step in steps] == [(10, 10), (10, 20), (10, 30)]
    for number, step in enumerate(steps):
        site = step.site
        assert (site.query_layout.frames, site.key_layout.frames) == (1, number + 1)
        assert site.first_frame == number
        assert site.query_layout.special == ("camera", "register")
    changed = images.clone()
    changed[:, 1, :, :PATCH, -PATCH:] += 3
    with torch.no_grad(), vistvis.capture(model, "**.global_blocks.*", accumulate=True) as after:
        model.inference(as_views(changed))
    last = after["aggregator.global_blocks.0"][2]
    answer = (last.key - steps[2].key).norm(dim=-1).sum((0, 1))
    assert int(answer.argmax()) == last.site.key_layout.index(frame=1, row=0, col=COLS - 1)
    assert int(answer.argmax()) != last.site.key_layout.index(frame=2, row=0, col=COLS - 1)


def test_a_module_without_a_cache_has_no_keys_of_earlier_frames() -> None:
    """Merged tokens can be as many as those of fewer frames: nothing is said of them."""
    layout = TokenLayout(4, (2, 2), 1)
    assert all_frames(layout, Sizes(1, 10, 10)).key_layout is None
    assert cached_frames(layout, Sizes(1, 5, 10)).key_layout == replace(layout, frames=2)
    for queries, keys in ((5, 11), (10, 5), (10, 20), (0, 5)):
        assert cached_frames(layout, Sizes(1, queries, keys)).key_layout is None


def test_a_view_a_step_with_a_state_beside_it() -> None:
    case = Case(Cut3r(), views)
    seen = captured(case, pictures(batch=1), accumulate=True)
    one = TokenLayout(1, (ROWS, COLS), ("pose",), PATCH)
    sides = {
        name: [(a.site.query_layout, a.site.key_layout, a.site.frames_in_batch) for a in runs]
        for name, runs in seen.items()
    }
    assert sides == {
        "enc_blocks.0.attn": [(replace(one, special=()),) * 2 + (False,)],
        "dec_blocks.0.attn": 3 * [(one, one, False)],
        "dec_blocks.0.cross_attn": 3 * [(one, None, False)],
        "dec_blocks_state.0.attn": 3 * [(None, None, False)],
        "dec_blocks_state.0.cross_attn": 3 * [(None, one, False)],
    }


def test_portrait_pictures_transposed_in_a_batch_have_no_one_grid() -> None:
    model, images = Dust3r(ManyARPatchEmbed), pictures(2, 2)

    def sites(*shapes: tuple[int, int]) -> set[TokenLayout | None]:
        pair = [{**view, "true_shape": torch.tensor(shapes)} for view in as_views(images)]
        with torch.no_grad(), vistvis.capture(model) as seen:
            model(*pair)
        return {a.site.key_layout for a in seen.values()}

    height, width = ROWS * PATCH, COLS * PATCH
    assert sites((height, width), (width, height)) == {None}
    assert None not in sites((height, width), (height, width))
    other = [{"img": images[:, 0]}, {"img": torch.rand(2, 3, 4 * PATCH, 2 * PATCH)}]
    assert layout_of_inputs(Dust3r(), tuple(other), {}) is None


def test_visible_patches_only_have_no_place_by_their_number() -> None:
    model, images = Croco(), pictures(2)
    with torch.no_grad(), vistvis.capture(model, "enc_blocks.**", accumulate=True) as seen:
        model(*images.unbind(1))
    visible, whole = seen["enc_blocks.0.attn"]
    assert (visible.shape[3], visible.site.key_layout) == (4, None)
    one = TokenLayout(1, (ROWS, COLS), (), PATCH)
    assert (whole.site.key_layout, whole.site.frames_in_batch) == (one, False)


def test_pictures_come_in_many_ways() -> None:
    images = pictures(batch=2)
    layout = TokenLayout.from_model(Pi3(), images)
    assert layout == TokenLayout(3, (ROWS, COLS), ("register",) * 5, PATCH)
    assert TokenLayout.from_model(Pi3(), as_views(images)) == layout
    assert TokenLayout.from_model(Pi3(), list(images.unbind(1))) == layout
    assert TokenLayout.from_model(Pi3(), images[0]) == layout
    assert layout_of_inputs(Pi3(), (), {"views": tuple(as_views(images))}) == layout
    intrinsics = torch.rand(2, 3, 5, 4, 4)
    assert layout_of_inputs(Pi3(), (), {"poses": intrinsics, "images": images}) == layout
    with pytest.raises(LayoutError, match="these pictures in a model of Pi3's kind is not known"):
        TokenLayout.from_model(Pi3(), [images[:, 0], images[:, 0, :, :PATCH]])


def test_grids_that_differ_between_pictures_have_no_layout() -> None:
    assert layout_of_inputs(
        Qwen(), (None, torch.tensor([[2, 4, 4], [1, 4, 4]])), {}
    ) == TokenLayout(3, (4, 4), (), PATCH)
    assert layout_of_inputs(Qwen(), (None, torch.tensor([[1, 4, 4], [1, 4, 6]])), {}) is None


def test_patch_size_is_what_the_model_says_or_unknown() -> None:
    model = VGGTLike(width=WIDTH, heads=2, patch=PATCH)
    images = pictures()
    assert TokenLayout.from_model(model, images).patch_size == (PATCH, PATCH)
    del model.patch_size
    with pytest.raises(LayoutError, match="not known"):
        TokenLayout.from_model(model, images)  # no 14, and no coincidence
    assert layout_of_inputs(model, (images,), {}) is None
    model.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
    assert TokenLayout.from_model(model, images).patch_size == (8, 8)
    # An encoder of another patch size than the whole model's: nothing is said of its tokens.
    omega = Omega()
    omega.aggregator.patch_size = 8
    encoder = next(site for site in find_sites(omega) if "patch_embed" in site.name)
    layout = TokenLayout.from_model(omega, pictures(rows=4))
    own = Sizes(6, 3 + layout.num_patches, 3 + layout.num_patches)
    assert encoder.role.place(layout, own).key_layout is None
    same = replace(layout, patch_size=(PATCH, PATCH))
    assert encoder.role.place(same, own).key_layout is not None
