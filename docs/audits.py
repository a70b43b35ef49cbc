"""Measure how far shortcuts move results, and write docs/audits.md.

Run it from anywhere: `python docs/audits.py`. A few seconds on one core.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vggt_adapter import VGGT, AttentionExtractor
from vggt_adapter.sample_scene import sample_points
from vggt_adapter.steps import load_pictures
from vistvis import Attention
from vistvis.analysis import frame_mass, match_rate
from vistvis.intervention import Truth, truth_of_scene
from vistvis.recipes import robust_vggt, vggt_slam2

PAGE = Path(__file__).parent / "audits.md"
# The last, whose head 0 was trained to point, and the one before it.
BLOCKS = (3, 2)


def main() -> None:
    torch.set_num_threads(1)
    model = VGGT.tiny()
    images = load_pictures(None, model).images
    as_is, before = captured(model, images, rope=True), captured(model, images, rope=False)
    truth = truth_of_scene(*sample_points((images.shape[-2] // 14, images.shape[-1] // 14)))
    variants = {
        f"block {block}, {name}": attention
        for block in BLOCKS
        for name, attention in (
            ("as the model computes it", as_is[block]),
            ("before RoPE", before[block]),
            ("softmax over patches alone", over_patches(as_is[block])),
            ("q and k pooled 2×2", pooled(as_is[block])),
        )
    }
    page = TEXT.format(
        table(variants, views, ["weight on view 0", "view 1", "view 2", "scores", "rejected"]),
        table(variants, ratios, ["match ratio of view 1", "view 2", "taken"]),
        table(variants, lambda a: rates(a, truth), ["head 0", "head 1"]),
        table(variants, masses, ["own patches", "other views' patches", "special tokens"]),
        counted=int(truth.visible.sum()),
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
    )
    PAGE.write_text(page, encoding="utf-8")


def captured(model: VGGT, images: Tensor, *, rope: bool) -> list[Attention]:
    """The global blocks."""
    with AttentionExtractor(model) as extractor:
        extractor.register_hooks(attention_types="global", rope=rope)
        with torch.no_grad():
            model(images)
        return list(extractor.captured.values())


def over_patches(a: Attention) -> Attention:
    """The same queries and keys, as if special tokens were not there."""
    layout = a.key_layout
    assert layout is not None
    keys = torch.tensor([layout.locate(token).is_patch for token in range(layout.num_tokens)])
    return Attention(
        query=a.query, key=a.key, scale=a.scale, mask=keys[None, None, None], site=a.site
    )


def pooled(a: Attention) -> Attention:
    """The mean of q and of k of four patches that lie together in place of each."""
    layout, site = a.key_layout, a.site
    assert layout is not None
    assert site is not None
    rows, cols = layout.grid
    half = replace(layout, grid=(rows // 2, cols // 2), patch_size=(28, 28))
    first = layout.patch_start_idx

    def mean(tokens: Tensor) -> Tensor:
        frames = tokens.unflatten(2, (layout.frames, -1))
        special, patches = frames[:, :, :, :first], frames[:, :, :, first:]
        cells = patches.unflatten(3, (rows // 2, 2, cols // 2, 2)).mean((4, 6)).flatten(3, 4)
        return torch.cat([special, cells], 3).flatten(2, 3)

    return Attention(
        query=mean(a.query),
        key=mean(a.key),
        scale=a.scale,
        site=replace(site, query_layout=half, key_layout=half),
    )


def views(a: Attention) -> list[str]:
    result = robust_vggt.view_scores(a)
    weights = [f"{100 * weight:.1f} %" for weight in result.maps[0].sum((1, 2)).tolist()]
    scores = ", ".join(f"{score:.2f}" for score in result.scores[0].tolist())
    return [*weights, scores, named(result.outliers[0])]


def ratios(a: Attention) -> list[str]:
    # Its softmax goes over queries: which keys there are beside the patches does not count.
    whole = Attention(query=a.query, key=a.key, scale=a.scale, site=a.site)
    ratio = vggt_slam2.match_ratio(whole).ratio[0, 1:]
    return [*(f"{one:.2f}" for one in ratio.tolist()), named(ratio >= vggt_slam2.THRESHOLD, 1)]


def named(which: Tensor, first: int = 0) -> str:
    """The views of which it is true."""
    return ", ".join(str(first + view) for view, true in enumerate(which.tolist()) if true) or "–"


def rates(a: Attention, truth: Truth) -> list[str]:
    """The share of true matches of all pairs of views that each head finds within 21 pixels."""
    layout = a.key_layout
    assert layout is not None
    # One patch of 14 pixels and a half, whatever a patch of this layout is.
    within = 21 / layout.patch_size[0] - 0.5
    hits, counted = torch.zeros(a.shape[1]).double(), 0
    for i, j, known in pairs(truth):
        found = match_rate(a, i, j, known, within=within)
        hits += found.rate[0] * found.counted[0]
        counted += int(found.counted[0])
    return [f"{rate:.1f} %" for rate in (100 * hits / counted).tolist()]


def pairs(truth: Truth) -> Iterator[tuple[int, int, Tensor]]:
    """Every pair of views, with the matches `x, y, x', y'` in pixels."""
    cols = sample_grid(truth)[1]
    number = torch.arange(truth.visible.shape[-1])
    here = torch.stack([number % cols, number // cols], -1).double()
    for i, j in torch.cartesian_prod(*[torch.arange(truth.visible.shape[1])] * 2).tolist():
        seen = truth.visible[0, i, j]
        if bool(seen.any()):
            there = truth.places[0, i, j].flip(-1)
            yield i, j, 14 * (torch.cat([here, there], -1)[seen] + 0.5)


def sample_grid(truth: Truth) -> tuple[int, int]:
    patches = truth.visible.shape[-1]
    return patches // 16, 16


def masses(a: Attention) -> list[str]:
    """What a patch gives, on average over heads and views."""
    mass = frame_mass(a)[0, :, :, :, 1].mean(0)  # (S_q, S_k, special or patch)
    own = mass[..., 1].diagonal().mean()
    others = mass[..., 1].sum(1).mean() - own
    special = mass[..., 0].sum(1).mean()
    return [f"{100 * share:.1f} %" for share in (own.item(), others.item(), special.item())]


def table(
    variants: Mapping[str, Attention], numbers: Callable[[Attention], list[str]], names: list[str]
) -> str:
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(numbers(a))} |" for name, a in variants.items()]
    return "\n".join(lines)


TEXT = """\
# Shortcuts, audited

How far do numbers about attention move where it is not quite the model's own? Measured by
`docs/audits.py` on {date} (torch {torch}, CPU, float32), on the small VGGT that comes with the
package (`VGGT.tiny()`) and its three sample views (12×16 patches), its last two global blocks. One
model of two million parameters on one scene: what it shows is that shortcuts can move results, and
which; not by how much they move those of VGGT-1B.

The shortcuts: queries and keys taken before RoPE (`capture(model, rope=False)`), as hooks on
`q_norm` and `k_norm` do; the neighbouring block; a softmax over patches without the special tokens;
and means of q and of k over 2×2 patches in place of each.

## View scores

Of [`robust_vggt.view_scores`](recipes.md), without features: what a patch of view 0 gives to the
patches of each view, mean over heads; the scores of the three views; and which fall below 0.4. All
three show one scene. Scores are scaled from the least to the most of the views, so one of them is
always 0, however close they are.

{0}

## Match ratio

Of [`vggt_slam2.match_ratio`](recipes.md), keys of view 0. The softmax goes over queries, so leaving
out the keys of special tokens changes nothing. The authors take a pair from 0.85 on, in one block
of VGGT-1B; elsewhere that number means something else.

{1}

## Match rate

The share of {counted} true matches, over all pairs of views, within 21 pixels (one patch and a
half) of which a head's strongest patch lies. Head 0 of block 3 was trained to point; heads of
different blocks have nothing but their number in common. Leaving out special tokens cannot move
this number: the strongest patch is the strongest. Pooled patches lie 28 pixels apart, which costs
some by itself.

{2}

## Frame mass

What a patch gives, mean over heads and views (`analysis.frame_mass`). Where special tokens get
nothing, leaving them out changes nothing; where they get something, all else is blown up.

{3}
"""


if __name__ == "__main__":
    main()
