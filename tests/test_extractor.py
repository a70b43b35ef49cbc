"""AttentionExtractor on our VGGT: exact against two witnesses, names, shapes, refusals.

Attention is sharpened through `q_norm.weight`: with normalised queries and keys, scaling the
projections would change nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from laws import reference_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from vggt_adapter.extractor import AttentionExtractor, extract_both_attentions
from vggt_adapter.model import VGGT
from vistvis import Attention, RunWriter, TokenLayout, open_run
from vistvis.errors import CaptureError, DenseLimitError, InputError, SiteError

SPECIAL = ("camera", "register", "register", "register", "register")


def sharpen(model: nn.Module, images: Tensor) -> None:
    """Scale q norms until the largest weight of the watched blocks lies between 0.3 and 0.95."""
    with torch.no_grad():
        for blocks in (model.aggregator.frame_blocks, model.aggregator.global_blocks):
            for number, block in enumerate(blocks):
                kind = "frame" if blocks is model.aggregator.frame_blocks else "global"
                for _ in range(20):
                    with AttentionExtractor(model) as extractor:
                        extractor.register_hooks(number, kind)
                        model(images)
                    top = float(extractor.captured[f"{kind}_block_{number}"].dense().max())
                    if top > 0.3:
                        break
                    block.attn.q_norm.weight.mul_(1.5)
                assert 0.3 < top < 0.95


def make(depth: int = 2) -> VGGT:
    torch.manual_seed(3)
    model = VGGT.from_config(
        img_size=56, patch_size=14, embed_dim=64, depth=depth, num_heads=4, patch_embed="conv"
    )
    # LayerScale starts at 0.01: blocks would hardly change what the next one sees.
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "token" in name:
            nn.init.normal_(parameter)
    return model.eval()


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(2, 3, 3, 42, 70)


@pytest.fixture(scope="module")
def model(images: Tensor) -> VGGT:
    model = make()
    sharpen(model, images)
    return model


class Kernel(TorchFunctionMode):
    """A witness that shares no code with the package: notes every kernel call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self.calls.append((query.clone(), key.clone(), value.clone(), out.clone()))
        return out


def run(model: VGGT, images: Tensor) -> tuple[AttentionExtractor, Kernel]:
    with AttentionExtractor(model) as extractor, Kernel() as kernel, torch.no_grad():
        extractor.register_hooks()
        model(images)
    return extractor, kernel


def traces(model: nn.Module) -> list[str]:
    """Whatever a capture may have left on a model or in this thread."""
    found = [str(mode) for mode in _get_current_function_mode_stack()]
    for name, module in model.named_modules():
        found += [f"{name}.{key}" for key in ("forward", "__call__") if key in vars(module)]
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            found += [f"{name}: {hook}" for hook in hooks.values()]
    return found


def output(model: VGGT, images: Tensor) -> Tensor:
    with torch.no_grad():
        tokens, _ = model(images)
    return torch.stack(list(tokens))


# -- exactness -------------------------------------------------------------------------------


def test_first_witness_the_kernel(model: VGGT, images: Tensor) -> None:
    extractor, kernel = run(model, images)
    assert list(extractor.captured) == [
        "frame_block_0",
        "global_block_0",
        "frame_block_1",
        "global_block_1",
    ]
    assert len(kernel.calls) == 4
    for attention, (query, key, value, out) in zip(
        extractor.captured.values(), kernel.calls, strict=True
    ):
        assert attention.query is not None
        assert attention.key is not None
        assert torch.equal(attention.query, query)
        assert torch.equal(attention.key, key)
        weights = attention.dense()
        assert 0.3 < float(weights.max()) < 0.95
        torch.testing.assert_close(weights @ value, out, atol=1e-5, rtol=0)
        wanted = reference_weights(query, key)
        assert float((weights.double() - wanted).abs().max()) < 1e-5


@torch.no_grad()
def by_projection(attn: nn.Module, taken: Tensor, layout: TokenLayout, *, rope: bool) -> Tensor:
    """Weights from the output of the qkv projection: norm and rotary embedding written out here."""
    batch, tokens, width = taken.shape[0], taken.shape[1], taken.shape[2] // 3
    heads = attn.num_heads
    dim = width // heads
    query, key, _ = taken.reshape(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    query = F.layer_norm(query, (dim,), attn.q_norm.weight, attn.q_norm.bias, 1e-5)
    key = F.layer_norm(key, (dim,), attn.k_norm.weight, attn.k_norm.bias, 1e-5)
    if rope:
        places = torch.zeros(tokens, 2)
        for token in range(tokens):
            place = layout.locate(token)
            if place.row is not None and place.col is not None:
                places[token] = torch.tensor([place.row + 1, place.col + 1])
        query, key = rotated(query, places), rotated(key, places)
    return reference_weights(query, key)


def rotated(x: Tensor, places: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = 100.0 ** -(torch.arange(0, half, 2) / half)
    out = []
    for part, position in ((x[..., :half], places[:, 0]), (x[..., half:], places[:, 1])):
        first, second = part.chunk(2, -1)
        angle = position[:, None] * frequencies
        cos, sin = angle.cos(), angle.sin()
        out += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(out, -1)


@pytest.mark.parametrize("rope", [True, False])
def test_second_witness_the_projections(model: VGGT, images: Tensor, rope: bool) -> None:
    taken: dict[str, Tensor] = {}
    hooks = []
    for kind in ("frame", "global"):
        for number, block in enumerate(getattr(model.aggregator, f"{kind}_blocks")):

            def keep(_: nn.Module, __: object, out: Tensor, name: str = f"{kind}_block_{number}"):
                taken[name] = out.detach()

            hooks.append(block.attn.qkv.register_forward_hook(keep))
    try:
        with AttentionExtractor(model) as extractor, torch.no_grad():
            extractor.register_hooks(rope=rope)
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for name, attention in extractor.captured.items():
        assert attention.site is not None
        assert attention.site.rope is (None if rope else False)
        attn = getattr(model.aggregator, f"{attention.site.kind}_blocks")[attention.site.block].attn
        layout = attention.site.key_layout
        assert layout is not None
        wanted = by_projection(attn, taken[name], layout, rope=rope)
        found = attention.dense().double()
        assert float((found - wanted).abs().max()) < 1e-5
        broken = by_projection(attn, taken[name], layout, rope=not rope)
        assert float((found - broken).abs().max()) > 1e-2


@pytest.mark.parametrize("mistake", ["swapped heads", "token off by one", "other block"])
def test_the_witness_notices(model: VGGT, images: Tensor, mistake: str) -> None:
    extractor, kernel = run(model, images)
    attention = extractor.captured["global_block_1"]
    query, key, _, _ = kernel.calls[3]
    wanted = reference_weights(query, key)
    if mistake == "other block":
        wrong = extractor.captured["global_block_0"].dense()
    elif mistake == "swapped heads":
        wrong = attention.dense().flip(1)
    else:
        wrong = attention.dense().roll(1, 2)
    assert float((wrong - wanted).abs().max()) > 0.1


# -- the model is not changed ------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 3, 42, 70), (8, 3, 28, 42), (1, 1, 3, 70, 42), (2, 2, 3, 56, 56)]
)
def test_output_is_the_same_bit_for_bit(model: VGGT, shape: tuple[int, ...]) -> None:
    images = pictures(*shape)
    plain = output(model, images)
    with AttentionExtractor(model) as extractor:
        extractor.register_hooks()
        assert torch.equal(output(model, images), plain)
    frames, rows, cols = shape[-4], shape[-2] // 14, shape[-1] // 14
    layout = TokenLayout(frames, (rows, cols), SPECIAL)
    found = extractor.captured["global_block_1"]
    batch = shape[0] if len(shape) == 5 else 1
    assert found.shape == (batch, 4, layout.num_tokens, layout.num_tokens)
    assert found.site is not None
    assert found.site.key_layout == found.site.query_layout == layout
    frame = extractor.captured["frame_block_1"]
    per_frame = layout.tokens_per_frame
    assert frame.shape == (batch * frames, 4, per_frame, per_frame)
    assert frame.site is not None
    assert frame.site.frames_in_batch
    assert frame.site.key_layout == layout.frame_layout()
    assert traces(model) == []


@pytest.mark.parametrize("context", ["autocast", "inference_mode", "grad", "train"])
def test_under_other_modes(model: VGGT, images: Tensor, context: str) -> None:
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference_mode": torch.inference_mode,
        "grad": torch.enable_grad,
        "train": torch.enable_grad,
    }
    model.train(context == "train")
    try:
        with contexts[context]():
            plain = model(images)[0][-1]
        with AttentionExtractor(model) as extractor, Kernel() as kernel, contexts[context]():
            extractor.register_hooks()
            watched = model(images)[0][-1]
            if context in ("grad", "train"):
                watched.sum().backward()  # recomputes checkpointed blocks
        assert torch.equal(plain, watched)
        dtype = torch.bfloat16 if context == "autocast" else torch.float32
        for attention, (query, key, _, _) in zip(
            extractor.captured.values(), kernel.calls, strict=False
        ):
            assert attention.query is not None
            assert attention.key is not None
            assert attention.query.dtype == dtype
            assert torch.equal(attention.query, query.to(dtype))
            assert torch.equal(attention.key, key.to(dtype))
            assert not attention.query.requires_grad
            wanted = reference_weights(query.detach().to(dtype), key.detach().to(dtype))
            assert float((attention.dense().double() - wanted).abs().max()) < 1e-5
    finally:
        model.eval()
        model.zero_grad()
    assert traces(model) == []


def test_under_compile(model: VGGT, images: Tensor) -> None:
    def compiled() -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(model, backend="aot_eager")

    plain = output(compiled(), images)  # type: ignore[arg-type]
    fast = compiled()
    with AttentionExtractor(model) as extractor:
        extractor.register_hooks()
        for _ in range(2):
            assert torch.equal(output(fast, images), plain)  # type: ignore[arg-type]
        eager, _ = run(model, images)  # another capture, and a pass that is not compiled
    torch._dynamo.reset()
    for name, attention in eager.captured.items():
        for found in (extractor.captured[name], attention):
            assert found.shape == attention.shape
            assert float((found.dense() - attention.dense()).abs().max()) < 1e-5
    assert traces(model) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(
    model: VGGT, images: Tensor, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise error("in the middle")

    extractor = AttentionExtractor(model).register_hooks()
    with monkeypatch.context() as patched:
        patched.setattr(model.aggregator.global_blocks[0].attn.k_norm, "forward", fail)
        with pytest.raises(error):
            model(images)
        assert _get_current_function_mode_stack() == []
    with pytest.raises(CaptureError, match="failed"):
        extractor.captured["frame_block_0"]
    extractor.clear_hooks()
    assert traces(model) == []
    with pytest.raises(error):
        fail_inside_the_block(model, error)
    assert traces(model) == []


def fail_inside_the_block(model: VGGT, error: type[BaseException]) -> None:
    with AttentionExtractor(model) as extractor:
        extractor.register_hooks()
        raise error("in the block")


def test_nothing_is_left_after_a_failed_registration(model: VGGT) -> None:
    extractor = AttentionExtractor(model)
    with pytest.raises(InputError):
        extractor.register_hooks([0, 7])
    assert traces(model) == []


# -- what users get ------------------------------------------------------------------------------


def test_maps_are_the_dicts_users_know(model: VGGT, images: Tensor) -> None:
    extractor = AttentionExtractor(model)
    extractor.register_hooks(block_indices=[1], attention_types=["global", "frame"])
    with torch.no_grad():
        model(images)
    maps = extractor.get_attention_maps()
    extractor.clear_hooks()
    assert list(maps) == ["frame_block_1", "global_block_1"]
    tokens = 3 * 5 + 5
    for name, kind, count, batch in (
        ("frame_block_1", "frame", tokens, 6),
        ("global_block_1", "global", 3 * tokens, 2),
    ):
        assert set(maps[name]) == {"attn_weights", "layer_type", "num_heads", "num_tokens"}
        assert maps[name]["layer_type"] == kind
        assert maps[name]["num_heads"] == 4
        assert maps[name]["num_tokens"] == count
        assert isinstance(maps[name]["attn_weights"], Attention)
        assert maps[name]["attn_weights"].shape == (batch, 4, count, count)
        assert maps[name]["attn_weights"].site.name == name


def test_dense_gives_plain_tensors_under_the_limit(
    model: VGGT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = extract_both_attentions(model, images, block_idx=0)
    plain = extract_both_attentions(model, images, block_idx=0, dense=True)
    for part in ("frame_attention", "global_attention"):
        assert type(plain[part]["attn_weights"]) is Tensor
        assert torch.equal(plain[part]["attn_weights"], lazy[part]["attn_weights"].dense())
    assert plain["global_attention"]["attn_weights"].shape == (2, 4, 60, 60)
    wide = pictures(1, 3, 14 * 100, 14 * 120)
    with pytest.raises(DenseLimitError, match=r"rows\(queries\)"):
        extract_both_attentions(model, wide, block_idx=0, dense=True)
    assert traces(model) == []


def test_both_attentions_of_one_block(model: VGGT, images: Tensor) -> None:
    result = extract_both_attentions(model, images[0], block_idx=-1)
    assert set(result) == {"frame_attention", "global_attention", "block_idx", "patch_start_idx"}
    assert (result["block_idx"], result["patch_start_idx"]) == (1, 5)
    assert result["frame_attention"]["attn_weights"].shape == (3, 4, 20, 20)
    assert result["global_attention"]["attn_weights"].shape == (1, 4, 60, 60)
    without = extract_both_attentions(model, images[0], block_idx=1, rope=False)
    assert without["global_attention"]["rope"] is False
    difference = (
        without["global_attention"]["attn_weights"][0, 0]
        - (result["global_attention"]["attn_weights"][0, 0])
    )
    assert float(difference.abs().max()) > 1e-2


def test_last_pass_wins_and_accumulate_keeps_all(model: VGGT) -> None:
    first, second = pictures(2, 3, 28, 28), pictures(3, 3, 42, 28)
    extractor = AttentionExtractor(model)
    extractor.register_hooks(0)
    for images in (first, second):
        output(model, images)
    assert extractor.captured["global_block_0"].shape[-1] == 3 * 11
    extractor.register_hooks(0, "global", accumulate=True)
    for images in (first, second):
        output(model, images)
    extractor.clear_hooks()
    passes = extractor.captured["global_block_0"]
    assert [a.shape[-1] for a in passes] == [2 * 9, 3 * 11]  # type: ignore[attr-defined]
    assert len(extractor.get_attention_maps()["global_block_0"]["attn_weights"]) == 2


def test_a_call_of_the_aggregator_alone_is_a_pass_too(model: VGGT, images: Tensor) -> None:
    extractor = AttentionExtractor(model.aggregator)
    extractor.register_hooks()
    with torch.no_grad():
        model.aggregator(images)
        model.aggregator(images)
    assert len(extractor.captured) == 4
    assert "global_block_1" in extractor.report() or "global_blocks.1" in extractor.report()
    extractor.clear_hooks()


def test_a_run_is_written_while_the_model_runs(model: VGGT, images: Tensor, tmp_path: Path) -> None:
    kept, _ = run(model, images)
    with RunWriter(tmp_path / "run") as writer, AttentionExtractor(model) as extractor:
        extractor.register_hooks(sink=writer)
        output(model, images)
        with pytest.raises(CaptureError, match="handed to the sink"):
            extractor.captured["frame_block_0"]
    stored = open_run(tmp_path / "run")
    assert list(stored) == list(kept.captured)
    for name, attention in kept.captured.items():
        assert torch.equal(stored[name].dense(), attention.dense())
        assert stored[name].site == attention.site


def test_values_are_kept_where_they_are_asked_for(model: VGGT, images: Tensor) -> None:
    with AttentionExtractor(model) as extractor, Kernel() as kernel:
        extractor.register_hooks(values=True)
        model(images)
    for attention, (_, _, value, _) in zip(extractor.captured.values(), kernel.calls, strict=False):
        assert attention.value is not None
        assert torch.equal(attention.value, value)


def test_keep_cpu(model: VGGT, images: Tensor) -> None:
    with AttentionExtractor(model) as extractor:
        extractor.register_hooks(keep="cpu")
        output(model, images)
    assert all(a.device.type == "cpu" for a in extractor.captured.values())


class Fork(nn.Module):
    """Blocks in a model that is not ours: other special tokens, merged tokens in one block."""

    class Block(nn.Module):
        def __init__(self, merge: bool) -> None:
            super().__init__()
            self.attn = Fork.Attention(merge)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)

    class Attention(nn.Module):
        def __init__(self, merge: bool) -> None:
            super().__init__()
            self.num_heads, self.merge = 2, merge
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            if self.merge:
                k, v = k[:, :, ::2], v[:, :, ::2]
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx = 16, 3
        self.frame_blocks = nn.ModuleList([Fork.Block(False), Fork.Block(False)])
        self.global_blocks = nn.ModuleList([Fork.Block(False), Fork.Block(True)])
        self.embed = nn.Conv2d(3, 16, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        x = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([x.new_ones(x.shape[0], 3, 16), x], 1)
        for frame, everything in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame(x)
            x = everything(x.reshape(batch, -1, 16)).reshape(batch * frames, -1, 16)
        return x


def test_forks_are_captured_as_their_kernel_sees_them() -> None:
    fork = Fork().eval()
    with AttentionExtractor(fork) as extractor, Kernel() as kernel, torch.no_grad():
        extractor.register_hooks()
        fork(pictures(1, 2, 3, 32, 48))
    for attention, (query, key, _, _) in zip(
        extractor.captured.values(), kernel.calls, strict=True
    ):
        assert attention.query is not None
        assert attention.key is not None
        assert torch.equal(attention.query, query)
        assert torch.equal(attention.key, key)
    plain = extractor.captured["global_block_0"].site
    assert plain is not None
    assert plain.key_layout == TokenLayout(2, (2, 3), ("special",) * 3, 16)  # type: ignore[arg-type]
    merged = extractor.captured["global_block_1"]
    assert merged.shape == (1, 2, 18, 9)
    assert merged.site is not None
    assert merged.site.key_layout is None  # which patch a merged key stands for is not known


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "error", "text"),
    [
        (lambda e: e.register_hooks(2), InputError, r"blocks 0…1 of each kind, got 2"),
        (lambda e: e.register_hooks([0, -3]), InputError, r"blocks 0…1 of each kind, got -3"),
        (lambda e: e.register_hooks([]), InputError, r"got none"),
        (lambda e: e.register_hooks(0, "cross"), InputError, r"'frame' and 'global', got \['cross"),
        (lambda e: e.register_hooks(0, []), InputError, "'frame' and 'global'"),
        (lambda e: e.captured, CaptureError, r"call register_hooks\(\)"),
        (lambda e: e.get_attention_maps(), CaptureError, r"call register_hooks\(\)"),
    ],
)
def test_refusals(model: VGGT, ask: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ask(AttentionExtractor(model))  # type: ignore[operator]
    assert traces(model) == []


def test_hooks_without_a_forward_pass(model: VGGT) -> None:
    extractor = AttentionExtractor(model).register_hooks(0)
    with pytest.raises(CaptureError, match="was not run"):
        extractor.get_attention_maps()
    with pytest.raises(SiteError, match="'global_block_24': nearest: global_block_0"):
        extractor.captured["global_block_24"]
    extractor.clear_hooks()


def test_a_model_without_the_blocks() -> None:
    words = r"Sequential \(it has 0\).*vistvis\.capture\(.*TokenLayout.*vistvis\.trace_layout"
    with pytest.raises(SiteError, match=words):
        AttentionExtractor(nn.Sequential(nn.Linear(1, 1)))


def test_images_that_are_none(model: VGGT) -> None:
    with pytest.raises(InputError, match=r"\(S, 3, H, W\) or \(B, S, 3, H, W\)"):
        extract_both_attentions(model, torch.rand(3, 42, 42), block_idx=0)
    with pytest.raises(InputError, match=r"blocks 0…1"):
        extract_both_attentions(model, torch.rand(1, 3, 42, 42))


def test_both_attentions_under_autocast() -> None:
    model = VGGT.tiny()
    images = torch.rand(2, 3, 28, 28)
    plain = extract_both_attentions(model, images, block_idx=-1)
    cast = extract_both_attentions(model, images, block_idx=-1, dtype=torch.bfloat16)
    for kind in ("frame_attention", "global_attention"):
        assert plain[kind]["attn_weights"].dtype == torch.float32
        assert cast[kind]["attn_weights"].query.dtype == torch.bfloat16
