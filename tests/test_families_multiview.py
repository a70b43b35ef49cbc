"""The structures of multi-view families: positions, caches, merging, eager cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import check_model, prepare
from torch import Tensor, nn
from zoo import (
    CrocoLike,
    DepthAnythingLike,
    MergingAttention,
    Pi3Like,
    PooledAttention,
    Rope2D,
    ScaledAttention,
    StreamAttention,
    VGGTLike,
)

import vistvis
from vistvis.errors import CaptureError


def places(*lead: int, count: int = 12) -> Tensor:
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(count // 3)) + 1
    return grid.expand(*lead, count, 2)


def causal_frames() -> Tensor:
    frame = torch.arange(12) // 4
    return torch.where(frame[:, None] >= frame, 0.0, -torch.inf)


Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {
    "VGGT": lambda: (VGGTLike(), (torch.rand(2, 3, 28, 42),), {}),
    "VGGT with RoPE in place": lambda: (
        VGGTLike(in_place_rope=True),
        (torch.rand(2, 3, 28, 42),),
        {},
    ),
    "Pi3": lambda: (Pi3Like(), (torch.randn(2, 3, 12, 32), places(2, 3)), {}),
    "FastVGGT": lambda: (
        MergingAttention(32, 4, Rope2D()),
        (torch.randn(2, 12, 32),),
        {"pos": places(2), "global_merging": 3},
    ),
    "StreamVGGT, masked": lambda: (
        StreamAttention(32, 4, Rope2D()),
        (torch.randn(2, 12, 32),),
        {"pos": places(2), "attn_mask": causal_frames()},
    ),
    "StreamVGGT, cached": lambda: (
        StreamAttention(32, 4, Rope2D()),
        (torch.randn(2, 12, 32),),
        {
            "pos": places(2),
            "past_key_values": (torch.randn(2, 4, 24, 8), torch.randn(2, 4, 24, 8)),
            "use_cache": True,
        },
    ),
    "MapAnything": lambda: (ScaledAttention(32, 4), (torch.randn(2, 12, 32),), {}),
    "DUSt3R": lambda: (
        CrocoLike(),
        (torch.randn(2, 12, 32), torch.randn(2, 18, 32), places(2), places(2, count=18)),
        {},
    ),
    "SAM 2": lambda: (PooledAttention(32, 4, Rope2D()), (torch.randn(2, 12, 32), places(2)), {}),
    "Depth-Anything-3": lambda: (
        DepthAnythingLike(),
        (torch.randn(2, 3, 12, 32), places(2, 3)),
        {},
    ),
}


def made(case: str) -> Case:
    model, args, kwargs = CASES[case]()
    prepare(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model, args, kwargs


@pytest.mark.parametrize("case", CASES)
def test_exact_and_unchanged(case: str) -> None:
    model, args, kwargs = made(case)
    outcome = check_model(model, lambda: model(*args, **kwargs), name=case, family="zoo", most=8)
    assert not outcome.failures()
    assert all(site.exact for site in outcome.sites)
    assert all(site.largest > 0.25 for site in outcome.sites)


@pytest.mark.parametrize("case", CASES)
def test_verified_against_the_kernel(case: str) -> None:
    model, args, kwargs = made(case)
    with torch.no_grad(), vistvis.capture(model, verify=True) as captured:
        model(*args, **kwargs)
    for attention in captured.values():
        assert torch.allclose(attention.rows(None).sum(-1), torch.ones(()), atol=1e-5)


def test_shapes_are_those_of_the_kernel() -> None:
    shapes = {
        "FastVGGT": {"MergingAttention": (2, 4, 4, 4)},
        "StreamVGGT, cached": {"StreamAttention": (2, 4, 12, 36)},
        "SAM 2": {"PooledAttention": (2, 4, 6, 12)},
        "DUSt3R": {"attn": (2, 4, 12, 12), "cross_attn": (2, 4, 12, 18)},
    }
    for case, expected in shapes.items():
        model, args, kwargs = made(case)
        with torch.no_grad(), vistvis.capture(model) as captured:
            model(*args, **kwargs)
        assert {name: tuple(a.shape) for name, a in captured.items()} == expected


def test_frame_and_global_blocks_in_one_decoder() -> None:
    for case, odd in (("Pi3", [12, 36, 12, 36]), ("Depth-Anything-3", [12, 12, 12, 36])):
        model, args, kwargs = made(case)
        layout = vistvis.TokenLayout(3, (3, 4))
        with torch.no_grad(), vistvis.capture(model, layout=layout) as captured:
            model(*args, **kwargs)
        assert [a.shape[3] for a in captured.values()] == odd
        for attention in captured.values():
            folded = attention.shape[3] == 12
            assert attention.site.frames_in_batch is folded
            assert attention.site.query_layout == (layout.frame_layout() if folded else layout)


def test_cross_attention_has_a_kind_of_its_own() -> None:
    model, _, _ = made("DUSt3R")
    kinds = {site.name: (site.kind, site.source) for site in vistvis.find_sites(model)}
    assert kinds == {"attn": ("self", "softmax"), "cross_attn": ("cross", "softmax")}


def test_before_rope_is_refused_where_it_can_not_be_told() -> None:
    model, args, kwargs = made("FastVGGT")
    with pytest.raises(CaptureError, match="tokens were merged or cached"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model, rope=False):
            model(*args, **kwargs)
    model, args, kwargs = made("DUSt3R")
    with pytest.raises(CaptureError, match="shows weights"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model, "attn", rope=False):
            model(*args, **kwargs)
    model, args, kwargs = made("VGGT with RoPE in place")
    with torch.no_grad():
        with vistvis.capture(model, rope=False) as before:
            model(*args, **kwargs)
        plain = VGGTLike()
        plain.load_state_dict(model.state_dict())
        with vistvis.capture(plain.eval(), rope=False) as reference:
            plain(*args, **kwargs)
    for name, attention in before.items():
        assert torch.equal(attention.query, reference[name].query)
