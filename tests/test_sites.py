"""Finding and choosing attention modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import CrocoLike, Pi3Like, VGGTLike

import vistvis
from vistvis.errors import LayoutError, SiteError
from vistvis.models.sites import choose_sites, find_sites


def test_a_table_of_names_kinds_heads_and_sources() -> None:
    sites = find_sites(VGGTLike())
    assert sites.names == [
        f"{kind}_blocks.{i}.attn" for kind in ("frame", "global") for i in range(2)
    ]
    assert [(s.kind, s.block, s.heads, s.source) for s in sites[1:3]] == [
        ("frame", 1, 4, "kernel"),
        ("global", 0, 4, "kernel"),
    ]
    assert str(sites).splitlines() == [
        "site                  module         kind    heads  read from",
        "frame_blocks.0.attn   VGGTAttention  frame   4      kernel",
        "frame_blocks.1.attn   VGGTAttention  frame   4      kernel",
        "global_blocks.0.attn  VGGTAttention  global  4      kernel",
        "global_blocks.1.attn  VGGTAttention  global  4      kernel",
    ]
    assert str(sites[0]) == "frame_blocks.0.attn  (VGGTAttention, frame, 4 heads, read from kernel)"
    assert str(find_sites(nn.Linear(2, 2))) == "no attention sites"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("frame_blocks.*.attn", 2),
        ("*_blocks.1.attn", 2),
        ("**.attn", 4),
        ("**", 4),
        ("frame_blocks.**", 2),
        ("frame_blocks.?.attn", 2),
        ("global_blocks.0.attn", 1),
        (["global_blocks.0.attn", "frame_blocks.*.attn"], 3),
        (lambda site: site.kind == "global", 2),
        (None, 4),
    ],
)
def test_choosing(pattern: object, count: int) -> None:
    sites = find_sites(VGGTLike())
    chosen = choose_sites(sites, pattern)  # type: ignore[arg-type]
    assert len(chosen) == count
    assert chosen.names == [name for name in sites.names if name in chosen.names]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("*", "no site '\\*'"),
        ("frame_blocks.*", "no site 'frame_blocks\\.\\*': nearest: frame_blocks"),
        ("global_block.0.attn", "nearest: global_blocks\\.0\\.attn"),
        (["frame_blocks.0.attn", "nope.attn"], "no site 'nope\\.attn'"),
        ([], "no sites were named"),
    ],
)
def test_choosing_nothing(pattern: object, text: str) -> None:
    with pytest.raises(SiteError, match=text):
        choose_sites(find_sites(VGGTLike()), pattern)  # type: ignore[arg-type]


class Indirect(nn.Module):
    """Reaches the kernel through a method, and a helper function."""

    def __init__(self, soft: bool = False) -> None:
        super().__init__()
        self.to_qkv, self.soft = nn.Linear(8, 24), soft
        if soft:
            self.attend = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        return self.attend(q @ k.mT) @ v if self.soft else self.inner(q, k, v)

    def inner(self, *args: Tensor) -> Tensor:
        return attention_helper(*args)


def attention_helper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Classifier(nn.Module):
    """A softmax that is no attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def test_code_is_followed_but_not_into_child_modules() -> None:
    model = nn.Sequential(Indirect(), nn.Sequential(Indirect(soft=True)), Classifier())
    sites = find_sites(model)
    assert sites.names == ["0", "1.0"]
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), vistvis.capture(model, verify=True) as captured:
        model(x)
    assert [a.shape for a in captured.values()] == [(2, 1, 5, 5), (2, 1, 5, 5)]
    assert [a.site.source for a in captured.values()] == ["kernel", "softmax"]


def test_other_multiview_families() -> None:
    assert find_sites(Pi3Like()).names == [f"decoder.{i}.attn" for i in range(4)]
    assert [site.source for site in find_sites(CrocoLike())] == ["softmax", "softmax"]


def test_layouts_of_vggt_like_models() -> None:
    model = VGGTLike()
    special = ("camera", *["register"] * 4)
    layout = vistvis.TokenLayout(3, (2, 3), special, 14)
    assert vistvis.TokenLayout.from_model(model, torch.zeros(3, 3, 28, 42)) == layout
    assert vistvis.TokenLayout.from_model(model, torch.zeros(2, 3, 3, 28, 42)) == layout
    with pytest.raises(LayoutError, match="smaller than one patch"):
        vistvis.TokenLayout.from_model(model, torch.zeros(3, 3, 7, 42))
    with pytest.raises(LayoutError, match="not known; give one: TokenLayout"):
        vistvis.TokenLayout.from_model(nn.Linear(2, 2), torch.zeros(3, 3, 28, 42))
