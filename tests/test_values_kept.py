"""Values are kept beside queries and keys: weights times values are what each kernel gave.

The witness is what enters the module's output projection, or leaves the kernel, noted by a hook of
its own; nothing of the package has a part in it.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import outputs_equal, prepare
from oracle import sharpen
from standins import flash_attn_func, flash_attn_varlen_func, memory_efficient_attention, package
from test_capture import GLOBAL, sharp_model
from test_families_multiview import CASES, made
from test_joined import (
    Block,
    by_queries,
    by_windows,
    each,
    each_head,
    each_without_batch,
    eager_heads,
    eager_slices,
    sdpa,
)
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import vistvis
from vistvis import Attention
from vistvis.errors import CaptureError
from vistvis.hooks import joining


def times(attention: Attention) -> Tensor:
    """Weights times values in float64, heads side by side: `(B, Nq, h · dv)`."""
    assert attention.value is not None
    value = attention.value.double()
    heads = [h * value.shape[1] // attention.shape[1] for h in range(attention.shape[1])]
    return (attention.dense().double() @ value[:, heads]).transpose(1, 2).flatten(2)


def close(attention: Attention, out: Tensor, atol: float = 1e-5) -> None:
    """What the kernel gave is weights times values; a token or a head off would be seen."""
    assert 0.3 < attention.dense().max() <= 1
    torch.testing.assert_close(times(attention), out.double(), atol=atol, rtol=0)
    assert attention.value is not None
    for dim in (1, 2):
        if attention.value.shape[dim] > 1:
            wrong = times(attention.replace(value=attention.value.roll(1, dim)))
            assert (wrong - out).abs().max() > 100 * atol


@contextmanager
def projected(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What enters the output projection of every site, by the site's name."""
    seen: dict[str, Tensor] = {}
    handles = []
    for site in vistvis.find_sites(model):
        child = getattr(site.module, "proj", None) or site.module.out_proj

        def note(_: nn.Module, inputs: Any, name: str = site.name) -> None:
            seen[name] = inputs[0].detach().clone()

        handles.append(child.register_forward_pre_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


# -- every way a site is read --------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_structures_of_families(case: str) -> None:
    model, args, kwargs = made(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or "q_norm.weight" in name or name.endswith("q_proj.weight"):
                parameter.mul_(2)
        plain = model(*args, **kwargs)
        with projected(model) as out, vistvis.capture(model, values=True) as captured:
            watched = model(*args, **kwargs)
    assert outputs_equal(plain, watched)
    for name, attention in captured.items():
        entered = out[name][:, ::3] if case == "FastVGGT" else out[name]
        close(attention, entered)


@pytest.mark.parametrize("layout", ["fused", "apart"])
@pytest.mark.parametrize(
    "attend",
    [
        *(sdpa, by_queries(4, 4, 2), by_windows(4, 6), each, each_without_batch, each_head),
        *(eager_heads, eager_slices(1), eager_slices(2)),
    ],
)
def test_calls_that_are_one(attend: Callable[..., Tensor], layout: str) -> None:
    model, x = Block(attend, layout).eval(), torch.randn(2, 10, 16)
    for around in (torch.no_grad(), torch.inference_mode()):
        with around, projected(model) as out, vistvis.capture(model, values=True) as captured:
            model(x)
        close(captured["Block"], out["Block"])


def test_chunks_of_queries_share_their_values() -> None:
    model = Block(by_queries(4, 4, 2), "apart").eval()
    with torch.no_grad(), vistvis.capture(model, values=True) as captured:
        model(torch.randn(2, 10, 16))
    value = captured["Block"].value
    assert value is not None
    assert value.shape == (2, 2, 10, 8)


@pytest.mark.parametrize("attend", [by_windows(4, 6), each, each_head, eager_slices(2)])
def test_parts_in_the_wrong_order_are_seen(
    attend: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = joining._combined

    def turned(parts: Any, cat: Any, **options: Any) -> Any:
        right = original(parts, cat, **options)
        wrong = cat([part.attention.value for part in [*parts[1:], parts[0]]])
        return replace(right, attention=right.attention.replace(value=wrong))

    monkeypatch.setattr(joining, "_combined", turned)
    model, x = Block(attend).eval(), torch.randn(2, 10, 16)
    with torch.no_grad(), projected(model) as out, vistvis.capture(model, values=True) as captured:
        model(x)
    with pytest.raises(AssertionError, match="not close"):
        close(captured["Block"], out["Block"])


def other_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(q[:, :, :5], k, v), sdpa(q[:, :, 5:], k, v + 1)], 2)


def of_two_widths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, -1)
    return torch.einsum("bhqk,bhkde->bhqde", weights, v.unflatten(-1, (2, 4))).flatten(3)


@pytest.mark.parametrize("attend", [other_values, of_two_widths])
def test_what_cannot_be_told_is_an_error_where_it_is_asked_for(
    attend: Callable[..., Tensor],
) -> None:
    model, x = Block(attend).eval(), torch.randn(2, 10, 16)
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(x)
    assert captured["Block"].value is None
    with pytest.raises(CaptureError, match="'Block': values=True needs the values"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model, values=True):
            model(x)


def test_values_of_more_items_than_weights() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q[:1], k[:1], v)

    model, x = Block(attend).eval(), torch.randn(2, 10, 16)
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(x)
    assert captured["Block"].shape == (1, 2, 10, 10)
    with pytest.raises(CaptureError, match="of more items than its weights"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model, values=True):
            model(x)


class Kernels(nn.Module):
    """Kernels by name, on queries of 4 heads; keys and values of 2, 4 or 1."""

    num_heads = 4

    def __init__(self, how: str, key_heads: int = 4) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 16 * key_heads)
        self.how = how
        self.proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q = 6 * self.q(x).unflatten(-1, (4, 8))
        k, v = self.kv(x).unflatten(-1, (2, -1, 8)).unbind(2)
        turned = [one.transpose(1, 2) for one in (q, k, v)]
        if self.how == "flash":
            out = sys.modules["flash_attn"].flash_attn_func(q, k, v, causal=True)
        elif self.how == "varlen":
            flat, bounds = [one.flatten(0, 1) for one in (q, k, v)], torch.tensor([0, 5, 12])
            out = sys.modules["flash_attn"].flash_attn_varlen_func(*flat, bounds, bounds, 7, 7)
            out = out.unflatten(0, x.shape[:2])
        elif self.how == "xformers":
            out = sys.modules["xformers.ops"].memory_efficient_attention(q, k, v)
        elif self.how == "flex":
            bias = torch.arange(6.0)
            out = flex_attention(
                *turned, lambda s, b, h, i, j: s + bias[j] / 4, enable_gqa=True
            ).transpose(1, 2)
        elif self.how == "sdpa":
            out = sdpa(*turned, enable_gqa=len(k) > 0 and k.shape[2] > 1).transpose(1, 2)
        else:
            weights = torch.softmax(turned[0] @ turned[1].mT / 2, -1)
            out = (weights @ turned[2]).transpose(1, 2)
        return self.proj(out.flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("how", "key_heads"),
    [
        *(("flash", 4), ("flash", 2), ("varlen", 2), ("xformers", 4), ("flex", 2), ("flex", 4)),
        *(("sdpa", 2), ("sdpa", 1), ("sdpa", 4), ("eager", 4), ("eager", 1)),
    ],
)
def test_kernels_and_grouped_values(
    how: str, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = package("flash_attn", flash_attn_func, flash_attn_varlen_func)
    for module in (flash, package("xformers.ops", memory_efficient_attention)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = Kernels(how, key_heads).eval()
    x = torch.randn(1, 12, 32) if how == "varlen" else torch.randn(2, 6, 32)
    with (
        torch.no_grad(),
        projected(model) as out,
        vistvis.capture(model, values=True, verify=True) as captured,
    ):
        model(x)
    attention = captured["Kernels"]
    close(attention, out["Kernels"])
    assert attention.value is not None
    assert attention.value.shape[1] == key_heads  # as it came, not repeated


class OneToken(nn.Module):
    """With one query token, grouped heads lie where queries do, as transformers packs them."""

    num_heads, num_key_value_groups = 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(32, 32), nn.Linear(32, 32), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q = 6 * self.q(x[:, -1]).unflatten(-1, (2, 2, 8))
        k, v = self.kv(x).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.flatten(1)[:, None])


def test_grouped_values_of_one_token() -> None:
    model = OneToken().eval()
    with (
        torch.no_grad(),
        projected(model) as out,
        vistvis.capture(model, values=True, verify=True) as captured,
    ):
        model(torch.randn(2, 6, 32))
    assert captured["OneToken"].shape == (2, 4, 1, 6)
    close(captured["OneToken"], out["OneToken"])
    assert captured["OneToken"].value.shape == (2, 2, 6, 8)


@pytest.mark.parametrize("name", ["ViT", "Swin (bias, shift mask)", "CrossViT (cross-attention)"])
@pytest.mark.parametrize("fused", [False, True])
def test_models_of_timm(name: str, fused: bool) -> None:
    pytest.importorskip("timm")
    from test_families_timm import MODELS

    make, size = MODELS[name]
    model, images = make(), torch.randn(2, 3, size, size)
    prepare(model, lambda: model(images))
    sites = [site for site in vistvis.find_sites(model) if not site.refused]
    for site in sites:
        if hasattr(site.module, "fused_attn"):
            site.module.fused_attn = fused

    def largest() -> dict[str, float]:
        with torch.no_grad(), vistvis.capture(model) as captured:
            model(images)
        return {name: float(one.dense().max()) for name, one in captured.items()}

    sharpen({site.name: site.module for site in sites}, largest)
    with torch.no_grad(), projected(model) as out, vistvis.capture(model, values=True) as captured:
        model(images)
    assert len(captured) == len(sites)
    for name, attention in captured.items():
        close(attention, out[name])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_multihead_attention(grad: bool, need_weights: bool, fast: bool) -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        module.in_proj_weight.mul_(4)
        module.in_proj_bias.normal_()
        module.out_proj.weight.copy_(torch.eye(16))
        module.out_proj.bias.zero_()
    x = torch.randn(2, 7, 16)
    padding = None if fast else torch.arange(7)[None].expand(2, 7) > 4
    with torch.set_grad_enabled(grad), vistvis.capture(module, values=True) as captured:
        out, _ = module(x, x, x, need_weights=need_weights, key_padding_mask=padding)
    close(captured["MultiheadAttention"], out.detach())


def test_encoder_layers_with_their_fast_path() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 1).eval()
        mine = encoder.layers[0].self_attn
        with torch.no_grad():
            mine.in_proj_weight.mul_(4)
            x, padding = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
            padding[1, -2:] = True
            with vistvis.capture(encoder, values=True) as captured:
                encoder(x, src_key_padding_mask=padding)
            with pytest.raises(CaptureError, match="fused native kernel"):  # noqa: SIM117
                with vistvis.capture(encoder, verify=True):
                    encoder(x, src_key_padding_mask=padding)
    value = captured["layers.0.self_attn"].value
    assert value is not None
    expected = x @ mine.in_proj_weight[32:].T + mine.in_proj_bias[32:]
    torch.testing.assert_close(value.transpose(1, 2).flatten(2)[0], expected[0])
    torch.testing.assert_close(value.transpose(1, 2).flatten(2)[1, :4], expected[1, :4])


@pytest.mark.slow  # compiling takes its time; verify=True reads values so in test_capture too
def test_compiled() -> None:
    torch._dynamo.reset()
    model, images = sharp_model(depth=1), torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        with vistvis.capture(model, values=True) as eager:
            model(images)
        compiled = torch.compile(model, backend="eager")
        with vistvis.capture(compiled, values=True) as captured:
            compiled(images)
        with vistvis.capture(compiled) as without:
            compiled(images)
    torch._dynamo.reset()
    for name, attention in eager.items():
        assert attention.value is not None
        assert captured[name].value is not None
        assert torch.equal(captured[name].value, attention.value)
        assert without[name].value is None


# -- options -------------------------------------------------------------------------------------


def run(**options: Any) -> Attention:
    with torch.no_grad(), vistvis.capture(sharp_model(), GLOBAL, **options) as captured:
        captured._model(torch.rand(2, 3, 28, 42))
    found: Any = captured[GLOBAL]
    return found


def test_none_unless_asked_for() -> None:
    assert run().value is None
    assert run(verify=True).value is None
    assert run(verify=True, values=True).value is not None
    without, with_values = run(), run(values=True)
    assert with_values.value is not None
    assert with_values.nbytes == without.nbytes + with_values.value.nbytes


def test_before_the_rotary_embedding_values_are_the_kernels() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    usual = run(values=True)
    torch.set_rng_state(state)
    before = run(values=True, rope=False)
    assert before.value is not None
    assert usual.value is not None
    assert torch.equal(before.value, usual.value)
    assert not torch.equal(before.query, usual.query)


def test_windows_before_the_rotary_embedding_stay_windows() -> None:
    model, x = Block(by_windows(4, 6)).eval(), torch.randn(2, 10, 16)
    for options in ({"source": "projection"}, {"rope": False}):
        with (
            torch.no_grad(),
            projected(model) as out,
            vistvis.capture(model, values=True, **options) as captured,
        ):
            model(x)
        assert captured["Block"].segments is not None
        close(captured["Block"], out["Block"])


@pytest.mark.parametrize("options", [{"keep": "cpu"}, {"accumulate": True}])
def test_other_ways_to_keep(options: dict[str, Any]) -> None:
    found: Any = run(values=True, **options)
    attention = found[0] if "accumulate" in options else found
    assert attention.value.shape == attention.key.shape


def test_autocast_keeps_what_the_kernel_used() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        attention = run(values=True, verify=True)
    assert attention.value is not None
    assert attention.value.dtype == torch.bfloat16


def test_a_later_write_into_values_is_an_error() -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            out = F.scaled_dot_product_attention(q, k, v)
            v.zero_()
            return self.proj(out.transpose(1, 2).reshape(x.shape))

    model, x = Writes(sdpa, "apart").eval(), torch.randn(2, 10, 16)
    with torch.no_grad(), vistvis.capture(model, values=True) as captured:
        model(x)
    for use in (lambda a: a.rows(0), lambda a: a.to(torch.float64), pickle.dumps):
        with pytest.raises(CaptureError, match="values or mask of site 'Writes' were written into"):
            use(captured["Writes"])
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(x)
    captured["Writes"].rows(0)  # nothing of it is wrong
    with torch.inference_mode(), vistvis.capture(model, values=True) as captured:
        model(x)
    value = captured["Writes"].value
    assert value is not None
    assert value.abs().max() > 0


def test_a_write_between_chunks_is_an_error() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.contiguous()
        first = sdpa(q[:, :, :5], k, v)
        second = sdpa(q[:, :, 5:], k, v)
        q.zero_()
        return torch.cat([first, second], 2)

    model = Block(attend, "apart").eval()
    with pytest.raises(CaptureError, match="written into"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model):
            model(torch.randn(1, 10, 16))
