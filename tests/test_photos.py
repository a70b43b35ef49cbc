"""What people type as photos: found, read upright, named, and led back to their pixels."""

from __future__ import annotations

import json
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_adapter import load_images
from vistvis.errors import InputError
from vistvis.models.loading import _timm_pictures, load
from vistvis.photos.finding import find_photos
from vistvis.photos.geometry import ImageGeometry
from vistvis.photos.photo import Photo, SeenPhoto, crop_lines
from vistvis.photos.reading import read_photos, seen_part
from vistvis.photos.records import photos_metadata, photos_of
from vistvis.queries import parse_query
from vistvis.tokens import TokenLayout


def coded(width: int, height: int) -> Image.Image:
    """A picture whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def save(path: Path, picture: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or coded(20, 10)).save(path)
    return path


def names(what: Any, **options: Any) -> list[str]:
    return [photo.name for photo in find_photos(what, **options)[0]]


# -- files, folders, globs -------------------------------------------------------------------------


def test_folders_and_globs_in_natural_order(tmp_path: Path) -> None:
    shots = tmp_path / "shots"
    for name in ("a10.jpg", "a2.jpg", "B1.PNG", "._a2.jpg", "sub/a1.jpg"):
        save(shots / name)
    (shots / "notes.txt").write_text("no picture")
    assert names(shots) == ["a2.jpg", "a10.jpg", "B1.PNG"]
    assert names(f"{shots}/*.jpg") == ["a2.jpg", "a10.jpg"]
    assert names(f"{shots}/**/*.jpg") == ["a2.jpg", "a10.jpg", "a1.jpg"]
    assert names(f"{shots}/*") == ["a2.jpg", "a10.jpg", "B1.PNG"]
    assert names(shots, every="2f") == ["a2.jpg", "B1.PNG"]
    assert names([shots / "a10.jpg", str(shots / "a2.jpg")]) == ["a10.jpg", "a2.jpg"]
    assert names(save(tmp_path / "odd[1].jpg")) == ["odd[1].jpg"]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("https://example.org/a.jpg", r"download it first: curl -LO 'https://example.org/a\.jpg'"),
        ("s3://bucket/a.jpg", "is a URL"),
        ("file:///a.jpg", "without file://"),
        ("{}/none.jpg", "no file"),
        ("{}/none*.jpg", "matches no picture, nothing"),
        ("{}/empty", "holds no picture, nothing"),
        ("{}/texts", r"holds no picture, only 'clip\.mp4', 'notes\.txt'"),
        ("{}/texts/notes.txt", r"notes\.txt.*it is no JPEG.*or HEIC; save it as"),
        ("{}/cut.png", "damaged or cut short"),
        ("{}/nothing.png", "it is empty"),
    ],
)
def test_what_is_no_photo_says_what_it_is(tmp_path: Path, what: str, text: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("notes.txt", "clip.mp4"):
        (tmp_path / "texts" / name).write_text("no picture")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "nothing.png").write_bytes(b"")
    with pytest.raises(InputError, match=text):
        find_photos(what.format(tmp_path))


def test_unknown_is_never_called_damaged(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no picture")
    with pytest.raises(InputError) as caught:
        find_photos(file)
    assert "damaged" not in str(caught.value)


def test_too_many_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vistvis.photos.finding.MOST", 3)
    for number in range(5):
        save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match=r"5 pictures.*at most 3.*--every 10f"):
        find_photos(tmp_path)
    assert len(names(tmp_path, every="2f")) == 3


@pytest.mark.parametrize("every", ["0", "-1", "2.5f", "x", "1e3", "nan", "9" * 5000, ""])
def test_every_is_seconds_or_frames(tmp_path: Path, every: str) -> None:
    with pytest.raises(InputError, match=r"seconds \(0.5 or 0.5s\) or of frames \(10f\)"):
        find_photos(save(tmp_path / "a.png"), every=every)


def test_seconds_mean_nothing_to_photographs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="these are photographs"):
        find_photos(save(tmp_path / "a.png"), every="1s")


# -- videos ----------------------------------------------------------------------------------------


def clip(path: Path, *, codec: str = "libx264", frames: int = 20, rate: int = 10) -> Path:
    """Frame i is grey, 10·i; the left half of the upper half is white."""
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "6"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 10 * number, np.uint8)
            pixels[:24, :32] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(photos: list[Photo]) -> list[int]:
    return [round(float(np.asarray(one)[36:44, 40:60].mean()) / 10) for one in read_photos(photos)]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.mov", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.webm", "libvpx-vp9"),
    ],
)
def test_frames_of_a_video_are_those_that_their_names_say(
    tmp_path: Path, name: str, codec: str
) -> None:
    file = clip(tmp_path / name, codec=codec)
    photos, lines = find_photos(file)
    assert greys(photos) == [0, 3, 5, 8, 11, 14, 16, 19]
    assert [photo.time for photo in photos] == pytest.approx(
        [0.0, 0.3, 0.5, 0.8, 1.1, 1.4, 1.6, 1.9]
    )
    assert photos[1].name == f"{name} @ 0:00.3"
    assert lines == [
        f"{name}: 8 of its 20 frames, spread evenly; choose with --every, as in --every 0.5s or "
        "--every 10f"
    ]
    assert greys(find_photos(file, every=0.5)[0]) == [0, 5, 10, 15]
    assert greys(find_photos(file, every="9f")[0]) == [0, 9, 18]
    assert greys(photos[::-1]) == [19, 16, 14, 11, 8, 5, 3, 0]


def test_names_tell_frames_apart(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.mp4", frames=4, rate=50)
    assert [name.split("@ ")[1] for name in names(file)] == [
        "0:00.00",
        "0:00.02",
        "0:00.04",
        "0:00.06",
    ]


def test_a_video_is_turned_upright(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.mp4", frames=2)
    data = bytearray(file.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, ids, layers, then the matrix
    one = 1 << 16
    # x' = 48 − y, y' = x: what a telephone writes that was held upright.
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    file.write_bytes(data)
    (first, _) = read_photos(find_photos(file)[0])
    assert first.size == (48, 64)
    pixels = np.asarray(first)[..., 0]
    assert pixels[:28, 28:].min() > 200  # the white corner, a quarter turn with the clock
    assert pixels[:, :20].max() < 50
    assert pixels[40:].max() < 50


def test_pixels_of_a_video_that_are_not_square(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "wide.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 60, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 60, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (first,) = read_photos(find_photos(file)[0])
    assert first.size == (80, 48)


def test_a_damaged_video_is_told(tmp_path: Path) -> None:
    file = clip(tmp_path / "a.mp4")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError, match=r"a\.mp4.*can't be read as a video.*damaged or cut"):
        find_photos(file)


def test_damage_in_the_middle_is_not_painted_over(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file, noise = tmp_path / "a.mp4", np.random.default_rng(0)
    with av.open(file, "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(20):
            pixels = noise.integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.mp4.*damaged or cut short"):
        list(read_photos(find_photos(file)[0]))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="only sound"):
        find_photos(tmp_path / "a.mkv")


def test_an_animated_gif_needs_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    pictures = [Image.new("L", (64, 48), 20 * number) for number in range(5)]
    pictures[0].save(
        tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=200, loop=0
    )
    photos, _ = find_photos(tmp_path / "a.gif", every="2f")
    assert [photo.name for photo in photos] == [f"a.gif @ 0:00.{n}" for n in (0, 4, 8)]
    assert greys(photos) == [0, 4, 8]
    assert names(save(tmp_path / "still.gif")) == ["still.gif"]


@pytest.mark.parametrize(
    ("file", "start", "module", "text"),
    [
        ("a.mp4", b"\0\0\0\x18ftypisom\0\0", "av", r"a\.mp4': a video needs.*'vistvis\[video\]'"),
        ("x.heic", b"\0\0\0\x18ftypheic\0\0", "pillow_heif", r"HEIC needs.*'vistvis\[heic\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    start: bytes,
    module: str,
    text: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / file).write_bytes(start)
    with pytest.raises(InputError, match=text) as caught:
        find_photos(tmp_path / file)
    assert "damaged" not in str(caught.value)


# -- pixels ----------------------------------------------------------------------------------------


def test_heic_is_read_upright(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: what is shown is 40 wide, 60 high
    picture = Image.new("RGB", (60, 40), "red")
    heif.from_pillow(picture).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=90)
    (photo,) = read_photos(find_photos(tmp_path / "a.heic")[0])
    assert photo.size in ((40, 60), (60, 40))
    with heif.open_heif(tmp_path / "a.heic").to_pillow() as shown:
        assert photo.size == shown.size


def test_all_models_see_photos_upright(tmp_path: Path) -> None:
    upright = coded(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    save(tmp_path / "upright.png", upright)
    turned, straight = (
        load("vit_tiny_patch16_224@random", images=[tmp_path / name], device="cpu", size=32)
        for name in ("turned.png", "upright.png")
    )
    assert torch.equal(turned.images, straight.images)
    assert turned.photos[0].geometry == straight.photos[0].geometry
    assert turned.photos[0].name == "turned.png"


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("input_size", [(96, 96), (96, 161), (95, 64)])
@pytest.mark.parametrize("size", [(250, 187), (131, 254), (200, 200)])
def test_timm_pixels_are_where_the_geometry_says(
    tmp_path: Path,
    mode: str,
    pct: float,
    input_size: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Independent witness: the picture's colours are its coordinates."""
    photo = save(tmp_path / "coded.png", coded(*size))
    config = {
        "input_size": (3, *input_size),
        "crop_pct": pct,
        "crop_mode": mode,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    batch, (seen,), sharp = _timm_pictures(config, find_photos(photo)[0])
    geometry = seen.geometry
    assert geometry is not None
    assert geometry.image_size == tuple(batch.shape[-2:]) == input_size
    assert geometry.original_size == size[::-1]
    assert sharp is not None
    for pixels in (batch[0].permute(1, 2, 0).numpy() * 255, sharp[0].astype(np.float64)):
        scale = pixels.shape[1] // input_size[1]
        rows, cols = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
        y, x = (((axis + 0.5) / scale - 0.5) for axis in (rows, cols))
        at_x, at_y = geometry.to_original(x, y)
        # Away from the edges, where resampling has nothing to take beyond them.
        inner = (at_x > 4) & (at_x < size[0] - 5) & (at_y > 4) & (at_y < size[1] - 5)
        for channel, expected in ((0, at_x), (1, at_y)):
            wrong = (pixels[..., channel] - expected)[inner]
            assert abs(wrong.mean()) < 0.1
            assert np.abs(wrong).max() < 1.1


def test_a_query_counts_pixels_in_the_photo(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{n}.png", coded(*size)) for n, size in enumerate([(200, 100)] * 2)]
    loaded = load("vit_tiny_patch16_224@random", images=files, device="cpu", size=96)
    layout = TokenLayout.from_model(loaded.model, loaded.images)
    geometry = loaded.photos[1].geometry
    assert geometry is not None
    token = parse_query("100,50px").index(layout, to_model=loaded.to_model(1))
    place = layout.locate(token)
    assert place.box is not None
    x0, y0, x1, y1 = geometry.box_to_original(place.box)
    assert x0 <= 100.5 <= x1
    assert y0 <= 50.5 <= y1
    with pytest.raises(InputError, match=r"query '5,50px'.*200×100 photo was cropped away"):
        parse_query("5,50px").index(layout, to_model=loaded.to_model(1))
    (line,) = crop_lines(loaded.photos)
    assert line.startswith("the model sees x 55…144 of 200, y 5…94 of 100 pixels ('0.png', '1.png'")
    sharp = loaded.sharp()
    assert sharp is not None
    assert sharp.shape == (2, 576, 576, 3)


def test_vggt_takes_frames_of_a_video(tmp_path: Path) -> None:
    photos, _ = find_photos(clip(tmp_path / "a.mp4"), every=0.5)
    loaded = load("vggt:tiny", images=photos, device="cpu", size=56)
    assert loaded.pictures.shape == (1, 4, 3, 42, 56)
    assert [photo.name for photo in loaded.photos][1] == "a.mp4 @ 0:00.5"
    assert loaded.pictures[0, :, 0, -1, -1].tolist() == pytest.approx(
        [0, 50 / 255, 100 / 255, 150 / 255], abs=0.02
    )
    assert loaded.to_model()(3, 32, 24) == (28, 21)
    assert load_images(photos, size=56).seen == loaded.photos


def test_the_visible_part_is_the_models_view(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", coded(100, 250))
    loaded = load_images(file, size=518)
    (picture,) = read_photos(find_photos(file)[0])
    part = seen_part(picture, loaded.geometries[0], 1) / 255.0
    assert np.abs(part.transpose(2, 0, 1) - loaded.images[0].numpy()).mean() < 0.01
    assert loaded.geometries[0].crop_text() == "the model sees y 75…174 of 250 pixels"


# -- what runs keep --------------------------------------------------------------------------------

SEEN = (
    SeenPhoto("a.jpg", None, ImageGeometry((480, 640), (392, 518), (392, 518), (0, 0))),
    SeenPhoto("b.mp4 @ 0:02.4", 2.4, ImageGeometry((640, 480), (686, 518), (518, 518), (-84, 0))),
    SeenPhoto("c.jpg", None, None),
)


def test_photos_of_a_run_there_and_back() -> None:
    metadata = json.loads(json.dumps(photos_metadata(SEEN)))
    assert photos_of(metadata) == SEEN
    assert metadata["photos"][1]["size"] == [480, 640]
    assert metadata["photos"][1]["box"] == pytest.approx([0, 84 * 640 / 686, 480, 602 * 640 / 686])
    assert photos_of({}) == ()


@pytest.mark.parametrize(
    "photos",
    [
        5,
        [5],
        [{}],
        [{"name": 5}],
        [{"name": "a", "time": "x"}],
        [{"name": "a", "time": float("nan")}],
        [{"name": "a", "size": [0, 5]}],
        [{"name": "a", "size": [5, 5], "resized": [5, 5], "input": [5, 5], "offset": [0.5, 0]}],
        [{"name": "a", "size": [5, 5], "resized": [5, 5], "input": [5], "offset": [0, 0]}],
        [{"name": "a", "size": [2**70, 5], "resized": [5, 5], "input": [5, 5], "offset": [0, 0]}],
    ],
)
def test_forged_photos_of_a_run_are_told(photos: Any) -> None:
    with pytest.raises(InputError, match="what the run says of its photos"):
        photos_of({"photos": photos})
