"""Kernels that are Python functions: seen at the call under whatever name, read exactly or refused.

`standins.py` has those that need a GPU; `flex_attention` is torch's own, and transformers is real.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from standins import (
    SEEN,
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    memory_efficient_attention,
    package,
    sageattn,
    varlen_attn,
)
from torch import Tensor, nn

import vistvis
from vistvis import Attention
from vistvis.errors import CaptureError, SiteError
from vistvis.hooks import fused, kernels
from vistvis.models import families

FLASH = (
    *(flash_attn_func, flash_attn_qkvpacked_func, flash_attn_kvpacked_func),
    *(flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache),
)
flash = package("flash_attn", *FLASH)
xops = package("xformers.ops", memory_efficient_attention)
sage = package("sageattention", sageattn)
varlen = package("torch_varlen", varlen_attn)
another_name = flash_attn_func
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    SEEN.clear()
    loaded = [flash, xops, sage, varlen]
    for module in loaded:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield
    for module in (*loaded, sys.modules[__name__]):
        assert not kernels._KERNELS.keys() & set(map(id, vars(module).values()))
    assert not kernels._OWNERS
    assert not kernels.EARS.stack


class Base(nn.Module):
    """`attend` gets `(B, N, h, d)`, and keys of a context of another length if there is one."""

    num_heads, key_heads = 4, 4
    attend: Attend

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 16 * self.key_heads)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q = 6 * self.q(x).unflatten(-1, (4, 8))
        k, v = self.kv(x if context is None else context).unflatten(-1, (2, -1, 8)).unbind(2)
        return self.attend(q, k, v).reshape(*x.shape[:2], -1)


def site(attend: Callable[..., Tensor], **traits: Any) -> nn.Module:
    """A module whose own code calls a kernel so."""
    return type("Mine", (Base,), {"attend": attend, **traits})().eval()


def captured(model: nn.Module, *inputs: Tensor, **options: Any) -> Attention:
    """What is read, once the model gives the same as without."""
    with torch.no_grad():
        plain = model(*inputs)
        with vistvis.capture(model, verify=True, **options) as capture:
            assert torch.equal(model(*inputs), plain)
    return capture["Mine"]


def check(model: nn.Module, *inputs: Tensor, **options: Any) -> Attention:
    """What is read is what the kernel used."""
    attention = captured(model, *inputs, **options)
    assert attention.site is not None
    assert attention.site.source == "kernel"
    assert 0.3 < SEEN[-1].max() <= 1
    torch.testing.assert_close(attention.dense().double(), SEEN[-1], atol=2e-6, rtol=0)
    return attention


def lengths(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])

DENSE: dict[str, Attend] = {
    "plain": lambda s, q, k, v: flash.flash_attn_func(q, k, v),
    "imported": lambda s, q, k, v: flash_attn_func(q, k, v, 0.0, 0.2),
    "causal": lambda s, q, k, v: flash.flash_attn_func(q, k, v, causal=True),
    "window": lambda s, q, k, v: flash.flash_attn_func(q, k, v, window_size=(2, 1)),
    "left": lambda s, q, k, v: flash.flash_attn_func(q, k, v, window_size=(2, -1)),
    "causal window": lambda s, q, k, v: flash_attn_func(q, k, v, causal=True, window_size=(1, 3)),
    "softcap": lambda s, q, k, v: flash_attn_func(q, k, v, softcap=1.5, causal=True),
    "alibi": lambda s, q, k, v: flash_attn_func(q, k, v, alibi_slopes=SLOPES, softcap=2.0),
    "alibi of each": lambda s, q, k, v: flash_attn_func(
        q, k, v, causal=True, alibi_slopes=torch.stack([SLOPES, 2 * SLOPES])
    ),
    "with lse": lambda s, q, k, v: flash_attn_func(q, k, v, return_attn_probs=True)[0],
    "kvpacked": lambda s, q, k, v: flash.flash_attn_kvpacked_func(q, torch.stack([k, v], 2)),
    "cache": lambda s, q, k, v: flash.flash_attn_with_kvcache(q, k, v, causal=True),
    "filled": lambda s, q, k, v: flash.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=torch.tensor([5, 5]), causal=True
    ),
    "growing": lambda s, q, k, v: flash.flash_attn_with_kvcache(
        q, k.clone(), v.clone(), k[:, :2], v[:, :2], cache_seqlens=4
    ),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "key_heads"), [(6, 4), (9, 2)])
@pytest.mark.parametrize("name", DENSE)
def test_flash_attn(name: str, keys: int, key_heads: int) -> None:
    model = site(DENSE[name], key_heads=key_heads)
    check(model, torch.randn(2, 6, 32), torch.randn(2, keys, 32))


def test_flash_attn_packed_whole() -> None:
    model = site(lambda s, q, k, v: flash.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2)))
    check(model, torch.randn(2, 6, 32))


def packed(*counts: int, keys: tuple[int, ...] = (), **how: Any) -> Attend:
    """Tokens of all batch items as sequences one behind the other."""

    def attend(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds, longest = (lengths(*counts), lengths(*(keys or counts))), max(counts + keys)
        flat = [one.flatten(0, 1) for one in (q, k, v)]
        return flash.flash_attn_varlen_func(*flat, *bounds, longest, longest, **how)

    return attend


@pytest.mark.parametrize("how", [{}, {"causal": True}, {"softmax_scale": 0.2}])
def test_sequences_of_equal_bounds_are_segments(how: dict[str, Any]) -> None:
    attention = check(site(packed(5, 0, 4, 3, **how)), torch.randn(1, 12, 32))
    assert attention.segments is not None
    assert attention.segments.tolist() == [0, 5, 9]


@pytest.mark.parametrize(
    "how",
    [
        {"window_size": (1, 1)},
        {"causal": True, "softcap": 1.5},
        {"alibi_slopes": SLOPES},
        {"keys": (2, 7, 3)},
        {"keys": (2, 7, 3), "causal": True},
        {"keys": (5, 4, 6), "window_size": (2, 0), "alibi_slopes": SLOPES},
    ],
)
def test_other_sequences(how: dict[str, Any]) -> None:
    model = site(packed(5, 4, 3, **how), key_heads=2)
    keys = sum(how.get("keys", (12,)))
    check(model, torch.randn(1, 12, 32), torch.randn(1, keys, 32))


def test_other_functions_of_sequences() -> None:
    bounds = lengths(5, 7)

    def together(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qkv = torch.stack([q, k, v], 2).flatten(0, 1)
        return flash.flash_attn_varlen_qkvpacked_func(qkv, bounds, 7, causal=True)

    def of_torch(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [one.flatten(0, 1) for one in (q, k, v)]
        return varlen.varlen_attn(*flat, bounds, bounds, 7, 7, window_size=(-1, 0), enable_gqa=True)

    for attend, heads in ((together, 4), (of_torch, 2)):
        attention = check(site(attend, key_heads=heads), torch.randn(1, 12, 32))
        assert attention.segments is not None
        assert attention.causal


# -- xformers ------------------------------------------------------------------------------------

BIASES = {
    "none": None,
    "tensor": torch.randn(2, 4, 6, 9),
    "causal": LowerTriangularMask(),
    "from the end": LowerTriangularFromBottomRightMask(),
}


@pytest.mark.parametrize("name", BIASES)
def test_xformers(name: str) -> None:
    bias = BIASES[name]
    model = site(lambda s, q, k, v: xops.memory_efficient_attention(q, k, v, bias, scale=0.3))
    check(model, torch.randn(2, 6, 32), torch.randn(2, 9, 32))


def test_xformers_of_sequences() -> None:
    for kind in (BlockDiagonalMask, BlockDiagonalCausalMask):
        bias = kind([0, 5, 12], [0, 5, 12])
        model = site(lambda s, q, k, v, b=bias: xops.memory_efficient_attention(q, k, v, b))
        attention = check(model, torch.randn(1, 12, 32))
        assert attention.segments is not None
        assert attention.mask is None
    bias = BlockDiagonalMask([0, 5, 6], [0, 2, 9])
    attention = check(model, torch.randn(1, 6, 32), torch.randn(1, 9, 32))
    assert attention.segments is None
    assert attention.mask is not None


def test_xformers_in_three_and_five_dimensions() -> None:
    def three(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [one.transpose(1, 2).flatten(0, 1) for one in (q, k, v)]
        out = xops.memory_efficient_attention(*flat, LowerTriangularMask())
        return out.unflatten(0, (2, 4)).transpose(1, 2)

    def five(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (one[:, :, :, None].expand(-1, -1, -1, 2, -1) for one in (k, v))
        bias = torch.linspace(-3, 3, 2 * 4 * 36).view(2, 2, 2, 6, 6)
        return xops.memory_efficient_attention(q.unflatten(2, (2, 2)), k, v, bias)

    x = torch.randn(2, 6, 32)
    read = captured(site(three), x).dense().double()
    torch.testing.assert_close(read, SEEN[-1].view(2, 4, 6, 6), atol=2e-6, rtol=0)
    attention = check(site(five, key_heads=2), x)
    assert attention.groups == 2


# -- breaks: each must go red --------------------------------------------------------------------


def goes_red(model: nn.Module, *inputs: Tensor) -> None:
    with pytest.raises(CaptureError, match="differs from the kernel's output"):
        captured(model, *inputs)


def test_a_band_counted_from_the_first_key_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused._band
    start = fused._Places(lambda i: i, lambda j: j)
    monkeypatch.setattr(fused, "_band", lambda places, *ends: right(start, *ends))
    goes_red(site(DENSE["causal"]), torch.randn(2, 6, 32), torch.randn(2, 9, 32))


def test_a_start_that_is_off_by_one_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused._banded

    def shifted(*args: Any, **rest: Any) -> fused.Meaning:
        meaning = right(*args, **rest)
        starts = [start + (start > 0) for start in meaning.segments or ()]
        return meaning._replace(segments=starts)

    monkeypatch.setattr(fused, "_banded", shifted)
    goes_red(site(packed(5, 4, 3)), torch.randn(1, 12, 32))


@pytest.mark.parametrize("name", ["softcap", "alibi", "alibi of each"])
def test_scores_that_are_not_changed_go_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(a: Any, places: Any) -> None:
        a.take("softcap"), a.take("alibi_slopes")

    monkeypatch.setattr(fused, "_score_mod", without)
    goes_red(site(DENSE[name]), torch.randn(2, 6, 32))


def test_a_dropped_bias_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused._READERS["memory_efficient_attention"]

    def without(*args: Any) -> fused.Meaning:
        meaning = right(*args)
        return meaning._replace(call=meaning.call._replace(attn_mask=None))

    monkeypatch.setitem(fused._READERS, "memory_efficient_attention", without)
    model = site(lambda s, q, k, v: memory_efficient_attention(q, k, v, BIASES["tensor"]))
    goes_red(model, torch.randn(2, 6, 32), torch.randn(2, 9, 32))


# -- refusals ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Attend, str]] = {
    "dropout": (lambda s, q, k, v: flash_attn_func(q, k, v, 0.1), "dropout is active"),
    "dropout of xformers": (
        lambda s, q, k, v: memory_efficient_attention(q, k, v, p=0.5),
        "dropout is active",
    ),
    "pages": (
        lambda s, q, k, v: flash.flash_attn_with_kvcache(q, k, v, block_table=torch.zeros(1)),
        "block_table=…: its keys lie in pages of a table",
    ),
    "rotary": (
        lambda s, q, k, v: flash.flash_attn_with_kvcache(q, k, v, rotary_cos=torch.ones(1)),
        "rotary_cos=…: it rotates queries and keys itself",
    ),
    "uneven cache": (
        lambda s, q, k, v: flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths(3)),
        "another length in each batch item",
    ),
    "padding": (
        lambda s, q, k, v: flash.flash_attn_varlen_func(
            *(one.flatten(0, 1) for one in (q, k, v)), lengths(3, 4), lengths(3, 4), 4, 4
        ).new_zeros(12, 4, 8),
        "must cover its 12 queries, and go from 0 to 7",
    ),
    "bias": (
        lambda s, q, k, v: memory_efficient_attention(q, k, v, Unknown(q, k)),
        "its mask is a Unknown",
    ),
    "one of two": (
        lambda s, q, k, v: sage.sageattn(q, k, v) if s.training is False else flash_attn_func(),
        "rounds queries and keys to 8 or 4 bits",
    ),
}  # fmt: skip


class Unknown(Tensor):
    """A bias whose `materialize` is not there."""

    @staticmethod
    def __new__(cls, q: Tensor, k: Tensor) -> Unknown:
        return torch.zeros(1, 1, q.shape[1], k.shape[1]).as_subclass(cls)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    attend, reason = REFUSED[name]
    model, x = site(attend), torch.randn(2, 6, 32)
    with torch.no_grad(), pytest.raises(CaptureError, match=reason), vistvis.capture(model):
        assert model(x).shape == x.shape


def test_an_argument_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(q, k, v, softmax_scale=None, causal=False, twist=1):  # type: ignore[no-untyped-def]
        return flash_attn_func(q, k, v, 0.0, softmax_scale, causal)

    monkeypatch.setattr(flash, "flash_attn_func", newer)
    attend = lambda s, q, k, v: flash.flash_attn_func(q, k, v, twist=s.twist)  # noqa: E731
    x = torch.randn(2, 6, 32)
    check(site(attend, twist=1), x)
    with pytest.raises(CaptureError, match="twist=…: its effect on the weights is not known"):
        captured(site(attend, twist=2), x)


def test_approximations_alone_are_refused_before_they_run() -> None:
    model = nn.Sequential(site(lambda s, q, k, v: sage.sageattn(q, k, v)))
    (found,) = vistvis.find_sites(model)
    assert "SageAttention, which rounds" in found.refused
    with pytest.raises(SiteError, match="not the softmax of the queries and keys"):
        vistvis.capture(model)


def test_sites_are_found_by_the_names_of_kernels() -> None:
    for attend in (DENSE["plain"], packed(3), lambda s, q, k, v: xops.memory_efficient_attention()):
        (found,) = vistvis.find_sites(site(attend))
        assert found.source == "kernel"
        assert not found.refused


def test_every_name_has_a_reader_and_a_sign() -> None:
    assert fused._READERS.keys() == kernels._SIGNS.keys()
    assert kernels._SIGNS.keys() | families.APPROXIMATIONS.keys() == kernels.NAMES


def test_another_function_of_the_name_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)))

    monkeypatch.setattr(flash, "flash_attn_func", own)
    model = site(lambda s, q, k, v: flash.flash_attn_func(q, k, v).transpose(1, 2))
    assert captured(model, torch.randn(2, 6, 32)).shape == (2, 4, 6, 6)


# -- life cycle ----------------------------------------------------------------------------------


def test_under_other_names() -> None:
    def alias(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return another_name(q, k, v) if k is not None else flash_attn_func(q, k, v)

    model = site(alias)
    check(model, torch.randn(2, 6, 32))
    model = site(lambda s, q, k, v: s.held(q, k, v) if s.held else flash_attn_func(q, k, v))
    model.held = flash_attn_func
    check(model, torch.randn(2, 6, 32))
    assert model.held is flash_attn_func


def test_several_captures_in_any_order() -> None:
    model, x = site(DENSE["plain"]), torch.randn(2, 6, 32)
    other = nn.Sequential(model)
    model.held = flash_attn_func
    original = flash.flash_attn_func
    with torch.no_grad():
        first, second = vistvis.capture(model), vistvis.capture(other)
        other(x)
        assert torch.equal(first["Mine"].query, second["0"].query)
        first.remove()
        assert flash.flash_attn_func is not original
        assert model.held is not original
        other(x)
        assert second.passes == 2
        second.remove()
    assert flash.flash_attn_func is original
    assert model.held is original


def test_an_interrupt_while_names_are_led_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    original, right = flash.flash_attn_func, kernels._replaced

    def interrupted(names: dict[str, Any], by: Any) -> bool:
        found = right(names, by)
        if found:
            monkeypatch.setattr(kernels, "_replaced", right)
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(kernels, "_replaced", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vistvis.capture(site(DENSE["plain"]))
    assert flash.flash_attn_func is original


def test_an_error_in_the_kernel_is_the_users() -> None:
    model = site(lambda s, q, k, v: flash.flash_attn_func(q, k[..., :4], v))
    with vistvis.capture(model) as capture, torch.no_grad():
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 6, 32))
        assert capture.failed_passes == 1
        assert not kernels.EARS.stack


def test_modules_loaded_meanwhile_get_the_kernel_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with vistvis.capture(site(DENSE["plain"])):
        late = package("late", flash.flash_attn_func)
        monkeypatch.setitem(sys.modules, "late", late)
        late.flash_attn_func = flash.flash_attn_func
    assert late.flash_attn_func is flash_attn_func


def test_calls_of_other_threads_are_not_the_sites() -> None:
    def attend(self: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        beside = threading.Thread(target=lambda: flash_attn_func(q + 1, k, v))
        beside.start()
        beside.join()
        return flash_attn_func(q, k, v)

    check(site(attend), torch.randn(2, 6, 32))


def test_what_a_kernel_calls_is_its_own() -> None:
    heard: list[str] = []
    with vistvis.capture(site(DENSE["plain"])):
        owner = object()
        with kernels.listening(owner, lambda call: heard.append(call.name)):
            flash.flash_attn_kvpacked_func(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 2, 1, 8))
            with kernels.listening(owner, lambda call: heard.append("inner " + call.name)):
                flash.flash_attn_func(*torch.ones(3, 1, 2, 1, 8))
        flash.flash_attn_func(*torch.ones(3, 1, 2, 1, 8))
    assert heard == ["flash_attn_kvpacked_func", "inner flash_attn_func"]
