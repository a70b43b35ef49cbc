"""What `intervene` computes equals dense attention in float64, under a mask of all tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interrupts import Model as Small
from interrupts import images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vistvis
import vistvis.hooks
import vistvis.intervention
from vggt_adapter import VGGT
from vistvis import TokenLayout, capture, find_sites, intervene, open_run, save_run
from vistvis.analysis import frame_mass
from vistvis.errors import SiteError
from vistvis.hooks import changed as changed_calls

SDPA = F.scaled_dot_product_attention
LAYOUT = TokenLayout(3, (2, 3), ("camera",), after=("scale",))  # 3 frames of 7, and one more
N, P, H = LAYOUT.num_tokens, LAYOUT.tokens_per_frame, 4
FRAME = [*(token // P for token in range(N - 1)), -1]


class Kernel(nn.Module):
    """An attention module that gets what its kernel gets."""

    num_heads = H

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Kernel()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.attn(q, k, v, **options)
        return out


def tensors(
    queries: int = N, keys: int = N, *, groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Sharp attention, batch 2."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    counts = (H, queries), (H // groups, keys), (H // groups, keys)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h, n in counts)
    return (1.5 * q).to(dtype), k.to(dtype), v.to(dtype)


def dense_weights(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    seen: Tensor | None = None,
    uniform: tuple[int, ...] = (),
    zero: tuple[int, ...] = (),
) -> Tensor:
    """The weights in float64, by a mask `(h, Nq, Nk)` of what is seen."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits[:, list(uniform)] = 0.0
    may = torch.ones(logits.shape, dtype=torch.bool)
    if is_causal:
        may &= torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if seen is not None:
        may &= seen
    may[:, list(zero)] = False
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        may &= attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask.double()
    exps = torch.where(may, (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
    return exps / exps.sum(-1, keepdim=True).clamp_min(1e-300)


def dense(q: Tensor, k: Tensor, v: Tensor, *, mean: tuple[int, ...] = (), **more: Any) -> Tensor:
    out = dense_weights(q, k, **more) @ v.double().repeat_interleave(H // v.shape[1], 1)
    for head in mean:
        out[:, head] = out[:, head].mean(1, keepdim=True).expand_as(out[:, head])
    return out


def seen(
    hidden: Callable[[int, int], bool],
    *,
    heads: tuple[int, ...] = tuple(range(H)),
    queries: int = N,
    keys: int = N,
) -> Tensor:
    """`(h, Nq, Nk)`, False where a query of these heads does not see a key."""
    table = torch.tensor([[not hidden(i, j) for j in range(keys)] for i in range(queries)])
    made = torch.ones(H, queries, keys, dtype=torch.bool)
    made[list(heads)] = table
    return made


def other_frame(i: int, j: int) -> bool:
    return FRAME[i] != FRAME[j] and -1 not in (FRAME[i], FRAME[j])


# What `intervene` is asked for, and what the dense witness gets.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uniform": ({"mode": "uniform", "heads": [0, 2]}, {"uniform": (0, 2)}),
    "uniform of all": ({"mode": "uniform"}, {"uniform": tuple(range(H))}),
    "zero": ({"mode": "zero", "heads": [1]}, {"zero": (1,)}),
    "mean": ({"mode": "mean", "heads": [3]}, {"mean": (3,)}),
    "keys": ({"cut_keys": [0, 5, 6]}, {"seen": seen(lambda i, j: j in (0, 5, 6))}),
    "queries": ({"cut_queries": torch.arange(3, 9)}, {"seen": seen(lambda i, j: 3 <= i < 9)}),
    "frames": ({"cut": [(2, 0)]}, {"seen": seen(lambda i, j: (FRAME[i], FRAME[j]) == (2, 0))}),
    "within": ({"within_frame": True}, {"seen": seen(other_frame)}),
    "tokens": (
        {"cut": [([1, 8], [2, 3]), (1, [20])]},
        {"seen": seen(lambda i, j: (i in (1, 8) and j in (2, 3)) or (FRAME[i] == 1 and j == 20))},
    ),
    "heads' keys": (
        {"heads": [1, 3], "cut_keys": range(7)},
        {"seen": seen(lambda i, j: j < 7, heads=(1, 3))},
    ),
    "heads' frames": (
        {"heads": [2], "cut": [(0, 1), (2, 0)]},
        {"seen": seen(lambda i, j: (FRAME[i], FRAME[j]) in ((0, 1), (2, 0)), heads=(2,))},
    ),
    "keys and queries": (
        {"cut_keys": [4], "cut_queries": [0, 20]},
        {"seen": seen(lambda i, j: j == 4 or i in (0, 20))},
    ),
    "uniform of what is seen": (
        {"mode": "uniform", "heads": [0], "cut": [(1, 0)]},
        {"uniform": (0,), "seen": seen(lambda i, j: (FRAME[i], FRAME[j]) == (1, 0), heads=(0,))},
    ),
    "mean under a cut": (
        {"mode": "mean", "heads": [0, 1], "cut_keys": [3]},
        {"mean": (0, 1), "seen": seen(lambda i, j: j == 3, heads=(0, 1))},
    ),
}
PAIRS = list(itertools.permutations(range(3), 2))
BIAS = torch.randn(1, H, N, N, generator=torch.Generator().manual_seed(3))
HIDES = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(4)) < 0.6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.9},
    "mask": {"attn_mask": HIDES},
    "keys' mask": {"attn_mask": HIDES[:, :, :1]},
    "bias": {"attn_mask": BIAS},
    "−inf": {"attn_mask": torch.where(HIDES, 0.0, -torch.inf)},
}


def changed(model: nn.Module, *call: Tensor, options: dict[str, Any], **change: Any) -> Tensor:
    with intervene(model, "attn", layout=LAYOUT, **change):
        out: Tensor = model(*call, **options)
    return out


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_equal_to_dense_attention(change: str, options: str) -> None:
    asked, witness = CHANGES[change]
    more = OPTIONS[options]
    if "uniform" in witness and options == "bias":
        with pytest.raises(SiteError, match=r"which keys a query sees.*'attn'"):
            changed(Model(), *tensors(), options=more, **asked)
        return
    call = tensors()
    plain = dense_weights(*call[:2], **more)
    assert 0.3 < plain.max() <= 1.0
    out = changed(Model(), *call, options=more, **asked)
    expected = dense(*call, **more, **witness)
    assert (out - expected).abs().max() < 2e-6
    # Were it not changed, that would be seen.
    assert (dense(*call, **more) - expected).abs().max() > 1e-2
    exact = tensors(dtype=torch.float64)
    mask = more.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        more = {"attn_mask": mask.double()}
    again = changed(Model(), *exact, options=more, **asked)
    assert (again - dense(*exact, **more, **witness)).abs().max() < 1e-14


def test_the_tests_attention_is_sharp() -> None:
    assert 0.3 < dense_weights(*tensors()[:2]).max() < 0.95


@pytest.mark.parametrize("change", CHANGES)
def test_a_capture_shows_what_the_model_used(change: str) -> None:
    """Verified against the kernel's output, in whatever order the blocks are opened."""
    (asked, witness), model, call = CHANGES[change], Model(), tensors()
    expected = dense_weights(*call[:2], **{n: w for n, w in witness.items() if n != "mean"})
    for first, second in itertools.permutations(
        (
            lambda: capture(model, verify=True, layout=LAYOUT),
            lambda: intervene(model, "attn", layout=LAYOUT, **asked),
        )
    ):
        with first() as one, second() as two:
            out = model(*call)
        captured = next(made for made in (one, two) if isinstance(made, vistvis.Capture))
        attention = captured["attn"]
        assert (attention.dense() - expected).abs().max() < 1e-5
        assert (attention[1, 2, 5] - expected[1, 2, 5]).abs().max() < 1e-5
        assert attention.site is not None
        assert attention.site.intervened
        assert (out - dense(*call, **witness)).abs().max() < 2e-6


def test_what_a_capture_says_was_changed() -> None:
    texts = {
        "uniform": "heads 0, 2 uniform",
        "uniform of all": "all heads uniform",
        "frames": "frames 2→0 cut",
        "within": "within frames",
        "tokens": "tokens 1, 8→tokens 2, 3, frame 1→token 20 cut",
        "heads' keys": "heads 1, 3 keys 0…6 cut",
        "keys and queries": "key 4 cut; queries 0, 20 cut",
    }
    model = Model()
    for change, text in texts.items():
        with capture(model) as c, intervene(model, "attn", layout=LAYOUT, **CHANGES[change][0]):
            model(*tensors())
        site = c["attn"].site
        assert site is not None
        assert site.intervened == text
        assert vistvis.SiteInfo.from_dict(site.to_dict()) == site
    with capture(model) as c:
        model(*tensors())
    assert "intervened" not in c["attn"].site.to_dict()


def test_stored_where_a_file_can_hold_it(tmp_path: Path) -> None:
    model = Model()
    layout = TokenLayout(3, (2, 3), ("camera",))  # without a token that all frames see
    for change in ("uniform", "zero", "keys", "queries", "heads' keys", "within"):
        call = tensors(21, 21)
        with capture(model) as c, intervene(model, "attn", layout=layout, **CHANGES[change][0]):
            model(*call)
        assert c["attn"].mask is None or c["attn"].mask.numel() <= 2 * H * N
        save_run(c, tmp_path / change)
        stored = open_run(tmp_path / change)["attn"]
        assert torch.equal(stored.dense(), c["attn"].dense())
        assert stored.site is not None
        assert stored.site.intervened == c["attn"].site.intervened  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "name", "wrong"),
    [
        ("tokens", "_ordered", lambda tensor, dim, places: tensor),
        ("heads' keys", "_ordered", lambda tensor, dim, places: tensor),
        ("frames", "_groups", lambda cuts: [(torch.arange(N), torch.arange(7, N))]),
        ("within", "_groups", lambda cuts: [(torch.arange(N), torch.arange(N))]),
    ],
)
def test_mistakes_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, change: str, name: str, wrong: Callable[..., Any]
) -> None:
    (asked, witness), call = CHANGES[change], tensors()
    monkeypatch.setattr(changed_calls, name, wrong)
    out = changed(Model(), *call, options={}, **asked)
    assert (out - dense(*call, **witness)).abs().max() > 1e-2


# -- shapes, dtypes, other ways to call ----------------------------------------------------------


@pytest.mark.parametrize("change", ["uniform", "zero", "heads' keys", "keys", "mean under a cut"])
def test_grouped_heads(change: str) -> None:
    asked, witness = CHANGES[change]
    call = tensors(groups=2)
    out = changed(Model(), *call, options={"enable_gqa": True}, **asked)
    assert (out - dense(*call, **witness)).abs().max() < 2e-6
    # One key head for all, broadcast.
    call = tensors(groups=H)
    out = changed(Model(), *call, options={}, **asked)
    assert (out - dense(*call, **witness)).abs().max() < 2e-6


def test_cross_attention() -> None:
    model, call = Model(), tensors(9, 13)
    hidden = seen(lambda i, j: j == 3 or (i == 2 and j in (5, 6)), queries=9, keys=13)
    with (
        capture(model, verify=True) as captured,
        intervene(model, "attn", cut_keys=[3], cut=[([2], [5, 6])]),
    ):
        out = model(*call)
    assert (out - dense(*call, seen=hidden)).abs().max() < 2e-6
    assert (captured["attn"].dense() - dense_weights(*call[:2], seen=hidden)).abs().max() < 1e-5


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    model, call = Model(), tensors()
    with intervene(model, "attn", cut_queries=[4]), intervene(model, "attn", cut_keys=range(N - 1)):
        out = model(*call)
    assert torch.equal(out[:, :, 4], torch.zeros_like(out[:, :, 4]))
    assert (out[:, :, 5] - call[2][:, :, -1]).abs().max() < 1e-6  # all others see the last key
    with intervene(model, "attn", cut_keys=range(N)):
        assert torch.equal(model(*call), torch.zeros_like(call[2]))


@pytest.mark.parametrize("change", ["uniform", "zero", "mean", "frames", "heads' keys", "queries"])
def test_bfloat16_and_autocast(change: str) -> None:
    asked, witness = CHANGES[change]
    call = tensors(dtype=torch.bfloat16)
    expected = dense(*call, **witness)
    out = changed(Model(), *call, options={}, **asked)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        out = changed(Model(), *(one.float() for one in call), options={}, **asked)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.03


class Folded(nn.Module):
    """Heads folded with the batch, `(B·h, N, d)`, or behind more dimensions."""

    num_heads = H

    def __init__(self, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.lead = lead

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shaped = (one.reshape(*self.lead, *one.shape[-2:]) for one in (q, k, v))
        return F.scaled_dot_product_attention(*shaped).reshape(q.shape)


@pytest.mark.parametrize("lead", [(2 * H,), (1, 2, H)])
@pytest.mark.parametrize("change", ["uniform", "zero", "mean", "frames", "heads' frames"])
def test_heads_in_other_dimensions(change: str, lead: tuple[int, ...]) -> None:
    asked, witness = CHANGES[change]
    model, call = nn.Sequential(), tensors()
    model.add_module("attn", Folded(lead))
    if not all(name in ("mode", "heads") for name in asked):
        # Layouts are made for a pass of the model; these tokens are given by number.
        pairs = {"frames": [(2, 0)], "heads' frames": [(0, 1), (2, 0)]}[change]
        frames = [[t for t in range(N) if FRAME[t] == f] for f in range(3)]
        asked = {**asked, "cut": [(frames[a], frames[b]) for a, b in pairs]}
    with capture(model, verify=True) as captured, intervene(model, "attn", **asked):
        out = model.attn(torch.zeros(2, N, 1), *call)
    assert (out - dense(*call, **witness)).abs().max() < 2e-6
    weights = dense_weights(*call[:2], **{n: w for n, w in witness.items() if n != "mean"})
    assert (captured["attn"].dense() - weights).abs().max() < 1e-5


def test_gradients_are_those_of_dense_attention() -> None:
    for change in ("uniform", "zero", "mean", "frames", "heads' frames", "queries"):
        asked, witness = CHANGES[change]
        call = [one.requires_grad_() for one in tensors(dtype=torch.float64)]
        weight = torch.randn(2, H, N, 8, dtype=torch.float64)
        out = changed(Model(), *call, options={}, **asked)
        grads = torch.autograd.grad((out * weight).sum(), call, allow_unused=True)
        expected = torch.autograd.grad((dense(*call, **witness) * weight).sum(), call)
        for got, want in zip(grads, expected, strict=True):
            assert (got - want).abs().max() < 1e-12


# -- memory, and nothing to do -------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self.most = max(self.most, one.numel())
        return out


def test_no_tensor_of_all_queries_and_keys_is_made() -> None:
    layout = TokenLayout(4, (16, 32))
    count = layout.num_tokens
    call = [torch.randn(1, H, count, 8) for _ in range(3)]
    assert count * count > 8 * call[0].numel()
    changes: list[dict[str, Any]] = [
        {"mode": "uniform", "heads": [0], "cut": [(0, 2)]},
        {"within_frame": True},
        {"cut": [(0, 2), (3, 1)], "heads": [1]},
        {"cut_keys": range(0, count, 3), "cut_queries": range(0, count, 5), "mode": "mean"},
    ]
    for change, causal in itertools.product(changes, (False, True)):
        model = Model()
        with (
            intervene(model, "attn", layout=layout, **change),
            Largest() as largest,
            torch.no_grad(),
        ):
            model(*call, is_causal=causal)
        assert largest.most < count * count
    with Largest() as largest, torch.no_grad():
        SDPA(*call, attn_mask=torch.ones(count, count, dtype=torch.bool).tril())
    assert largest.most >= count * count


@pytest.mark.parametrize(
    "nothing",
    [{"heads": []}, {"heads": [], "mode": "zero"}, {"cut": [], "cut_keys": ()}, {}],
    ids=str,
)
def test_an_empty_selection_changes_nothing(nothing: dict[str, Any]) -> None:
    model, call = Small().eval(), images()
    before = [set(vars(module)) for module in model.modules()]
    plain = model(call)
    with intervene(model, "attn", **nothing):
        assert [set(vars(module)) for module in model.modules()] == before
        assert torch.equal(model(call), plain)


# -- a whole model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vggt() -> VGGT:
    return VGGT.tiny().requires_grad_(False)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    scene = torch.rand(2, 3, 3, 7, 7, generator=torch.Generator().manual_seed(2))
    return F.interpolate(scene.flatten(0, 1), (4 * 14, 5 * 14)).unflatten(0, (2, 3))


def by_dense(model: nn.Module, blocks: str, hidden: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A context in which blocks of a list compute dense attention in float64, under a mask."""
    inside: list[bool] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not inside:
            return SDPA(q, k, v)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        logits = q.double() @ k.double().mT / q.shape[-1] ** 0.5
        return (logits.masked_fill(hidden(i, j), -torch.inf).softmax(-1) @ v.double()).to(v.dtype)

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        modules = [site.module for site in find_sites(model) if blocks in site.path]
        handles = [m.register_forward_pre_hook(lambda *_: inside.append(True)) for m in modules]
        handles += [m.register_forward_hook(lambda *_: inside.clear()) for m in modules]
        F.scaled_dot_product_attention = kernel
        try:
            yield
        finally:
            F.scaled_dot_product_attention = SDPA
            for handle in handles:
                handle.remove()

    return patched()


def test_frames_of_a_vggt(vggt: VGGT, pictures: Tensor) -> None:
    each = 25
    plain = vggt(pictures)[0][-1]
    cuts: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
        "cut": ({"cut": [(0, 2)]}, lambda i, j: (i // each == 0) & (j // each == 2)),
        "within": ({"within_frame": True}, lambda i, j: i // each != j // each),
    }
    for change, hidden in cuts.values():
        with intervene(vggt, "global_*", **change) as made:
            out = vggt(pictures)[0][-1]
        assert made.sites.names == [f"global_block_{block}" for block in range(4)]
        with by_dense(vggt, "global_blocks", hidden):
            expected = vggt(pictures)[0][-1]
        size = expected.abs().max()
        assert (out - expected).abs().max() < 1e-5 * size
        assert (plain - expected).abs().max() > 1e-2 * size
        with by_dense(vggt, "global_blocks", lambda i, j, hidden=hidden: hidden(i, j - 1)):
            shifted = vggt(pictures)[0][-1]
        assert (out - shifted).abs().max() > 1e-3 * size  # by one token: that would be seen
    # What frame blocks do, they do already.
    with intervene(vggt, "frame_*", within_frame=True), capture(vggt, "**.frame_blocks.**") as c:
        assert torch.equal(vggt(pictures)[0][-1], plain)
    assert not c["aggregator.frame_blocks.0.attn"].site.intervened  # type: ignore[union-attr]


def test_frames_of_a_vggt_that_are_cut_in_a_capture(vggt: VGGT, pictures: Tensor) -> None:
    with intervene(vggt, "global_block_3", within_frame=True), capture(vggt, verify=True) as c:
        vggt(pictures)
    captured = c["aggregator.global_blocks.3.attn"]
    mass = frame_mass(captured).sum(-1).mean(-1)
    assert (mass - torch.eye(3)).abs().max() < 1e-5
    assert captured.dense().amax(-1).mean() > 0.3


def test_other_ways_to_capture_show_the_change_too(vggt: VGGT, pictures: Tensor) -> None:
    site, apart = "aggregator.global_blocks.3.attn", torch.arange(75) // 25
    outside = (apart[:, None] != apart[None]).expand(2, 2, -1, -1)
    for options in ({"rope": False}, {"keep": "cpu", "values": True}):
        for change in ({"within_frame": True}, {"cut": PAIRS}):
            with capture(vggt, site, **options) as c, intervene(vggt, site, **change):
                vggt(pictures)
            assert torch.equal(c[site].dense() == 0, outside)
            assert c[site].site.intervened  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [name for name in CHANGES if "mean" not in name])
def test_weights_times_values_are_the_output(change: str) -> None:
    asked, _ = CHANGES[change]
    model, call = Model(), tensors(groups=2)
    with (
        capture(model, values=True, layout=LAYOUT) as captured,
        intervene(model, "attn", layout=LAYOUT, **asked),
    ):
        out = model(*call, enable_gqa=True)
    attention = captured["attn"]
    assert attention.value is not None
    assert attention.value.shape == call[2].shape
    value = attention.value.repeat_interleave(2, 1)
    assert (attention.dense() @ value - out).abs().max() < 5e-6


def test_one_head_of_one_block_by_its_name(vggt: VGGT, pictures: Tensor) -> None:
    taken: list[Tensor] = []
    proj = vggt.get_submodule("aggregator.global_blocks.3.attn.proj")
    handle = proj.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    names = {"aggregator.global_blocks.3.attn": "mine"}
    vggt(pictures)
    for sites, more in (("global_block_3", {}), ("**.global_blocks.3.attn", {}), ("mine", names)):
        with intervene(vggt, sites, heads=[1], mode="uniform", names=more or None):
            vggt(pictures)
    handle.remove()
    plain, *again = taken
    for out in again:
        assert torch.equal(out[..., :64], plain[..., :64])  # head 0
        spread = out[..., 64:] - out[..., 64:].mean(1, keepdim=True)
        assert spread.abs().max() < 1e-5  # the same for all queries
        assert torch.equal(out, again[0])


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_on_cuda(change: str) -> None:
    (asked, witness), model, call = CHANGES[change], Model(), tensors()
    with (
        capture(model, verify=True, layout=LAYOUT) as captured,
        intervene(model, "attn", layout=LAYOUT, **asked),
    ):
        out = model(*(one.cuda() for one in call))
    assert (out.cpu() - dense(*call, **witness)).abs().max() < 1e-5
    weights = dense_weights(*call[:2], **{n: w for n, w in witness.items() if n != "mean"})
    assert (captured["attn"].dense().cpu() - weights).abs().max() < 1e-5
