"""Figures of numbers: what is drawn is what dense attention in float64 gives, and can be read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from torch import Tensor

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.analysis import Summary, Table, correspondence, similarity
from vistvis.analysis.likeness import Similarity
from vistvis.errors import IndexOutOfRange, InputError
from vistvis.views.figures import NotebookFigure
from vistvis.views.matches import match_lines
from vistvis.views.numbers import frame_matrices, over_depth, similarity_map, site_head_map
from vistvis.views.panels import MISSING

LAYOUT = TokenLayout(3, (2, 4), ("camera", "register"), (6, 10))
ONE = LAYOUT.frame_layout()
KEYS = ("site", "kind", "block", "batch", "head")


def site(name: str, kind: str, block: int | None, *, seed: int, batch: int = 2) -> Attention:
    """Sharp attention of three heads."""
    layout = ONE if kind == "frame" else LAYOUT
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, 3, layout.num_tokens, 8, generator=generator).mul(2.2)
    layouts = {} if kind == "other" else {"query_layout": layout, "key_layout": layout}
    folded = kind == "frame"
    info = SiteInfo(name, kind=kind, block=block, frames_in_batch=folded, **layouts)
    return Attention(query=q, key=k, site=info)


def dense(a: Attention) -> NDArray[np.float64]:
    """By numpy, in float64."""
    q, k = (t.double().numpy() for t in (a.query, a.key))
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


SITES = {
    a.site.name: a
    for a in (
        site("frame_1", "frame", 1, seed=1),
        site("global_0", "global", 0, seed=2),
        site("frame_0", "frame", 0, seed=3),
        site("global_1", "global", 1, seed=4),
        site("odd", "other", None, seed=5),
    )
    if a.site is not None
}


@pytest.fixture(scope="module")
def summary() -> Summary:
    return vistvis.summarize(SITES, progress=False)


def entropies(*names: str) -> NDArray[np.float64]:
    """`(sites, heads)`, mean over batch and queries."""
    p = [dense(SITES[name]) for name in names]
    return np.stack([-(w * np.log(w)).sum(-1).mean((0, 2)) for w in p])


def drawn(figure: NotebookFigure) -> dict[str, NDArray[np.float64]]:
    """The matrices of a figure by their titles; NaN where a cell is grey."""
    return {
        axes.get_title(loc="left"): np.ma.filled(axes.images[0].get_array(), np.nan)
        for axes in figure.axes
        if axes.images
    }


def names_of(figure: NotebookFigure, panel: int, axis: str = "y") -> list[str]:
    axes = figure.axes[panel]
    return [t.get_text() for t in (axes.get_yticklabels if axis == "y" else axes.get_xticklabels)()]


def test_attention_is_sharp() -> None:
    assert all(0.3 < dense(a).max(-1).mean() < 0.95 for a in SITES.values())


# -- sites by heads --------------------------------------------------------------------------------


def test_sites_by_heads_are_the_dense_entropies(summary: Summary) -> None:
    figure = site_head_map(summary, "entropy")
    shown = drawn(figure)
    assert list(shown) == ["frame", "global", "other"]
    wanted = entropies("frame_1", "frame_0")
    assert shown["frame"] == pytest.approx(wanted, rel=1e-5)
    assert shown["frame"] != pytest.approx(wanted[:, ::-1], rel=1e-2)  # swapped heads are seen
    assert shown["frame"] != pytest.approx(wanted[::-1], rel=1e-2)  # and swapped sites
    assert names_of(figure, 0) == ["frame_1", "frame_0"]
    assert names_of(figure, 0, "x") == ["0", "1", "2"]
    assert names_of(figure, 1) == ["global_0", "global_1"]
    texts = [text.get_text() for text in figure.texts]
    assert "entropy" in texts
    assert any("mean over the batch" in text for text in texts)
    assert figure.axes[-1].get_ylabel() == "nats"


def test_numbers_stand_in_large_cells(summary: Summary) -> None:
    figure = site_head_map(summary, "entropy")
    written = {t.get_position(): t.get_text() for t in figure.axes[1].texts}
    wanted = entropies("global_0", "global_1")
    assert len(written) == wanted.size
    for (col, row), text in written.items():
        assert float(text) == pytest.approx(wanted[int(row), int(col)], abs=0.006)


def test_what_has_no_number_is_grey(summary: Summary) -> None:
    figure = site_head_map(summary, "distance")
    assert np.isnan(drawn(figure)["other"]).all()
    assert np.isfinite(drawn(figure)["global"]).all()
    assert any("grey: no number" in text.get_text() for text in figure.texts)
    colour = figure.axes[2].images[0].get_cmap().get_bad()[:3]
    assert colour == pytest.approx(to_rgb(MISSING))
    only = summary.where(site="odd")
    with pytest.raises(InputError, match="no site has a number in 'distance': where tokens lie"):
        site_head_map(only, "distance")
    # By the pixels too: all panels' third is this grey.
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255  # type: ignore[attr-defined]
    grey = (np.abs(pixels - to_rgb(MISSING)).max(-1) < 0.01).sum()
    box = figure.axes[2].get_window_extent()
    assert grey == pytest.approx(box.width * box.height, rel=0.05)


def test_no_part_of_a_mean_is_grey() -> None:
    """A batch item without a number does not count."""
    lines = {"site": ["a"] * 4, "kind": [""] * 4, "block": [0] * 4, "batch": [0, 0, 1, 1]}
    table = Table({**lines, "head": [0, 1, 0, 1], "x": [1.0, np.nan, 3.0, 5.0]}, keys=KEYS)
    assert drawn(site_head_map(table, "x"))[""].tolist() == [[2.0, 5.0]]


def test_changes_lie_around_zero(summary: Summary) -> None:
    other = vistvis.summarize(
        {name: Attention(query=a.query * 0.7, key=a.key, site=a.site) for name, a in SITES.items()},
        progress=False,
    )
    figure = site_head_map(summary.compare(other), "entropy_change")
    shown = drawn(figure)
    assert (shown["global"] > 0).all()  # what is less sharp has more entropy
    low, high = figure.axes[0].images[0].get_clim()
    assert -low == high == pytest.approx(max(float(m.max()) for m in shown.values()))
    image = figure.axes[0].images[0]
    assert min(image.to_rgba(0.0)[:3]) > 0.93  # white: nothing changed
    red, _, blue, _ = image.to_rgba(high)
    assert red > 2 * blue
    assert "change of entropy" in [text.get_text() for text in figure.texts]


def test_a_logarithmic_scale_has_a_colour_for_nothing(summary: Summary) -> None:
    columns = dict(summary.columns)
    columns["sinks"] = np.where(summary["head"] == 0, 0, 10 ** summary["head"])
    figure = site_head_map(Table(columns, keys=KEYS), "sinks", norm="log")
    image = figure.axes[0].images[0]
    assert not np.isnan(drawn(figure)["frame"]).any()
    assert image.norm(image.get_array())[0].tolist() == pytest.approx([0, 0.5, 1])
    assert [text.get_text() for text in figure.axes[0].texts[:3]] == ["0", "10", "100"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("entrpy", "did you mean 'entropy'"),
        ("site", "is no number of a head"),
        ("head", "is no number of a head"),
    ],
)
def test_columns_that_cannot_be_drawn(summary: Summary, column: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        site_head_map(summary, column)


def test_options_that_there_are_not(summary: Summary) -> None:
    with pytest.raises(InputError, match="norm is one of"):
        site_head_map(summary, norm="sqrt")
    with pytest.raises(InputError, match="no colour map"):
        site_head_map(summary, cmap="nothing-like-it")
    with pytest.raises(InputError, match="a width is"):
        site_head_map(summary, width=1)


# -- frames ----------------------------------------------------------------------------------------


def masses(p: NDArray[np.float64], query_part: str, key_parts: str) -> NDArray[np.float64]:
    """`(h, S, S)` of one batch item's `(h, N, N)`, with loops."""
    size = LAYOUT.tokens_per_frame
    parts = {"special": range(LAYOUT.num_special), "patch": range(LAYOUT.num_special, size)}
    parts["all"] = range(size)
    out = np.zeros((len(p), LAYOUT.frames, LAYOUT.frames))
    for q in range(LAYOUT.frames):
        for k in range(LAYOUT.frames):
            for token in parts[query_part]:
                for key in parts[key_parts]:
                    out[:, q, k] += p[:, q * size + token, k * size + key]
    return out / len(parts[query_part])


@pytest.mark.parametrize("parts", [("patch", "patch"), ("special", "patch"), ("patch", "all")])
@pytest.mark.parametrize("batch", [0, 1])
def test_matrices_of_frames_are_the_dense_masses(
    summary: Summary, parts: tuple[str, str], batch: int
) -> None:
    figure = frame_matrices(
        summary, site="global_1", batch=batch, query_part=parts[0], key_part=parts[1]
    )
    wanted = masses(dense(SITES["global_1"])[batch], *parts)
    shown = drawn(figure)
    assert list(shown) == ["head 0", "head 1", "head 2", "mean over heads"]
    for head in range(3):
        assert shown[f"head {head}"] == pytest.approx(wanted[head], rel=1e-5)
        assert shown[f"head {head}"] != pytest.approx(wanted[head].T, rel=1e-3)
    assert shown["mean over heads"] == pytest.approx(wanted.mean(0), rel=1e-5)
    if parts[1] == "all":
        assert shown["head 1"].sum(1) == pytest.approx(1, rel=1e-5)


def test_chosen_heads_of_frames(summary: Summary) -> None:
    figure = frame_matrices(summary, site="global_1", heads=[2, "mean"], title="mine")
    assert list(drawn(figure)) == ["head 2", "mean over heads"]
    assert figure.texts[0].get_text() == "mine"
    assert figure.axes[0].get_ylabel() == "frame of the query"
    assert figure.axes[0].get_xlabel() == "frame of the key"


def test_frames_that_cannot_be_drawn(summary: Summary) -> None:
    with pytest.raises(InputError, match=r"no masses of frames for site 'globl_1'.*did you mean"):
        frame_matrices(summary, site="globl_1")
    with pytest.raises(InputError, match="no masses of frames for site 'odd'"):
        frame_matrices(summary, site="odd")
    with pytest.raises(InputError, match="batch 2"):
        frame_matrices(summary, site="global_1", batch=2)
    with pytest.raises(IndexOutOfRange, match=r"head 3 is outside 0…2"):
        frame_matrices(summary, site="global_1", heads=3)
    with pytest.raises(InputError, match='query_part is "patch" or "special"'):
        frame_matrices(summary, site="global_1", query_part="all")


# -- depth -----------------------------------------------------------------------------------------


def test_curves_are_means_and_bands_of_the_dense_entropies(summary: Summary) -> None:
    figure = over_depth(summary, ["entropy", "distance"])
    entropy, distance = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["entropy", "distance"]
    frame, everywhere, odd = entropy.lines
    wanted = entropies("frame_0", "frame_1")  # by their blocks, not as they came
    assert frame.get_xdata().tolist() == [0, 1]
    assert frame.get_ydata() == pytest.approx(wanted.mean(1), rel=1e-6)
    assert everywhere.get_ydata() == pytest.approx(entropies("global_0", "global_1").mean(1))
    assert odd.get_xdata().tolist() == [0]
    (band, *_) = [c for c in entropy.collections if isinstance(c, PolyCollection)]
    corners = band.get_paths()[0].vertices
    for block in range(2):
        ends = corners[corners[:, 0] == block, 1]
        assert ends.min() == pytest.approx(wanted[block].min())
        assert ends.max() == pytest.approx(wanted[block].max())
    assert np.isnan(distance.lines[2].get_ydata()).all()
    assert entropy.get_xlabel() == "block, or order of sites"  # of "odd"
    assert (entropy.get_ylabel(), distance.get_ylabel()) == ("nats", "patches")
    words = [text.get_text() for text in figure.texts]
    assert {"— frame", "— global", "— other"} <= set(words)


def test_sites_without_blocks_of_their_own_stand_in_their_order() -> None:
    lines = {"site": ["b", "a", "c"], "kind": ["self"] * 3, "batch": [0] * 3, "head": [0] * 3}
    for blocks in ([3, 3, 1], [0, -1, 1]):
        table = Table({**lines, "block": blocks, "x": [1.0, 2.0, 3.0]}, keys=KEYS)
        (axes,) = over_depth(table, "x").axes
        (curve,) = axes.lines
        assert axes.get_xlabel() == "block, or order of sites"
        assert axes.get_ylim() == pytest.approx((0, 3.18))  # nothing is cut off
        assert curve.get_xdata().tolist() == [0, 1, 2]
        assert curve.get_ydata().tolist() == [1, 2, 3]


def test_nothing_to_draw_over_depth(summary: Summary) -> None:
    with pytest.raises(InputError, match="no column to draw"):
        over_depth(summary, [])
    with pytest.raises(InputError, match="no column 'depth'"):
        over_depth(summary, "depth")


# -- likeness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["heads", "queries"])
def test_likeness_is_drawn_in_its_order(of: Any) -> None:
    result = similarity(SITES["global_1"], of=of, samples=12)
    figure = similarity_map(result)
    (shown,) = drawn(figure).values()
    matrix, order = result.matrix.numpy(), result.order.numpy()
    for row, i in enumerate(order):
        for col, j in enumerate(order):
            assert shown[row, col] == pytest.approx(matrix[i, j], abs=1e-6)
    assert names_of(figure, 0) == [result.labels[i] for i in order]
    (plain,) = drawn(similarity_map(result, ordered=False)).values()
    assert plain == pytest.approx(matrix, abs=1e-6)


# -- matches ---------------------------------------------------------------------------------------


def pointing(permutation: Tensor, sure: Tensor) -> Attention:
    """Patches of frame 0 give `sure` to one patch of frame 1 each, which gives back."""
    layout = TokenLayout(2, LAYOUT.grid, (), LAYOUT.patch_size)
    count = layout.num_patches
    weights = ((1 - sure) / (2 * count))[:, None].expand(count, 2 * count).clone()
    weights[torch.arange(count), count + permutation] += sure
    back = torch.full((count, 2 * count), 0.4 / (2 * count))
    back[permutation, torch.arange(count)] += 0.6
    both = torch.cat([weights, back])[None, None].expand(1, 2, -1, -1).clone()
    both[:, 1] = torch.full_like(both[:, 1], 1 / (2 * count))  # head 1 points nowhere
    return Attention.from_weights(both, site=SiteInfo("g", query_layout=layout, key_layout=layout))


ORDER = torch.tensor([3, 1, 0, 7, 2, 6, 5, 4])
SURE = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.3, 0.8, 0.4, 0.6])
PICTURES = torch.linspace(0, 1, 2 * 3 * 12 * 40).view(2, 3, 12, 40)


def lines_of(figure: NotebookFigure) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of the lines in pixels of the two pictures, `(n, 2, 2)`, and their confidence."""
    axes = figure.axes[0]
    (drawn,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    ends = np.array(drawn.get_segments())
    _, second = axes.images
    left, _, _, above = second.get_extent()
    ends[:, 1] -= (left, above)
    return ends, np.asarray(drawn.get_array())


def test_lines_end_where_the_matches_lie() -> None:
    a = pointing(ORDER, SURE)
    layout = a.site.query_layout if a.site else None
    assert layout is not None
    found = correspondence(a, 0, 1)
    ends, confidence = lines_of(match_lines(*PICTURES, found, layout))
    assert len(ends) == 8
    assert (np.diff(confidence) > 0).all()  # the most confident above the others
    cols = LAYOUT.grid[1]
    for (start, end), patch in zip(ends, SURE.argsort().tolist(), strict=True):
        (row, col), (to_row, to_col) = divmod(patch, cols), divmod(int(ORDER[patch]), cols)
        assert start == pytest.approx((10 * col + 5, 6 * row + 3))
        assert end == pytest.approx((10 * to_col + 5, 6 * to_row + 3))
    # Weight on the match, of that on all patches of the frame.
    wanted = (SURE + (1 - SURE) / 16) / (SURE + (1 - SURE) / 2)
    assert confidence == pytest.approx(wanted.sort().values.numpy(), rel=1e-5)


def test_the_most_confident_that_point_back() -> None:
    a = pointing(ORDER, SURE)
    layout = a.site.query_layout if a.site else None
    assert layout is not None
    found = correspondence(a, 0, 1)
    _, three = lines_of(match_lines(*PICTURES, found, layout, most=3))
    assert three == pytest.approx(np.sort(found.confidence[0, 0].numpy())[-3:])
    lost = found._replace(cycle=torch.where(SURE > 0.55, 3.0, 0.0).expand(1, 2, 8).double())
    figure = match_lines(*PICTURES, lost, layout, cycle=1.0, names=["left", "right"])
    assert lines_of(figure)[1].max() < three.min()
    words = [text.get_text() for text in (*figure.texts, *figure.axes[0].texts)]
    assert "4 of 8 patches, the most confident that point back within 1 patch" in words
    assert {"left", "right"} <= set(words)
    nothing = found._replace(cycle=torch.full((1, 2, 8), torch.nan))
    with pytest.raises(InputError, match="no correspondence is left to draw of 8: head 1"):
        match_lines(*PICTURES, nothing, layout, cycle=1.0, head=1)


def test_matches_that_cannot_be_drawn() -> None:
    found = correspondence(pointing(ORDER, SURE), 0, 1)
    layout = TokenLayout(2, (2, 4), (), (6, 10))
    with pytest.raises(IndexOutOfRange, match=r"head 2 is outside 0…1"):
        match_lines(*PICTURES, found, layout, head=2)
    with pytest.raises(IndexOutOfRange, match=r"batch -1 is outside 0…0"):
        match_lines(*PICTURES, found, layout, batch=-1)
    with pytest.raises(InputError, match="8 patches, the layout 6"):
        match_lines(*PICTURES, found, TokenLayout(2, (2, 3)))
    with pytest.raises(InputError, match="a picture is"):
        match_lines(PICTURES, PICTURES[1], found, layout)


# -- how they look ---------------------------------------------------------------------------------


def synthetic(sites: int, heads: int, frames: int) -> Summary:
    """Numbers of as many sites as a large model has."""
    rng = np.random.default_rng(0)
    kinds = ("frame", "global")
    numbers = [(kind, i, h) for i in range(sites) for kind in kinds for h in range(heads)]
    lines = [(f"{kind}_block_{i}", kind, i, 0, h) for kind, i, h in numbers]
    columns = dict(zip(KEYS, map(np.array, zip(*lines, strict=True)), strict=True))
    made = Summary({**columns, "entropy": rng.random(len(lines))}, keys=KEYS)
    pairs = np.indices((heads, frames, frames)).reshape(3, -1)
    one = {"site": "global_block_0", "batch": 0, "query_part": "patch", "key_part": "patch"}
    frames_of = dict(zip(("head", "query_frame", "key_frame"), pairs, strict=True))
    same = {name: np.full(len(pairs[0]), value) for name, value in one.items()}
    made.frames = Table({**same, **frames_of, "mass": rng.random(len(pairs[0]))})
    return made


def alike(count: int) -> Similarity:
    """As many heads, each like itself alone."""
    order = torch.arange(count)
    names = tuple(f"blocks.{n}.attn head 0" for n in range(count))
    return Similarity(torch.eye(count).double(), names, order, order[:9], "heads", "cosine")


@pytest.mark.parametrize("width", [None, "column"])
@pytest.mark.parametrize("sizes", [(24, 16, 8), (2, 4, 4), (1, 1, 2)])
def test_every_name_can_be_read(sizes: tuple[int, int, int], width: str | None) -> None:
    """No text leaves the figure, and no name of a row or column touches the next."""
    given = synthetic(*sizes)
    for figure in (
        site_head_map(given, width=width),
        frame_matrices(given, site="global_block_0", width=width),
        over_depth(given, "entropy", width=width),
        similarity_map(alike(12 * sizes[0]), width=width),
    ):
        figure.draw_without_rendering()
        inches = {None: figure.get_figwidth(), "column": 3.35}[width]
        assert figure.get_figwidth() == pytest.approx(inches)
        across, down = figure.bbox.size
        for axes in figure.axes:
            for labels, side in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
                boxes = [t.get_window_extent().get_points()[:, side] for t in labels]
                shown = sorted(tuple(box) for box in boxes if box[1] - box[0] > 1)
                for (_, end), (start, _) in pairwise(shown):
                    assert start > end - 1
            box = axes.get_tightbbox()
            assert box is not None
            assert box.x0 > -1
            assert box.y0 > -1
            assert box.x1 < across + 1
            assert box.y1 < down + 1
        for text in figure.texts:
            assert text.get_window_extent().x1 < across + 1
