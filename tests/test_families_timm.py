"""A small set of timm's attention modules; `nox -s sweep` runs every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import check_model, prepare
from oracle import record_inputs, reference_weights
from torch import nn

import vistvis
from vistvis.errors import CaptureError, SiteError

timm = pytest.importorskip("timm")


def vit(**more: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
    }  # fmt: skip
    return VisionTransformer(**settings, num_classes=0, **more)


def eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0,
        use_rot_pos_emb=True, qkv_fused=True, num_reg_tokens=2,
    )  # fmt: skip


def beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0,
        use_rel_pos_bias=True,
    )  # fmt: skip


def cait() -> nn.Module:
    from timm.models.cait import Cait

    return Cait(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0)


def swin(version: int) -> nn.Module:
    from timm.models import swin_transformer, swin_transformer_v2

    cls = (
        swin_transformer.SwinTransformer if version == 1 else swin_transformer_v2.SwinTransformerV2
    )
    return cls(
        img_size=32, patch_size=4, embed_dim=32, depths=(2,), num_heads=(2,), window_size=4,
        num_classes=0,
    )  # fmt: skip


def crossvit() -> nn.Module:
    from timm.models.crossvit import CrossVit

    return CrossVit(
        img_size=32, embed_dim=(16, 32), depth=((1, 1, 0),), num_heads=(2, 2),
        mlp_ratio=(1, 1, 1), num_classes=0,
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT": (vit, 32),
    "ViT with q/k norm and registers": (lambda: vit(qk_norm=True, reg_tokens=3), 32),
    "ViT without cls, attention pooling": (
        lambda: vit(class_token=False, global_pool="map"),
        32,
    ),
    "EVA (RoPE, registers)": (eva, 32),
    "BEiT (relative position bias)": (beit, 32),
    "CaiT (talking heads, class attention)": (cait, 32),
    "Swin (bias, shift mask)": (lambda: swin(1), 32),
    "Swin v2 (cosine, logit scale)": (lambda: swin(2), 32),
    "CrossViT (cross-attention)": (crossvit, 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_and_unchanged(name: str) -> None:
    make, size = MODELS[name]
    model, images = make(), torch.randn(2, 3, size, size)
    prepare(model, lambda: model(images))
    outcome = check_model(model, lambda: model(images), name=name, family="timm")
    assert not outcome.failures()
    assert all(site.exact for site in outcome.sites)


@pytest.mark.parametrize("name", ["ViT", "CaiT (talking heads, class attention)"])
def test_eager_and_fused_paths_agree(name: str) -> None:
    """timm's own switch between the two: both are read, from different places."""
    make, size = MODELS[name]
    model, images = make().eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        with vistvis.capture(model, verify=True) as fused:
            model(images)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        with vistvis.capture(model, verify=True) as eager:
            model(images)
    assert {one.site.source for one in eager.values()} == {"softmax"}
    for site in fused:
        assert (fused[site].dense() - eager[site].dense()).abs().max() < 1e-5


def test_differential_attention_is_read_from_its_eager_path() -> None:
    from timm.layers import DiffAttention

    model, x = vit(attn_layer=DiffAttention), torch.randn(2, 3, 32, 32)
    prepare(model)
    with pytest.raises(CaptureError, match="set its fused_attn = False"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model):
            model(x)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.no_grad(), vistvis.capture(model, verify=True) as captured:
        model(x)
    module = model.get_submodule("blocks.0.attn")
    with torch.no_grad():
        inputs = record_inputs({"attn": module}, lambda: model(x))["attn"]
    pairs = reference_weights(module, *inputs, 4).unflatten(1, (4, 2))
    weights = captured["blocks.0.attn"].dense().double()
    factors = (pairs[:, :, 0] - weights) / pairs[:, :, 1]
    assert factors.std() < 1e-4 * factors.mean()
    assert weights.shape == (2, 4, 17, 17)


def test_talking_heads_are_mixed_after_the_softmax() -> None:
    model = cait()
    prepare(model)
    with torch.no_grad(), vistvis.capture(model, "blocks.*.attn") as captured:
        model(torch.randn(1, 3, 32, 32))
    sums = captured["blocks.0.attn"].dense().sum(-1)
    assert (sums - 1).abs().max() > 1e-3, "rows of mixed heads need not sum to 1"


@pytest.mark.parametrize(
    ("make", "special"),
    [
        (vit, ("cls",)),
        (lambda: vit(reg_tokens=3), ("cls", "register", "register", "register")),
        (lambda: vit(class_token=False, global_pool="avg"), ()),
        (eva, ("cls", "register", "register")),
        (beit, ("cls",)),
    ],
)
def test_layouts(make: Callable[[], nn.Module], special: tuple[str, ...]) -> None:
    model, images = make().eval(), torch.randn(1, 3, 32, 32)
    layout = vistvis.TokenLayout.from_model(model, images)
    assert layout == vistvis.TokenLayout(1, (4, 4), special, 8)
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(images)
    assert all(one.site.query_layout == layout for one in captured.values())


def test_layouts_that_are_not_known_are_asked_for() -> None:
    with pytest.raises(vistvis.VistvisError, match="give one: TokenLayout"):
        vistvis.TokenLayout.from_model(swin(1), torch.randn(1, 3, 32, 32))


def test_channel_attention_is_refused_by_name() -> None:
    from timm.models.xcit import Xcit

    model = Xcit(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, cls_attn_layers=1,
        num_classes=0,
    )  # fmt: skip
    with pytest.raises(SiteError, match=r"'blocks\.0\.attn' \(XCA\): attention over channels"):
        vistvis.capture(model, "blocks.*.attn")
    with torch.no_grad(), vistvis.capture(model.eval()) as captured:
        model(torch.randn(2, 3, 32, 32))
    assert list(captured) == ["cls_attn_blocks.0.attn"]
    assert "refused: attention over channels" in captured.report()
