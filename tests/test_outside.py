"""Kernel calls outside of all sites: laid to the module that ran, kept where nobody asked for
certain sites, and reported either way."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from zoo import VGGTAttention

import vistvis
from vistvis.errors import CaptureError, SiteError, VistvisWarning
from vistvis.hooks import account

SEEN: list[tuple[Tensor, Tensor]] = []


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    SEEN.append((q.detach().double(), k.detach().double()))
    return F.scaled_dot_product_attention(q, k, v)


# Looked up by a string: what a name of code can't tell.
TABLE = {"fused": fused}


def split(x: Tensor, heads: int = 2) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Mixing(nn.Module):
    """Calls its kernel through a table: no site by its code. `calls` times in a run."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.num_heads, self.calls = 2, calls
        self.qkv, self.drop = nn.Linear(16, 48), nn.Dropout(0.5)
        with torch.no_grad():
            self.qkv.weight.mul_(12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        out = x
        for call in range(self.calls):
            out = out + TABLE["fused"](q * (call + 1), k, v).transpose(1, 2).flatten(2)
        return out


class Model(nn.Module):
    """One site, and blocks that are none."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.attn, self.blocks = VGGTAttention(16, 2, None), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def witness() -> Iterator[None]:
    torch.manual_seed(0)
    SEEN.clear()
    yield
    assert _get_current_function_mode_stack() == []


def expected(call: int) -> Tensor:
    q, k = SEEN[call]
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def run(model: nn.Module, x: Tensor, *sites: Any, **options: Any) -> tuple[Tensor, Any]:
    """A watched forward, bit-equal to the plain one."""
    model.eval()
    before = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        plain = model(x)
        SEEN.clear()
        with vistvis.capture(model, *sites, **options) as captured:
            out = model(x)
    assert torch.equal(out, plain)
    assert before == [set(vars(module)) for module in model.modules()]
    return out, captured


def test_a_call_in_a_plain_function_is_kept_under_the_module_that_ran() -> None:
    model = Model(Mixing(), Mixing(calls=3))
    _, captured = run(model, torch.randn(2, 6, 16), verify=True)
    names = ["attn", "blocks.0", "blocks.1", "blocks.1#2", "blocks.1#3"]
    assert list(captured) == names
    assert captured.sites.names == names
    for call, name in enumerate(names[1:]):
        assert captured[name].shape == (2, 2, 6, 6)
        assert (captured[name][:].double() - expected(call)).abs().max() < 1e-5
        assert expected(call).max() > 0.3
    # The check has teeth: the calls of one module are not alike.
    assert (captured["blocks.1#2"][:].double() - expected(1)).abs().max() > 0.01
    site = captured["blocks.1#2"].site
    assert (site.kind, site.block, site.module, site.source) == ("self", 1, "Mixing", "kernel")
    assert "1 sites expected, 4 more seen, 5 captured" in captured.report()
    assert "outside" not in captured.report()


def test_calls_are_counted_where_sites_were_asked_for() -> None:
    model = Model(Mixing(), Mixing(calls=3), VGGTAttention(16, 2, None))
    _, captured = run(model, torch.randn(2, 6, 16), "attn")
    assert list(captured) == ["attn"]
    lines = captured.report().splitlines()[-3:]
    assert lines == [
        "seen outside all sites: scaled_dot_product_attention, while 'blocks.0' (Mixing) ran, "
        "1 time",
        "seen outside all sites: scaled_dot_product_attention, while 'blocks.1' (Mixing) ran, "
        "3 times",
        "1 site not chosen made 1 kernel call",
    ]
    with pytest.raises(SiteError, match=r"no site 'blocks\.0'.*find_sites\(model, example=…\)"):
        vistvis.capture(model, "blocks.0")


def test_without_the_account_they_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "_KERNELS", frozenset())
    _, captured = run(Model(Mixing()), torch.randn(2, 6, 16))
    assert list(captured) == ["attn"]
    assert "outside" not in captured.report()


def test_a_model_without_any_site_by_its_code() -> None:
    model = nn.Sequential(Mixing(), nn.Linear(16, 16))
    capture = vistvis.capture(model)
    with pytest.raises(CaptureError, match="was not run while it was captured"):
        list(capture)
    capture.close()
    _, captured = run(model, torch.randn(1, 6, 16))
    assert list(captured) == ["0"]
    assert (captured["0"][:].double() - expected(0)).abs().max() < 1e-5


class Idle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def test_nothing_captured_says_what_was_seen_outside() -> None:
    with pytest.raises(CaptureError, match="no kernel call that can be read in 1 forward"):
        run(nn.Sequential(Idle(), nn.Linear(16, 16)), torch.randn(1, 6, 16))

    class Never(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    with pytest.raises(CaptureError, match=r"none of the 1 chosen.*while 'blocks\.0' \(Mixing\)"):
        run(Never(Mixing()), torch.randn(1, 6, 16), "attn")


def test_accumulated_over_passes_and_handed_to_a_sink() -> None:
    model, x = Model(Mixing(calls=2)).eval(), torch.randn(1, 6, 16)
    given: list[str] = []
    with torch.no_grad():
        with vistvis.capture(model, accumulate=True) as several:
            model(x)
            model(x)
        with vistvis.capture(model, sink=lambda name, attention: given.append(name)):
            model(x)
        with vistvis.capture(model) as last:
            model(x)
            model(x[:, :4])
    assert [len(several[name]) for name in several] == [2, 2, 2]
    assert given == ["attn", "blocks.0", "blocks.0#2"]
    assert last["blocks.0#2"].shape == (1, 2, 4, 4)


class Hidden(Mixing):
    """Dropout in its kernel: what it used is not the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        return LEAKING["fused"](q, k, v, dropout_p=1e-9).transpose(1, 2).flatten(2)


LEAKING: dict[str, Callable[..., Tensor]] = {"fused": F.scaled_dot_product_attention}


def test_a_call_that_can_not_be_read_does_not_spoil_the_rest() -> None:
    torch.manual_seed(1)
    model = Model(Hidden(), Mixing()).eval()
    with (
        pytest.warns(VistvisWarning, match=r"'blocks\.0': dropout is active in the kernel"),
        torch.no_grad(),
        vistvis.capture(model) as captured,
    ):
        model(torch.randn(1, 6, 16))
    assert captured["blocks.1"].shape == (1, 2, 6, 6)
    with pytest.raises(CaptureError, match="dropout is active"):
        captured["blocks.0"]
    assert "error: dropout is active" in captured.report()


class XCA(Mixing):
    """Carries the name of a class that is refused."""


def test_refused_classes_stay_refused() -> None:
    _, captured = run(Model(XCA()), torch.randn(1, 6, 16))
    assert list(captured) == ["attn"]
    assert "while 'blocks.0' (XCA) ran, 1 time" in captured.report()


class Caller(nn.Module):
    """Calls its attention by a method of its own, past `__call__`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Listed(16, 2, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn.forward_list([x])[0]


class Listed(VGGTAttention):
    def forward_list(self, xs: list[Tensor]) -> list[Tensor]:
        return [VGGTAttention.forward(self, x) for x in xs]


def test_a_method_past_call_is_a_run_of_its_site() -> None:
    _, captured = run(Caller(), torch.randn(2, 6, 16), "attn", verify=True)
    assert captured["attn"].shape == (2, 2, 6, 6)
    assert "seen outside" not in captured.report()


class Processor:
    """A plain object that a module hands itself to."""

    def __call__(self, attn: Processed, x: Tensor, text: Tensor) -> Tensor:
        both = torch.cat((text, x), 1)
        return fused(*map(split, attn.to_qkv(both).chunk(3, -1))).transpose(1, 2).flatten(2)


class EagerProcessor:
    def __call__(self, attn: Processed, x: Tensor, text: Tensor) -> Tensor:
        both = torch.cat((text, x), 1)
        q, k, v = map(split, attn.to_qkv(both).chunk(3, -1))
        SEEN.append((q.double(), k.double()))
        return (attn.get_scores(q, k) @ v).transpose(1, 2).flatten(2)


class Processed(nn.Module):
    """The kernel is called by what it holds, as in diffusers: 2 text and 4 picture tokens."""

    def __init__(self, processor: Any, *, crossing: bool = False) -> None:
        super().__init__()
        self.heads, self.is_cross_attention = 2, crossing
        self.to_qkv = nn.Linear(16, 48)
        self.processor = processor
        with torch.no_grad():
            self.to_qkv.weight.mul_(4)

    def get_scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x[:, 2:], x[:, :2])


@pytest.mark.parametrize(("kind", "source"), [(Processor, "kernel"), (EagerProcessor, "softmax")])
def test_what_a_plain_object_calls_is_read_as_its_modules_code(kind: type, source: str) -> None:
    model = nn.Sequential(Processed(kind()), Processed(kind(), crossing=True))
    sites = vistvis.find_sites(model)
    assert [(site.name, site.kind, site.heads) for site in sites] == [
        ("0", "self", 2),
        ("1", "cross", 2),
    ]
    _, captured = run(model, torch.randn(1, 6, 16), "*", verify=True)
    for call, name in enumerate(captured):
        assert captured[name].site.source == source
        assert (captured[name][:].double() - expected(call)).abs().max() < 1e-5
    # Its processor is what its code is: another one, and it is no site.
    model[0].processor = lambda attn, x, text: torch.cat((text, x), 1)
    assert vistvis.find_sites(model).names == ["1"]


def test_sites_of_an_example() -> None:
    model, x = Model(Mixing(), Hidden(), Mixing(calls=2)).eval(), torch.randn(1, 6, 16)
    names = ["attn", "blocks.0", "blocks.1", "blocks.2", "blocks.2#2"]
    for example in (x, (x,), {"x": x}, lambda: model(x)):
        sites = vistvis.find_sites(model, example=example)
        assert sites.names == names
    assert [site.source for site in sites][1:] == ["kernel"] * 4
    assert sites[2].refused.startswith("dropout is active")
    assert vistvis.find_sites(model).names == ["attn"]
    assert all("forward" not in vars(module) for module in model.modules())


# -- fused paths of PyTorch's own modules ----------------------------------------------------------


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3).eval()


class Attending(nn.Module):
    """`nn.MultiheadAttention` alone, with its fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x, x, x, need_weights=False)[0]
        return self.b(x, x, x, need_weights=False)[0]


@pytest.fixture
def natives(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of native kernels as they run."""
    ran: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        original = getattr(torch, name)

        def counted(*args: Any, original: Any = original, name: str = name) -> Any:
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(torch, name, counted)
    return ran


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sites", ["layers.0.self_attn", None])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_paths_stay_on(natives: list[str], guard: Any, sites: Any, padded: bool) -> None:
    model, x = encoder(), torch.randn(2, 6, 16)
    mask = torch.arange(6) >= torch.tensor([[6], [4]]) if padded else None
    with guard(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are said to be a prototype
        plain = model(x, src_key_padding_mask=mask)
        assert natives == ["_transformer_encoder_layer_fwd"] * 3
        with vistvis.capture(model, sites) as captured:
            watched = model(x, src_key_padding_mask=mask)
    assert natives == ["_transformer_encoder_layer_fwd"] * 6
    assert torch.equal(plain, watched)
    if sites:
        assert "2 sites not chosen made 2 kernel calls" in captured.report()
    assert len(captured) == (1 if sites else 3)


def test_fused_modules_in_a_plain_list_stay_fused(natives: list[str]) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = VGGTAttention(16, 2, None)
            self.rest = [nn.MultiheadAttention(16, 2, batch_first=True).eval()]

        def forward(self, x: Tensor) -> Tensor:
            x = self.site(x)
            out: Tensor = self.rest[0](x, x, x, need_weights=False)[0]
            return out

    model, x = Listed().eval(), torch.randn(2, 6, 16)
    with torch.no_grad():
        plain = model(x)
        with vistvis.capture(model) as captured:
            assert torch.equal(model(x), plain)
    assert natives == ["_native_multi_head_attention"] * 2
    assert "nn.MultiheadAttention, while 'MultiheadAttention'" in captured.report()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_fused_module_alone(natives: list[str], guard: Any) -> None:
    model, x = Attending().eval(), torch.randn(2, 6, 16)
    with guard():
        plain = model(x)
        # Two at once: the account of one is no other's business.
        with vistvis.capture(model, "a") as one, vistvis.capture(model, "b") as other:
            assert torch.equal(model(x), plain)
    assert len(natives) == 4
    assert (list(one), list(other)) == (["a"], ["b"])
    assert "1 site not chosen made 1 kernel call" in one.report()


class Plain(TorchFunctionMode):
    """Changes nothing, and is in the way of fused paths."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_mode_would_switch_them_off(natives: list[str]) -> None:
    model, x = encoder(), torch.randn(2, 6, 16)
    with torch.no_grad(), Plain():
        model(x)
    assert natives == []


def test_accounts_go_aside_and_modes_of_others_stay() -> None:
    def made() -> account.Account:
        return account.Account(None, lambda: False, lambda: None, lambda run: None)  # type: ignore[arg-type, return-value]

    modes = [Plain(), made(), Plain(), made()]
    with modes[0], modes[1], modes[2], modes[3]:
        with suppress(KeyError), account.aside():
            assert _get_current_function_mode_stack() == [modes[0], modes[2]]
            raise KeyError
        assert _get_current_function_mode_stack() == modes


# -- threads, errors, compiled code ----------------------------------------------------------------


def test_a_pass_sees_its_own_thread_only() -> None:
    model, other = Model(Mixing()).eval(), Mixing().eval()
    inside, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        inside.wait(5)
        other(torch.randn(1, 3, 16))
        done.set()

    class Waiting(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert done.wait(5)
            return super().forward(x)

    model.blocks.append(Waiting().eval())
    thread = threading.Thread(target=elsewhere)
    thread.start()
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(torch.randn(1, 6, 16))
    thread.join()
    assert {name: captured[name].shape[-1] for name in captured} == {
        "attn": 6,
        "blocks.0": 6,
        "blocks.1": 6,
    }


class Interrupting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_an_interrupt_leaves_no_mode_behind() -> None:
    model = Model(Mixing(), Interrupting())
    capture = vistvis.capture(model)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(1, 6, 16))
    assert _get_current_function_mode_stack() == []
    assert capture.failed_passes == 1
    capture.close()


@pytest.mark.parametrize("how", ["function", "child", "in place"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_part_that_is_compiled(how: str, backend: str) -> None:
    torch._dynamo.reset()
    model = Model(Mixing(), nn.Sequential(nn.Linear(16, 16), nn.GELU()))
    if how == "function":
        turned = torch.compile(lambda x: (x * 2).tanh(), backend=backend)
        model.blocks[1].register_forward_hook(lambda module, args, out: turned(out))
    elif how == "child":
        model.blocks[1] = torch.compile(model.blocks[1], backend=backend)
    else:
        model.blocks[1].compile(backend=backend)
    _, captured = run(model, torch.randn(1, 6, 16))
    assert list(captured) == ["attn", "blocks.0"]
    said = "compiled code: kernel calls outside sites are not seen" in captured.report()
    assert said == (how != "function")
    torch._dynamo.reset()
