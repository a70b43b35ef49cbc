"""Recipes equal the authors' own code on the same queries and keys, and a dense computation.

The authors' numbers are in data/recipes_golden.safetensors, with repository and commit of each in
the file's metadata; docs/recipes.md says how they were made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import dense_of
from safetensors import safe_open
from torch import Tensor

from vggt_adapter import VGGT, AttentionExtractor
from vistvis import Attention, SiteInfo, TokenLayout, open_run, save_run
from vistvis.attention.order import TokenOrder
from vistvis.errors import IndexOutOfRange, InputError, LayoutError, SiteError
from vistvis.hooks.capture import Capture
from vistvis.recipes import fast_vggt, robust_vggt, vggt_slam2
from vistvis.recipes.sites import blocks, take, take_all

GOLDEN = Path(__file__).parent / "data" / "recipes_golden.safetensors"
SPECIAL = ("camera", *["register"] * 4)
LAYOUT = TokenLayout(3, (4, 5), SPECIAL, 14)
P = LAYOUT.tokens_per_frame  # 25


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        assert file.metadata()["robust_vggt"].startswith(
            "github.com/cvlab-kaist/RobustVGGT @ 8fd46b"
        )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def attention(
    golden: dict[str, Tensor], *, frames: int = 3, block: int = 23, rope: bool | None = None
) -> Attention:
    layout = TokenLayout(frames, (4, 5), SPECIAL, 14)
    name = f"global_block_{block}"
    site = SiteInfo(name, "global", block=block, query_layout=layout, key_layout=layout, rope=rope)
    q, k = (golden[n][:, :, : frames * P] for n in "qk")
    return Attention(query=q, key=k, site=site)


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=atol)


# -- RobustVGGT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [1, 3000, None])
def test_view_scores_are_the_authors(golden: dict[str, Tensor], max_bytes: int | None) -> None:
    result = robust_vggt.view_scores(
        {"global_block_23": attention(golden, rope=False)},
        features=golden["features"],
        max_bytes=max_bytes,
    )
    close(result.scores[0], golden["robust_score"])
    close(result.attention[0], golden["robust_attention"])
    assert result.similarity is not None
    close(result.similarity[0], golden["robust_similarity"])
    assert result.outliers[0].tolist() == golden["robust_rejected"].bool().tolist()
    assert result.outliers[0].tolist() == [False, True, False]
    assert "before RoPE, so not the model's own softmax" in result.label
    assert "paper takes" not in result.label


def test_view_maps_are_means_of_dense_weights(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    p = dense_of(a)
    assert p.max() > 0.8
    result = robust_vggt.view_scores(a)
    mean = p[:, :, 5:P].mean((1, 2))
    close(result.maps, LAYOUT.maps(mean), 1e-7)
    assert result.similarity is None
    assert torch.equal(result.scores, result.attention)
    assert "attention alone" in result.label
    assert "as in the kernel" in result.label
    # Another reference is another question.
    other = robust_vggt.view_scores(a, reference=2)
    close(other.maps, LAYOUT.maps(p[:, :, 2 * P + 5 :].mean((1, 2))), 1e-7)
    assert not other.outliers[0, 2]


def test_view_scores_tell_shortcuts_apart(golden: dict[str, Tensor]) -> None:
    """Softmax over the queries, over patches alone, and features of another frame go wrong."""
    a = attention(golden)
    maps = robust_vggt.view_scores(a).maps
    logits = a.query.double() @ a.key.double().mT * a.scale
    for wrong in (logits.softmax(-2)[:, :, 5:P], _over_patches(logits)[:, :, 5:P]):
        assert (maps - LAYOUT.maps(wrong.mean((1, 2)))).abs().max() > 1e-3
    rolled = robust_vggt.view_scores(a, features=golden["features"].roll(1, 0))
    assert (rolled.scores[0] - golden["robust_score"]).abs().max() > 0.1


def _over_patches(logits: Tensor) -> Tensor:
    special = torch.arange(LAYOUT.num_tokens) % P < 5
    return logits.masked_fill(special, -torch.inf).softmax(-1)


def test_features_of_all_tokens_or_of_patches(golden: dict[str, Tensor]) -> None:
    a, features = attention(golden), golden["features"]
    whole = robust_vggt.view_scores(a, features=features).scores
    patches = robust_vggt.view_scores(a, features=features[None, :, 5:]).scores
    assert torch.equal(whole, patches)
    with pytest.raises(InputError, match=r"of 1 scenes of 3 views, got \(2, 25, 8\)"):
        robust_vggt.view_scores(a, features=features[:2])
    with pytest.raises(InputError, match="20 patches, or of 25 tokens of a frame, got 24"):
        robust_vggt.view_scores(a, features=features[:, 1:])


# -- VGGT-SLAM 2.0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [1, 3000, None])
def test_match_ratio_is_the_authors(golden: dict[str, Tensor], max_bytes: int | None) -> None:
    captured = {"global_block_20": attention(golden, frames=2, block=20)}
    result = vggt_slam2.match_ratio(captured, max_bytes=max_bytes)
    close(result.ratio[0, 1], golden["slam_ratio"])
    back = vggt_slam2.match_ratio(captured, frame=1, max_bytes=max_bytes)
    close(back.ratio[0, 0], golden["slam_ratio_back"])
    assert "not the model's softmax" in result.label
    assert "paper takes" not in result.label


def test_match_ratio_of_tokens_equals_dense(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    logits = a.query.double() @ a.key.double().mT * a.scale
    p = logits.softmax(-2).mean(1)[0]  # (queries, keys): each key's queries sum to 1
    result = vggt_slam2.match_ratio(a, frame=1)
    own = p[P : 2 * P, P + 5 : 2 * P].amax(0) + 1e-8
    ratio = (p[:, P + 5 : 2 * P] / own).amax(1)
    close(result.tokens[0].reshape(-1), ratio)
    for view in range(3):
        values = ratio[view * P : (view + 1) * P].numpy()
        top = values[values >= np.percentile(values, 75)]
        assert result.ratio[0, view].item() == pytest.approx(top.mean(), rel=1e-5)
    assert result.tokens[0, 1].max() <= 1
    assert result.ratio[0, 0] > 1.2
    # The model's own softmax, over keys, gives another number.
    keys = logits.softmax(-1).mean(1)[0]
    wrong = (keys[:, P + 5 : 2 * P] / (keys[P : 2 * P, P + 5 : 2 * P].amax(0) + 1e-8)).amax(1)
    assert (result.tokens[0].reshape(-1) - wrong).abs().max() > 0.1


def test_match_ratio_of_a_copied_view_is_that_of_itself(golden: dict[str, Tensor]) -> None:
    a = attention(golden, frames=2)
    twice = Attention(
        query=a.query[:, :, :P].repeat(1, 1, 2, 1),
        key=a.key[:, :, :P].repeat(1, 1, 2, 1),
        site=a.site,
    )
    result = vggt_slam2.match_ratio(twice)
    close(result.tokens[0, 0], result.tokens[0, 1])
    assert result.tokens.max().item() == pytest.approx(1.0, abs=1e-6)


# -- FastVGGT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [0, 20])
def test_maps_are_the_authors(golden: dict[str, Tensor], token: int) -> None:
    captured = {"global_block_0": attention(golden, block=0)}
    result = fast_vggt.maps(captured, token)
    close(result.maps[0], golden[f"fast_grid_token{token}"])
    large = fast_vggt.maps(captured, token, size=(56, 70)).maps[0]
    close(large[:, 3::7, 3::7], golden[f"fast_pixels_token{token}"])
    assert result.place.token == token
    assert "not attention" in result.label
    # With the scale of the softmax the map is the same, with the softmax it is not.
    weights = LAYOUT.maps(dense_of(attention(golden))[0, :, token].mean(0))
    scaled = (weights - weights.amin((1, 2), True)) / (
        weights.amax((1, 2), True) - weights.amin((1, 2), True)
    )
    assert (result.maps[0] - scaled).abs().max() > 0.1


def test_maps_by_words_and_of_grouped_heads(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    assert fast_vggt.maps(a, "1:r2,c3").place.token == P + 5 + 13
    key = a.key[:, ::2]
    grouped = Attention(query=a.query, key=key, site=a.site)
    expected = torch.einsum("hd,hnd->hn", a.query[0, :, 7], key[0].repeat_interleave(2, 0)).mean(0)
    close(fast_vggt.maps(grouped, 7).products[0], LAYOUT.maps(expected))
    with pytest.raises(IndexOutOfRange, match="75"):
        fast_vggt.maps(a, 75)


def test_a_view_that_is_all_alike_is_zero() -> None:
    layout = TokenLayout(1, (2, 2))
    site = SiteInfo("one", "global", query_layout=layout, key_layout=layout)
    same = Attention(query=torch.ones(1, 1, 4, 2), key=torch.ones(1, 1, 4, 2), site=site)
    assert fast_vggt.maps(same, 0).maps.tolist() == [[[[0, 0], [0, 0]]]]


# -- which attention -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Capture, Tensor]:
    model = VGGT.tiny()
    pictures = torch.rand(3, 3, 56, 70, generator=torch.Generator().manual_seed(5))
    extractor = AttentionExtractor(model)
    extractor.register_hooks(attention_types="global")
    with torch.no_grad():
        tokens, _ = model(pictures)
    extractor.clear_hooks()
    return extractor.captured, tokens[-1][..., 128:]


def test_recipes_run_on_the_small_vggt(tiny: tuple[Capture, Tensor], tmp_path: Path) -> None:
    captured, features = tiny
    save_run(captured, tmp_path / "run")
    run = open_run(tmp_path / "run")
    last = dense_of(captured["global_block_3"])
    for source in (captured, run, dict(captured)):
        scores = robust_vggt.view_scores(source, features=features)
        close(scores.maps, LAYOUT.maps(last[:, :, 5:P].mean((1, 2))), 1e-7)
        assert scores.label.startswith(
            "global_block_3; the paper takes global block 23 of 24: mean over heads"
        )
        assert vggt_slam2.match_ratio(source).label.startswith("global_block_3; the paper takes")
        assert fast_vggt.maps(source).label.startswith("global_block_0: q·k")
        one = robust_vggt.view_scores(source, block=1)
        assert one.label.startswith("global_block_1; the paper")
    assert list(take_all(run)) == [0, 1, 2, 3]
    # Nothing was read but what was asked for.
    fresh = open_run(tmp_path / "run")
    assert blocks(fresh) == {n: f"global_block_{n}" for n in range(4)}
    assert not fresh._cache


def test_the_small_vggt_by_the_authors_code(golden: dict[str, Tensor]) -> None:
    model = VGGT.tiny()
    pictures = torch.rand(3, 3, 56, 70, generator=torch.Generator().manual_seed(5))

    def run(frames: int, *, rope: bool = True) -> tuple[Capture, Tensor]:
        with AttentionExtractor(model) as extractor, torch.no_grad():
            extractor.register_hooks(attention_types="global", rope=rope)
            tokens, _ = model(pictures[:frames])
            return extractor.captured, tokens[-1][..., 128:]

    before, features = run(3, rope=False)
    scores = robust_vggt.view_scores(before, features=features)
    close(scores.scores[0], golden["tiny_robust_score"], 1e-4)
    assert "before RoPE" in scores.label
    three, two = run(3)[0], run(2)[0]
    after = robust_vggt.view_scores(three, features=features)
    assert (after.scores[0] - golden["tiny_robust_score"]).abs().max() > 1e-3
    close(vggt_slam2.match_ratio(two).ratio[0, 1], golden["tiny_slam_ratio"], 1e-4)
    one_off = vggt_slam2.match_ratio(two, block=2).ratio[0, 1]
    assert (one_off - golden["tiny_slam_ratio"]).abs() > 0.01
    for token in (0, 20):
        close(fast_vggt.maps(three, token).maps[0], golden[f"tiny_fast_grid_token{token}"], 1e-4)


def test_blocks_of_fewer_than_24_are_at_the_same_depth(golden: dict[str, Tensor]) -> None:
    def captured(*numbers: int) -> dict[str, Attention]:
        return {f"b{n}": attention(golden, block=n) for n in numbers}

    assert take(captured(*range(24)), None, 20).text == "b20"
    assert take(captured(*range(12)), None, 20).text == "b10; the paper takes global block 20 of 24"
    with pytest.raises(SiteError, match=r"no global block 5 .global block 20 of 24 in the paper"):
        take(captured(0, 6), None, 20)
    with pytest.raises(SiteError, match="no global block 7 was captured, there are 0, 6"):
        take(captured(0, 6), 7, 20)
    with pytest.raises(SiteError, match="has none: 'x'"):
        take({"x": attention(golden).with_site(SiteInfo("x", "frame", block=3))}, None, 20)
    with pytest.raises(InputError, match="block= chooses among several sites"):
        take(attention(golden), 3, 20)
    with pytest.raises(InputError, match="several passes"):
        take({"x": [attention(golden)]}, None, 20)  # type: ignore[dict-item]


def test_attention_that_a_recipe_is_not_about(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    with pytest.raises(LayoutError, match="has to say where its tokens lie"):
        robust_vggt.view_scores(a.with_site(SiteInfo("x", "global")))
    order = TokenOrder(torch.arange(LAYOUT.num_tokens))
    moved = SiteInfo("x", "global", query_layout=LAYOUT, key_layout=LAYOUT, key_order=order)
    with pytest.raises(LayoutError, match="x has its tokens reordered or merged"):
        robust_vggt.view_scores(a.with_site(moved))
    frame = LAYOUT.frame_layout()
    folded = SiteInfo("x", "frame", query_layout=frame, key_layout=frame, frames_in_batch=True)
    with pytest.raises(LayoutError, match="take a global block"):
        robust_vggt.view_scores(a.with_site(folded))
    with pytest.raises(LayoutError, match=r"reference is one of 0…2, got 3"):
        robust_vggt.view_scores(a, reference=3)
    with pytest.raises(LayoutError, match=r"frame is one of 0…2, got -1"):
        vggt_slam2.match_ratio(a, frame=-1)
    masked = Attention(query=a.query, key=a.key, causal=True, site=a.site)
    with pytest.raises(InputError, match="match_ratio is defined without masks"):
        vggt_slam2.match_ratio(masked)
    with pytest.raises(InputError, match="maps needs queries and keys, and global_block_23 has"):
        fast_vggt.maps(Attention.from_weights(a.dense(), site=a.site))
    # What needs weights alone takes those.
    given = Attention.from_weights(a.dense(), site=a.site)
    close(robust_vggt.view_scores(given).scores, robust_vggt.view_scores(a).scores, 1e-6)


def test_scenes_of_a_batch_are_apart(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    both = Attention(
        query=torch.cat([a.query, a.query.flip(-1)]), key=torch.cat([a.key, a.key]), site=a.site
    )
    other = Attention(query=a.query.flip(-1), key=a.key, site=a.site)
    for number, single in enumerate((a, other)):
        close(
            robust_vggt.view_scores(both).scores[number], robust_vggt.view_scores(single).scores[0]
        )
        close(vggt_slam2.match_ratio(both).ratio[number], vggt_slam2.match_ratio(single).ratio[0])
        close(fast_vggt.maps(both, 3).maps[number], fast_vggt.maps(single, 3).maps[0])


# -- figures ---------------------------------------------------------------------------------------


def test_figures_show_every_view_with_its_score(golden: dict[str, Tensor], tmp_path: Path) -> None:
    a = attention(golden)
    pictures = torch.rand(3, 3, 56, 70, generator=torch.Generator().manual_seed(6))
    scores = robust_vggt.view_scores(a, features=golden["features"])
    figure = robust_vggt.figure(scores, images=pictures)
    texts = [text.get_text().replace("\n", " ") for text in figure.texts]
    assert texts[0] == "View scores (RobustVGGT)"
    assert texts[1] == scores.label
    assert [t for t in texts if t.startswith("view ")] == [
        f"view 0: {scores.scores[0, 0]:.2f}",
        f"view 1: {scores.scores[0, 1]:.2f} outlier",
        f"view 2: {scores.scores[0, 2]:.2f}",
    ]
    assert len(figure.axes) == 4  # three views and the bar
    assert figure.axes[0].images[0].get_array().shape == (56, 70, 3)
    assert figure.save(tmp_path / "scores.png").stat().st_size > 5000
    ratio = vggt_slam2.figure(vggt_slam2.match_ratio(a))
    assert ratio.axes[1].images[0].get_array().shape == (4, 5)
    assert "view 0: the keys" in [text.get_text() for text in ratio.texts]
    maps = fast_vggt.figure(fast_vggt.maps(a, 7))
    assert np.asarray(maps.axes[2].images[0].get_array()).max() == pytest.approx(1)
    with pytest.raises(InputError, match="images are those of 3 views, got 2"):
        robust_vggt.figure(scores, images=pictures[:2])
