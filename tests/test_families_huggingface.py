"""Hugging Face transformers: their SDPA path runs, their eager attentions are the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import check_model, prepare
from torch import Tensor, nn

import vistvis

transformers = pytest.importorskip("transformers")

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 56,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
}
T = transformers


def vision(name: str, **more: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        config = getattr(T, f"{name}Config")(**VISION, **more)
        return getattr(T, f"{name}Model")(config), {"pixel_values": torch.randn(2, 3, 56, 56)}

    return make


def swin() -> tuple[nn.Module, dict[str, Any]]:
    config = T.SwinConfig(
        image_size=56, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=7
    )
    return T.SwinModel(config), {"pixel_values": torch.randn(2, 3, 56, 56)}


def sam() -> tuple[nn.Module, dict[str, Any]]:
    config = T.SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_dim=64,
        image_size=112,
        patch_size=14,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=16,
    )
    return T.SamVisionModel(config), {"pixel_values": torch.randn(2, 3, 112, 112)}


def tokens(**more: Any) -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": torch.randint(3, 60, (2, 9)), "attention_mask": mask, **more}


def language(name: str, **more: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        config = getattr(T, f"{name}Config")(**TEXT, num_key_value_heads=2, **more)
        return getattr(T, f"{name}ForCausalLM")(config), tokens(use_cache=False)

    return make


def crossing() -> tuple[nn.Module, dict[str, Any]]:
    """A picture encoder whose tokens a text decoder attends to."""
    encoder = T.ViTModel(T.ViTConfig(**VISION))
    decoder = T.BertLMHeadModel(T.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
    inputs = tokens(use_cache=False)
    return T.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder), {
        "pixel_values": torch.randn(2, 3, 56, 56),
        "decoder_input_ids": inputs["input_ids"],
        "decoder_attention_mask": inputs["attention_mask"],
        "use_cache": False,
    }


CASES = {
    "ViT": vision("ViT"),
    "DINOv2": vision("Dinov2"),
    "DINOv2 with registers": vision("Dinov2WithRegisters", num_register_tokens=4),
    "DINOv3": vision("DINOv3ViT", num_register_tokens=4),
    "CLIP vision": vision("CLIPVision"),
    "SigLIP": vision("SiglipVision"),
    "Swin": swin,
    "SAM vision encoder": sam,
    "Qwen2 (GQA, causal, RoPE)": language("Qwen2"),
    "Llama (GQA, causal, RoPE)": language("Llama"),
    "ViT to BERT (cross-attention)": crossing,
}


def eager_weights(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """The attentions that the model itself returns in its eager mode, in float64."""
    double: Any = copy.deepcopy(model).double()
    double.set_attn_implementation("eager")
    given = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    with torch.no_grad():
        out = double(**given, output_attentions=True)
    return {"attentions": list(out.attentions)}


@pytest.mark.parametrize("case", CASES)
def test_exact_and_unchanged(case: str) -> None:
    """Against a float64 copy of every attention module on its own input."""
    model, inputs = CASES[case]()
    prepare(model)
    outcome = check_model(model, lambda: model(**inputs), name=case, family="transformers")
    assert not outcome.failures()
    assert all(site.exact for site in outcome.sites)
    assert all(site.largest > 0.25 for site in outcome.sites)


WITH_ATTENTIONS = [c for c in CASES if c not in ("Swin", "SAM vision encoder") and " to " not in c]


@pytest.mark.parametrize("case", WITH_ATTENTIONS)
def test_equal_to_its_own_eager_attentions(case: str) -> None:
    model, inputs = CASES[case]()
    prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    expected = eager_weights(model, inputs)
    before = model.config._attn_implementation
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(**inputs)
    assert model.config._attn_implementation == before
    groups: dict[str, list[str]] = {}
    for name, attention in captured.items():
        if attention.site.source == "module":
            continue  # SigLIP's pooling head, which its attentions leave out
        groups.setdefault("attentions", []).append(name)
    assert set(groups) == set(expected)
    for side, names in groups.items():
        assert len(names) == len(expected[side])
        for name, reference in zip(names, expected[side], strict=True):
            difference = (captured[name].dense() - reference).abs()
            if case.startswith(("Qwen2", "Llama")):
                difference = difference[:, :, :6]  # padded queries mean nothing
            # The float32 model's own activations differ from the float64 copy's by rounding that
            # grows from block to block.
            assert difference.max() < 5e-5, name


def test_kinds_heads_and_layouts() -> None:
    model, inputs = CASES["ViT to BERT (cross-attention)"]()
    sites = vistvis.find_sites(model)
    assert [site.kind for site in sites].count("cross") == 2
    assert {site.heads for site in sites} == {4}
    with torch.no_grad(), vistvis.capture(model.eval(), "**.crossattention.**") as captured:
        model(**inputs)
    for attention in captured.values():
        assert attention.shape == (2, 4, 9, 17)
    for case, special in (("DINOv3", 5), ("SigLIP", 0), ("CLIP vision", 1)):
        model, inputs = CASES[case]()
        layout = vistvis.TokenLayout.from_model(model, inputs["pixel_values"])
        assert (layout.num_special, layout.grid) == (special, (4, 4))
        with torch.no_grad(), vistvis.capture(model.eval()) as captured:
            model(**inputs)
        assert next(iter(captured.values())).site.query_layout == layout


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_step_by_step(padded: bool) -> None:
    """With a cache, one query meets every earlier key; grouped heads stay heads."""
    model, inputs = CASES["Qwen2 (GQA, causal, RoPE)"]()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].flip(1)
    mask = mask if padded else torch.ones_like(mask)
    with torch.no_grad():
        with vistvis.capture(model) as whole:
            model(ids, attention_mask=mask)
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        with vistvis.capture(model) as last:
            model(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
    for name, attention in last.items():
        assert attention.shape == (2, 4, 1, 9)
        assert (attention.dense() - whole[name][:, :, -1:]).abs().max() < 1e-4


def test_generate_runs_many_passes() -> None:
    model, inputs = CASES["Llama (GQA, causal, RoPE)"]()
    model.eval()
    with vistvis.capture(model, accumulate=True) as captured:
        model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    kept: Any = captured["model.layers.0.self_attn"]
    assert [one.shape[2:] for one in kept] == [(9, 9), (1, 10), (1, 11)]


def test_flex_attention_is_read_as_well() -> None:
    model, inputs = CASES["ViT"]()
    model.eval()
    with torch.no_grad(), vistvis.capture(model) as expected:
        model(**inputs)
    model.config._attn_implementation = "flex_attention"
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(**inputs)
    assert list(captured) == list(expected)
    for name, attention in captured.items():
        assert (attention.dense() - expected[name].dense()).abs().max() < 1e-5
