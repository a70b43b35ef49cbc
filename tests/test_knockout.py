"""Tables of knock-outs: numbers counted once more by other code, and the command around them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vggt_adapter import VGGT, load_images
from vggt_adapter.sample_scene import sample_points, sample_views
from vistvis import TokenLayout, cli
from vistvis.errors import InputError, LayoutError, SiteError
from vistvis.intervention import KnockoutTable, Rates, Truth, knockout_table
from vistvis.intervention.truth import truth_of_scene
from vistvis.views.head_table import HeadTable, head_tables

GRID = ROWS, COLS = 12, 16
COUNT, EACH = ROWS * COLS, ROWS * COLS + 5


@pytest.fixture(scope="module")
def model() -> VGGT:
    return VGGT.tiny().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return load_images(sample_views()[:2], size=COLS * 14, patch_size=14).images[None]


@pytest.fixture(scope="module")
def truth() -> Truth:
    points, cameras = sample_points(GRID)
    return truth_of_scene(points[:2], cameras[:2])


@pytest.fixture(scope="module")
def table(model: VGGT, images: Tensor, truth: Truth) -> KnockoutTable:
    return knockout_table(model, images, mode="uniform", truth=truth, max_bytes=10_000)


def by_hand(model: VGGT, images: Tensor, truth: Truth, block: str = "", head: int = 0) -> Rates:
    """Rates with one head's output replaced in front of its projection."""
    attention = {
        n: m for n, m in model.named_modules() if n.endswith("_blocks.3.attn") or n == block
    }
    values: list[Tensor] = []
    handles, seen = [], []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        values[:] = [out[..., 256 + 64 * head : 256 + 64 * (head + 1)].mean(1, keepdim=True)]

    def replaced(module: nn.Module, args: Any) -> Any:
        x = args[0].clone()
        x[..., 64 * head : 64 * (head + 1)] = values[0]
        return x

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out)

    if block:
        handles.append(attention[block].qkv.register_forward_hook(keep))
        handles.append(attention[block].proj.register_forward_pre_hook(replaced))
    last = model.aggregator.global_blocks[3]
    for part in (last.attn.q_norm, last.attn.k_norm):
        handles.append(part.register_forward_hook(note))
    positions: list[Tensor] = []
    rope = last.attn.rope
    handles.append(
        last.attn.register_forward_pre_hook(
            lambda m, args, kwargs: positions.append(kwargs["pos"]), with_kwargs=True
        )
    )
    tokens, start = model(images)
    for handle in handles:
        handle.remove()
    q, k = (rope(one, positions[0]).double() for one in seen)
    logits = (q @ k.mT / 8)[0, 0].softmax(-1)
    knocked = block == "aggregator.global_blocks.3.attn" and head == 0
    hits, found, pointed = 0, 0, 0
    final = tokens[-1][0, :, start:, 128:].double()
    for i, j in permutations(range(2), 2):
        alike = torch.cosine_similarity(final[i][:, None], final[j][None], dim=-1)
        for patch in range(COUNT):
            if not truth.visible[0, i, j, patch]:
                continue
            row, col = truth.places[0, i, j, patch].tolist()
            near = int(alike[patch].argmax())
            there = logits[i * EACH + start + patch, j * EACH + start :][:COUNT]
            there = int(there.argmax())
            found += 1
            hits += max(abs(near // COLS - row), abs(near % COLS - col)) <= 1.5
            off = max(abs(there // COLS - row), abs(there % COLS - col))
            pointed += off <= 1.5 and not knocked
    return Rates(float(hits) / found, float(pointed) / found)


def test_rates_are_those_counted_by_hand(
    model: VGGT, images: Tensor, truth: Truth, table: KnockoutTable
) -> None:
    assert table.pointing == ("global_block_3", 0)
    assert table.counted == int(truth.visible.sum())
    assert table.undisturbed == pytest.approx(by_hand(model, images, truth))
    assert table.sites == [f"{kind}_block_{n}" for n in range(4) for kind in ("frame", "global")]
    assert len(table.knockouts) == 16
    changed = 0
    for one in (table.knockouts[place] for place in (0, 3, 9, 14)):
        path = f"aggregator.{one.kind}_blocks.{one.site[-1]}.attn"
        assert one.rates == pytest.approx(by_hand(model, images, truth, path, one.head))
        changed += one.rates != table.undisturbed
    assert changed >= 2
    assert all(np.isnan(one.own) == (one.kind == "frame") for one in table.knockouts)
    assert table.knockouts[14].own == table.undisturbed.pointing
    assert table.knockouts[14].rates.pointing == 0.0
    assert table.within_frames.pointing == 0.0


def test_without_a_truth_the_undisturbed_matches_take_its_place(
    model: VGGT, images: Tensor
) -> None:
    table = knockout_table(model, images, mode="zero", sites=["global_block_0", "frame_block_0"])
    assert table.undisturbed.tokens == 1.0
    assert not table.truth
    assert table.counted == 2 * COUNT
    assert table.sites == ["frame_block_0", "global_block_0"]
    assert [one.head for one in table.knockouts] == [0, 1, 0, 1]
    assert min(one.rates.tokens for one in table.knockouts) < 1.0


def test_groups_are_knocked_out_together(
    model: VGGT, images: Tensor, truth: Truth, table: KnockoutTable
) -> None:
    def groups(own: Mapping[tuple[str, int], float]) -> Any:
        assert own[table.pointing] == table.undisturbed.pointing
        both = [("global_block_0", 0), ("global_block_0", 1)]
        return {"one": [("global_block_0", 1)], "block": both, "frames": [("frame_block_3", 0)]}

    grouped = knockout_table(model, images, truth=truth, sites="global_block_0", groups=groups)
    assert grouped.groups["one"] == grouped.knockouts[1].rates
    assert grouped.groups["frames"] == table.knockouts[12].rates
    assert grouped.groups["block"] not in [one.rates for one in grouped.knockouts]


def test_a_table_as_text(table: KnockoutTable) -> None:
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(lines) == 18
    assert [line["mode"] for line in lines[:3]] == ["undisturbed", "within_frame", "uniform"]
    assert float(lines[0]["token_change"]) == 0
    for line, one in zip(lines[2:], table.knockouts, strict=True):
        assert (line["site"], line["head"]) == (one.site, str(one.head))
        assert float(line["token_rate"]) == pytest.approx(one.rates.tokens, abs=1e-6)
        change = one.rates.pointing - table.undisturbed.pointing
        assert float(line["pointing_change"]) == pytest.approx(change, abs=1e-6)
        assert (line["own_pointing_rate"] == "") == (one.kind == "frame")
    own = table.grid(lambda one: one.own)
    assert own.shape == (8, 2)
    real = [one.own for one in table.knockouts if one.kind == "global"]
    assert own[1::2].flatten().tolist() == real
    assert own[::2].isnan().all()


def test_what_can_not_be_measured(model: VGGT, images: Tensor, truth: Truth) -> None:
    with pytest.raises(InputError, match="two views or more, got"):
        knockout_table(model, images[:, :1])
    with pytest.raises(InputError, match=r"truth has places .*got \(1, 2, 2, 192, 2\)"):
        knockout_table(model, images[..., :-14], truth=truth)
    with pytest.raises(SiteError, match="no site 'global_block_7'"):
        knockout_table(model, images, sites="global_block_7")
    with pytest.raises(LayoutError, match=r"is not known; give layout="):
        knockout_table(nn.Linear(2, 2), images)
    with pytest.raises(SiteError, match="no global blocks"):
        knockout_table(model.aggregator.patch_embed, images, layout=TokenLayout(2, GRID))


# -- the truth -----------------------------------------------------------------------------------


def test_true_places_are_those_of_the_renderer() -> None:
    pytest.importorskip("skimage")
    import rendering
    import samples

    surfaces, cameras = samples.sample_scene()
    height, width = samples.SIZE
    truth = truth_of_scene(*sample_points((12, 16)))
    down, across = height / 12, width / 16
    y, x = np.meshgrid((np.arange(12) + 0.5) * down, (np.arange(16) + 0.5) * across, indexing="ij")
    same, wrong = [], []
    for i, j in permutations(range(3), 2):
        there = rendering.correspond(surfaces, cameras[i], cameras[j], np.stack([x, y], -1))
        place = np.stack([there.xy[..., 1] / down, there.xy[..., 0] / across], -1) - 0.5
        seen = there.visible.ravel()
        off = np.abs(place.reshape(-1, 2) - truth.places[0, i, j].numpy())[seen]
        assert off.max() < 2e-3
        same.append(seen == truth.visible[0, i, j].numpy())
        wrong.append((~seen & truth.visible[0, i, j].numpy()).mean())
    # What hides is told by a patch here, by a point there; few are taken as visible that are not.
    assert np.mean(same) > 0.92
    assert np.mean(wrong) < 0.015
    assert not truth.visible[0, [0, 1, 2], [0, 1, 2]].any()


def test_points_that_no_camera_sees_so() -> None:
    points, cameras = sample_points(GRID)
    with pytest.raises(InputError, match="points of view 0 are not what a pinhole camera sees"):
        truth_of_scene(points[:, ::-1, ::2], cameras[::-1])
    with pytest.raises(InputError, match=r"points \(S, rows, cols, 3\)"):
        truth_of_scene(points[0], cameras)


# -- what is drawn, and the command --------------------------------------------------------------


def test_tables_of_heads_are_drawn_with_their_numbers() -> None:
    values = np.array([[-3.0, 2.0, np.nan], [0.0, 1.0, 0.4]])
    tables = [
        HeadTable("changes", values, "points", "{:+.1f}", changes=True),
        HeadTable("shares", 10 * np.abs(values), "per cent"),
    ]
    figure = head_tables(tables, sites=["frame_block_0", "global_block_0"], title="title")
    first, _, second, _ = figure.axes
    assert [text.get_text() for text in first.texts] == ["−3.0", "+2.0", "+0.0", "+1.0", "+0.4"]
    assert [text.get_text() for text in second.texts] == ["30", "20", "0", "10", "4"]
    low, high = first.images[0].get_clim()
    assert (low, high) == (-3.0, 3.0)
    assert np.ma.getmaskarray(first.images[0].get_array()).tolist() == np.isnan(values).tolist()
    names = [text.get_text() for text in first.get_yticklabels()]
    assert names == ["frame_block_0", "global_block_0"]
    with pytest.raises(InputError, match=r"tables are \(1 sites, heads\), all alike; got \(2, 3\)"):
        head_tables(tables, sites=["one"], title="")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = [str(path) for path in sample_views()]
    argv = ["knockout", *photos, "--size", "112", "--sites", "global_block_3", "--out"]
    assert cli.main([*argv, str(tmp_path / "out"), "--mode", "zero", "--format", "png,pdf"]) == 0
    out = capsys.readouterr().out
    assert "true ones; the head that points best is head 0 of global_block_3" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("knockout_zero.csv", "knockout_zero.pdf", "knockout_zero.png"),
    ]
    lines = (tmp_path / "out" / "knockout_zero.csv").read_text().splitlines()
    assert [line.split(",")[:4] for line in lines[3:]] == [
        ["global_block_3", "global", "0", "zero"],
        ["global_block_3", "global", "1", "zero"],
    ]
    shown = [line for line in out.splitlines() if line.startswith("global_block_3 head 0")]
    assert float(lines[3].split(",")[4]) == pytest.approx(
        float(shown[0].split()[3][:-1]) / 100, abs=6e-4
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("{photo}", "matching needs two photographs of one scene, got 1"),
        ("{photo} {photo} --model vit_tiny_patch16_224@random", "a model of several views"),
        ("{photo} {photo} --sites global_block_9", "no site 'global_block_9'"),
    ],
)
def test_wrong_knockouts(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["knockout", *words.format(photo=sample_views()[0]).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vistvis knockout: error: ")
    assert text in error
