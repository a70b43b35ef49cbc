"""Capture: exact queries and keys, an unchanged model, nothing left behind, clear refusals."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import softmax_of
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from zoo import Block, VGGTAttention, VGGTLike

import vistvis
from vistvis import Attention
from vistvis.errors import CaptureError, InputError, SiteError
from vistvis.hooks import patching
from vistvis.hooks.readings import KernelReader

GLOBAL = "global_blocks.1.attn"
FRAME = "frame_blocks.0.attn"


def sharp_model(**settings: Any) -> VGGTLike:
    """Attention whose largest weights lie between 0.3 and 0.95, so that mistakes show."""
    model = VGGTLike(**settings).eval()
    for module in model.modules():
        if isinstance(module, VGGTAttention):
            with torch.no_grad():
                module.q_norm.weight.mul_(1.9)
                module.q_norm.bias.normal_(0, 0.5)
                module.qkv.bias.normal_(0, 0.5)
    return model


@pytest.fixture
def model() -> VGGTLike:
    return sharp_model()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 28, 42)


@contextlib.contextmanager
def kernel_recorder() -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """The first witness, without any function mode: a replaced kernel notes q, k, v and output."""
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    real = F.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        out = real(q, k, v, **kwargs)
        calls.append((q.detach().clone(), k.detach().clone(), v.detach().clone(), out.detach()))
        return out

    F.scaled_dot_product_attention = note
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = real


def names(model: nn.Module) -> list[str]:
    return vistvis.find_sites(model).names


def in_run_order(model: VGGTLike) -> list[str]:
    pairs = zip(model.frame_blocks, model.global_blocks, strict=True)
    return [f"{k}_blocks.{i}.attn" for i, _ in enumerate(pairs) for k in ("frame", "global")]


def state_of(model: nn.Module) -> list[Any]:
    """Everything that capture could leave behind on modules."""
    return [
        (sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), m.forward)
        for m in model.modules()
    ]


def no_mode_left() -> bool:
    return torch._C._len_torch_function_stack() == 0


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(3, 3, 28, 42), (1, 3, 28, 42), (2, 2, 3, 42, 28), (8, 3, 14, 28)]
)
def test_both_witnesses_agree(shape: tuple[int, ...]) -> None:
    model, images = sharp_model(), torch.rand(shape)
    with torch.no_grad(), kernel_recorder() as calls:
        model(images)
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(images)
    assert list(captured) == names(model)
    for name, (q, k, v, out) in zip(in_run_order(model), calls, strict=True):
        attention = captured[name]
        assert torch.equal(attention.query, q)
        assert torch.equal(attention.key, k)
        assert 0.25 < attention.dense().max() < 0.97, "not sharp enough to show mistakes"
        assert torch.allclose(attention.dense() @ v, out, atol=2e-6)
        expected = softmax_of(q, k)
        assert (attention.dense() - expected).abs().max() < 1e-5
        # The same comparison turns red when something is dropped or swapped.
        assert (attention.dense().roll(1, 1) - expected).abs().max() > 1e-2, "heads swapped"
        assert (attention.dense().roll(1, 3) - expected).abs().max() > 1e-2, "tokens shifted"


def test_norm_and_rope_on_the_projections_give_the_same(model: VGGTLike, images: Tensor) -> None:
    """The second witness: hooks on the projections, then norm and RoPE by hand."""
    seen: dict[str, Tensor] = {}
    places: list[Tensor] = []
    attn = model.global_blocks[1].attn
    handles = [
        attn.qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o)),
        attn.register_forward_pre_hook(lambda m, a, k: places.append(k["pos"]), with_kwargs=True),
    ]
    with torch.no_grad(), vistvis.capture(model, GLOBAL) as captured:
        model(images)
    for handle in handles:
        handle.remove()
    batch, count, _ = seen["qkv"].shape
    q, k, _ = seen["qkv"].view(batch, count, 3, 4, 8).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    without = softmax_of(q, k)
    q, k = model.rope(q, places[0]), model.rope(k, places[0])
    assert torch.equal(captured[GLOBAL].query, q)
    assert torch.equal(captured[GLOBAL].key, k)
    difference = (captured[GLOBAL].dense() - without).abs().max()
    assert difference > 1e-2, "dropping RoPE must show, or this test shows nothing"


def test_before_rope_on_purpose(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad():
        with vistvis.capture(model, GLOBAL, rope=False) as before:
            model(images)
        with vistvis.capture(model, GLOBAL) as after:
            model(images)
    assert before[GLOBAL].site.rope is False
    assert before[GLOBAL].site.source == "projection"
    assert "WITHOUT rope" in repr(before[GLOBAL])
    assert after[GLOBAL].site.rope is None
    assert (before[GLOBAL].dense() - after[GLOBAL].dense()).abs().max() > 1e-2
    # Special tokens sit at position (0, 0), where the rotation is the identity.
    assert torch.allclose(before[GLOBAL].query[:, :, :5], after[GLOBAL].query[:, :, :5])


def test_site_descriptions(model: VGGTLike) -> None:
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(torch.rand(2, 3, 3, 28, 42))
    frame, every = captured[FRAME].site, captured[GLOBAL].site
    assert (frame.kind, frame.block, frame.frames_in_batch) == ("frame", 0, True)
    assert (every.kind, every.block, every.frames_in_batch) == ("global", 1, False)
    assert every.query_layout == vistvis.TokenLayout(3, (2, 3), ("camera", *["register"] * 4), 14)
    assert frame.key_layout == every.query_layout.frame_layout()
    assert captured[FRAME].shape == (6, 4, 11, 11)
    assert captured[GLOBAL].shape == (2, 4, 33, 33)


def test_autocast_records_what_the_kernel_used(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(images)
        with vistvis.capture(model, verify=True) as captured:
            watched = model(images)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert captured[GLOBAL].query.dtype == torch.bfloat16


def test_half_precision_model(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), vistvis.capture(model.bfloat16(), verify=True) as captured:
        model(images.bfloat16())
    assert captured[GLOBAL].query.dtype == torch.bfloat16
    assert captured[GLOBAL].rows(3).dtype == torch.float32


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, torch.enable_grad, contextlib.nullcontext]
)
def test_the_output_is_the_same_bit_for_bit(
    model: VGGTLike, images: Tensor, around: Callable[[], Any]
) -> None:
    with around():
        plain = model(images)
        with vistvis.capture(model) as captured:
            watched = model(images)
        again = model(images)
    for a, b, c in zip(plain, watched, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not captured[GLOBAL].query.requires_grad
    assert torch.allclose(captured[GLOBAL].rows(0).sum(-1), torch.ones(()))


def test_verify_passes_and_can_fail(
    model: VGGTLike, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad(), vistvis.capture(model, verify=True) as captured:
        model(images)
    assert len(captured) == 4

    real = KernelReader.sdpa

    def one_token_off(reader: KernelReader, call: Any, *rest: Any) -> Any:
        return real(reader, call._replace(key=call.key.roll(1, -2)), *rest)

    monkeypatch.setattr(KernelReader, "sdpa", one_token_off)
    capture = vistvis.capture(model, GLOBAL, verify=True)
    with pytest.raises(CaptureError, match=r"'global_blocks\.1\.attn': weights @ V differs"):  # noqa: SIM117
        with torch.no_grad(), capture:
            model(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_is_strict_behind_large_masks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A mask of −10³⁸ must not count as a logit that excuses rounding."""
    hidden = torch.zeros(6, 6, dtype=dtype).masked_fill(~HIDDEN, torch.finfo(dtype).min)
    hidden[5] = torch.finfo(dtype).min
    model = Kernel(lambda x: sdpa(x, x, x.flip(2), attn_mask=hidden)).eval()
    with vistvis.capture(model, verify=True) as captured:
        model(X.to(dtype))
    assert captured["Kernel"].shape == (2, 2, 6, 6)
    real = KernelReader.sdpa

    def dropped(reader: KernelReader, call: Any, *rest: Any) -> Any:
        return real(reader, call._replace(attn_mask=None), *rest)

    monkeypatch.setattr(KernelReader, "sdpa", dropped)
    with pytest.raises(CaptureError, match="weights @ V differs"):  # noqa: SIM117
        with vistvis.capture(model, verify=True):
            model(X.to(dtype))


# -- passes ----------------------------------------------------------------------------------------


def test_the_last_pass_wins(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(images)
        first = captured[GLOBAL].query.clone()
        model(images.flip(-1))
    assert captured.passes == 2
    assert not torch.equal(captured[GLOBAL].query, first)


def test_accumulate_keeps_every_pass(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), vistvis.capture(model, GLOBAL, accumulate=True) as captured:
        for count in (1, 2, 3):
            model(images[:count])
    kept: Any = captured[GLOBAL]
    assert [one.shape[2] for one in kept] == [11, 22, 33]
    assert "3 × " in captured.report()


class Twice(nn.Module):
    """One attention module used at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = VGGTAttention(32, 4, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.attn(x))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def other(self, x: Tensor) -> Tensor:
        return self.attn(x)


def test_a_shared_module_is_an_error_that_leaves_the_forward_alone() -> None:
    model, x = Twice().eval(), torch.randn(1, 5, 32)
    capture = vistvis.capture(model)
    with pytest.raises(CaptureError, match=r"'attn': ran 2 times in one forward pass"):  # noqa: SIM117
        with capture:
            assert torch.equal(model(x), capture._model(x))
    with vistvis.capture(model, accumulate=True) as captured:
        model(x)
    kept: Any = captured["attn"]
    assert len(kept) == 2


def test_other_methods_of_the_root_are_passes_too() -> None:
    model, x = Twice().eval(), torch.randn(1, 5, 32)
    for method in ("forward_features", "other"):
        with vistvis.capture(model) as captured:
            getattr(model, method)(x)
            getattr(model, method)(x + 1)
        assert captured.passes == 2
        assert captured["attn"].shape == (1, 4, 5, 5)
    assert vars(model).keys() == vars(Twice()).keys()


def test_recomputation_in_the_backward_pass_is_ignored(model: VGGTLike, images: Tensor) -> None:
    model.train()
    with vistvis.capture(model) as captured:
        model(images)[-1].sum().backward()
    assert all(count == 1 for count in captured._results.fired.values())
    assert captured[GLOBAL].shape == (1, 4, 33, 33)


def test_recomputation_with_reentrant_checkpoints() -> None:
    block = Block(32, VGGTAttention(32, 4, None)).train()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=True)

    with vistvis.capture(Net()) as captured:
        out = captured._model(torch.randn(1, 5, 32, requires_grad=True))
        out.sum().backward()
    assert captured["block.attn"].shape == (1, 4, 5, 5)


def test_a_failed_pass_is_not_kept(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(images)
        with pytest.raises(RuntimeError):
            model(images[:, :2])
    assert captured.failed_passes == 1
    assert "1 failed" in captured.report()
    with pytest.raises(CaptureError, match="the last forward pass failed"):
        captured[GLOBAL]


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_an_earlier_pass_makes_room_site_by_site(
    model: VGGTLike, images: Tensor, fails: bool
) -> None:
    seen: list[tuple[int, int]] = []

    def look(*_: Any) -> None:
        alive = sum(old() is not None for old in earlier)
        seen.append((alive, len(captured)))
        if fails and len(seen) == 2:
            raise RuntimeError("stop here")

    with torch.no_grad(), vistvis.capture(model) as captured:
        model(images)
        earlier = [weakref.ref(attention.query) for attention in captured.values()]
        for name in captured:
            model.get_submodule(name).q_norm.register_forward_hook(look)
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            model(images)
        assert not any(old() is not None for old in earlier)
    # Gone when the site runs again, out of sight as soon as the pass begins.
    assert len(earlier) == 4
    assert seen == [(3, 0), (2, 0), (1, 0), (0, 0)][: len(seen)]
    assert len(seen) == (2 if fails else 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_more_than_queries_and_keys_is_held(
    model: VGGTLike, images: Tensor, mode: Callable[[], Any]
) -> None:
    with mode(), vistvis.capture(model) as captured:
        model(images)
    for attention in captured.values():
        for tensor in (attention.query, attention.key):
            size = tensor.numel() * tensor.element_size()
            assert tensor.untyped_storage().nbytes() <= 1.05 * size


class Plain(nn.Module):
    """No norm, no rope: q and k are views of the fused projection."""

    def __init__(self, *, write: bool = False) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.write = 4, nn.Linear(32, 96), write

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.write:
            q, k = q.clone(), k.clone()
        out = F.scaled_dot_product_attention(q, k, v)
        if self.write:
            k.zero_()
        return out.transpose(1, 2).flatten(2)


def test_views_of_a_fused_projection_are_copied() -> None:
    with torch.no_grad(), vistvis.capture(Plain()) as captured:
        captured._model(torch.randn(1, 50, 32))
    query = captured["Plain"].query
    assert query.untyped_storage().nbytes() == query.numel() * 4


def test_a_later_write_is_an_error() -> None:
    with torch.no_grad(), vistvis.capture(Plain(write=True)) as captured:
        captured._model(torch.randn(1, 50, 32))
    with pytest.raises(CaptureError, match="written into"):
        captured["Plain"].rows(0)


def test_a_later_write_does_not_matter_in_inference_mode() -> None:
    model, x = Plain(write=True), torch.randn(1, 50, 32)
    with torch.inference_mode(), vistvis.capture(model) as captured:
        model(x)
    assert captured["Plain"].key.abs().sum() > 0


BLOCKS = "blocks.*"


class Masked(nn.Module):
    """Three sites, one mask; the second writes into it where it is told to."""

    def __init__(self, *, write: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Kernel(lambda x: x) for _ in range(3))
        self.write = write

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            block.call = lambda x: F.scaled_dot_product_attention(x, x, x, mask.expand(2, 1, 6, 6))
            x = block(x)
            if index == 0 and self.write:
                mask.fill_(0)
        return x


def test_one_copy_of_a_mask_serves_every_site() -> None:
    with torch.inference_mode(), vistvis.capture(Masked(), BLOCKS) as captured:
        captured._model(X.clone(), HIDDEN.expand(1, 1, 6, 6).float().log())
    masks = {a.mask.untyped_storage().data_ptr(): a.mask for a in captured.values()}
    assert len(masks) == 1
    assert next(iter(masks.values())).untyped_storage().nbytes() == 36 * 4


def test_a_mask_that_is_written_into() -> None:
    mask = HIDDEN.expand(1, 1, 6, 6).float().log()
    with torch.inference_mode(), vistvis.capture(Masked(write=True), BLOCKS) as captured:
        captured._model(X.clone(), mask.clone())
    first, second, _ = captured.values()
    assert first.dense().triu(1).abs().max() == 0
    assert second.dense().triu(1).abs().max() > 0
    with torch.no_grad(), vistvis.capture(Masked(write=True), BLOCKS) as captured:
        captured._model(X.clone(), mask.clone())
    with pytest.raises(CaptureError, match="written into"):
        captured["blocks.0"].rows(0)


def test_keep_and_sink(model: VGGTLike, images: Tensor) -> None:
    seen: dict[str, Attention] = {}
    with torch.no_grad(), vistvis.capture(model, keep="cpu", sink=seen.__setitem__) as captured:
        model(images)
        assert list(seen) == in_run_order(model)
    with pytest.raises(CaptureError, match="handed to the sink"):
        captured[GLOBAL]


def test_close_lets_go(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(images)
    assert captured.nbytes > 0
    captured.close()
    assert captured.nbytes == 0
    with pytest.raises(CaptureError, match="closed"):
        captured[GLOBAL]


# -- nothing is left behind ------------------------------------------------------------------------


def test_after_success(model: VGGTLike, images: Tensor) -> None:
    before = state_of(model)
    with torch.no_grad(), vistvis.capture(model):
        model(images)
        assert state_of(model) != before
    assert state_of(model) == before
    assert no_mode_left()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_error_in_the_middle_of_a_kernel(
    model: VGGTLike, images: Tensor, error: type[BaseException]
) -> None:
    before = state_of(model)

    def fail(module: nn.Module, inputs: Any) -> None:
        raise error

    handle = model.global_blocks[0].attn.q_norm.register_forward_pre_hook(fail)
    with pytest.raises(error), torch.no_grad(), vistvis.capture(model):
        model(images)
    handle.remove()
    assert state_of(model) == before
    assert no_mode_left()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 2, 4])
def test_after_a_registration_that_fails_halfway(
    model: VGGTLike, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], when: int
) -> None:
    module = sys.modules["vistvis.hooks.watching"]
    before, real, count = state_of(model), patching.attach, 0

    def fails(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > when:
            raise error
        real(*args, **kwargs)

    monkeypatch.setattr(module, "attach", fails)
    with pytest.raises(error):
        vistvis.capture(model)
    assert state_of(model) == before


def test_an_instance_with_its_own_forward_gets_it_back(model: VGGTLike, images: Tensor) -> None:
    attn = model.global_blocks[1].attn
    own = attn.forward
    attn.forward = own
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(images)
    assert attn.__dict__["forward"] is own
    assert captured[GLOBAL].shape[2] == 33


def test_captures_on_one_model_end_in_any_order(model: VGGTLike, images: Tensor) -> None:
    before = state_of(model)
    one, two = vistvis.capture(model, GLOBAL), vistvis.capture(model, "*_blocks.*.attn")
    with torch.no_grad():
        model(images)
        one.remove()
        model(images.flip(0))
        two.remove()
    assert state_of(model) == before
    assert (one.passes, two.passes) == (1, 2)
    assert not torch.equal(one[GLOBAL].query, two[GLOBAL].query)
    assert len(two) == 4


def test_two_threads_with_two_models_do_not_mix(images: Tensor) -> None:
    models = [sharp_model(), sharp_model()]
    alone = []
    for model in models:
        with torch.no_grad(), vistvis.capture(model) as captured:
            model(images)
        alone.append({name: a.query for name, a in captured.items()})
    start, errors = threading.Barrier(2), []

    def work(index: int) -> None:
        try:
            start.wait()
            for _ in range(5):
                with torch.no_grad(), vistvis.capture(models[index]) as captured:
                    models[index](images)
                for name, attention in captured.items():
                    assert torch.equal(attention.query, alone[index][name])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# -- compiled models -------------------------------------------------------------------------------


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)  # compiling takes its time


@pytest.mark.parametrize(
    ("backend", "first", "root"),
    [
        ("eager", "compile", "compiled"),
        ("eager", "capture", "original"),
        slow("eager", "capture", "compiled"),
        slow("eager", "compile", "original"),
        slow("aot_eager", "compile", "compiled"),
        slow("aot_eager", "capture", "original"),
        slow("inductor", "compile", "compiled"),
        slow("inductor", "capture", "original"),
    ],
)
def test_compiled_models(images: Tensor, backend: str, first: str, root: str) -> None:
    model = sharp_model(depth=1)
    # Inductor fuses differently from eager code; what it gave to its kernel is compared there.
    close = 2e-6 if backend == "inductor" else 0.0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    chosen = compiled if root == "compiled" else model
    with torch.no_grad():
        plain = compiled(images)
        if first == "capture":
            torch._dynamo.reset()
        with vistvis.capture(chosen, verify=True) as captured:
            compiled(images.flip(0))
            watched = compiled(images)
        again = compiled(images)
        with vistvis.capture(model) as eager:
            model(images)
    torch._dynamo.reset()
    for a, b, c in zip(plain, watched, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert captured.passes == 2
    for name, attention in eager.items():
        assert (attention.query - captured[name].query).abs().max() <= close
        assert (attention.key - captured[name].key).abs().max() <= close
        assert attention.site.query_layout == captured[name].site.query_layout


@pytest.mark.parametrize("root", ["compiled", "original"])
def test_compiled_under_autocast(images: Tensor, root: str) -> None:
    """Read after the block has ended: the dtype is that of the kernel all the same."""
    torch._dynamo.reset()
    model = sharp_model(depth=1)
    compiled = torch.compile(model, backend="eager")
    capture = vistvis.capture(compiled if root == "compiled" else model, "**.frame_blocks.*.attn")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled(images)
    capture.remove()
    assert capture[FRAME].query.dtype == torch.bfloat16
    torch._dynamo.reset()


def test_a_module_compiled_in_place(images: Tensor) -> None:
    torch._dynamo.reset()
    model = sharp_model(depth=1)
    model.compile(backend="eager")
    with torch.no_grad():
        plain = model(images)
        with vistvis.capture(model) as captured:
            watched = model(images)
    torch._dynamo.reset()
    assert torch.equal(plain[-1], watched[-1])
    assert captured[FRAME].shape == (3, 4, 11, 11)


# -- refusals --------------------------------------------------------------------------------------


def test_names_that_match_nothing(model: VGGTLike) -> None:
    with pytest.raises(SiteError, match=r"no site 'global_blocks\.9\.attn': nearest: global_blo"):
        vistvis.capture(model, "global_blocks.9.attn")
    with pytest.raises(SiteError, match="chose none of the 4 sites"):
        vistvis.capture(model, lambda site: False)
    with pytest.raises(SiteError, match="no attention site"):
        vistvis.capture(nn.Linear(3, 3))
    assert all("forward" not in vars(module) for module in model.modules())


def test_access_to_what_was_not_captured(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), vistvis.capture(model, "frame_blocks.*.attn") as captured:
        with pytest.raises(CaptureError, match="model was not run"):
            captured[FRAME]
        with pytest.raises(CaptureError, match="nothing was captured"):
            list(captured)
        model(images)
    with pytest.raises(SiteError, match="was not chosen"):
        captured[GLOBAL]
    with pytest.raises(SiteError, match="no site 'frame_blocks'"):
        captured["frame_blocks"]


def test_sites_that_never_run() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = VGGTAttention(32, 4, None), VGGTAttention(32, 4, None)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with vistvis.capture(Two().eval()) as captured:
        captured._model(torch.randn(1, 4, 32))
    assert list(captured) == ["used"]
    assert "idle" not in captured
    with pytest.raises(CaptureError, match="'idle' did not run in 1 forward passes"):
        captured["idle"]
    assert "did not run" in captured.report()
    capture = vistvis.capture(captured._model, "idle")
    with pytest.raises(CaptureError, match="none of the 1 chosen sites ran"):  # noqa: SIM117
        with capture:
            captured._model(torch.randn(1, 4, 32))


def test_models_that_can_not_be_captured(model: VGGTLike) -> None:
    with pytest.raises(CaptureError, match="DataParallel"):
        vistvis.capture(nn.DataParallel(model))
    with pytest.raises(CaptureError, match="TorchScript"):
        vistvis.capture(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.raises(InputError, match=r"nn\.Module"):
        vistvis.capture("model")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="keep"):
        vistvis.capture(model, keep="gpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="source"):
        vistvis.capture(model, source="guess")  # type: ignore[arg-type]


def memory_efficient_attention(*args: Tensor) -> Tensor:
    """Stands for a kernel outside of torch's functions: nothing of it can be seen."""
    with torch._C.DisableTorchFunction():
        return torch.zeros_like(args[0])


class Hidden(nn.Module):
    """An attention module that calls such a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return memory_efficient_attention(x, x, x)


def test_a_kernel_that_shows_nothing_is_named() -> None:
    model = Hidden()
    assert vistvis.find_sites(model)[0].source == "kernel"
    with pytest.raises(CaptureError, match=r"'Hidden': .*code names memory_efficient_attention"):  # noqa: SIM117
        with vistvis.capture(model):
            model(X)


def test_script_modules_inside_a_model_are_refused_by_name() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            attn = VGGTAttention(32, 4, None).eval()
            self.attn = torch.jit.trace(attn, torch.randn(1, 4, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)

    with pytest.raises(SiteError, match=r"'attn' .*TorchScript \(VGGTAttention\)"):
        vistvis.capture(Outer())


class Kernel(nn.Module):
    """Calls the kernel the way that it is told to."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads, self.call = 2, call

    def forward(self, x: Tensor) -> Tensor:
        if x is None:
            return F.scaled_dot_product_attention(x, x, x)
        return self.call(x)


def captured_kernel(call: Callable[[Tensor], Tensor], x: Tensor) -> Attention:
    model = Kernel(call).train()
    with vistvis.capture(model, verify=True) as captured:
        out = model(x)
    model.call = lambda x: x
    assert out is not None
    return captured["Kernel"]


def sdpa(*args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


X = torch.linspace(-2, 2, 2 * 2 * 6 * 4).sin().mul(3).view(2, 2, 6, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: sdpa(x, x, x, dropout_p=0.1), "dropout is active"),
        (lambda x: sdpa(x, x, x) + sdpa(x, x, x), "made 2 attention kernel calls"),
        (lambda x: x + 1, "without a kernel call that can be seen"),
        (lambda x: torch.exp(x @ x.mT) @ x, "without a kernel call that can be seen"),
        (lambda x: F.dropout((x @ x.mT).softmax(-1), 0.5) @ x, "dropout is active on its weights"),
        (lambda x: (x @ x.mT).softmax(-2) @ x, "softmax runs over the queries"),
        (
            lambda x: torch.vmap(lambda one: sdpa(one, one, one))(x[:, None]),
            r"inside a torch\.func transform",
        ),
    ],
)
def test_kernel_calls_that_can_not_be_exact(call: Callable[[Tensor], Tensor], text: str) -> None:
    with pytest.raises(CaptureError, match=f"site 'Kernel': .*{text}"):
        captured_kernel(call, X)


def test_nested_tensors_are_refused() -> None:
    lengths = [torch.randn(2, 3, 4), torch.randn(2, 5, 4)]
    x = torch.nested.nested_tensor(lengths, layout=torch.strided)
    with pytest.raises(CaptureError, match="nested tensor"):
        captured_kernel(lambda x: sdpa(x, x, x), x)


BIAS = torch.linspace(-4, 4, 36).cos().view(1, 1, 6, 6) * 3
HIDDEN = torch.ones(6, 6).tril().bool()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: sdpa(x, x, x), {}),
        (lambda x: sdpa(query=x, key=x, value=x, scale=0.9), {"scale": 0.9}),
        (lambda x: sdpa(x, x, x, None, 0.0, True), {"causal": True}),
        (lambda x: sdpa(x, x, x, HIDDEN), {"mask": HIDDEN}),
        (lambda x: sdpa(x, x, x, attn_mask=BIAS), {"mask": BIAS}),
        (
            lambda x: sdpa(x, x, x, causal_lower_right(6, 6)),
            {"mask": HIDDEN},
        ),
        (lambda x: (x @ x.mT * 0.5).softmax(-1) @ x, {}),
        (lambda x: F.softmax(x @ x.mT * 0.5 + BIAS, dim=3) @ x, {"mask": BIAS}),
        (lambda x: (x.mT @ torch.softmax(x @ x.mT * 0.5, -1).mT).mT, {}),
        (
            lambda x: torch.einsum(
                "bhqk,bhkd->bqhd",
                torch.einsum("bhqd,bhkd->bhqk", x, x).mul(0.5).softmax(-1),
                x,
            ),
            {},
        ),
        (
            lambda x: torch.bmm(
                torch.baddbmm(BIAS[0].expand(4, 6, 6), x.flatten(0, 1), x.flatten(0, 1).mT)
                .softmax(-1)
                .clone(),
                x.flatten(0, 1),
            ),
            {"scale": 1.0, "mask": BIAS},
        ),
    ],
)
def test_ways_to_call_a_kernel(call: Callable[[Tensor], Tensor], expected: dict[str, Any]) -> None:
    model = Kernel(call).eval()
    with vistvis.capture(model) as captured:
        model(X)
    weights, reference = captured["Kernel"].dense(), softmax_of(X, X, **expected)
    assert weights.shape == (2, 2, 6, 6)
    assert (weights - reference).abs().max() < 1e-5
    if "mask" in expected:
        bare = softmax_of(X, X, scale=expected.get("scale"))
        assert (weights - bare).abs().max() > 0.05, "dropping the mask must show"


@pytest.mark.parametrize("fused", [True, False])
def test_channel_attention_of_any_class_is_refused(fused: bool) -> None:
    def call(x: Tensor) -> Tensor:  # (B, N, C)
        heads = x.unflatten(-1, (2, 4)).permute(0, 2, 3, 1)
        if fused:
            return sdpa(heads, heads, heads)
        return (heads @ heads.mT).softmax(-1) @ heads

    with pytest.raises(CaptureError, match="over the channels of a head, not over its 6 tokens"):
        captured_kernel(call, torch.randn(2, 6, 8))


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4)])
def test_causal_with_other_numbers_of_keys(sizes: tuple[int, int]) -> None:
    """Counted from the first key, as the kernel does."""
    query, key = torch.randn(2, 2, sizes[0], 4), torch.randn(2, 2, sizes[1], 4)
    model = Kernel(lambda x: sdpa(query, key, key, is_causal=True)).eval()
    with vistvis.capture(model, verify=True) as captured:
        model(X)
    assert (captured["Kernel"].dense() - softmax_of(query, key, causal=True)).abs().max() < 1e-5


def test_grouped_heads_are_not_copied() -> None:
    query = torch.randn(2, 4, 6, 4) * 2
    model = Kernel(lambda x: sdpa(query, x, x, enable_gqa=True)).eval()
    with vistvis.capture(model, verify=True) as captured:
        model(X)
    attention = captured["Kernel"]
    assert attention.key.shape[1] == 2
    assert (attention.dense() - softmax_of(query, X)).abs().max() < 1e-5


def test_folded_dimensions() -> None:
    """Windows between heads and tokens, and heads folded into the batch."""
    x = torch.randn(2, 3, 2, 5, 4) * 2  # batch, windows, heads, tokens, width
    model = Kernel(lambda x: sdpa(x, x, x)).eval()
    with vistvis.capture(model, verify=True) as captured:
        model(x)
    expected = softmax_of(x, x).flatten(0, 1)
    assert (captured["Kernel"].dense() - expected).abs().max() < 1e-5
    with vistvis.capture(model, verify=True) as captured:
        model(x.transpose(1, 2))  # batch, heads, windows
    assert (captured["Kernel"].dense() - expected).abs().max() < 1e-5


def test_source_can_be_forced(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad():
        with vistvis.capture(model, GLOBAL, source="kernel") as captured:
            model(images)
        assert captured[GLOBAL].site.source == "kernel"
        with pytest.raises(CaptureError, match="shows only kernel"):  # noqa: SIM117
            with vistvis.capture(model, GLOBAL, source="softmax"):
                model(images)
        with pytest.raises(CaptureError, match="rope=False"):  # noqa: SIM117
            with vistvis.capture(model, GLOBAL, source="projection"):
                model(images)
    plain = Block(32, VGGTAttention(32, 4, None)).eval()
    with torch.no_grad(), vistvis.capture(plain, source="projection") as captured:
        plain(torch.randn(1, 6, 32))
    assert captured["attn"].site.source == "projection"


def test_a_copy_of_a_watched_model_still_runs(model: VGGTLike, images: Tensor) -> None:
    with torch.no_grad(), vistvis.capture(model):
        plain = model(images)
        assert torch.equal(copy.deepcopy(model)(images)[-1], plain[-1])


def test_report(model: VGGTLike, images: Tensor) -> None:
    capture = vistvis.capture(model, [FRAME, "global_blocks.*.attn"])
    assert "still watching" in capture.report()
    assert "model was not run" in capture.report()
    with torch.no_grad(), capture:
        model(images)
    report = capture.report()
    assert report.startswith("3 sites expected, 3 captured, 1 forward passes")
    assert f"{GLOBAL}  VGGTAttention  1    kernel     1×4×33×33" in report
    assert "3 of 3 sites" in repr(capture)
