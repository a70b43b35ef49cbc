"""AttentionExtractor, values and figures on VGGT's relatives: what is marked is the lit patch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litmodels import (
    COLS,
    PATCH,
    ROWS,
    DepthLike,
    DustLike,
    OmegaLike,
    Pi3Like,
    StreamLike,
    WholeLike,
    order_of,
    scene,
)
from matplotlib.patches import Circle, Rectangle
from torch import Tensor, nn

import vistvis
from vggt_adapter import (
    AttentionExtractor,
    demo_visualize_token_attention,
    extract_both_attentions,
    get_attention_values,
    visualize_attention_on_image,
)
from vggt_adapter.inputs import Query
from vggt_adapter.sample_scene import sample_views
from vggt_adapter.values import QueryValues, query_values
from vistvis import Attention, TokenLayout, VistvisWarning
from vistvis.attention import TokenOrder
from vistvis.errors import CaptureError, IndexOutOfRange, InputError, SiteError

HW = ROWS * COLS


def seen(model: nn.Module, run: Callable[[], Any], **named: Any) -> Any:
    """What the extractor captures while the model runs; the output is the same without it."""
    with torch.no_grad():
        plain = run()
        with AttentionExtractor(model) as extractor:
            extractor.register_hooks(**named)
            torch.testing.assert_close(run(), plain, rtol=0, atol=0)
    return extractor.captured


def marked(values: QueryValues) -> dict[int, Any]:
    """Picture → the patch that values mark in it."""
    return {match.place.frame_idx: match.place.patch for match in values.matches}


def rings(figure: Any) -> dict[int, int]:
    """Picture → the patch in the ring of its heatmap, or in the square, where that is the query."""
    found = {}
    for axes in figure.axes:
        title = axes.get_title(loc="left").split()
        for mark in axes.patches if title[:1] == ["frame"] else ():
            if isinstance(mark, Rectangle):
                (x, y), (x1, y1) = mark.get_bbox().get_points()
                x, y = (x + x1) / 2, (y + y1) / 2
            else:
                assert isinstance(mark, Circle)
                x, y = mark.center
            found.setdefault(int(title[1]), int(y // PATCH * COLS + x // PATCH))
    return found


def wrong_marks(
    attention: Attention, images: Tensor, lit: list[list[int]], **named: Any
) -> list[str]:
    """Coloured patches whose values or figure mark others than those of their colour.

    Tokens are counted here, by the special tokens and frames that the miniature has.
    """
    site = attention.site
    assert site is not None
    assert site.key_layout is not None
    first, count = site.key_layout.patch_start_idx, site.key_layout.tokens_per_frame
    wrong = []
    for frame in named.pop("of", range(len(lit))):
        for colour, patch in enumerate(lit[frame]):
            shown, query = named.get("to", range(len(lit))), frame * count + first + patch
            asked: dict[str, Any] = {"batch_idx": named.get("batch", 0)}
            if site.kind == "frame":
                shown, query = [frame], first + patch
                asked["frame_idx"] = frame
            wanted = {one: lit[one][colour] for one in shown}
            values = query_values(attention, images, Query(query, **asked))
            if marked(values) != wanted or values.query.patch != patch:
                wrong.append(f"values of frame {frame}, patch {patch}: {marked(values)}")
            if colour:
                continue
            figure = visualize_attention_on_image(attention, images, query, **asked)
            if rings(figure) != {frame: patch} | wanted:
                wrong.append(f"figure of frame {frame}, patch {patch}: {rings(figure)}")
    return wrong


def changed(attention: Attention, **fields: Any) -> Attention:
    """The same weights, described otherwise."""
    assert attention.site is not None
    return attention.with_site(replace(attention.site, **fields))


# -- families ------------------------------------------------------------------------------------


def test_omega_with_register_blocks() -> None:
    model, (images, lit) = OmegaLike(), scene(3)
    captured = seen(model, lambda: model(images))
    assert list(captured) == [
        *("frame_block_0", "global_block_0", "frame_block_1", "register_block_1"),
        *("frame_block_2", "global_block_2"),
    ]
    for name in ("frame_block_0", "global_block_2"):
        assert 0.3 < float(captured[name].dense().max()) < 0.95
        assert wrong_marks(captured[name], images, lit) == []
    other = scene(3, seed=9)[1]
    assert len(wrong_marks(captured["global_block_0"], images, other)) == 9 + 3


def test_register_blocks_give_numbers_and_no_pictures() -> None:
    model, (images, _) = OmegaLike(), scene(3)
    block = seen(model, lambda: model(images))["register_block_1"]
    assert block.shape == (1, 2, 15, 15)
    camera = HW + 5
    values = get_attention_values(block, images, camera, allow_special=True)
    assert values["metadata"]["attention_type"] == "register"
    assert values["metadata"]["patch_mass"] == 0
    assert not values["attention_maps"].any()
    row = block.token_rows(camera, heads=1)[0, 0]  # over all tokens, of which it saw the special
    special = torch.arange(3 * (HW + 5)).view(3, -1)[:, :5].flatten()
    torch.testing.assert_close(row[special], block.rows(5)[0, 1, 0])
    assert float(row.sum()) == pytest.approx(1, abs=1e-6)
    for token, allowed in ((camera, False), (7, False), (7, True)):
        with pytest.raises(InputError, match=r"hold no patches.*camera or register token"):
            get_attention_values(block, images, token, allow_special=allowed)
    with pytest.raises(InputError, match=rf"no patches.*token_rows\({camera}\)"):
        visualize_attention_on_image(block, images, camera, allow_special=True)


def test_pi3() -> None:
    model, (images, lit) = Pi3Like(), scene(3)
    captured = seen(model, lambda: model(images[None]))
    assert list(captured) == [f"{kind}_block_{n}" for n in (0, 1) for kind in ("frame", "global")]
    for attention in captured.values():
        assert wrong_marks(attention, images, lit) == []


@pytest.mark.parametrize("reference", [1, 2])
def test_depth_anything_with_its_reference_view_first(reference: int) -> None:
    model, (images, lit) = DepthLike(reference), scene(3)
    captured = seen(model, lambda: model(images[None]))
    assert list(captured) == ["frame_block_0", "frame_block_1", "frame_block_2", "global_block_3"]
    order = order_of(3, reference)
    tokens = (order[:, None] * (HW + 1) + torch.arange(HW + 1)).flatten()
    every = {"query_order": TokenOrder(tokens), "key_order": TokenOrder(tokens)}
    for name, orders in (
        ("frame_block_1", {"frame_order": order[None]}),
        ("global_block_3", every),
    ):
        attention = changed(captured[name], **orders)
        assert wrong_marks(attention, images, lit) == []
        without = changed(attention, **dict.fromkeys(orders))
        assert len(wrong_marks(without, images, lit)) > 5
    assert wrong_marks(changed(captured["frame_block_0"], frame_order=None), images, lit) == []


def test_every_scene_of_a_batch_has_its_own_order() -> None:
    images, lit = zip(*(scene(3, seed=seed) for seed in (4, 5)), strict=True)
    found, orders = [], []
    for reference, one in zip((2, 1), images, strict=True):
        model = DepthLike(reference)
        found.append(seen(model, lambda m=model, x=one: m(x[None]))["global_block_3"])
        tokens = order_of(3, reference)[:, None] * (HW + 1) + torch.arange(HW + 1)
        orders.append(tokens.flatten())
    query, key = (torch.cat([getattr(a, side) for a in found]) for side in ("query", "key"))
    order = TokenOrder(torch.stack(orders))
    site = replace(found[0].site, query_order=order, key_order=order)
    both = Attention(query=query, key=key, scale=found[0].scale, site=site)
    for batch in (0, 1):
        assert wrong_marks(both, torch.stack(images), lit[batch], batch=batch) == []
        swapped = TokenOrder(torch.stack(orders[::-1]))
        other = changed(both, query_order=swapped, key_order=swapped)
        assert wrong_marks(other, torch.stack(images), lit[batch], batch=batch)


def test_dust3r_looks_from_one_picture_into_the_other() -> None:
    model, (images, lit) = DustLike(), scene(2)
    captured = seen(model, lambda: model({"img": images[:1]}, {"img": images[1:]}))
    assert list(captured) == [
        *("cross_block_0", "cross_block_0_dec_blocks2"),
        *("cross_block_1", "cross_block_1_dec_blocks2"),
    ]
    for name, of in (("cross_block_1", 0), ("cross_block_1_dec_blocks2", 1)):
        attention = captured[name]
        assert wrong_marks(attention, images, lit, of=[of], to=[1 - of]) == []
        values = get_attention_values(attention, images, of * HW + lit[of][0])
        assert values["attention_maps"].shape == (1, ROWS, COLS)
        mistaken = changed(attention, key_order=attention.site.query_order)
        assert len(wrong_marks(mistaken, images, lit, of=[of], to=[1 - of])) == 3 + 1
        with pytest.raises(IndexOutOfRange, match="not among the tokens"):
            query_values(attention, images, Query((1 - of) * HW + 3))
    figure = visualize_attention_on_image(captured["cross_block_0"], images, lit[0][1])
    assert figure.texts[0].get_text() == "Cross attention · block 0 · head 0"
    shown = [axes for axes in figure.axes if axes.images]
    titles = [axes.get_title(loc="left") for axes in shown]
    assert titles == ["frame 0 · query", "frame 1", ""]


def test_a_cache_has_keys_of_earlier_frames() -> None:
    model, (images, lit) = StreamLike(), scene(3)
    views = [{"img": image[None]} for image in images]
    captured = seen(model, lambda: model.inference(views), accumulate=True)
    for step, attention in enumerate(captured["global_block_0"]):
        so_far, patches = images[: step + 1], lit[: step + 1]
        assert attention.shape == (1, 2, HW + 5, (step + 1) * (HW + 5))
        assert wrong_marks(attention, so_far, patches, of=[step]) == []
        if step:
            with pytest.raises(InputError, match=rf"queries of frames {step}…{step} only"):
                query_values(attention, so_far, Query(6))
            with pytest.raises(InputError, match=f"saw {step + 1} frames, images has 1"):
                query_values(attention, images[:1], Query(6))
            with pytest.raises(InputError, match="only"):  # so a frame that is not said is no luck
                wrong_marks(changed(attention, first_frame=0), so_far, patches, of=[step])
    both = extract_both_attentions(model, views, block_idx=0)
    assert both["patch_start_idx"] == 5
    assert wrong_marks(both["global_attention"]["attn_weights"], images, lit) == []


def test_blocks_of_a_second_network_name_it() -> None:
    """Depth Anything 3, nested: the second network's block 3 is no frame block of the first."""
    model, (images, _) = nn.Module(), scene(3)
    model.da3, model.da3_metric = DepthLike(0), DepthLike(0)
    model.da3_metric.backbone.pretrained.alt_start = -1
    model.forward = lambda x: (model.da3(x), model.da3_metric(x))  # type: ignore[method-assign]
    blocks = AttentionExtractor(model).blocks
    assert [block.name for block in blocks] == [
        *("frame_block_0", "frame_block_1", "frame_block_2", "global_block_3"),
        *(f"frame_block_{number}_da3_metric" for number in range(4)),
    ]
    both = extract_both_attentions(model, images[None], block_idx=3)
    assert both["frame_attention"]["attn_weights"].site.name == "frame_block_2"


# -- orders in general ---------------------------------------------------------------------------


def test_patches_along_a_curve() -> None:
    model, (images, lit) = Pi3Like(), scene(3)
    captured = seen(model, lambda: model(images[None]))
    inner = torch.randperm(HW + 5, generator=torch.Generator().manual_seed(2))
    whole = (torch.arange(3)[:, None] * (HW + 5) + inner).flatten()
    for name, order in (("frame_block_0", inner), ("global_block_0", whole)):
        plain = captured[name]
        orders = {"query_order": TokenOrder(order), "key_order": TokenOrder(order)}
        moved = Attention(
            query=plain.query[:, :, order],
            key=plain.key[:, :, order],
            site=replace(plain.site, **orders),
        )
        assert wrong_marks(moved, images, lit) == []
        assert wrong_marks(changed(moved, **dict.fromkeys(orders)), images, lit)


def test_merged_tokens_share_their_weight() -> None:
    model, (images, _) = Pi3Like(), scene(3)
    plain = seen(model, lambda: model(images[None]))["global_block_0"]
    count = HW + 5
    members = torch.arange(3 * count)
    members[count:] = count + (members[count:] - count) // 2  # pairs, in all frames but the first
    sums = torch.zeros(int(members.max()) + 1, 3 * count).index_put_(
        (members, torch.arange(3 * count)), torch.tensor(1.0)
    )
    mean = sums / sums.sum(1, keepdim=True)
    query, key = mean @ plain.query[0, 0], mean @ plain.key[0, 0]
    order = TokenOrder(torch.arange(3 * count), members)
    site = replace(plain.site, query_order=order, key_order=order)
    merged = Attention(query=query[None, None], key=key[None, None], site=site)

    token = 2 * count + 9
    row = torch.softmax(query[members[token]].double() @ key.double().T / 2, -1)
    wanted = (row / sums.sum(1))[members].view(3, count)[:, 5:].view(3, ROWS, COLS)
    values = query_values(merged, images, Query(token))
    np.testing.assert_allclose(values.maps, wanted, atol=1e-6)
    unshared = row[members].view(3, count)[:, 5:].view(3, ROWS, COLS)
    assert np.abs(values.maps - unshared.numpy()).max() > 0.01
    assert values.merged
    figure = visualize_attention_on_image(merged, images, token)
    assert "merged tokens" in figure.texts[0].get_text()
    with pytest.raises(InputError, match="queries, its layout"):
        query_values(changed(merged, query_order=None, key_order=None), images, Query(token))


def test_what_is_not_known_is_not_drawn() -> None:
    model, (images, _) = Pi3Like(), scene(3)
    attention = seen(model, lambda: model(images[None]))["global_block_0"]
    for side in ("query_layout", "key_layout"):
        with pytest.raises(InputError, match=r"not known.*TokenLayout.*vistvis\.trace_layout"):
            get_attention_values(changed(attention, **{side: None}), images, 9)
    for named in ({"patch_size": 14}, {"patch_start_idx": 1}):
        with pytest.raises(InputError, match=next(iter(named))):
            get_attention_values(attention, images, 9, **named)
    assert attention.site is not None
    assert attention.site.patch_size == (16, 16)
    with pytest.raises(InputError, match="patch_size"):  # plain tensors: 14, which does not fit
        get_attention_values(attention.dense(), images, 9)
    two = changed(attention, frames_in_batch=False, kind="self", **one_picture())
    folded = Attention(query=torch.rand(6, 1, HW, 4), key=torch.rand(6, 1, HW, 4), site=two.site)
    with pytest.raises(InputError, match="folds 3 frames of 2 scenes"):
        get_attention_values(folded, torch.stack([images, images]), 9)


def one_picture() -> dict[str, TokenLayout]:
    layout = TokenLayout(1, (ROWS, COLS), (), PATCH)  # type: ignore[arg-type]
    return {"query_layout": layout, "key_layout": layout}


def test_a_cls_token_is_no_camera() -> None:
    """Plain tensors of another model say how many special tokens there are, not which."""
    images, _ = scene(2)
    weights = torch.rand(2, 1, HW + 5, HW + 5).softmax(-1)
    with pytest.warns(VistvisWarning, match="token_idx 0 is a special token"):
        get_attention_values(weights, images, 0, 0, 5, "frame", patch_size=16)
    with pytest.warns(VistvisWarning, match="token_idx 0 is a camera token"):
        get_attention_values(weights, images, 0, patch_size=16)


# -- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ((None, "cross"), r"'frame' and 'global' and 'register', got \['cross'\]"),
        ((None, ["frame", "causal"]), r"'frame' and 'global' and 'register', got"),
        ((1, "global"), r"global blocks 0, 2, got 1"),
        ((1, ["frame", "global"]), r"frame blocks 0…2; global blocks 0, 2, got 1"),
        ((3, None), r"frame blocks 0…2; global blocks 0, 2; register blocks 1, got 3"),
        (([], None), "got none"),
    ],
)
def test_refusals_name_what_there_is(ask: Any, words: str) -> None:
    extractor = AttentionExtractor(OmegaLike())
    with pytest.raises(InputError, match=words):
        extractor.register_hooks(*ask)


def test_numbers_count_within_the_kind() -> None:
    model, (images, _) = OmegaLike(), scene(2)
    names = {
        asked: list(seen(model, lambda: model(images), block_indices=asked)) for asked in (1, -1)
    }
    assert names[1] == ["frame_block_1", "register_block_1"]
    assert names[-1] == ["register_block_1", "frame_block_2", "global_block_2"]


def test_both_attentions_of_a_pair() -> None:
    images, _ = scene(3)
    depth = extract_both_attentions(DepthLike(0), images[None], block_idx=-1)
    kinds = ("frame", "global")
    sites = [depth[f"{kind}_attention"]["attn_weights"].site for kind in kinds]
    assert [site.name for site in sites] == ["frame_block_2", "global_block_3"]
    assert (depth["block_idx"], depth["patch_start_idx"]) == (3, 1)
    with pytest.raises(InputError, match=r"global blocks 0, 2, got 1"):
        extract_both_attentions(OmegaLike(), images, block_idx=1)
    views = [{"img": image[None]} for image in images]
    with pytest.raises(InputError, match="no frame and no global blocks, only cross blocks"):
        extract_both_attentions(DustLike(), views, block_idx=0)


def test_the_demo_on_a_relative(tmp_path: Path) -> None:
    figures, result = demo_visualize_token_attention(
        sample_views(), 1, 40, model=Pi3Like(), output_dir=tmp_path, size=96
    )
    assert [kind for kind, _ in figures] == ["frame", "global"]
    layout = result["global_attention"]["attn_weights"].site.key_layout
    assert layout.patch_size == (16, 16)
    assert len(list(tmp_path.iterdir())) == 3


# -- VGGT whole ----------------------------------------------------------------------------------


def test_heads_that_iterate_do_not_spoil_the_rest(tmp_path: Path) -> None:
    """The README's `capture(model)`, and what it does with what was captured."""
    model, (images, lit) = WholeLike().eval(), scene(3)
    told = pytest.warns(VistvisWarning, match=r"camera_head.*accumulate=True")
    with torch.no_grad(), told, vistvis.capture(model) as captured:
        model(images)
    attention = captured["aggregator.global_blocks.1.attn"]
    assert wrong_marks(attention, images, lit) == []
    with pytest.raises(CaptureError, match="ran 4 times"):
        captured["camera_head.trunk.0.attn"]
    vistvis.save_run(captured, tmp_path / "run", images=images)
    stored = vistvis.open_run(tmp_path / "run")
    assert list(stored) == list(captured)
    assert len(stored) == 4
    assert wrong_marks(stored["aggregator.frame_blocks.1.attn"], images, lit) == []
    with torch.no_grad(), vistvis.capture(model, accumulate=True) as every:
        model(images)
    assert [a.shape[-1] for a in every["camera_head.trunk.1.attn"]] == [3] * 4  # type: ignore[attr-defined]
    # Its tokens were followed there: the camera token of each frame.
    trunk = every["camera_head.trunk.1.attn"][0].site  # type: ignore[index]
    assert [trunk.key_layout.locate(n).kind for n in trunk.key_order.tokens] == ["camera"] * 3
    by_name = vistvis.capture(model, "camera_head.**")
    with pytest.raises(CaptureError, match="ran 4 times"), torch.no_grad(), by_name:
        model(images)
    assert list(seen(model, lambda: model(images))) == [
        f"{kind}_block_{n}" for n in (0, 1) for kind in ("frame", "global")
    ]


def test_the_aggregator_alone_is_a_pass_of_the_whole_model_too() -> None:
    model, (images, lit) = WholeLike(), scene(3)
    captured = seen(model, lambda: model.aggregator(images[None])[0])
    assert wrong_marks(captured["global_block_0"], images, lit) == []


# -- names and pages -----------------------------------------------------------------------------


def test_import_star() -> None:
    code = (
        "import sys\n"
        "import vggt_adapter\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "from vggt_adapter import *\n"
        "missing = [name for name in vggt_adapter.__all__ if name not in globals()]\n"
        "assert not missing and VGGT and AttentionExtractor, missing\n"
        "assert 'timm' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_the_guide_is_python_and_uses_names_that_exist() -> None:
    page = (Path(__file__).parents[1] / "docs/relatives.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(codes) > 10
    names = set()
    for code in codes:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module in ("vistvis", "vggt_adapter"):
                names |= {(node.module, one.name) for one in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names |= {("vistvis", node.attr)} if node.value.id == "vistvis" else set()
    assert names >= {("vistvis", "capture"), ("vggt_adapter", "AttentionExtractor")}
    for module, name in names:
        assert hasattr(sys.modules[module], name), f"{module}.{name}"


# -- models of single pictures ---------------------------------------------------------------------


def test_self_attention_of_single_pictures_is_frame_attention() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64)).eval()
    images = torch.rand(2, 3, 48, 64)
    extractor = AttentionExtractor(model)
    assert extractor.attention_types == ["frame"]
    assert [block.number for block in extractor.blocks] == list(range(12))
    with extractor, torch.no_grad():
        extractor.register_hooks(-1)
        model(images)
    attention = extractor.captured["frame_block_11"]
    values = get_attention_values(attention, images[:, None], 5, batch_idx=1)
    row = attention.rows(5, batch=1, heads=0).flatten()
    assert torch.equal(torch.from_numpy(values["attention_maps"]).flatten(), row[1:])
    with pytest.raises(SiteError, match=r"capture\(model, layout=TokenLayout"):
        AttentionExtractor(nn.Sequential(nn.Linear(2, 2)))
