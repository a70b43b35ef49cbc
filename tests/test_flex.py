"""`flex_attention`, torch's own: bare, compiled and through transformers; registered functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from standins import SEEN, flash_attn_func
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vistvis
from vistvis import Attention
from vistvis.errors import CaptureError
from vistvis.hooks import fused, indices, kernels

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
compiled = torch.compile(flex_attention, backend="eager")
Mod = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert not kernels._OWNERS
    assert id(flex_attention) not in kernels._KERNELS


class Flex(nn.Module):
    """Keys of a context, in 2 heads for 4; `bias` is what its functions close over."""

    num_heads = 4

    def __init__(self, score_mod: str = "", block: Any = None, quick: bool = False) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32)
        self.score_mod, self.block, self.quick = score_mod, block, quick
        self.bias = torch.randn(4, 12, 12)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = 6 * self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        bias = self.bias
        mods: dict[str, Mod | None] = {
            "": None,
            "bias": lambda score, b, h, i, j: score + bias[h, i, j],
            "cap": lambda score, b, h, i, j: 2 * torch.tanh(score / 2) - 0.3 * (i - j).abs(),
        }
        attend = compiled if self.quick else flex_attention
        out = attend(q, k, v, mods[self.score_mod], self.block, scale=0.3, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def run(model: nn.Module, **options: Any) -> Attention:
    """What is read, once the model gives the same as without."""
    x, context = torch.randn(2, 6, 32), torch.randn(2, 9, 32)
    with torch.no_grad():
        plain = model.eval()(x, context)
        with vistvis.capture(model, verify=True, **options) as captured:
            assert torch.equal(model(x, context), plain)
    return captured["Flex"]


def block_mask() -> BlockMask:
    def document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i // 4 == j // 4) | (j == b)

    return create_block_mask(document, 2, None, 6, 9, device="cpu")


def truth(attention: Attention, model: Flex) -> Tensor:
    """From the formula, in float64."""
    q, k = attention.query.double(), attention.key.double().repeat_interleave(2, 1)
    scores, i, j = 0.3 * q @ k.mT, torch.arange(6)[:, None], torch.arange(9)
    if model.score_mod == "bias":
        scores = scores + model.bias[:, :6, :9].double()
    if model.score_mod == "cap":
        scores = 2 * torch.tanh(scores / 2) - 0.3 * (i - j).abs()
    if model.block is not None:
        b = torch.arange(2).view(2, 1, 1, 1)
        scores = scores.masked_fill(~((i // 4 == j // 4) | (j == b)), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("score_mod", ["", "bias", "cap"])
@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention(score_mod: str, masked: bool, quick: bool) -> None:
    model = Flex(score_mod, block_mask() if masked else None, quick)
    attention = run(model)
    assert attention.shape == (2, 4, 6, 9)
    assert attention.mask is None
    assert attention.site is not None
    assert attention.site.source == "kernel"
    expected = truth(attention, model)
    assert 0.3 < expected.max() <= 1
    torch.testing.assert_close(attention.dense().double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("part", ["score_mod", "mask_mod"])
def test_a_dropped_function_goes_red(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused._READERS["flex_attention"]
    broken = lambda *args: right(*args)._replace(**{part: None})  # noqa: E731
    monkeypatch.setitem(fused._READERS, "flex_attention", broken)
    with pytest.raises(CaptureError, match="differs from the kernel's output"):
        run(Flex("bias", block_mask()))


def test_tensors_of_a_function_stay_as_they_were() -> None:
    model = Flex("bias")
    attention = run(model)
    attention.rows(0)
    model.bias.add_(1)
    with pytest.raises(CaptureError, match="score_mod or mask_mod uses was written into"):
        attention.rows(0)


def test_a_function_keeps_what_it_closes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested, in a tuple, and over itself; and with the check off, a later write does show."""
    table, steps = torch.tensor([1.0, 2.0]), (lambda i: table[i],)

    def mod(score: Tensor, i: Tensor) -> Tensor:
        return score + steps[0](i) if score < 9 else mod(score - 9, i)

    keeping = indices.Keeping()
    one, two = (indices.kept_function(mod, keeping) for _ in range(2))
    assert one(torch.tensor(10.0), torch.tensor(1)) == 3
    assert one.__wrapped__ is mod
    table[1] = 5.0
    with pytest.raises(CaptureError):
        two(torch.tensor(1.0), torch.tensor(1))


def test_blocks_left_out_without_a_function_are_refused() -> None:
    counts = torch.ones(1, 1, 1, dtype=torch.int32)
    order = torch.tensor([[[[0, 1]]]], dtype=torch.int32)
    block = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=(8, 8), seq_lengths=(6, 9))
    with pytest.raises(CaptureError, match="leaves out blocks and has no mask_mod"):
        run(Flex("", block))


# -- transformers --------------------------------------------------------------------------------


def vit(attention: str) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        image_size=12, patch_size=4, attn_implementation=attention,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        if ".query." in name or ".key." in name or "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(40)
    return model


def same_as_eager(model: nn.Module, *inputs: Any, **named: Any) -> None:
    """Rows by a kernel are those of the same model's eager softmax."""
    with torch.no_grad():
        plain = model(*inputs, **named).last_hidden_state
        with vistvis.capture(model, verify=True) as by_kernel:
            assert torch.equal(model(*inputs, **named).last_hidden_state, plain)
        model.set_attn_implementation("eager")
        with vistvis.capture(model) as by_softmax:
            model(*inputs, **named)
    assert len(by_kernel) == len(by_softmax) == 2
    for name, read in by_kernel.items():
        assert read.site is not None
        assert read.site.source == "kernel"
        expected = by_softmax[name].dense()
        assert 0.2 < expected.max() <= 1
        torch.testing.assert_close(read.dense(), expected, atol=5e-5, rtol=0)


@pytest.fixture(params=["uncompiled", pytest.param("inductor", marks=pytest.mark.slow)])
def _stance(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.compiler.set_stance("force_eager" if request.param == "uncompiled" else "default"):
        yield


@pytest.mark.usefixtures("_stance")
@pytest.mark.filterwarnings("ignore:_compile flag")
def test_transformers_flex_attention() -> None:
    pytest.importorskip("transformers")
    same_as_eager(vit("flex_attention"), torch.randn(2, 3, 12, 12))


@pytest.mark.usefixtures("_stance")
@pytest.mark.filterwarnings("ignore:_compile flag")
def test_transformers_flex_attention_with_padding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=50, attn_implementation="flex_attention",
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(30)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    same_as_eager(model, torch.randint(0, 50, (2, 7)), attention_mask=mask)


def test_a_registered_function_that_calls_a_kernel() -> None:
    transformers = pytest.importorskip("transformers")

    def mine(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        turned = [one.transpose(1, 2) for one in (query, key, value)]
        return flash_attn_func(*turned, softmax_scale=rest.get("scaling")), None

    transformers.AttentionInterface.register("mine", mine)
    SEEN.clear()
    same_as_eager(vit("mine"), torch.randn(2, 3, 12, 12))
    assert SEEN


def test_a_sink_that_the_kernel_does_not_show_is_refused() -> None:
    model = Flex()
    model.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(CaptureError, match="has a sink beside the keys"):
        run(model)


def test_in_compiled_code_it_is_refused_by_name() -> None:
    model, x, context = Flex().eval(), torch.randn(2, 6, 32), torch.randn(2, 9, 32)
    torch.compiler.reset()
    with torch.no_grad(), vistvis.capture(model) as captured:
        out = torch.compile(model, backend="eager")(x, context)
        assert torch.equal(out, Flex.forward(model, x, context))
        with pytest.raises(CaptureError, match="Flex can't be read in compiled code"):
            captured["Flex"]
    torch.compiler.reset()
