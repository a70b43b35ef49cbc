"""Moving pictures: frames, or a query that wanders over a picture, as a GIF or an MP4."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from vistvis.errors import InputError
from vistvis.files import atomic_file
from vistvis.images import extra
from vistvis.progress import progress
from vistvis.tokens import TokenLayout
from vistvis.views.figures import NotebookFigure

if TYPE_CHECKING:
    from PIL import Image

Bytes: TypeAlias = NDArray[np.uint8]
Frame: TypeAlias = "Bytes | NotebookFigure"
Step = TypeVar("Step")

ENDINGS = (".gif", ".mp4")
# GIFs count time in hundredths of a second, and players take less than two for ten.
_FASTEST = 50.0
# Of figures that move, which are looked at on a screen.
_DPI = 100


def check_movie(path: str | os.PathLike[str], *, fps: float = 8.0) -> Path:
    """The path of a movie, judged before anything is drawn.

    InputError if its ending is neither .gif nor .mp4, an MP4 is meant and PyAV is not installed
    (extra `video`), or `fps` is not above 0 and at most 50.
    """
    target = Path(path)
    if target.suffix.lower() not in ENDINGS:
        raise InputError(f"a movie ends in {' or '.join(ENDINGS)}, got {target.name!r}")
    if not 0 < fps <= _FASTEST:
        raise InputError(f"a movie has more than 0 and at most 50 frames a second, got {fps:g}")
    if target.suffix.lower() == ".mp4":
        extra("av", "video", f"{target.name}: an MP4")
    return target


def write_movie(
    frames: Iterable[Frame],
    path: str | os.PathLike[str],
    *,
    fps: float = 8.0,
    total: int | None = None,
) -> Path:
    """Write frames as a GIF (Pillow) or MP4 (PyAV, H.264); the ending of `path` chooses.

    Parameters
    ----------
    frames
        uint8 `(H, W, 3)` or figures, all of one size; taken one by one, so that a generator may
        draw them.
    fps
        Frames a second, above 0, at most 50.
    total
        How many frames there are, for the bar that a terminal shows after two seconds.

    The file is whole or not there. An MP4 of odd sides has its last line or column doubled. Raises
    InputError as `check_movie`, and for no frames or frames of different sizes.
    """
    target = check_movie(path, fps=fps)
    target.parent.mkdir(parents=True, exist_ok=True)
    bar = progress(frames, "drawing", unit="frame", total=total, shown=None, delay=2)
    pixels = _equal(bar)
    try:
        first = next(pixels)
    except StopIteration:
        raise InputError("a movie has at least one frame, got none") from None
    every = itertools.chain([first], pixels)
    write = _write_gif if target.suffix.lower() == ".gif" else _write_mp4
    with atomic_file(target, sync=False) as file:
        write(every, file, fps)
    return target


def query_path(layout: TokenLayout, tokens: Sequence[int]) -> list[int]:
    """The patches on straight lines from each of some patches of one frame to the next.

    Neighbours in the list are neighbours in the grid, diagonals too; a single token is its own
    path. InputError for special tokens, several frames, or no token.
    """
    places = [layout.locate(token) for token in tokens]
    cells: list[tuple[int, int]] = []
    for place in places:
        if place.row is None or place.col is None or place.frame_idx != places[0].frame_idx:
            raise InputError(f"a path leads over patches of one frame, got {place}")
        if not cells:
            cells.append((place.row, place.col))
        (row, col) = cells[-1]
        down, across = place.row - row, place.col - col
        steps = max(abs(down), abs(across))
        cells += [
            (row + round(k * down / steps), col + round(k * across / steps))
            for k in range(1, steps + 1)
        ]
    if not cells:
        raise InputError("a path has at least one patch, got none")
    return [layout.index(frame=places[0].frame_idx, row=row, col=col) for row, col in cells]


def write_query_movie(
    steps: Sequence[Step],
    draw: Callable[[Step], NotebookFigure],
    path: str | os.PathLike[str],
    *,
    fps: float = 4.0,
) -> Path:
    """Write a query that moves, a figure `draw(step)` for each of its steps, as `write_movie`.

    Captions may differ in length: figures get the size of the largest, with white around them.
    Steps are tokens, or whatever `draw` takes. All are drawn before the first is written, and kept
    as PNG, about 0.2 MB each.
    """
    from PIL import Image

    check_movie(path, fps=fps)
    if not steps:
        raise InputError("a movie has at least one frame, got none")
    bar = progress(steps, "drawing", unit="frame", total=len(steps), shown=None, delay=2)
    figures = map(draw, bar)
    drawn = [figure.png(dpi=min(figure.dpi, _DPI)) for figure in figures]
    sizes = [Image.open(io.BytesIO(png)).size for png in drawn]
    size = max(width for width, _ in sizes), max(height for _, height in sizes)

    def pages() -> Iterator[Bytes]:
        for png in drawn:
            page = Image.new("RGB", size, "white")
            page.paste(Image.open(io.BytesIO(png)).convert("RGB"))
            yield np.asarray(page)

    return write_movie(pages(), path, fps=fps, total=len(drawn))


def path_of(layout: TokenLayout, token: int, *, frames: bool = False) -> list[int]:
    """How a movie's query moves: along the grid row of its patch; or, with `frames`, in time.

    That is the token at the same place of each frame. InputError for a special token in space.
    """
    place = layout.locate(token)
    if frames:
        return [layout.index(frame=f, token=place.token_in_frame) for f in range(layout.frames)]
    if place.row is None:
        raise InputError(
            f"in a movie the query moves along its grid row, and a {place.kind} token has none; "
            "name a patch, as in 0:middle"
        )
    frame, row, last = place.frame_idx, place.row, layout.grid[1] - 1
    return query_path(layout, [layout.index(frame=frame, row=row, col=col) for col in (0, last)])


def _equal(frames: Iterable[Frame]) -> Iterator[Bytes]:
    """Frames as pixels, all of the size of the first."""
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        if isinstance(frame, NotebookFigure):
            canvas: Any = frame.canvas
            canvas.draw()
            frame = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise InputError(f"a frame is uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        shape = shape or frame.shape
        if frame.shape != shape:
            raise InputError(
                f"frames of a movie have one size, got {shape[:2]} and, as frame {number}, "
                f"{frame.shape[:2]}"
            )
        yield frame


def _write_gif(frames: Iterator[Bytes], file: BinaryIO, fps: float) -> None:
    from PIL import Image

    def pictures() -> Iterator[Image.Image]:
        for frame in frames:
            yield Image.fromarray(frame).quantize(dither=Image.Dither.NONE)

    rest = pictures()
    first = next(rest)
    time = round(1000 / fps)
    first.save(file, "GIF", save_all=True, append_images=rest, duration=time, loop=0)


def _write_mp4(frames: Iterator[Bytes], file: BinaryIO, fps: float) -> None:
    import av

    with av.open(file, "w", format="mp4") as container:
        # Nearly without loss: these are drawings with thin lines and small print.
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"}
        )
        stream.pix_fmt = "yuv420p"  # which players want, and with it even sides
        for number, frame in enumerate(frames):
            height, width = frame.shape[:2]
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not number:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
