"""Softmaxes outside of all sites: where a class names one, and with `discover=True` everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from zoo import CrocoLike, VGGTAttention, VGGTLike

import vistvis
from vistvis.errors import CaptureError, VistvisWarning

SEEN: list[Tensor] = []


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():  # the witness is no call of the model's
        SEEN.append((q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Attend:
    """A plain class, found by nobody who reads the modules' code."""

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k, v)


TABLE: dict[str, Callable[..., Tensor]] = {"function": eager, "class": Attend.run}


class Mixer(nn.Module):
    """Names nothing; its code is looked up in a table."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.num_heads, self.how = 2, how
        self.both = nn.Linear(16, 48)
        with torch.no_grad():
            self.both.weight.mul_(10)

    def parts(self, x: Tensor) -> list[Tensor]:
        return [split(part) for part in self.both(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        return x + TABLE[self.how](*self.parts(x)).transpose(1, 2).flatten(2)


class Naming(Mixer):
    """Its code names a softmax, and nothing else of it looks like what is searched for."""

    def __init__(self) -> None:
        super().__init__("")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        with torch._C.DisableTorchFunction():  # the witness is no call of the model's
            SEEN.append((q.double() @ k.double().mT).softmax(-1))
        return x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Twice(Naming):
    """S and its transpose: two softmaxes in one run."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        scores = q @ k.mT
        out = scores.softmax(-1) @ v + scores.mT.softmax(-1) @ v
        with torch._C.DisableTorchFunction():
            SEEN.extend(s.double().softmax(-1) for s in (scores, scores.mT))
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.site, self.blocks = VGGTAttention(16, 2, None), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def witness() -> Iterator[None]:
    torch.manual_seed(0)
    SEEN.clear()
    yield
    assert _get_current_function_mode_stack() == []


def run(model: nn.Module, *args: Tensor, sites: Any = None, **options: Any) -> Any:
    """A watched forward, bit-equal to the plain one."""
    model.eval()
    with torch.no_grad():
        plain = model(*args)
        SEEN.clear()
        with vistvis.capture(model, sites, **options) as captured:
            out = model(*args)
    assert torch.equal(torch.as_tensor(out[0]), torch.as_tensor(plain[0]))
    assert all("forward" not in vars(module) for module in model.modules())
    return captured


def test_a_class_that_names_a_softmax_is_followed() -> None:
    captured = run(Model(Naming(), Twice()), torch.randn(2, 6, 16), verify=True)
    assert list(captured) == ["site", "blocks.0", "blocks.1", "blocks.1#2"]
    for weights, name in zip(SEEN, list(captured)[1:], strict=True):
        assert captured[name].site.source == "softmax"
        assert weights.max() > 0.3
        assert (captured[name][:].double() - weights).abs().max() < 1e-5
    # The two of one module are each other's transpose before the softmax, and not alike.
    assert (captured["blocks.1"][:].double() - SEEN[2]).abs().max() > 0.01


def test_it_is_counted_where_sites_were_asked_for() -> None:
    captured = run(Model(Naming(), Twice()), torch.randn(2, 6, 16), sites="site")
    assert list(captured) == ["site"]
    assert captured.report().splitlines()[-2:] == [
        "seen outside all sites: softmax, while 'blocks.0' (Naming) ran, 1 time",
        "seen outside all sites: softmax, while 'blocks.1' (Twice) ran, 2 times",
    ]


@pytest.mark.parametrize("how", ["function", "class"])
def test_discover_follows_everything(how: str) -> None:
    model, x = Model(Mixer(how), nn.Sequential(Mixer(how))), torch.randn(2, 6, 16)
    assert list(run(model, x)) == ["site"]  # what discover is for
    captured = run(model, x, discover=True, verify=True)
    assert list(captured) == ["site", "blocks.0", "blocks.1.0"]
    for weights, name in zip(SEEN, list(captured)[1:], strict=True):
        assert captured[name].shape == (2, 2, 6, 6)
        assert weights.max() > 0.3
        assert (captured[name][:].double() - weights).abs().max() < 1e-5
    asked = run(model, x, sites="site", discover=True)
    assert "softmax, while 'blocks.1.0' (Mixer) ran, 1 time" in asked.report()


def test_nothing_is_taken_twice() -> None:
    """A class that names its softmax inside a root that is followed, and sites with eager code."""
    x = torch.randn(1, 6, 16)
    model = Model(Naming(), Mixer("class"))
    assert list(run(model, x, discover=True)) == ["site", "blocks.0", "blocks.1"]
    images = torch.randn(2, 3, 28, 42)
    plain, discovered = (run(VGGTLike(), images, discover=d) for d in (False, True))
    assert list(plain) == list(discovered)
    pos = torch.cartesian_prod(torch.arange(2), torch.arange(3))[None]
    tokens = torch.randn(1, 6, 32)
    captured = run(CrocoLike(), tokens, tokens, pos, pos, discover=True)
    assert list(captured) == ["attn", "cross_attn"]


class Parts(Mixer):
    """Product, softmax and dropout in small modules of their own."""

    def __init__(self) -> None:
        super().__init__("")
        self.product, self.normal, self.drop = Product(), Normal(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        weights = self.drop(self.normal(self.product(q, k.mT)))
        return x + self.product(weights, v).transpose(1, 2).flatten(2)


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Normal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def test_small_modules_are_parts_of_what_calls_them() -> None:
    captured = run(Model(Parts()), torch.randn(2, 6, 16), discover=True)
    # By its innermost running module: the product's, where weights meet values.
    assert list(captured)[1:] == ["blocks.0.product"]
    assert captured["blocks.0.product"].shape == (2, 2, 6, 6)


class Scores(nn.Module):
    """Class scores that meet nothing, and a pooling whose weights come of no two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.to_weights, self.classes = nn.Linear(16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.to_weights(x).softmax(1)
        pooled = (weights.mT @ x)[:, 0]
        return self.classes(pooled).softmax(-1)


def test_other_softmaxes_are_counted_and_left_alone() -> None:
    captured = run(Model(Naming(), Scores()), torch.randn(2, 6, 16), discover=True)
    assert list(captured) == ["site", "blocks.0"]
    # The pooling's weights come of no product; the class scores do, and meet nothing.
    assert captured.report().splitlines()[-1] == (
        "seen outside all sites: softmax that meets no values, while 'blocks.1' (Scores) ran, "
        "1 time"
    )


def test_dropout_is_refused_and_spoils_nothing() -> None:
    model = Model(Parts(), Naming())
    x = torch.randn(2, 6, 16)
    with (
        pytest.warns(VistvisWarning, match="dropout is active on its weights"),
        torch.no_grad(),
        vistvis.capture(model.train(), discover=True) as captured,
    ):
        model(x)
    assert captured["blocks.1"].shape == (2, 2, 6, 6)
    with pytest.raises(CaptureError, match="dropout is active"):
        captured["blocks.0.product"]
