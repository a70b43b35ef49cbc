"""Photos into model inputs: golden pixels, geometry there and back, files that are none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import DATA
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from vggt_adapter import (
    ImageGeometry,
    load_and_preprocess_images,
    load_images,
    preprocess_geometry,
)
from vistvis import TokenLayout
from vistvis.errors import InputError, VistvisWarning

GOLDEN: dict[str, Any] = json.loads((DATA / "preprocess.json").read_text())


def synthetic(width: int, height: int, mode: str) -> Image.Image:
    """The picture that the golden file's formula describes."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    channels = [
        np.round(127.5 + 127.5 * np.sin(0.013 * (c + 1) * x + 0.017 * y * (1 + 0.3 * c) + c))
        for c in range(3)
    ]
    if mode == "RGBA":
        channels.append(np.broadcast_to(np.round(255 * x / width), (height, width)))
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, told in GOLDEN["sources"].items():
        synthetic(told["width"], told["height"], told["mode"]).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in GOLDEN["sources"]}


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_golden_pixels(case: str, sources: dict[str, Path]) -> None:
    told = GOLDEN["cases"][case]
    paths = [sources[name] for name in told["files"]]
    if case in ("crop_ac", "crop_be"):
        with pytest.warns(VistvisWarning, match="padded with white to 518×"):
            images = load_and_preprocess_images(paths, told["mode"])
    else:
        images = load_and_preprocess_images(paths, told["mode"])
    assert list(images.shape) == told["shape"]
    expected = load_file(DATA / "preprocess.safetensors")[case]
    assert (images[..., ::37, ::37] - expected).abs().max() <= 1 / 255
    assert images.double().mean().item() == pytest.approx(told["mean"], abs=1e-4)
    assert images.dtype == torch.float32


def test_golden_pixels_notice_another_filter(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, _: resize(self, size, Image.Resampling.BILINEAR)
    )
    images = load_and_preprocess_images([sources["c"]])
    expected = load_file(DATA / "preprocess.safetensors")["crop_c"]
    assert (images[..., ::37, ::37] - expected).abs().max() > 1 / 255


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((640, 480), "crop", (392, 518)),
        ((1920, 1080), "crop", (294, 518)),
        ((700, 700), "crop", (518, 518)),
        ((480, 640), "crop", (518, 518)),
        ((640, 480), "pad", (518, 518)),
        ((5000, 20), "crop", (14, 518)),  # would round to nothing
    ],
)
def test_sizes(size: tuple[int, int], mode: str, expected: tuple[int, int]) -> None:
    (geometry,) = preprocess_geometry([size], mode=mode)
    assert geometry.image_size == expected
    assert geometry.original_size == size[::-1]


# -- geometry --------------------------------------------------------------------------------------

SIDES = st.integers(1, 3000)


def quiet(sizes: list[tuple[int, int]], **options: Any) -> tuple[ImageGeometry, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VistvisWarning)
        return preprocess_geometry(sizes, **options)


@given(
    st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3),
    st.sampled_from(["crop", "pad"]),
    st.sampled_from([14, 224, 518]),
    st.floats(-0.5, 1),
    st.floats(-0.5, 1),
)
def test_there_and_back(
    sizes: list[tuple[int, int]], mode: str, size: int, across: float, down: float
) -> None:
    geometries = quiet(sizes, mode=mode, size=size)
    assert len({geometry.image_size for geometry in geometries}) == 1
    for (width, height), geometry in zip(sizes, geometries, strict=True):
        x, y = across * width, down * height
        assert geometry.to_original(*geometry.to_model(x, y)) == pytest.approx((x, y), abs=1e-6)
        # Corners go to corners.
        top, left = geometry.offset
        (rows, cols), (full_rows, full_cols) = geometry.resized_size, geometry.image_size
        assert geometry.to_model(-0.5, -0.5) == pytest.approx((left - 0.5, top - 0.5))
        end = geometry.to_model(width - 0.5, height - 0.5)
        assert end == pytest.approx((left + cols - 0.5, top + rows - 0.5))
        # In the middle, up to the odd pixel.
        assert abs((full_rows - rows) / 2 - top) <= 0.5
        assert abs((full_cols - cols) / 2 - left) <= 0.5
        assert full_rows % 14 == full_cols % 14 == 0
        box = geometry.box_to_original((left, top, left + cols, top + rows))
        assert box == pytest.approx((0, 0, width, height), abs=1e-6)


@given(st.tuples(SIDES, SIDES), st.sampled_from(["crop", "pad"]), st.data())
def test_every_visible_pixel_has_a_model_pixel_and_others_say_why_not(
    size: tuple[int, int], mode: str, data: st.DataObject
) -> None:
    width, height = size
    (geometry,) = quiet([size], mode=mode)
    x = data.draw(st.integers(0, width - 1))
    y = data.draw(st.integers(0, height - 1))
    x0, y0, x1, y1 = geometry.visible_box
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    if x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1:
        column, row = geometry.model_pixel(x, y)
        assert 0 <= row < geometry.image_size[0]
        assert 0 <= column < geometry.image_size[1]
        near = geometry.to_model(x, y)
        assert abs(column - near[0]) <= 0.5
        assert abs(row - near[1]) <= 0.5
    else:
        with pytest.raises(InputError, match=r"cropped away.*pad"):
            geometry.model_pixel(x, y)
    for outside in ((-1, y), (width, y), (x, -1), (x, height)):
        with pytest.raises(InputError, match="outside"):
            geometry.model_pixel(*outside)


def test_a_known_pixel() -> None:
    (geometry,) = preprocess_geometry([(640, 480)])
    # 518/640 of a pixel in x, 392/480 in y; centres, so half a pixel is added and taken away.
    assert geometry.to_model(120.0, 80.0) == pytest.approx((97.0296875, 65.2416667))
    assert geometry.model_pixel(120, 80) == (97, 65)
    assert geometry.model_pixel(639, 479) == (517, 391)
    assert geometry.model_pixel(639.5, 479.5) == (517, 391)


def test_arrays_and_tensors_of_pixels() -> None:
    (geometry,) = preprocess_geometry([(640, 480)])
    x, y = np.array([0.0, 120.0]), np.array([0.0, 80.0])
    for kind in (np.asarray, torch.as_tensor):
        out_x, out_y = geometry.to_model(kind(x), kind(y))
        assert (float(out_x[1]), float(out_y[1])) == pytest.approx(geometry.to_model(120.0, 80.0))


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 1000)])
def test_geometry_says_where_pixels_really_went(
    tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    """Independent witness: paint a block, load the picture, find the block."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    centre = (width // 3, height // 2 + height // 9)  # x, y of the block's middle
    pixels[centre[1] - 9 : centre[1] + 10, centre[0] - 9 : centre[0] + 10, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "block.png")
    loaded = load_images([tmp_path / "block.png"], mode=mode)
    red = (loaded.images[0, 0] - loaded.images[0, 1]).clamp(0)  # white padding is no block
    rows, cols = torch.meshgrid(*(torch.arange(n).double() for n in red.shape), indexing="ij")
    found = [float((axis * red).sum() / red.sum()) for axis in (cols, rows)]
    assert found == pytest.approx(loaded.geometries[0].to_model(*map(float, centre)), abs=0.05)


def test_original_pixels_to_tokens_and_back(tmp_path: Path, sources: dict[str, Path]) -> None:
    with pytest.warns(VistvisWarning):
        loaded = load_images([sources["a"], sources["b"]])
    frames, _, height, width = loaded.images.shape
    layout = TokenLayout(
        frames=frames, grid=(height // 14, width // 14), special=("camera", *["register"] * 4)
    )
    for frame, (x, y) in ((0, (120, 80)), (0, (0, 0)), (1, (240, 320)), (1, (479, 100))):
        token = loaded.token_at(layout, frame, x, y)
        assert layout.locate(token).frame == frame
        box = loaded.original_box(layout, token)
        assert box is not None
        assert box[0] <= x + 0.5 <= box[2]
        assert box[1] <= y + 0.5 <= box[3]
    assert loaded.original_box(layout, 0) is None
    assert loaded.paths == (sources["a"], sources["b"])


# -- what files can be -----------------------------------------------------------------------------


def test_one_path_alone_and_text(sources: dict[str, Path]) -> None:
    expected = load_and_preprocess_images([sources["a"]])
    assert torch.equal(load_and_preprocess_images(sources["a"]), expected)
    assert torch.equal(load_and_preprocess_images(str(sources["a"])), expected)
    assert torch.equal(load_and_preprocess_images(iter([str(sources["a"])])), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = synthetic(60, 40, "RGB")
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    sideways = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    sideways.save(tmp_path / "photo.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    expected = load_images([tmp_path / "upright.png"], size=56)
    turned = load_images([tmp_path / "photo.png"], size=56)
    assert torch.equal(turned.images, expected.images)
    assert turned.geometries == expected.geometries
    as_stored = load_images([tmp_path / "photo.png"], size=56, exif=False)
    assert torch.equal(as_stored.images, expected.images) == (orientation == 1)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1", "I;16", "YCbCr"])
def test_other_pixel_modes_keep_their_greys(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 56).round().astype(np.uint8), (56, 1))
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
        picture = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    elif mode == "P":
        picture = Image.fromarray(grey).quantize(256)
    else:
        picture = Image.fromarray(grey).convert("RGB").convert(mode)
    file = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.save(file)
    images = load_and_preprocess_images([file], size=56)
    assert (images[0] * 255 - torch.from_numpy(grey)).abs().max() <= 3


def test_transparency_goes_to_white_in_palettes_too(tmp_path: Path) -> None:
    picture = Image.new("P", (56, 56), 1)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.png", transparency=1)
    assert torch.equal(
        load_and_preprocess_images([tmp_path / "a.png"], size=56), torch.ones(1, 3, 56, 56)
    )


def test_nothing_to_load() -> None:
    with pytest.raises(ValueError, match=r"at least one image.*empty list"):
        load_and_preprocess_images([])
    with pytest.raises(InputError, match="at least one"):
        preprocess_geometry([])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "stretch"}, "'crop' or 'pad', got 'stretch'"),
        ({"size": 520}, "multiple of the patch size 14, got 520; use 518"),
        ({"size": 0}, "positive multiple.*use 14"),
        ({"size": 518, "patch_size": 16}, "patch size 16, got 518; use 512"),
        ({"patch_size": 0}, "patch_size must be positive"),
    ],
)
def test_options_that_cannot_be(
    sources: dict[str, Path], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        load_and_preprocess_images([sources["a"]], **options)
    assert isinstance(caught.value, InputError)


def test_files_that_are_no_pictures(tmp_path: Path, sources: dict[str, Path]) -> None:
    good = sources["a"].read_bytes()
    jpeg = tmp_path / "good.jpg"
    synthetic(640, 480, "RGB").save(jpeg)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    broken = {
        "empty.png": b"",
        "text.jpg": b"no picture",
        "cut.png": good[: len(good) // 2],
        "cut.jpg": jpeg.read_bytes()[:5000],
        "header.png": good[:20],
        "flipped.png": bytes(flipped),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}.*can't be read as a picture"):
            load_and_preprocess_images([sources["a"], tmp_path / name])
    with pytest.raises(InputError, match=r"nowhere\.png"):
        load_and_preprocess_images([tmp_path / "nowhere.png"])
    with pytest.raises(InputError, match="is a folder"):
        load_and_preprocess_images([tmp_path])
    with pytest.raises(InputError, match="must be file names"):
        load_and_preprocess_images([synthetic(4, 4, "RGB")])  # type: ignore[list-item]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).random((20, 20), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match=r"f\.tif.*no known white"):
        load_and_preprocess_images([tmp_path / "f.tif"])


def test_loaded_images_are_frozen(sources: dict[str, Path]) -> None:
    loaded = load_images([sources["a"]], size=56)
    with pytest.raises(AttributeError):
        loaded.images = torch.zeros(1)  # type: ignore[misc]
