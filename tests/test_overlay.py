"""Arrays to pictures: against Pillow, against formulas, and against what must not happen."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vistvis.errors import InputError
from vistvis.images import to_rgb
from vistvis.views import painting as overlay
from vistvis.views.overlay_painter import Look, OverlayPainter
from vistvis.views.png import encode_png


def random_map(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("grid", "size"), [((37, 37), (518, 518)), ((3, 5), (48, 70)), ((1, 4), (9, 9))]
)
def test_resizing_is_bilinear_with_half_pixel_centres(
    grid: tuple[int, int], size: tuple[int, int]
) -> None:
    values = random_map(*grid)
    expected = Image.fromarray(values, mode="F").resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.abs(overlay.resize(values, size) - np.asarray(expected)).max() < 1e-5


def test_a_patch_keeps_its_value_at_its_centre() -> None:
    values = random_map(4, 6)
    large = overlay.resize(values, (4 * 15, 6 * 15))
    assert np.allclose(large[7::15, 7::15], values, atol=1e-6)
    # With corners aligned it would not: this test can fail.
    wrong = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=(60, 90), mode="bilinear", align_corners=True
    )[0, 0].numpy()
    assert np.abs(wrong[7::15, 7::15] - values).max() > 0.01


def test_resizing_keeps_leading_dimensions_and_is_not_rounded_to_bytes() -> None:
    values = random_map(2, 3, 4, 4) * 1e-4
    large = overlay.resize(torch.from_numpy(values).to(torch.bfloat16), (16, 20))
    assert large.shape == (2, 3, 16, 20)
    assert large.dtype == np.float32
    assert len(np.unique(large)) > 1000
    assert large.max() <= 1.01e-4


def test_resizing_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="rows, cols"):
        overlay.resize(np.zeros(3), (4, 4))
    with pytest.raises(InputError, match="positive"):
        overlay.resize(np.zeros((2, 2)), (0, 4))


def test_stretching_goes_from_zero_to_one_and_leaves_constant_maps_dark() -> None:
    stretched = overlay.stretch(np.stack([random_map(3, 3) + 5, np.full((3, 3), 0.25, "f")]))
    assert stretched[0].min() == 0
    assert stretched[0].max() == pytest.approx(1, abs=1e-5)
    assert (stretched[1] == 0).all()


def test_one_scale_serves_all_values_given() -> None:
    scale = overlay.normalizer(np.array([[0.1, 0.4], [np.nan, 0.2]]))
    assert (scale.vmin, scale.vmax) == (0, pytest.approx(0.4))
    assert overlay.normalizer(np.array([-2.0, 3.0])).vmin == -2
    log = overlay.normalizer(np.array([0.0, 1e-12, 0.5]), norm="log")
    assert log.vmin == pytest.approx(5e-7)
    laid = overlay.lay_over(np.zeros((1, 1, 3)), np.zeros((1, 1), np.float32), normalizer=log)
    assert (laid == overlay.colour_table("inferno")[0]).all()
    spiked = np.append(np.linspace(0, 0.01, 999), 1.0)
    assert overlay.normalizer(spiked, norm="percentile").vmax < 0.011
    assert overlay.normalizer(np.zeros(4)).vmax == 1
    assert overlay.normalizer(np.array([0.0] * 200 + [1.0]), norm="percentile").vmax == 1
    for wrong in ("sqrt", ""):
        with pytest.raises(InputError, match="norm is one of"):
            overlay.normalizer(np.ones(2), norm=wrong)
    with pytest.raises(InputError, match="positive"):
        overlay.normalizer(np.zeros(2), norm="log")
    with pytest.raises(InputError, match="finite"):
        overlay.normalizer(np.array([np.nan]))


def test_the_scale_of_itself_leaves_out_the_query_and_what_lies_beside_it() -> None:
    maps = np.full((2, 5, 6), 0.01, np.float32)
    maps[1, 0:3, 0:2] = 0.5, 0.6
    maps[0, 4, 4], maps[1, 3, 0] = 0.02, 0.03
    own = (1, 1, 0)
    scale = overlay.normalizer(maps, own=own)
    assert (scale.vmin, scale.vmax) == (0, pytest.approx(0.03))
    assert overlay.is_clipped(maps, scale)
    assert overlay.scale_text(maps, scale, norm="auto", own=own) == (
        "scale: to the largest weight outside the query's patch and its neighbours "
        "(white: above it, up to 0.6)"
    )
    assert overlay.normalizer(maps).vmax == pytest.approx(0.6)
    assert overlay.normalizer(maps, norm="linear", own=own).vmax == pytest.approx(0.6)
    assert not overlay.is_clipped(maps, overlay.normalizer(maps))
    assert overlay.scale_text(maps, overlay.normalizer(maps), norm="linear") == (
        "scale: to the largest weight"
    )
    # Where every map has the query's patch, what lies beside it is what is looked for.
    maps[:, 1, 0] = 0.9
    everywhere = overlay.normalizer(maps, own=(slice(None), 1, 0))
    assert everywhere.vmax == pytest.approx(0.6)
    one = maps[1], (0, 1, 0)
    scale = overlay.normalizer(one[0], own=one[1])
    assert scale.vmax == pytest.approx(0.6)
    assert overlay.scale_text(one[0], scale, norm="auto", own=one[1]) == (
        "scale: to the largest weight outside the query's patch (white: above it, up to 0.9)"
    )
    # Nothing but the query's surroundings, or nothing outside: all counts.
    assert overlay.normalizer(maps[1:, 1:2, :1], own=(0, 0, 0)).vmax == pytest.approx(0.9)


def test_what_lies_above_the_scale_is_white() -> None:
    heat = np.array([[0.0, 0.5, 1.0, 1.01]], np.float32)
    scale = overlay.normalizer(heat[:, :3])
    white = np.ones((1, 4, 3), np.float32)
    for picture in (white * 0, white):
        laid = overlay.lay_over(picture, heat, normalizer=scale)
        assert (laid[0, 3] == 255).all()
        assert not (laid[0, 2] == 255).all()
    colours = overlay.colour_table("inferno")
    black = overlay.lay_over(white * 0, heat, normalizer=scale)
    assert np.abs(black[0, :3] - colours[[0, 127, 255]].astype(int)).max() <= 2
    # The picture is grey, and what a map of nothing lets through is 1 − alpha of it.
    red = white * np.array([1, 0, 0], np.float32)
    nothing = overlay.lay_over(red, 0 * heat, normalizer=scale, alpha=0.4)
    assert np.abs(nothing[0, 0] - 0.6 * 0.299 * 255).max() <= 4
    with pytest.raises(InputError, match="alpha"):
        overlay.lay_over(red, heat, normalizer=scale, alpha=1.1)


def test_dark_maps() -> None:
    maps = np.zeros((4, 3, 3), np.float32)
    maps[0, 2, 2] = 1e-4
    maps[0, 0, 0], maps[1, 1, 1], maps[2, 2, 2] = 1.0, 0.1, 0.2
    assert overlay.dark_maps(maps, overlay.normalizer(maps, norm="linear")) == (1,)
    assert overlay.dark_maps(maps, overlay.normalizer(maps, norm="log")) == ()
    assert overlay.dark_maps(maps, overlay.normalizer(maps, own=(0, 0, 0))) == ()


def colours(values: Any, cmap: str) -> Any:
    """As overlays look them up."""
    return overlay.colour_table(cmap).take(overlay.colour_indices(values), axis=0)


@pytest.mark.parametrize("cmap", ["jet", "inferno", "tab10"])
def test_colours_are_those_of_matplotlib(cmap: str) -> None:
    import matplotlib

    values = random_map(20, 20)
    expected = matplotlib.colormaps[cmap](values)[..., :3] * 255
    found = colours(values, cmap)
    if cmap != "tab10":  # a table of ten is looked up by tens, not by 256 steps
        assert np.abs(found - expected).max() <= 0.51
    assert found.dtype == np.uint8


def test_colours_beyond_the_ends_and_of_nan() -> None:
    found = colours(np.array([-1.0, 0.0, 1.0, 7.0, np.nan, np.inf], np.float32), "inferno")
    table = overlay.colour_table("inferno")
    assert [tuple(c) for c in found] == [tuple(table[i]) for i in (0, 0, 255, 255, 0, 255)]
    with pytest.raises(InputError, match="no colour map 'yet'"):
        overlay.colour_table("yet")


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.sampled_from(["inferno", "jet", "gray"]), st.integers(0, 2**32 - 1))
def test_the_painter_lays_over_to_one_level(alpha: float, cmap: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (3, 14, 21), dtype=np.uint8).transpose(1, 2, 0)
    maps = rng.random((2, 2, 3), dtype=np.float32) ** 4
    look = Look(norm="linear", cmap=cmap, alpha=alpha)
    painter = OverlayPainter({7: picture}, look)
    scale = overlay.normalizer(maps * 0.6)  # something lies above it
    for own in (True, False):
        values = overlay.stretch(maps[0]) if own else maps[0]
        heat = overlay.resize(values, (14, 21))
        expected = overlay.lay_over(
            picture / np.float32(255),
            heat,
            normalizer=overlay.normalizer(np.ones(1)) if own else scale,
            cmap=cmap,
            alpha=alpha,
        )
        found = painter.paint(maps[0], 7, None if own else scale)
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert found.shape == (14, 21, 3)


def test_looks_that_can_not_be() -> None:
    with pytest.raises(InputError, match="alpha"):
        OverlayPainter({}, Look(alpha=1.5))
    with pytest.raises(InputError, match="no colour map 'yet'"):
        OverlayPainter({}, Look(cmap="yet"))
    with pytest.raises(InputError, match="norm is one of 'own', 'auto'"):
        Look(norm="sqrt")


def test_what_the_painter_does_with_a_constant_map_and_eps() -> None:
    picture = np.full((4, 4, 3), 200, np.uint8)
    constant, noise = np.full((2, 2), 0.25, "f"), np.array([[0, 1e-6], [0, 0]], "f")
    dark = OverlayPainter({0: picture}, Look()).paint(constant, 0)
    assert len(np.unique(dark.reshape(-1, 3), axis=0)) == 1
    loud = OverlayPainter({0: picture}, Look()).paint(noise, 0)
    assert len(np.unique(loud.reshape(-1, 3), axis=0)) > 1
    assert (OverlayPainter({0: picture}, Look(eps=1.0)).paint(noise, 0) == dark).all()


def test_an_outline_lies_inside_its_box_and_leaves_the_picture_alone() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    marked = overlay.outline(image, (14, 0, 28, 14), colour=(1, 2, 3), width=3)
    changed = (marked != 0).any(-1)
    assert not image.any()
    assert changed[0:14, 14:28].sum() == 14 * 14 - 8 * 8
    assert changed.sum() == 14 * 14 - 8 * 8
    assert not changed[3:11, 17:25].any()
    tiny = overlay.outline(image, (0, 0, 3, 3), width=5)
    assert not tiny[1, 1].any()
    with pytest.raises(InputError, match="does not touch"):
        overlay.outline(image, (70, 0, 80, 10))


def test_pictures_of_every_kind_become_the_same_bytes() -> None:
    rng = np.random.default_rng(1)
    bytes_ = rng.integers(0, 256, (2, 3, 5, 4), dtype=np.uint8)
    expected = bytes_.transpose(0, 2, 3, 1)
    kinds = [
        bytes_,
        torch.from_numpy(bytes_),
        bytes_.astype(np.float32),
        bytes_ / 255,
        torch.from_numpy(bytes_ / 255).half(),
        bytes_.astype(np.int64),
    ]
    for images in kinds:
        assert (to_rgb(images) == expected).all()
    assert np.abs(to_rgb(torch.from_numpy(bytes_ / 255).bfloat16()) - 1.0 * expected).max() <= 1
    grey = to_rgb(bytes_[:, :1])
    assert grey.shape == (2, 5, 4, 3)
    assert (grey[..., 2] == bytes_[:, 0]).all()


def test_resampling_may_overshoot() -> None:
    image = np.array([-0.04, 0.5, 1.04], np.float32).reshape(1, 1, 3)
    assert to_rgb(image).ravel()[::3].tolist() == [0, 128, 255]


def test_pictures_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="normalised"):
        to_rgb(np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32))
    with pytest.raises(InputError, match="normalised"):
        to_rgb(np.full((3, 2, 2), np.nan))
    with pytest.raises(InputError, match="1 or 3 channels"):
        to_rgb(np.zeros((4, 2, 2)))
    with pytest.raises(InputError, match="uint8 or floating"):
        to_rgb(np.zeros((3, 2, 2), bool))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_png_gives_back_every_byte(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(image))) as picture:
        assert picture.mode == "RGB"
        assert (np.asarray(picture) == image).all()


def test_png_of_other_arrays_is_refused() -> None:
    for wrong in (np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2, 3), np.uint8)):
        with pytest.raises(InputError, match="uint8"):
            encode_png(wrong)  # type: ignore[arg-type]
