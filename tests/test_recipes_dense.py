"""Recipes on blocks, depth, sinks and motion equal the authors' code, and dense computations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from multiview import Dust3r
from oracle import dense_of
from safetensors.torch import load_file
from torch import Tensor

from vggt_adapter import AttentionExtractor
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.errors import InputError, SiteError
from vistvis.recipes import attention_sinks, easi3r, go_to_hunt, sparse_vggt, vggt4d
from vistvis.recipes.otsu import adaptive_threshold

SPECIAL = ("camera", *["register"] * 4)
LAYOUT = TokenLayout(3, (4, 5), SPECIAL, 14)
P = LAYOUT.tokens_per_frame


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "recipes_golden.safetensors")


def site(block: int, layout: TokenLayout = LAYOUT) -> SiteInfo:
    name = f"global_block_{block}"
    return SiteInfo(name, "global", block=block, query_layout=layout, key_layout=layout)


def attention(golden: dict[str, Tensor], block: int = 23) -> Attention:
    return Attention(query=golden["q"], key=golden["k"], site=site(block))


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=atol)


# -- block-sparse VGGT -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_pooled_scores_and_kept_blocks_are_the_authors(
    golden: dict[str, Tensor], share: float
) -> None:
    a = attention(golden)
    result = sparse_vggt.block_coverage(a, share=share, query_block=8, key_block=4)
    close(result.scores, golden["sparse_prob_avg"])
    assert torch.equal(result.kept, golden[f"sparse_mask_{share}"].bool())
    close(result.sparsity, 1 - golden[f"sparse_mask_{share}"].double().mean((2, 3)))
    close(result.coverage, (result.scores * result.kept).sum(-1))
    # The fewest that reach the share: one less would not.
    ordered = golden["sparse_prob_avg"].double().sort(-1, descending=True).values.cumsum(-1)
    reached = ordered.gather(-1, result.needed[..., None] - 1)[..., 0]
    before = ordered.gather(-1, (result.needed[..., None] - 2).clamp_min(0))[..., 0]
    assert (reached >= share - 1e-6).all()
    assert (before < share + 1e-6)[result.needed > 1].all()
    assert "estimate, not the model's attention" in result.label


def test_other_pools_and_ratios_are_the_authors(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    most = sparse_vggt.block_coverage(a, query_block=8, key_block=4, pool="max")
    close(most.scores, golden["sparse_prob_max"])
    both = sparse_vggt.block_coverage(a, share=0.5, query_block=8, key_block=4, sparse_ratio=0.75)
    assert torch.equal(both.kept, golden["sparse_mask_ratio"].bool())


def test_blocks_of_one_token_are_attention_over_patches(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    result = sparse_vggt.block_coverage(a, query_block=1, key_block=1)
    patches = (torch.arange(3 * P) % P) >= 5
    logits = (a.query.double() @ a.key.double().mT * a.scale)[:, :, patches][..., patches]
    assert result.scores.max() > 0.5
    close(result.scores, logits.softmax(-1), 1e-9)
    # Pooled ones are not the mean of what they pool.
    pooled = sparse_vggt.block_coverage(a, query_block=8, key_block=4).scores
    exact = torch.nn.functional.avg_pool1d(logits.softmax(-1)[0].mT, 8, ceil_mode=True).mT
    exact = 4 * torch.nn.functional.avg_pool1d(exact, 4, ceil_mode=True)
    assert (pooled[0] - exact).abs().max() > 0.05


def test_numbers_that_block_coverage_refuses(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    with pytest.raises(InputError, match=r"share and sparse_ratio are from 0 to 1, got 1\.5"):
        sparse_vggt.block_coverage(a, share=1.5)
    with pytest.raises(InputError, match="query_block=0"):
        sparse_vggt.block_coverage(a, query_block=0)


# -- Good Token Hunting ----------------------------------------------------------------------------


def test_layer_entropy_equals_dense(golden: dict[str, Tensor]) -> None:
    captured = {
        "a": attention(golden, 0),
        "b": Attention(query=0 * golden["q"], key=golden["k"], site=site(5)),
        "frame": attention(golden).with_site(SiteInfo("frame", "frame", block=1)),
    }
    result = go_to_hunt.layer_entropy(captured, max_bytes=2000)
    assert result.blocks == (0, 5)
    p = dense_of(captured["a"])
    entropy = -(p * p.log()).sum(-1).mean() / math.log(75)
    close(result.entropy, torch.tensor([[entropy, 1.0]]), 1e-6)
    close(result.top, torch.tensor([[p.amax(-1).mean(), 1 / 75]]), 1e-6)
    some = go_to_hunt.layer_entropy(captured, heads=[1, 3], queries=[4, 30])
    q = p[:, [1, 3]][:, :, [4, 30]]
    close(some.entropy[0, :1], -(q * q.log()).sum(-1).mean()[None] / math.log(75), 1e-6)
    assert "the chosen heads" in some.label
    with pytest.raises(SiteError, match="needs global blocks"):
        go_to_hunt.layer_entropy({"frame": captured["frame"]})


# -- attention sinks -------------------------------------------------------------------------------


def sinks(golden: dict[str, Tensor]) -> Attention:
    q, k, v = (golden[f"sinks_{n}"] for n in "qkv")
    return Attention(query=q, key=k, value=v, site=SiteInfo("blocks.3.attn"))


@pytest.mark.parametrize("max_bytes", [1, 500, None])
def test_sinks_are_the_authors(golden: dict[str, Tensor], max_bytes: int | None) -> None:
    result = attention_sinks.kinds({"blocks.3.attn": sinks(golden)}, max_bytes=max_bytes)
    assert torch.equal(result.token[0], golden["sinks_token"])
    close(result.mass[0], golden["sinks_mass"])
    close(result.routed[0], golden["sinks_routed_frac"])
    close(result.least[0], golden["sinks_min_a"])
    close(result.ratio[0], golden["sinks_ratio_head"])
    # Planted: parked, one message, in between, and one that too few queries of image 0 go to.
    assert result.kinds[0] == (
        ("nop", "broadcast", "between", "", "", ""),
        ("nop", "broadcast", "between", "nop", "", ""),
    )
    strict = attention_sinks.kinds(sinks(golden), negligible=0.01, full=2.0)
    assert strict.kinds[0][0] == ("between", "between", "between", "", "", "")


def test_sinks_of_grouped_values_and_without(golden: dict[str, Tensor]) -> None:
    a = sinks(golden)
    grouped = Attention(query=a.query, key=a.key[:, ::2], value=a.value[:, ::2], site=a.site)
    written = Attention(
        query=a.query,
        key=a.key[:, ::2].repeat_interleave(2, 1),
        value=a.value[:, ::2].repeat_interleave(2, 1),
    )
    close(attention_sinks.kinds(grouped).ratio, attention_sinks.kinds(written).ratio)
    with pytest.raises(InputError, match="attention has no values; capture them with"):
        attention_sinks.kinds(Attention(query=a.query, key=a.key))
    few = Attention(query=a.query[:1], key=a.key[:1], value=a.value[:1])
    with pytest.raises(InputError, match=r"\(1, 6\), \(2, 6\)"):
        attention_sinks.kinds({"a": a, "b": few})


# -- VGGT4D ----------------------------------------------------------------------------------------

MOVING = TokenLayout(5, (4, 5), SPECIAL, 14)


def moving(golden: dict[str, Tensor]) -> dict[str, Attention]:
    """The golden patches behind special tokens that must not count."""
    captured = {}
    for block in range(24):
        q, k = (
            torch.nn.functional.pad(
                golden[f"vggt4d_{n}"][block], (0, 0, 5, 0), value=100.0
            ).flatten(1, 2)[None]
            for n in "qk"
        )
        captured[f"global_block_{block}"] = Attention(query=q, key=k, site=site(block, MOVING))
    return captured


def test_dynamic_maps_are_the_authors(golden: dict[str, Tensor]) -> None:
    captured = moving(golden)
    result = vggt4d.dynamic(captured)
    named = dict(
        zip(("mean1", "var1", "mean2", "mean3", "var3"), result.cues.values(), strict=True)
    )
    for name, cue in named.items():
        close(cue[0], golden[f"vggt4d_{name}"])
    close(result.maps[0], golden["vggt4d_maps"])
    assert result.threshold.item() == pytest.approx(
        golden["vggt4d_threshold_grid"].item(), abs=1e-5
    )
    large = vggt4d.dynamic(captured, size=(56, 70))
    close(large.threshold[0], golden["vggt4d_threshold"])
    assert large.mask.shape == (1, 5, 56, 70)
    assert 0 < result.mask.double().mean() < 0.5
    assert "not attention" in result.label
    # One block off is another map.
    names = list(captured)
    off = {
        name: captured[names[max(n - 1, 0)]].with_site(captured[name].site)
        for n, name in enumerate(names)
    }
    assert (vggt4d.dynamic(off).maps - result.maps).abs().max() > 0.3


def test_clusters_share_their_mean(golden: dict[str, Tensor]) -> None:
    captured = moving(golden)
    clusters = torch.arange(20).view(4, 5).expand(5, 4, 5) // 3
    maps = vggt4d.dynamic(captured).maps[0]
    result = vggt4d.dynamic(captured, clusters=clusters)
    mean = torch.stack([maps[clusters == n].mean() for n in range(7)])[clusters]
    low, high = mean.amin((1, 2), True), mean.amax((1, 2), True)
    mean = (mean - low) / (high - low + 1e-6)
    assert torch.equal(result.mask[0], mean > result.threshold)
    assert result.threshold.item() == pytest.approx(adaptive_threshold(mean.float()), abs=1e-6)
    with pytest.raises(InputError, match=r"clusters are whole numbers of the shape \(5, 4, 5\)"):
        vggt4d.dynamic(captured, clusters=clusters[:2])


def test_dynamic_needs_neighbours_and_several_blocks(golden: dict[str, Tensor]) -> None:
    three = {f"b{n}": attention(golden, n) for n in range(4)}
    with pytest.raises(InputError, match=r"frame 1 of 3 has no frame at .*nearer offsets"):
        vggt4d.dynamic(three)
    result = vggt4d.dynamic(three, offsets=(-1, 1))
    assert "of 4, at the depths of the paper's of 24" in result.label
    with pytest.raises(InputError, match="needs global blocks 2, 3"):
        vggt4d.dynamic({n: a for n, a in three.items() if n != "b2"}, offsets=(-1, 1))
    with pytest.raises(InputError, match="hand over what was captured of them all"):
        vggt4d.dynamic(three["b0"])


def test_the_threshold_is_the_best_of_all_there_are() -> None:
    """Against every choice of cuts between a dozen levels."""
    generator = np.random.default_rng(4)
    for _ in range(20):
        # Each a bin of its own, below the bin's centre, which is what a threshold is given as.
        levels = (generator.choice(254, 10, replace=False) + 1.1) * 255 / 256
        values = np.concatenate([[0, 255], levels, generator.choice(levels, 50)])
        best, lowest, top = -1.0, -1.0, 0.0
        for classes in (2, 3, 4):
            inner, chosen = -1.0, ()
            for cuts in itertools.combinations(np.unique(values)[1:], classes - 1):
                parts = np.split(np.sort(values), np.searchsorted(np.sort(values), cuts))
                between = sum(len(part) * (part.mean() - values.mean()) ** 2 for part in parts)
                if between > inner * (1 + 1e-12):
                    inner, chosen = between, cuts
            means = [
                p.mean()
                for p in np.split(np.sort(values), np.searchsorted(np.sort(values), chosen))
            ]
            if np.var(means) / classes**0.5 > best:
                best, top = np.var(means) / classes**0.5, chosen[-1]
                lowest = values[values < top].max()
        threshold = adaptive_threshold(torch.from_numpy(values).double())
        assert lowest < threshold < top
    assert adaptive_threshold(torch.full((9,), 0.3)) == pytest.approx(0.3)


# -- Easi3R ----------------------------------------------------------------------------------------


def decoders(golden: dict[str, Tensor]) -> dict[str, Attention]:
    layout = TokenLayout(1, (2, 3), (), 16)
    captured = {}
    for number, part in ((1, "dec_blocks"), (2, "dec_blocks2")):
        for block in range(12):
            name = f"cross_block_{block}" + ("_dec_blocks2" if number == 2 else "")
            captured[name] = Attention(
                query=golden[f"easi3r_q{number}"][block],
                key=golden[f"easi3r_k{number}"][block],
                site=SiteInfo(
                    name,
                    "cross",
                    block=block,
                    query_layout=layout,
                    key_layout=layout,
                    path=f"{part}.{block}.cross_attn",
                ),
            )
    return captured


def test_motion_of_pairs_is_the_authors(golden: dict[str, Tensor]) -> None:
    captured = decoders(golden)
    pairs = [(i, j) for i, j in golden["easi3r_pairs"].tolist()]
    result = easi3r.dynamic(captured, pairs=pairs)
    for name, theirs in zip(result.cues, ("i_mean", "i_var", "j_mean", "j_var"), strict=True):
        close(result.cues[name], golden[f"easi3r_{theirs}"])
    close(result.maps, golden["easi3r_maps"])
    assert torch.equal(result.mask, result.maps > result.threshold)
    swapped = easi3r.dynamic(captured, pairs=[(j, i) for i, j in pairs])
    assert (swapped.maps - result.maps).abs().max() > 0.3
    with pytest.raises(InputError, match=r"has 6 pairs of frames, and pairs= names 5"):
        easi3r.dynamic(captured, pairs=pairs[:5])
    first = {n: a for n, a in captured.items() if not n.endswith("2")}
    with pytest.raises(InputError, match="both decoders"):
        easi3r.dynamic(first, pairs=pairs)
    with pytest.raises(InputError, match="two pairs or more on each side, got 1: 6"):
        easi3r.dynamic(captured, pairs=[(0, 1)] * 6)


def test_motion_of_a_dust3r_as_it_is_captured() -> None:
    torch.manual_seed(0)
    model, views = Dust3r(), torch.rand(3, 3, 8, 12)
    pairs = list(itertools.permutations(range(3), 2))
    with AttentionExtractor(model) as extractor, torch.no_grad():
        extractor.register_hooks(attention_types="cross")
        model({"img": views[[i for i, _ in pairs]]}, {"img": views[[j for _, j in pairs]]})
    result = easi3r.dynamic(extractor.captured, pairs=pairs)
    grid = extractor.captured["cross_block_0"].key_layout.grid
    assert result.maps.shape == (3, *grid)
    # As many channels as blocks and heads, of each decoder its own.
    only = {n: a for n, a in extractor.captured.items() if "_1" not in n}
    assert len(only) == 2
    assert (easi3r.dynamic(only, pairs=pairs).maps - result.maps).abs().max() > 0.01


def test_motion_of_a_vggt_equals_dense(golden: dict[str, Tensor]) -> None:
    a = attention(golden)
    result = easi3r.dynamic({"global_block_23": a})
    logits = a.query.double()[0] @ a.key.double()[0].mT * a.scale
    stacks = []
    for j in range(3):
        several = []
        for i in (n for n in range(3) if n != j):
            rows = logits[:, i * P + 5 : (i + 1) * P, j * P + 5 : (j + 1) * P]
            several.append(rows.mean(1).T.reshape(4, 5, 4))
        stack = torch.stack(several, -1)
        stack[0, 0] = (stack[0, 1] + stack[1, 0]) / 2
        stacks.append(stack)
    every = torch.stack(stacks)

    def scaled(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min() + 1e-6)

    mean, spread = (scaled(scaled(x).mean(-1)) for x in (every.mean(-1), every.std(-1)))
    product = (1 - mean) * spread * mean * (1 - spread)
    expected = torch.stack([scaled(frame) for frame in product])
    close(result.maps, expected, 1e-5)
    assert "global blocks in place of both decoders" in result.label


# -- figures ---------------------------------------------------------------------------------------


def test_figures_say_what_was_found(golden: dict[str, Tensor], tmp_path: Path) -> None:
    blocks = sparse_vggt.block_coverage(attention(golden), query_block=8, key_block=4)
    names = [text.get_text() for text in sparse_vggt.figure(blocks).texts]
    assert f"head 2: {1 - blocks.sparsity[0, 2]:.0%} of blocks kept" in names
    depth = go_to_hunt.layer_entropy({f"b{n}": attention(golden, n) for n in range(3)})
    curves = go_to_hunt.figure(depth).axes[0].lines
    assert [line.get_label() for line in curves] == ["normalised entropy", "largest weight"]
    assert np.allclose(curves[0].get_ydata(), depth.entropy[0])
    found = attention_sinks.kinds({"first": sinks(golden), "second": sinks(golden)})
    figure = attention_sinks.figure(found, batch=1)
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert cells == list(itertools.chain(*[["nop", "broadcast", "between", "nop", "", ""]] * 2))
    assert figure.save(tmp_path / "kinds.png").stat().st_size > 5000
    moved = vggt4d.dynamic(moving(golden))
    assert len(vggt4d.figure(moved).axes) == 6
    share = moved.mask[0, 3].double().mean().item()
    assert f"frame 3: {share:.0%} masked" in [t.get_text() for t in vggt4d.figure(moved).texts]
    still = easi3r.dynamic({"b": attention(golden)})
    assert easi3r.figure(still).axes[2].images[0].get_array().shape == (4, 5)
