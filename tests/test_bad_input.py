"""Input that is none: bounded time and memory, and an error of ours."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vggt_adapter import load_images
from vistvis.errors import InputError
from vistvis.images import open_photo


def within(megabytes: int, work: Callable[[], None]) -> None:
    """Run `work` in a forked process that may take so much more memory, and 20 seconds."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with open("/proc/self/statm") as file:
                taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limit = taken + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, "see stderr"


def test_the_limit_of_memory_is_one() -> None:
    within(100, lambda: None)
    with pytest.raises(AssertionError):
        within(100, lambda: [np.ones(2**25), None][1])  # 256 MB


# -- photos --------------------------------------------------------------------------------------


def test_a_very_long_photo(tmp_path: Path) -> None:
    Image.new("RGB", (1, 60_000)).save(tmp_path / "high.png")
    Image.new("RGB", (60_000, 1)).save(tmp_path / "wide.png")

    def work() -> None:
        with pytest.raises(InputError, match=r"high\.png.*1×60000.*mode='pad'"):
            load_images([tmp_path / "high.png"])
        assert load_images([tmp_path / "high.png"], mode="pad").images.shape == (1, 3, 518, 518)
        assert load_images([tmp_path / "wide.png"]).images.shape == (1, 3, 14, 518)

    within(300, work)


def test_a_photo_with_more_pixels_than_are_taken(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")

    def work() -> None:
        with pytest.raises(InputError, match=r"large\.png.*MAX_IMAGE_PIXELS"):
            load_images([tmp_path / "large.png"])

    within(200, work)


@pytest.mark.parametrize("ending", ["eps", "pdf", "ppm", "ico"])
def test_only_formats_of_photos(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (32, 32)).save(path)
    path = path.rename(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg.*JPEG, PNG"):
        load_images([path])


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_the_formats_that_are_meant(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (32, 32), (255, 0, 0)).save(path)
    assert load_images([path], size=56).images[0, 0].min() > 0.9


def test_only_regular_files_are_photos(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")

    def work() -> None:
        for path in (tmp_path / "pipe.jpg", "/dev/zero"):
            with pytest.raises(InputError, match="a pipe"), open_photo(path):
                pass
        for path in ("a\0b.jpg", "\ud800.jpg", tmp_path / "nothing.jpg", tmp_path):
            with pytest.raises(InputError):
                load_images([path])

    within(100, work)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of tags that are damaged
def test_damaged_photos_are_input_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for ending in ("jpg", "png", "webp", "tif", "bmp", "gif"):
        path = tmp_path / f"a.{ending}"
        picture.save(path)
        whole = path.read_bytes()
        for number in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 200), 3):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged if number % 3 else whole[: int(rng.integers(len(whole)))])
            with contextlib.suppress(InputError):
                load_images([path], size=28)
