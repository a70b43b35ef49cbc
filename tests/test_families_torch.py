"""PyTorch's own attention modules, torchvision and open_clip."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from families import check_model, outputs_equal, prepare
from torch import Tensor, nn

import vistvis
from vistvis.errors import CaptureError

FLAGS = ("need_weights", "batch_first", "padding", "mask", "bias_kv", "grad", "cross")


def multihead_reference(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, allowed: Tensor
) -> Tensor:
    """Float64 weights written out from the projections; `allowed` is (B, 1, Nq, Nk)."""
    width, heads = module.embed_dim, module.num_heads
    weight, bias = module.in_proj_weight.double(), module.in_proj_bias.double()
    if not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    q = query.double() @ weight[:width].T + bias[:width]
    k = key.double() @ weight[width : 2 * width].T + bias[width : 2 * width]
    if module.bias_k is not None:
        k = torch.cat((k, module.bias_k.double().expand(len(k), 1, width)), 1)
        allowed = torch.cat((allowed, torch.ones_like(allowed[..., :1])), -1)
    q, k = (t.unflatten(-1, (heads, width // heads)).transpose(1, 2) for t in (q, k))
    logits = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=len(FLAGS))))
def test_multihead_attention_in_every_combination(flags: tuple[bool, ...]) -> None:
    on = dict(zip(FLAGS, flags, strict=True))
    module = nn.MultiheadAttention(
        16, 4, batch_first=on["batch_first"], add_bias_kv=on["bias_kv"]
    ).eval()
    with torch.no_grad():
        module.in_proj_weight.mul_(3)
        module.in_proj_bias.normal_()
    queries, keys = 5, 7 if on["cross"] else 5
    query = torch.randn((2, queries, 16) if on["batch_first"] else (queries, 2, 16))
    key = torch.randn((2, keys, 16) if on["batch_first"] else (keys, 2, 16))
    key = key if on["cross"] else query
    allowed = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    settings: dict[str, Any] = {"need_weights": on["need_weights"]}
    if on["padding"]:
        settings["key_padding_mask"] = torch.zeros(2, keys, dtype=torch.bool)
        settings["key_padding_mask"][1, -2:] = True
        allowed &= ~settings["key_padding_mask"][:, None, None]
    if on["mask"]:
        settings["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        allowed &= ~settings["attn_mask"]
    with torch.set_grad_enabled(on["grad"]):
        plain = module(query, key, key, **settings)
        with vistvis.capture(module) as captured:
            watched = module(query, key, key, **settings)
    assert outputs_equal(plain, watched)
    assert (plain[1] is None) == (watched[1] is None)
    attention = captured["MultiheadAttention"]
    assert attention.site is not None
    assert attention.site.source in ("module", "kernel")
    with torch.no_grad():
        expected = multihead_reference(module, query, key, allowed)
    weights = attention.dense()
    assert (weights - expected).abs().max() < 1e-5
    assert weights.max() > 0.3
    assert (weights.roll(1, 1) - expected).abs().max() > 1e-2
    if on["mask"]:
        with torch.no_grad():
            bare = multihead_reference(module, query, key, torch.ones_like(allowed))
        assert (weights - bare).abs().max() > 1e-2, "a dropped mask must show"


def test_multihead_attention_verifies_and_refuses() -> None:
    module, x = nn.MultiheadAttention(16, 4, dropout=0.1), torch.randn(5, 2, 16)
    with vistvis.capture(module.eval(), verify=True) as captured:
        module(x, x, x)
    assert captured["MultiheadAttention"].shape == (2, 4, 5, 5)
    for need_weights in (True, False):
        with pytest.raises(CaptureError, match="dropout is active"):  # noqa: SIM117
            with vistvis.capture(module.train()):
                module(x, x, x, need_weights=need_weights)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_encoder_with_its_fast_path(norm_first: bool, padded: bool, grad: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        for one in encoder.layers:
            with torch.no_grad():
                one.self_attn.in_proj_weight.mul_(3)
        x, padding = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
        padding[1, -2:] = True
        settings = {"src_key_padding_mask": padding} if padded else {}
        with torch.set_grad_enabled(grad):
            plain = encoder(x, **settings)
            with vistvis.capture(encoder) as captured:
                watched = encoder(x, **settings)
        assert torch.equal(plain, watched)
        assert list(captured) == ["layers.0.self_attn", "layers.1.self_attn"]
        # The reference: the same layers, step by step, without any fused path.
        y = x
        allowed = ~padding[:, None, None] if padded else torch.ones(2, 1, 1, 6, dtype=torch.bool)
        for one, attention in zip(encoder.layers, captured.values(), strict=True):
            inner = one.norm1(y) if norm_first else y
            with torch.no_grad():
                expected = multihead_reference(one.self_attn, inner, inner, allowed)
            difference = (attention.dense() - expected).abs()
            rows = difference.amax((1, 3))[~padding] if padded else difference
            assert rows.max() < 1e-5
            assert attention.dense().max() > 0.3
            with torch.enable_grad():  # gradients switch the fused path off
                y = one(y, **settings)
        if padded and not grad and not norm_first:
            assert not captured["layers.1.self_attn"].rows([4, 5], batch=1).any()


def test_decoder_self_and_cross() -> None:
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2)
    prepare(decoder)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 8, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        plain = decoder(x, memory, tgt_mask=causal)
        with vistvis.capture(decoder) as captured:
            watched = decoder(x, memory, tgt_mask=causal)
    assert torch.equal(plain, watched)
    kinds = {name: attention.site.kind for name, attention in captured.items()}
    assert list(kinds.values()) == ["self", "cross"] * 2
    assert captured["layers.0.self_attn"].dense().triu(1).abs().max() == 0
    assert captured["layers.1.multihead_attn"].shape == (2, 4, 5, 8)
    outcome = check_model(
        decoder, lambda: decoder(x, memory, tgt_mask=causal), name="decoder", family="torch"
    )
    assert not outcome.failures()


torchvision_models = pytest.importorskip("torchvision.models")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit", 32),
        pytest.param("swin_t", 64, marks=pytest.mark.slow),
        pytest.param("swin_v2_t", 64, marks=pytest.mark.slow),
    ],
)
def test_torchvision(name: str, size: int) -> None:
    if name == "vit":
        model = torchvision_models.VisionTransformer(size, 8, 2, 4, 32, 64)
    else:
        model = getattr(torchvision_models, name)()
    prepare(model)
    x = torch.randn(2, 3, size, size)
    outcome = check_model(model, lambda: model(x), name=name, family="torchvision")
    assert not outcome.failures()
    assert all(site.exact for site in outcome.sites)
    if name == "vit":
        with torch.no_grad(), vistvis.capture(model) as captured:
            model(x)
        layout = vistvis.TokenLayout.from_model(model, x)
        assert layout == vistvis.TokenLayout(1, (4, 4), ("cls",), 8)
        assert all(a.site.query_layout == layout for a in captured.values())


@pytest.mark.slow
def test_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("ViT-B-32", pretrained=None)
    prepare(model)
    x, text = torch.randn(2, 3, 224, 224), torch.randint(1, 100, (2, 77))
    outcome = check_model(model, lambda: model(x, text), name="ViT-B-32", family="open_clip")
    assert not outcome.failures()
    layout = vistvis.TokenLayout.from_model(model, x)
    assert layout == vistvis.TokenLayout(1, (7, 7), ("cls",), 32)
