"""`vistvis.plot`: what is drawn of which site, and that the maps are the rows."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from zoo import VGGTLike

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout, TokenOrder, VistvisWarning
from vistvis.errors import IndexOutOfRange, InputError, LayoutError, SiteError
from vistvis.views import board
from vistvis.views.figures import NotebookFigure
from vistvis.views.maps import pictures_of, scene_of, site_maps

LAYOUT = TokenLayout(3, (4, 6), ("camera", "register"), 8)
ONE = LAYOUT.frame_layout()
IMAGES = torch.linspace(0, 1, 3 * 3 * 32 * 48).view(1, 3, 3, 32, 48)
QUERY = LAYOUT.index(frame=1, row=2, col=3)


def given(name: str, weights: Tensor, **site: Any) -> Attention:
    return Attention.from_weights(weights, site=SiteInfo(name, **site))


def random_site(
    name: str = "global_0",
    *,
    heads: int = 2,
    layout: TokenLayout = LAYOUT,
    batch: int = 1,
    **site: Any,
) -> Attention:
    query, key = torch.randn(2, batch, heads, layout.num_tokens, 8).mul(2).unbind()
    layouts = {"query_layout": layout, "key_layout": layout}
    return Attention(query=query, key=key, site=SiteInfo(name, **{**layouts, **site}))


def frame_site(name: str = "frame_0", **site: Any) -> Attention:
    return random_site(name, layout=ONE, batch=3, kind="frame", frames_in_batch=True, **site)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Any]]:
    """What is drawn, tile by tile: a picture or a map, of which frame, in which box."""
    tiles = []
    paint = board._Painter.tile

    def tile(self: Any, heat: Any, frame: int, box: Any) -> None:
        tiles.append(("picture" if heat is None else "map", frame, box))
        paint(self, heat, frame, box)

    monkeypatch.setattr(board._Painter, "tile", tile)
    return tiles


def texts_of(figure: NotebookFigure) -> list[str]:
    return [text.get_text() for one in (figure, *figure.axes) for text in one.texts]


# -- what is computed ----------------------------------------------------------------------------


def test_maps_of_all_frames_are_the_row_laid_out() -> None:
    attention = random_site()
    found = site_maps("x", attention, scene_of(LAYOUT, QUERY))
    row = attention.dense()[0, :, QUERY].view(2, 3, -1)
    assert list(found.frames) == [0, 1, 2]
    for frame, maps in found.frames.items():
        np.testing.assert_allclose(maps, row[:, frame, 2:].reshape(2, 4, 6).numpy(), atol=1e-6)
    np.testing.assert_allclose(
        found.of("mean")[2], row[:, 2, 2:].mean(0).reshape(4, 6).numpy(), atol=1e-6
    )


def test_a_site_of_single_frames_shows_the_querys() -> None:
    attention = frame_site()
    found = site_maps("x", attention, scene_of(LAYOUT, QUERY))
    row = attention.dense()[1, :, ONE.index(row=2, col=3)]
    assert list(found.frames) == [1]
    np.testing.assert_allclose(found.frames[1], row[:, 2:].reshape(2, 4, 6).numpy(), atol=1e-6)


def test_frames_in_another_order_lie_where_the_site_says() -> None:
    attention = frame_site(frame_order=torch.tensor([[2, 0, 1]]))
    found = site_maps("x", attention, scene_of(LAYOUT, QUERY))
    row = attention.dense()[2, :, ONE.index(row=2, col=3)]
    np.testing.assert_allclose(found.frames[1], row[:, 2:].reshape(2, 4, 6).numpy(), atol=1e-6)


def test_the_second_scene_of_a_batch() -> None:
    attention = random_site(batch=2)
    found = site_maps("x", attention, scene_of(LAYOUT, QUERY, batch=1))
    row = attention.dense()[1, :, QUERY].view(2, 3, -1)
    np.testing.assert_allclose(found.frames[0], row[:, 0, 2:].reshape(2, 4, 6).numpy(), atol=1e-6)


def test_cross_attention_shows_only_frames_that_are_keys() -> None:
    frames = torch.arange(LAYOUT.num_tokens).view(3, -1)
    orders = {"query_order": TokenOrder(frames[1]), "key_order": TokenOrder(frames[2])}
    weights = torch.rand(1, 2, 26, 26).softmax(-1)
    attention = given("cross", weights, query_layout=LAYOUT, key_layout=LAYOUT, **orders)
    found = site_maps("cross", attention, scene_of(LAYOUT, QUERY))
    assert list(found.frames) == [2]
    row = weights[0, :, 2 + 2 * 6 + 3, 2:].reshape(2, 4, 6).numpy()
    np.testing.assert_allclose(found.frames[2], row, atol=1e-6)
    with pytest.raises(IndexOutOfRange):
        site_maps("cross", attention, scene_of(LAYOUT, "0:middle"))


def test_queries_of_later_frames_than_the_cached_keys() -> None:
    layouts = {"query_layout": ONE, "key_layout": LAYOUT, "first_frame": 1}
    weights = torch.rand(1, 2, 26, 78).softmax(-1)
    found = site_maps("step", given("step", weights, **layouts), scene_of(LAYOUT, QUERY))
    row = weights[0, :, ONE.index(row=2, col=3)].view(2, 3, -1)[:, 2, 2:].reshape(2, 4, 6)
    np.testing.assert_allclose(found.frames[2], row.numpy(), atol=1e-6)
    with pytest.raises(LayoutError, match="has the queries of frame 1 to 1"):
        site_maps("step", given("step", weights, **layouts), scene_of(LAYOUT, 5))


def test_a_layout_with_other_special_tokens_is_asked_for_the_same_patch() -> None:
    own = TokenLayout(1, (4, 6), ("cls",), 8)
    attention = random_site("dino", layout=own, batch=3, frames_in_batch=True)
    found = site_maps("dino", attention, scene_of(LAYOUT, QUERY))
    row = attention.dense()[1, :, 1 + 2 * 6 + 3, 1:].reshape(2, 4, 6)
    np.testing.assert_allclose(found.frames[1], row.numpy(), atol=1e-6)
    with pytest.raises(LayoutError, match="no special token of kind 'camera'"):
        site_maps("dino", attention, scene_of(LAYOUT, "camera@1"))
    coarse = TokenLayout(1, (2, 3), (), 16)
    attention = random_site("coarse", layout=coarse, batch=3, frames_in_batch=True)
    with pytest.raises(LayoutError, match="another grid"):
        site_maps("coarse", attention, scene_of(LAYOUT, QUERY))


def test_the_second_of_a_kind_of_special_tokens() -> None:
    whole = TokenLayout(3, (4, 6), ("register", "register"), 8)
    own = TokenLayout(1, (4, 6), ("cls", "register", "register"), 8)
    attention = random_site("own", layout=own, batch=3, frames_in_batch=True)
    found = site_maps("own", attention, scene_of(whole, "register1@2"))
    row = attention.dense()[2, :, 2, 3:].reshape(2, 4, 6)
    np.testing.assert_allclose(found.frames[2], row.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("site", "match"),
    [
        ({"query_layout": None}, "no token layout"),
        ({"query_layout": ONE, "key_layout": ONE}, "queries of 1 of 3 frames, not said which"),
        ({"query_layout": LAYOUT, "key_layout": ONE}, "keys of 1 of 3 frames, not said which"),
    ],
)
def test_what_a_site_does_not_say_is_not_guessed(site: dict[str, Any], match: str) -> None:
    queries, keys = (site.get(side) or LAYOUT for side in ("query_layout", "key_layout"))
    weights = torch.rand(1, 1, queries.num_tokens, keys.num_tokens).softmax(-1)
    attention = given("x", weights, **{"key_layout": LAYOUT, **site})
    with pytest.raises(LayoutError, match=match):
        site_maps("x", attention, scene_of(LAYOUT, QUERY))


# -- what is drawn -------------------------------------------------------------------------------


def test_one_site_is_heads_by_frames(drawn: list[Any]) -> None:
    figure = vistvis.plot(random_site(), QUERY, images=IMAGES, names=["a.jpg", "b.jpg", "c.jpg"])
    kinds = ["picture"] * 3 + ["map"] * 9
    assert [tile[:2] for tile in drawn] == list(zip(kinds, [0, 1, 2] * 4, strict=True))
    assert {"picture", "head 0", "head 1", "mean", "a.jpg", "c.jpg"} <= set(texts_of(figure))
    assert texts_of(figure)[0] == "global_0, query: patch r2,c3 of frame 1 (token 43)"
    # Outlined in the picture and in every map of its frame.
    assert len(figure.axes[0].patches) == 4


def test_many_sites_are_sites_by_heads(drawn: list[Any]) -> None:
    source = {one.site.name: one for one in (frame_site(), random_site()) if one.site}
    figure = vistvis.plot(source, QUERY, images=IMAGES, title="made")
    assert {"frame_0", "global_0", "head 0", "head 1", "mean", "frame 2"} <= set(texts_of(figure))
    assert texts_of(figure)[0].startswith("made, query: patch r2,c3 of frame 1")
    assert [tile[0] for tile in drawn] == ["picture"] * 3 + ["map"] * (3 * 1 + 3 * 3)
    assert [tile[1] for tile in drawn] == [0, 1, 2, *[1] * 3, *[0, 1, 2] * 3]
    boxes = [tile[2] for tile in drawn]
    # Nothing lies over anything else.
    for one, (x, y, width, height) in enumerate(boxes):
        for left, top, wide, high in boxes[:one]:
            apart = x >= left + wide or left >= x + width or y >= top + high or top >= y + height
            assert apart


def test_a_strong_patch_shines_at_its_place(drawn: list[Any]) -> None:
    weights = torch.full((1, 2, 78, 78), 1e-4)
    weights[0, 1, QUERY, LAYOUT.index(frame=2, row=1, col=4)] = 0.9
    attention = given("x", weights, query_layout=LAYOUT, key_layout=LAYOUT)
    figure = vistvis.plot(attention, QUERY, heads=[1])
    with Image.open(io.BytesIO(figure.png())) as picture:
        page = np.asarray(picture.convert("RGB"), float)
    (x, y, width, height) = (n * 200 for n in drawn[2][2])
    tile = page[round(y) + 1 : round(y + height) - 1, round(x) + 1 : round(x + width) - 1].sum(-1)
    down, across = np.argwhere(tile >= tile.max()).mean(0) / tile.shape
    assert (int(down * 4), int(across * 6)) == (1, 4)


def test_the_scale_leaves_out_the_querys_surroundings_of_every_head() -> None:
    weights = torch.full((1, 2, 78, 78), 1e-3)
    weights[0, :, QUERY, QUERY] = 0.9
    weights[0, 0, QUERY, QUERY + 1] = 0.4
    weights[0, 1, QUERY, LAYOUT.index(frame=2, row=0, col=0)] = 0.25
    attention = given("x", weights, query_layout=LAYOUT, key_layout=LAYOUT)
    for norm, top in (("auto", 0.25), ("linear", 0.9)):
        figure = vistvis.plot(attention, QUERY, norm=norm)
        low, high = figure.axes[1].get_xlim()
        assert (low, pytest.approx(high)) == (0, top)
        assert any("white: above" in text.replace("\n", " ") for text in texts_of(figure)) == (
            norm == "auto"
        )


def test_no_outline_for_a_special_token() -> None:
    figure = vistvis.plot(random_site(), "camera@1")
    assert texts_of(figure)[0].endswith("query: camera token of frame 1 (token 26)")
    assert not figure.axes[0].patches


def test_one_frame_is_heads_in_reading_order(drawn: list[Any]) -> None:
    vistvis.plot(frame_site(), 30, images=IMAGES)
    assert [tile[:2] for tile in drawn] == [("picture", 1), *[("map", 1)] * 3]
    alone = random_site("vit", layout=ONE)
    figure = vistvis.plot(alone, "r0,c0", images=IMAGES[0, :1])
    assert texts_of(figure)[0] == "vit, query: patch r0,c0 (token 2)"


def test_of_many_frames_those_that_get_most() -> None:
    layout = TokenLayout(12, (2, 2))
    weights = torch.full((1, 1, 48, 48), 1e-3)
    weights[..., 4 * 7 : 4 * 12] = 0.01
    attention = given("x", weights, query_layout=layout, key_layout=layout)
    figure = vistvis.plot(attention, "6:r0,c0")
    shown = [text for text in texts_of(figure) if text.startswith("frame ")]
    assert shown == [f"frame {n}" for n in (0, 1, 2, 6, 7, 8, 9, 10, 11)]
    assert texts_of(figure)[0].endswith("9 of 12 frames")
    figure = vistvis.plot(attention, frames=[11, 5])
    assert [t for t in texts_of(figure) if t.startswith("frame ")] == ["frame 11", "frame 5"]


def test_what_has_no_map_is_named_and_left_out() -> None:
    bare = Attention.from_weights(torch.rand(1, 1, 5, 5).softmax(-1))
    with pytest.warns(VistvisWarning, match="left out: 'text' has no token layout"):
        figure = vistvis.plot({"text": bare, "global_0": random_site()}, QUERY)
    assert texts_of(figure)[0].startswith("global_0, ")
    with pytest.raises(LayoutError, match="says where its tokens lie"):
        vistvis.plot(bare)
    order = TokenOrder(torch.tensor([0, 1, 26, 27]))
    special = given(
        "register",
        torch.rand(1, 1, 4, 4).softmax(-1),
        query_layout=LAYOUT,
        key_layout=LAYOUT,
        query_order=order,
        key_order=order,
    )
    with pytest.raises(LayoutError, match="gives this query's weight to no patch"):
        vistvis.plot(special, "camera@1")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": 78}, IndexOutOfRange, "outside 0…77"),
    ({"query": "0:3,4"}, InputError, "write 0:r3,c4"),
    ({"query": "7:middle"}, InputError, "there is no frame 7"),
    ({"query": 1.5}, InputError, "a token index or a text"),
    ({"heads": 2}, IndexOutOfRange, "head 2 is outside 0…1"),
    ({"heads": "max"}, InputError, 'a number, "mean" or "all"'),
    ({"heads": []}, InputError, "got none"),
    ({"frames": [3]}, IndexOutOfRange, "frame 3 is outside 0…2"),
    ({"frames": []}, InputError, "got none"),
    ({"batch": -1}, InputError, "counts from 0"),
    ({"names": ["a"]}, InputError, "3 frames need as many names"),
    ({"norm": "sqrt"}, InputError, "norm is one of"),
    ({"cmap": "infernal"}, InputError, "did you mean 'inferno'"),
    ({"alpha": 2}, InputError, "opacity from 0 to 1"),
    ({"images": IMAGES[:, :2]}, InputError, "the sites saw 3 frames"),
    ({"images": IMAGES[..., :32]}, InputError, "of another shape"),
    ({"sites": "globl_0"}, SiteError, "did you mean 'global_0'"),
    ({"width": -1}, InputError, "width"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG)
def test_wrong_arguments_are_told(
    wrong: Mapping[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        vistvis.plot({"global_0": random_site()}, **wrong)
    with pytest.raises(InputError, match="open_run"):
        vistvis.plot("runs/scene")  # type: ignore[arg-type]


def test_names_are_shown_as_they_are() -> None:
    name = "a$b$_<script>\x1b[31m\u202e" + "long" * 30
    other = random_site("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = vistvis.plot({name: random_site(), "plain": other}, QUERY, width=4.0)
        figure.png(dpi=40)
    (label,) = [text for text in texts_of(figure) if text.startswith("a$b")]
    assert "…" in label
    assert "\x1b" not in label


def test_pictures_in_bytes_and_as_a_batch_of_single_ones() -> None:
    scene = scene_of(ONE, None, batch=2)
    pictures = pictures_of((IMAGES[0] * 255).to(torch.uint8), scene)
    assert list(pictures) == [0]
    np.testing.assert_allclose(
        pictures[0], IMAGES[0, 2].permute(1, 2, 0).numpy(), atol=1 / 255 + 1e-6
    )


def test_a_capture_and_its_run_give_the_same_picture(tmp_path: Path) -> None:
    model = VGGTLike().eval()
    images = torch.rand(1, 2, 3, 28, 42)
    with vistvis.capture(model) as captured, torch.no_grad():
        model(images)
    live = vistvis.plot(captured, "1:r1,c2", images=images, title="small", width=5.0)
    vistvis.save_run(captured, tmp_path / "run", images=images, model="small")
    with vistvis.open_run(tmp_path / "run") as run:
        stored = vistvis.plot(run, "1:r1,c2", width=5.0)
    assert stored.png(dpi=60) == live.png(dpi=60)
    with Image.open(live.save(tmp_path / "live.png")) as picture:
        assert picture.width == 1000
