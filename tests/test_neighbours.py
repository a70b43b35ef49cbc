"""Copies of a watched model, and other tools that wrap the same modules."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vistvis import capture


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Block()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        return x + self.mha(x, x, x, need_weights=False)[0]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def images() -> Tensor:
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))


def held(model: nn.Module) -> list[list[str]]:
    return [sorted(module.__dict__) for module in model.modules()]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_watched_model_is_a_plain_one(model: Model, way: str) -> None:
    before, x = held(model), images()
    with capture(model) as outer, capture(model, "attn") as captured:
        model(x)
        twin = COPIES[way](model)
        assert held(twin) == before
        with torch.no_grad():
            for weight in twin.parameters():
                weight.add_(1)
        assert not torch.equal(twin(x), model(x))
        assert captured.passes == outer.passes == 2
        with capture(twin) as own:
            twin(x)
        assert not torch.equal(own["attn"].query, captured["attn"].query)
    assert held(twin) == held(model) == before


def test_a_copy_keeps_what_others_put_on_the_instance(model: Model) -> None:
    model.forward = model.forward  # a bound method, which a deep copy binds to itself
    with capture(model):
        deep, shallow = copy.deepcopy(model), copy.copy(model)
    assert deep.__dict__["forward"] == deep.forward
    assert deep.forward.__self__ is deep
    assert shallow.__dict__["forward"] is model.__dict__["forward"]


class Tool:
    """Wraps `forward` as accelerate and others do, and puts back what it found."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, 0
        self.before = module.forward
        self.had = "forward" in module.__dict__
        self.wrapper = functools.update_wrapper(functools.partial(self.run), self.before)
        module.forward = self.wrapper

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.before(*args, **kwargs)

    def leave(self) -> None:
        if self.had:
            self.module.forward = self.before
        else:
            del self.module.forward


@pytest.mark.parametrize("name", ["", "attn", "mha"])
def test_a_wrapper_that_came_meanwhile_stays(model: Model, name: str) -> None:
    before, x, module = held(model), images(), model.get_submodule(name)
    plain = model(x)
    captured = capture(model)
    tool = Tool(module)
    model(x)
    assert len(captured["attn"].query) == 1
    captured.remove()
    assert module.__dict__["forward"] is tool.wrapper
    assert torch.equal(model(x), plain)
    assert tool.calls == 2
    assert captured.passes == 1
    with capture(model, "attn") as again:  # through the tool
        model(x)
    assert again.passes == 1
    assert tool.calls == 3
    tool.leave()
    assert torch.equal(copy.deepcopy(model)(x), plain)
    assert held(copy.deepcopy(model)) == before
    assert torch.equal(model(x), plain)
    assert held(model) == before


def test_a_wrapper_put_back_by_its_tool_is_used_again(model: Model) -> None:
    before, x = held(model), images()
    captured = capture(model)
    tool = Tool(model.mha)
    captured.remove()
    tool.leave()
    with capture(model, "mha") as again:  # reads PyTorch's own forward, which must be bare
        model(x)
    assert again["mha"].shape == (1, 2, 5, 5)
    assert held(model) == before


@pytest.mark.parametrize("bound", [False, True], ids=["deleted", "put back"])
def test_a_wrapper_that_left_meanwhile_does_not_come_back(model: Model, bound: bool) -> None:
    before, x = held(model), images()
    tool = Tool(model.attn)
    captured = capture(model)
    model(x)
    if bound:
        model.attn.forward = tool.before
    else:
        tool.leave()
    captured.remove()
    model(x)
    assert tool.calls == 1
    model.attn.__dict__.pop("forward", None)
    assert held(model) == before


def test_nothing_waits_where_the_wrapper_is_gone_for_good(model: Model) -> None:
    tool = Tool(model.attn)
    before = held(model)
    captured = capture(model)
    model.attn.forward = tool.wrapper
    captured.remove()
    assert held(model) == before


def test_captures_before_and_after_a_tool_both_read(model: Model) -> None:
    before, x = held(model), images()
    first = capture(model, "attn")
    tool = Tool(model.attn)
    second = capture(model, "attn")
    model(x)
    assert torch.equal(first["attn"].query, second["attn"].query)
    first.remove()
    model(x)
    assert (first.passes, second.passes) == (1, 2)
    second.remove()
    tool.leave()
    model(x)
    assert held(model) == before
