"""TokenLayout: known values, round trips over random layouts, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistvis import TokenLayout
from vistvis.errors import LayoutError

VGGT_SPECIAL = ("camera", "register", "register", "register", "register")


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    return TokenLayout(
        frames=draw(st.integers(1, 6)),
        grid=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        special=tuple(draw(st.lists(st.sampled_from(["cls", "register", "camera"]), max_size=5))),
        patch_size=(draw(st.integers(1, 20)), draw(st.integers(1, 20))),
    )


@st.composite
def layouts_and_tokens(draw: st.DrawFn) -> tuple[TokenLayout, int]:
    layout = draw(layouts())
    return layout, draw(st.integers(0, layout.num_tokens - 1))


def test_known_value_of_930_tokens_a_frame() -> None:
    layout = TokenLayout(4, (25, 37), VGGT_SPECIAL)
    assert layout.tokens_per_frame == 930
    assert layout.index(frame=1, token=820) == 1750


def test_known_values_of_1041_tokens_a_frame() -> None:
    layout = TokenLayout(21, (28, 37), VGGT_SPECIAL)
    place = layout.locate(20238)
    assert (place.frame, place.token_in_frame, place.patch) == (19, 459, 454)
    assert (place.row, place.col) == (12, 10)
    # 20280 = 19 · 1041 + 501
    place = layout.locate(20280)
    assert (place.frame, place.token_in_frame, place.patch) == (19, 501, 496)
    assert (place.row, place.col) == (13, 15)
    camera = layout.locate(20820)
    assert (camera.frame, camera.kind, camera.patch) == (20, "camera", None)


def test_known_value_of_a_square_picture() -> None:
    layout = TokenLayout(1, (37, 37), VGGT_SPECIAL)
    place = layout.locate(500)
    assert (place.patch, place.row, place.col) == (495, 13, 14)
    assert place.box == (14 * 14, 13 * 14, 15 * 14, 14 * 14)
    assert layout.patch_start_idx == 5
    assert [layout.locate(t).kind == "patch" for t in (4, 5, 1373)] == [False, True, True]
    assert layout.num_tokens == 1374


@given(layouts_and_tokens())
def test_index_undoes_locate(case: tuple[TokenLayout, int]) -> None:
    layout, token = case
    place = layout.locate(token)
    assert layout.index(frame=place.frame, token=place.token_in_frame) == token
    if place.is_patch:
        assert layout.index(frame=place.frame, patch=place.patch) == token
        assert layout.index(frame=place.frame, row=place.row, col=place.col) == token
        assert layout.nearest_patch(token) == token
    else:
        same = [i for i, kind in enumerate(layout.special) if kind == place.kind]
        nth = same.index(place.token_in_frame)
        assert layout.index(frame=place.frame, kind=place.kind, nth=nth) == token
        assert layout.nearest_patch(token) == layout.index(frame=place.frame, patch=0)


@given(layouts_and_tokens(), st.floats(0, 0.999), st.floats(0, 0.999))
def test_every_pixel_of_a_box_gives_its_token(
    case: tuple[TokenLayout, int], across: float, down: float
) -> None:
    layout, token = case
    box = layout.locate(token).box
    if box is None:
        return
    x0, y0, x1, y1 = box
    assert layout.token_at(layout.locate(token).frame, x0, y0) == token
    assert layout.token_at(layout.locate(token).frame, x1 - 1, y1 - 1) == token
    x, y = x0 + across * (x1 - x0), y0 + down * (y1 - y0)
    assert layout.token_at(layout.locate(token).frame, x, y) == token


@given(layouts(), st.booleans())
def test_maps_put_every_token_in_its_cell(layout: TokenLayout, as_array: bool) -> None:
    row = torch.arange(layout.num_tokens).expand(2, -1)
    maps = layout.maps(row.numpy()) if as_array else layout.maps(row)
    assert tuple(maps.shape) == (2, layout.frames, *layout.grid)
    for frame, r, c in np.ndindex(layout.frames, *layout.grid):
        assert int(maps[1, frame, r, c]) == layout.index(frame=frame, row=r, col=c)


@given(layouts())
def test_plain_data_round_trip(layout: TokenLayout) -> None:
    assert TokenLayout.from_dict(layout.to_dict()) == layout


def test_corners_and_center() -> None:
    layout = TokenLayout(2, (3, 5), ("cls",))
    names = ("top left", "top right", "bottom left", "bottom right")
    assert [layout.corner(name) for name in names] == [1, 5, 11, 15]
    assert layout.corner("top left", frame=1) == 17
    assert layout.center() == layout.index(row=1, col=2)
    with pytest.raises(LayoutError, match="top left, top right"):
        layout.corner("upper left")


def test_each_side_of_attention_has_the_layout_that_fits() -> None:
    layout = TokenLayout(3, (2, 4), ("cls",))
    one = layout.frame_layout()
    assert layout.sides(27, 27) == (layout, layout)
    assert layout.sides(9, 9) == (one, one)
    assert layout.sides(9, 27) == (one, layout)
    assert layout.sides(27, 9) == (layout, None)  # nothing says whose keys these are
    assert layout.sides(27, 8) == (layout, None)
    assert layout.sides(77, 9) == (None, one)
    assert layout.sides(9, 77) == (one, None)
    assert layout.sides(18, 18) == (None, None)
    assert one.sides(9, 9) == (one, one)
    assert one.sides(9, 27) == (one, None)


def test_past_the_end_is_the_last_patch_of_the_last_frame() -> None:
    layout = TokenLayout(2, (3, 5), ("cls",))
    assert layout.nearest_patch(10_000) == layout.corner("bottom right", frame=1)
    assert layout.nearest_patch(-3) == layout.index(patch=0)


def test_ints_and_lists_are_accepted() -> None:
    assert TokenLayout(1, [2, 3], 2, 16) == TokenLayout(  # type: ignore[arg-type]
        1, (2, 3), ("special", "special"), (16, 16)
    )


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda y: y.locate(-1), r"token -1 is outside 0…31"),
        (lambda y: y.locate(32), r"token 32 is outside 0…31 \(2 frames of 16 tokens\)"),
        (lambda y: y.index(row=1), "name the token in one way"),
        (lambda y: y.index(patch=1, token=2), "name the token in one way"),
        (lambda y: y.index(), "name the token in one way"),
        (lambda y: y.index(row=3, col=0), r"row 3 is outside 0…2"),
        (lambda y: y.index(frame=2, patch=0), r"frame 2 is outside 0…1"),
        (lambda y: y.index(kind="camera"), r"no special token of kind 'camera'.*1 × cls"),
        (lambda y: y.index(kind="cls", nth=1), r"nth cls 1 is outside 0…0"),
        (lambda y: y.token_at(0, 70, 0), r"pixel \(70, 0\) lies outside the 70×42 picture"),
        (lambda y: y.maps(torch.zeros(3, 16)), r"32 values \(2 × 16\), got shape \(3, 16\)"),
        (lambda _: TokenLayout(0, (1, 1)), "at least one frame"),
        (lambda _: TokenLayout(1, (0, 1)), "grid must be positive"),
        (lambda _: TokenLayout(1, (2, 2), ("patch",)), "another kind"),
        (lambda _: TokenLayout.from_dict({"frames": 1}), "a layout has frames, grid"),
    ],
)
def test_refusals_name_what_was_seen(wrong: object, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        wrong(TokenLayout(2, (3, 5), ("cls",)))  # type: ignore[operator]


def test_tokens_behind_patches_and_of_no_frame() -> None:
    layout = TokenLayout(2, (1, 2), ("cls",), (14, 14), ("register",), ("text",), ("scale",))
    kinds = [layout.locate(token).kind for token in range(layout.num_tokens)]
    frame = ["cls", "patch", "patch", "register"]
    assert kinds == ["text", *frame, *frame, "scale"]
    assert [layout.locate(token).frame for token in (0, 1, 8, 9)] == [None, 0, 1, None]
    assert layout.index(frame=1, row=0, col=1) == 7
    assert layout.index(kind="register", frame=1) == 8
    assert (layout.index(kind="text"), layout.index(kind="scale")) == (0, 9)
    assert layout.maps(torch.arange(10)).flatten().tolist() == [2, 3, 6, 7]
    assert [layout.nearest_patch(token) for token in (0, 1, 4, 5, 8, 9, 99)] == [
        2,
        2,
        3,
        6,
        7,
        7,
        7,
    ]
    assert layout.frame_layout() == TokenLayout(1, (1, 2), ("cls",), (14, 14), ("register",))
    assert TokenLayout.from_dict(layout.to_dict()) == layout
    with pytest.raises(LayoutError, match="lies in no picture"):
        _ = layout.locate(0).frame_idx
    with pytest.raises(LayoutError, match="the last patch is 7"):
        layout.locate(10)
