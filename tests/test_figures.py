"""Figures of one query: what is in them, nothing clipped, nothing that pyplot knows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.image import AxesImage
from matplotlib.patches import Circle, Rectangle
from torch import Tensor

from vggt_adapter.figures import visualize_attention_on_image
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.errors import InputError
from vistvis.views.painting import NORMS

ROOT = Path(__file__).parents[1]
KINDS = ("camera", *("register",) * 4)


def make(kind: str, frames: int, grid: tuple[int, int], *, rope: bool | None = None) -> Attention:
    layout = TokenLayout(1 if kind == "frame" else frames, grid, KINDS)
    batch = frames if kind == "frame" else 1
    generator = torch.Generator().manual_seed(4)
    query = 3 * torch.randn(batch, 2, layout.num_tokens, 8, generator=generator)
    key = torch.randn(batch, 2, layout.num_tokens, 8, generator=generator)
    site = SiteInfo(
        f"{kind}_block_7",
        kind,
        block=7,
        query_layout=layout,
        key_layout=layout,
        frames_in_batch=kind == "frame",
        rope=rope,
    )
    return Attention(query=query, key=key, site=site)


def pictures(frames: int, grid: tuple[int, int], *, black: bool = False) -> Tensor:
    images = torch.rand(frames, 3, grid[0] * 14, grid[1] * 14)
    return images * (not black)


def draw(kind: str, frames: int, grid: tuple[int, int], token: int, **named: Any) -> Any:
    black = named.pop("black", False)
    return visualize_attention_on_image(
        make(kind, frames, grid), pictures(frames, grid, black=black), token, **named
    )


def panels(figure: Any) -> list[Any]:
    """Axes that show a picture, in reading order of their making; the colour bar's is left out."""
    return [axes for axes in figure.axes if axes.images]


def outlines(axes: Any) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_the_global_figure() -> None:
    grid, frames = (3, 5), 3
    per_frame = 5 + 15
    figure = draw("global", frames, grid, 1 * per_frame + 5 + 7)
    drawn = panels(figure)
    assert len(drawn) == 2 * frames
    title, query, *_ = texts(figure)
    assert title == "Global attention · block 7 · head 0"
    assert texts(figure)[3].startswith("□ query · ○ strongest patch of a frame")
    assert query == "query: token 12 of frame 1 (absolute 32), row 1, col 2"
    above, below = drawn[::2], drawn[1::2]
    for frame in range(frames):
        assert f"frame {frame}" in above[frame].get_title(loc="left")
        top, bottom = above[frame].get_position(), below[frame].get_position()
        assert bottom.y1 < top.y0
        assert (bottom.x0, bottom.x1) == pytest.approx((top.x0, top.x1))
        # The query is outlined in its frame, in the picture and in the heatmap, and nowhere else.
        for axes in (above[frame], below[frame]):
            assert bool(outlines(axes)) == (frame == 1)
    for outline in outlines(above[1]):
        (x0, y0), (x1, y1) = outline.get_bbox().get_points()
        # Just the patch: pixel 0 reaches from -0.5 to 0.5.
        assert (x0, y0, x1, y1) == pytest.approx((27.5, 13.5, 41.5, 27.5))
    assert len(figure.axes) == len(drawn) + 1  # one colour bar


def test_all_frames_share_one_scale() -> None:
    """A weight has the colour that the bar gives it, in whatever frame it lies."""
    figure = draw("global", 3, (3, 5), 12, black=True, norm="linear")
    weights = make("global", 3, (3, 5))[0, 0, 12].reshape(3, 20)[:, 5:].reshape(3, 3, 5).numpy()
    bar = figure.axes[-1]
    low, high = bar.get_ylim()
    assert (low, high) == pytest.approx((0, weights.max()))
    resized = F.interpolate(torch.from_numpy(weights)[:, None], (42, 70), mode="bilinear")[:, 0]
    expected = colormaps["inferno"]((resized / weights.max()).numpy())[..., :3]
    found = np.stack([axes.images[0].get_array() for axes in panels(figure)[1::2]])
    np.testing.assert_allclose(found / 255, expected, atol=0.03)
    own = [colormaps["inferno"]((one / one.max()).numpy())[..., :3] for one in resized]
    assert np.abs(found / 255 - np.stack(own)).max() > 0.3  # a scale for each frame would be seen


@pytest.mark.parametrize("frame_idx", [None, 0, 2])
def test_the_frame_figure(frame_idx: int | None) -> None:
    grid = (4, 3)
    images = pictures(3, grid)
    figure = visualize_attention_on_image(
        make("frame", 3, grid), images, 5 + 4, head_idx="mean", frame_idx=frame_idx
    )
    frame = frame_idx or 0
    left, right = panels(figure)
    assert left.get_position().x1 < right.get_position().x0
    shown = left.images[0].get_array() / 255
    np.testing.assert_allclose(shown, images[frame].permute(1, 2, 0), atol=0.51 / 255)
    assert left.get_title(loc="left") == f"frame {frame}"
    title, query, *_ = texts(figure)
    assert title == "Frame attention · block 7 · mean of 2 heads"
    assert query == f"query: token 9 of frame {frame} (absolute {frame * 17 + 9}), row 1, col 1"
    assert outlines(left)
    assert outlines(right)


def test_the_strongest_patch_is_ringed() -> None:
    figure = draw("global", 2, (3, 5), 12)
    weights = make("global", 2, (3, 5))[0, 0, 12].reshape(2, 20)[:, 5:]
    for number, axes in enumerate(panels(figure)):
        patch = int(weights[number // 2].argmax())
        row, col = divmod(patch, 5)
        rings = [ring for ring in axes.patches if isinstance(ring, Circle)]
        assert rings
        for ring in rings:
            assert ring.center == pytest.approx((col * 14 + 6.5, row * 14 + 6.5))


@pytest.mark.parametrize(
    ("kind", "frames"),
    [("frame", 1), ("global", 1), ("global", 2), ("global", 3), ("global", 5), ("global", 8)],
)
@pytest.mark.parametrize("grid", [(3, 5), (9, 3)])
@pytest.mark.parametrize("width", [None, "column", 6.9])
def test_nothing_is_clipped_and_pictures_keep_their_shape(
    kind: str, frames: int, grid: tuple[int, int], width: Any
) -> None:
    norm = NORMS[frames % 4]
    names = [f"a/long/name of $ photo {number:03} of ${{x.jpeg" for number in range(frames)]
    figure = draw(kind, frames, grid, 9, norm=norm, width=width, names=names, untrained=True)
    figure.canvas.draw()
    if width is not None:
        assert figure.get_size_inches()[0] == {"column": 3.35}.get(width, width)
        assert figure.get_size_inches()[1] < 11
    width, height = figure.canvas.get_width_height()
    boxes = [text.get_window_extent() for text in figure.texts]
    for axes in figure.axes:
        boxes.append(axes.get_tightbbox())
        if not axes.images or not isinstance(axes.images[0], AxesImage):
            continue
        box = axes.get_window_extent()
        assert box.height / box.width == pytest.approx(grid[0] / grid[1], rel=0.02)
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    # Panels, their titles and notes keep apart; so does the title of the whole.
    shown = [axes.get_tightbbox() for axes in panels(figure)]
    for number, one in enumerate(shown):
        assert not any(one.overlaps(box) for box in boxes[: len(figure.texts)])
        assert not any(one.overlaps(other) for other in shown[:number])


def test_scales() -> None:
    bars = {norm: draw("global", 2, (6, 8), 12, norm=norm).axes[-1] for norm in NORMS}
    weights = make("global", 2, (6, 8))[0, 0, 12].reshape(2, 53)[:, 5:].numpy()
    assert bars["linear"].get_ylim()[1] == pytest.approx(weights.max())
    assert bars["log"].get_yscale() == "log"
    assert bars["percentile"].get_ylim()[1] < weights.max()
    # Token 12 is patch 7: row 0, col 7.
    others = weights.reshape(2, 6, 8).copy()
    others[0, :2, 6:] = 0
    assert bars["auto"].get_ylim()[1] == pytest.approx(others.max())
    with pytest.raises(InputError, match="'linear', 'log', 'percentile'"):
        draw("global", 2, (6, 8), 12, norm="sqrt")


def spiked(*, rest: float) -> Tensor:
    """Global weights over two frames of 3×5 patches: token 12 looks at itself and `rest`."""
    row = torch.full((40,), 1e-5)
    row[12], row[25 + 8] = 0.8, rest
    row[0] += 1 - row.sum()
    return row.expand(1, 1, 40, 40)


def test_the_default_scale_shows_the_other_frames_and_says_so() -> None:
    figure = visualize_attention_on_image(spiked(rest=0.1), torch.zeros(2, 3, 42, 70), 12)
    own, other = (panels(figure)[number].images[0].get_array() for number in (1, 3))
    assert (own[20, 34] == 255).all()  # its own patch lies above the scale: white
    assert other[20, 48].max() > 200  # and frame 1 is bright
    assert figure.axes[-1].get_ylim() == pytest.approx((0, 0.1))
    note = texts(figure)[2].replace("\n", " ")
    assert note.endswith(
        "; scale: to the largest weight outside the query's patch and its neighbours "
        "(white: above it, up to 0.8)"
    )
    linear = visualize_attention_on_image(
        spiked(rest=0.1), torch.zeros(2, 3, 42, 70), 12, norm="linear"
    )
    assert panels(linear)[3].images[0].get_array().max() < 100
    assert texts(linear)[2].endswith("; scale: to the largest weight")


@pytest.mark.parametrize(("rest", "weak"), [(0.11, True), (0.14, False)])
def test_a_weak_match_is_drawn_and_called_so(rest: float, weak: bool) -> None:
    """Five times the uniform share of 40 keys is 0.125."""
    figure = visualize_attention_on_image(spiked(rest=rest), pictures(2, (3, 5)), 12)
    for axes in panels(figure)[2:]:
        rings = [patch for patch in axes.patches if isinstance(patch, Circle)]
        assert rings
        assert all((ring.get_linestyle() != "solid") == weak for ring in rings)
        assert all(ring.get_clip_on() for ring in rings)
    note = panels(figure)[3].get_xlabel()
    assert note == f"{100 * (rest + 14e-5):.1f} % of the weight" + " · weak" * weak
    assert texts(figure)[3].endswith("(dashed: weak)") == weak


def test_maxima_over_heads_are_not_called_shares() -> None:
    figure = draw("global", 2, (3, 5), 12, head_idx="max")
    said = [*texts(figure), *(axes.get_xlabel() for axes in panels(figure))]
    assert not any("%" in text for text in said)
    assert panels(figure)[1].get_xlabel().startswith("largest weight 0.")


def test_names_of_photographs_and_untrained_weights() -> None:
    names = ["a.jpg", "b $x$.jpg", "c.jpg"]
    figure = draw("global", 3, (9, 10), 12, names=names, untrained=True)
    assert [axes.get_xlabel() for axes in panels(figure)[::2]] == names
    assert texts(figure)[0].endswith(" · untrained weights")
    figure.png()
    with pytest.raises(InputError, match="3 pictures need as many names, got 2"):
        draw("global", 3, (3, 5), 12, names=names[:2])
    for wrong, said in (
        ({"width": "wide"}, "'column', 'double'"),
        ({"cmap": "infernal"}, "did you mean 'inferno'"),
        ({"alpha": 2}, "alpha"),
    ):
        with pytest.raises(InputError, match=said):
            draw("global", 3, (3, 5), 12, **wrong)


def test_one_frame_has_its_heatmap_beside_it() -> None:
    picture, heat = panels(draw("global", 1, (3, 5), 9))
    assert picture.get_position().x1 < heat.get_position().x0
    assert picture.get_position().y0 == heat.get_position().y0


def test_a_special_token_outlines_its_frame() -> None:
    figure = draw("global", 2, (3, 5), 20, allow_special=True)
    assert texts(figure)[1] == "query: token 0 of frame 1 (absolute 20), a camera token"
    assert not outlines(panels(figure)[0])
    for outline in outlines(panels(figure)[2]):
        np.testing.assert_allclose(outline.get_bbox().get_points(), [[-0.5, -0.5], [69.5, 41.5]])


def test_what_the_title_says() -> None:
    attention = make("global", 2, (3, 5), rope=False)
    images = pictures(2, (3, 5))
    title = texts(visualize_attention_on_image(attention, images, 9))[0]
    assert title == "Global attention · block 7 · head 0 · taken before RoPE"
    changed = attention.with_site(replace(attention.site, rope=None, intervened="head 0 zero"))
    title = texts(visualize_attention_on_image(changed, images, 9))[0]
    assert title == "Global attention · block 7 · head 0 · intervened: head 0 zero"
    plain = visualize_attention_on_image(attention.dense(), images, 9, block_idx=21)
    assert texts(plain)[0] == "Global attention · block 21 · head 0"
    unnamed = visualize_attention_on_image(attention.dense(), images, 9, "max")
    assert texts(unnamed)[0] == "Global attention · max of 2 heads"
    over = visualize_attention_on_image(attention, images, 9, renormalize=True)
    assert texts(over)[2].startswith("weights over patches only")


def test_saving(tmp_path: Path) -> None:
    for name in ("deep/er/figure.png", "figure.pdf"):
        target = tmp_path / name
        draw("frame", 1, (3, 5), 9, save_path=target)
        assert target.stat().st_size > 1000
        assert list(target.parent.glob(".*")) == []
    with pytest.raises(ValueError, match="nonsense"):
        draw("frame", 1, (3, 5), 9, save_path=tmp_path / "figure.nonsense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "figure.pdf"]


def test_pyplot_does_not_know_the_figures() -> None:
    """No leak in loops; and they show in notebooks all the same."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_figures import draw\n"
        "figure = draw('global', 2, (3, 5), 9)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert figure._repr_png_().startswith(b'\\x89PNG')\n"
        "import matplotlib.pyplot as plt\n"
        "assert plt.get_fignums() == []"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
