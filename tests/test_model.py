"""Our VGGT against the golden numbers, against laws, and against bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import CASES, differences, kernel_calls, model_of, pictures, published_1b_shapes
from torch import Tensor, nn

from vggt_adapter import VGGT, VGGTConfig, ViTConfig
from vggt_adapter.aggregator import (
    Attention,
    RotaryPositions,
    VisionTransformer,
    grid_positions,
)
from vggt_adapter.config import DINOV2_NAMES
from vistvis.errors import InputError

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_embed": "conv"}


def small(**sizes: Any) -> VGGT:
    """A small model whose blocks all matter: LayerScale 1, special tokens of normal size."""
    model = VGGT.from_config(**{**SMALL, "init_values": 1.0, **sizes})
    with torch.no_grad():
        for name in ("camera_token", "register_token"):
            getattr(model.aggregator, name).normal_()
    return model.eval()


# -- golden numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_in_float64(case: str) -> None:
    worst = differences(case, model_of(case), dtype=torch.float64)
    assert len(worst) >= 7
    assert max(worst.values()) < 1e-9, worst


@pytest.mark.parametrize("case", CASES)
def test_golden_in_float32(case: str) -> None:
    for name, worst in differences(case, model_of(case), dtype=torch.float32).items():
        assert worst < (2e-5 if name.endswith("attention") else 1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_golden_names_and_shapes(case: str) -> None:
    found = {n: list(v.shape) for n, v in model_of(case).aggregator.state_dict().items()}
    assert found == CASES[case]["state_dict"]


def test_the_1b_model_has_exactly_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        model = VGGT()
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == published_1b_shapes()
    assert sum(p.numel() for p in model.parameters()) == 909_112_320


# Each takes something out of the model that the golden numbers must notice.
Break = Callable[[VGGT, pytest.MonkeyPatch], None]


def _tanh_gelu(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    patch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))


def _no_rope(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RotaryPositions, "forward", lambda self, tokens, positions: tokens)


def _swapped_axes(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    turn = RotaryPositions.forward
    patch.setattr(RotaryPositions, "forward", lambda self, t, p: turn(self, t, p.flip(-1)))


def _interleaved(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    turn = RotaryPositions.forward

    def other(self: RotaryPositions, tokens: Tensor, positions: Tensor) -> Tensor:
        pairs = tokens.unflatten(-1, (2, -1, 2)).mT.flatten(-3)
        return turn(self, pairs, positions).unflatten(-1, (2, 2, -1)).mT.flatten(-3)

    patch.setattr(RotaryPositions, "forward", other)


def _patches_from_zero(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    turn = RotaryPositions.forward
    patch.setattr(RotaryPositions, "forward", lambda self, t, p: turn(self, t, (p - 1).clamp(0)))


def _angles_in_the_tokens_type(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    def exact(self: RotaryPositions, tokens: Tensor, positions: Tensor) -> Tensor:
        return naive_rotation(tokens, positions, self.frequency, angle_dtype=torch.float64)

    patch.setattr(RotaryPositions, "forward", exact)


def _first_frame_like_the_others(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model.aggregator.camera_token.copy_(model.aggregator.camera_token.flip(1))


def _no_qk_norm(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    model.aggregator.frame_blocks[0].attn.k_norm = nn.Identity()


def _no_image_norm(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    model.aggregator.image_mean.zero_()


def _global_before_frame(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    own = model.aggregator
    own.frame_blocks, own.global_blocks = own.global_blocks, own.frame_blocks


def _norm_eps(model: VGGT, patch: pytest.MonkeyPatch) -> None:
    for block in model.aggregator.frame_blocks:
        block.norm1.eps = 1e-6


BREAKS: tuple[Break, ...] = (
    _tanh_gelu,
    _no_rope,
    _swapped_axes,
    _interleaved,
    _patches_from_zero,
    _angles_in_the_tokens_type,
    _first_frame_like_the_others,
    _no_qk_norm,
    _no_image_norm,
    _global_before_frame,
    _norm_eps,
)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_golden_notices(broken: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("conv_b1s3")
    broken(model, monkeypatch)
    worst = differences("conv_b1s3", model, dtype=torch.float64)
    assert max(worst.values()) > 1e-8


def _plain_resize(model: VisionTransformer, patch: pytest.MonkeyPatch) -> None:
    real = F.interpolate
    patch.setattr(
        F, "interpolate", lambda x, size, mode, antialias: real(x, size, mode=mode, antialias=False)
    )


def _registers_first(model: VisionTransformer, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():  # a register that got the cls token's position
        assert model.register_tokens is not None
        model.register_tokens[:, 0] += model.pos_embed[:, 0]


def _vit_eps(model: VisionTransformer, patch: pytest.MonkeyPatch) -> None:
    model.norm.eps = 1e-5


@pytest.mark.parametrize("broken", [_plain_resize, _registers_first, _vit_eps])
def test_golden_notices_in_the_patch_embedding(
    broken: Callable[[VisionTransformer, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("dinov2s_b1s2")
    assert isinstance(model.aggregator.patch_embed, VisionTransformer)
    broken(model.aggregator.patch_embed, monkeypatch)
    worst = differences("dinov2s_b1s2", model, dtype=torch.float64)
    assert max(worst.values()) > 1e-8


# -- rotary positions ------------------------------------------------------------------------------


def naive_rotation(
    tokens: Tensor,
    positions: Tensor,
    frequency: float = 100.0,
    *,
    angle_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """RoPE as a loop over channel pairs, from the formula."""
    out = torch.empty_like(tokens)
    half = tokens.shape[-1] // 2
    for axis in (0, 1):
        for i in range(half // 2):
            exponent = torch.tensor(2 * i / half, dtype=angle_dtype)
            angle = positions[:, None, :, axis].to(angle_dtype) * (1 / frequency**exponent)
            cos, sin = angle.to(tokens.dtype).cos(), angle.to(tokens.dtype).sin()
            one, two = axis * half + i, axis * half + i + half // 2
            out[..., one] = tokens[..., one] * cos - tokens[..., two] * sin
            out[..., two] = tokens[..., two] * cos + tokens[..., one] * sin
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotation_is_the_formula(dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 3, 17, 16).to(dtype)
    positions = grid_positions(3, 4, 5).expand(2, -1, -1)
    expected = naive_rotation(tokens, positions)
    found = RotaryPositions()(tokens, positions)
    # One rounding apart where a product is fused with a sum; the pow of a vector and of a number
    # may differ in the last float32 bit.
    limit = 1e-5 if dtype in (torch.float64, torch.float32) else 4 * torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= limit * tokens.abs().max()
    assert torch.equal(found[:, :, :5], tokens[:, :, :5])


def test_positions_lose_precision_in_bfloat16_as_published() -> None:
    tokens = torch.randn(1, 1, 41 * 3, 64).bfloat16()
    positions = grid_positions(3, 41, 0)[None]
    found = RotaryPositions()(tokens, positions).float()
    as_published = naive_rotation(tokens, positions).float()
    precise = naive_rotation(tokens.float(), positions)
    assert (found - as_published).abs().max() < 0.05
    assert (found - precise).abs().max() > 0.1


def test_rotation_depends_on_distance_only() -> None:
    rope, q, k = (
        RotaryPositions(),
        torch.randn(1, 1, 1, 32).double(),
        torch.randn(1, 1, 1, 32).double(),
    )

    def dot(at: tuple[int, int], other: tuple[int, int]) -> Tensor:
        one, two = torch.tensor([[at]]), torch.tensor([[other]])
        return (rope(q, one) * rope(k, two)).sum()

    assert dot((3, 4), (7, 2)) == pytest.approx(dot((13, 24), (17, 22)).item(), abs=1e-5)
    assert dot((3, 4), (7, 2)) != pytest.approx(dot((3, 4), (2, 7)).item(), abs=1e-3)


def test_rotation_of_batches_in_different_places() -> None:
    tokens, rope = torch.randn(2, 1, 3, 8), RotaryPositions()
    positions = torch.randint(0, 9, (2, 3, 2))
    apart = [rope(tokens[i : i + 1], positions[i : i + 1]) for i in range(2)]
    assert torch.equal(rope(tokens, positions), torch.cat(apart))


def test_rotation_tables_are_those_of_the_positions_at_hand() -> None:
    rope, tokens = RotaryPositions(), torch.randn(1, 2, 6, 8)
    for dtype in (torch.float32, torch.float64, torch.float32):
        for rows, cols in ((2, 3), (3, 2), (1, 6), (6, 1), (2, 3)):
            positions = grid_positions(rows, cols, 0)[None]
            again = rope(tokens.to(dtype), positions), rope(tokens.to(dtype), positions)
            fresh = RotaryPositions()(tokens.to(dtype), positions)
            assert torch.equal(again[0], fresh)
            assert torch.equal(again[1], fresh)


def test_rotation_tables_do_not_outlive_a_forward() -> None:
    model = small()
    model(torch.rand(2, 3, 28, 42))
    assert model.aggregator.rope._tables == ()
    model.aggregator.global_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.rand(2, 3, 28, 42))
    assert model.aggregator.rope._tables == ()


# -- how the model runs ----------------------------------------------------------------------------


def test_shapes_and_names_that_others_rely_on() -> None:
    model = small()
    tokens, start = model(torch.rand(2, 3, 3, 28, 42))
    assert [tuple(t.shape) for t in tokens] == [(2, 3, 5 + 6, 64)] * 2
    own = model.aggregator
    assert start == own.patch_start_idx == 5
    assert own.patch_size == 14
    assert own.camera_token.shape == (1, 2, 1, 32)
    assert own.register_token.shape == (1, 2, 4, 32)
    for block in (*own.frame_blocks, *own.global_blocks):
        assert block.attn.rope is own.rope
        assert {"qkv", "q_norm", "k_norm", "proj"} <= {n for n, _ in block.attn.named_children()}
    assert not any("rope" in name or "image" in name for name in model.state_dict())


def test_positions_travel_as_keywords_and_rope_gives_the_kernels_queries() -> None:
    model, seen, rotated = small(), [], []
    for block in (model.aggregator.frame_blocks[1], model.aggregator.global_blocks[0]):
        for module in (block, block.attn):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append((len(args), set(kwargs))), with_kwargs=True
            )
    model.aggregator.rope.register_forward_hook(lambda _, __, out: rotated.append(out))
    with kernel_calls() as calls:
        model(torch.rand(2, 3, 28, 28))
    assert seen == [(1, {"pos"})] * 4
    assert len(rotated) == 2 * len(calls) == 8
    for index, (q, k, *_) in enumerate(calls):
        assert q is rotated[2 * index]
        assert k is rotated[2 * index + 1]


def test_a_batch_is_its_scenes() -> None:
    model, images = small().double(), torch.rand(2, 3, 3, 28, 42).double()
    together = model(images)[0][-1]
    for index in range(2):
        apart = model(images[index])[0][-1]
        assert torch.allclose(apart[0], together[index], atol=1e-12)


def test_later_frames_may_change_places_and_the_first_may_not() -> None:
    model, images = small().double(), torch.rand(4, 3, 28, 42).double()
    base = model(images)[0][-1][0]
    order = [0, 3, 1, 2]
    assert torch.allclose(model(images[order])[0][-1][0], base[order], atol=1e-12)
    order = [1, 0, 2, 3]
    assert not torch.allclose(model(images[order])[0][-1][0], base[order], atol=1e-3)


def test_frame_blocks_see_one_frame_and_global_blocks_all() -> None:
    model, images = small().double(), torch.rand(3, 3, 28, 42).double()
    other = images.clone()
    other[2] = torch.rand_like(other[2])
    one, two = (model(x)[0][0][0] for x in (images, other))
    width = model.config.embed_dim
    assert torch.equal(one[:2, :, :width], two[:2, :, :width])  # after the first frame block
    assert not torch.allclose(one[:2, :, width:], two[:2, :, width:], atol=1e-6)


@pytest.mark.parametrize("frames", [1, 8])
@pytest.mark.parametrize("size", [(14, 14), (70, 28)])
def test_any_number_of_frames_and_any_grid(frames: int, size: tuple[int, int]) -> None:
    tokens, _ = small()(torch.rand(frames, 3, *size))
    assert tokens[-1].shape == (1, frames, 5 + size[0] * size[1] // 196, 64)
    assert tokens[-1].isfinite().all()


def test_wanted_pairs_only() -> None:
    model, images = small(), torch.rand(2, 3, 28, 28)
    everything, _ = model(images)
    last, _ = model(images, pairs=[-1])
    assert len(last) == 1
    assert torch.equal(last[0], everything[1])
    assert model(images, pairs=[])[0] == []
    with pytest.raises(InputError, match=r"0…1.*\[2\]"):
        model(images, pairs=[2])


@pytest.mark.parametrize("patch_embed", ["conv", ViTConfig(depth=2, num_heads=4)])
def test_training_recomputes_blocks_and_gets_the_same_gradients(patch_embed: Any) -> None:
    model = small(patch_embed=patch_embed, img_size=28).double()
    images, calls = torch.rand(2, 3, 28, 28).double(), []
    attn = model.aggregator.global_blocks[0].attn
    attn.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        calls.clear()
        model(images)[0][-1].square().sum().backward()
        # The mask token is for masked training alone.
        named = {n: p.grad for n, p in model.named_parameters() if "mask_token" not in n}
        assert all(g is not None for g in named.values())
        return {n: g.clone() for n, g in named.items() if g is not None}

    plain = gradients()
    assert len(calls) == 1
    model.train()
    recomputed = gradients()
    assert len(calls) == 2
    model.aggregator.gradient_checkpointing = False
    kept = gradients()
    assert len(calls) == 1
    for name, value in plain.items():
        assert torch.allclose(value, recomputed[name], atol=1e-12), name
        assert torch.equal(value, kept[name]), name
    with torch.no_grad():
        model.aggregator.gradient_checkpointing = True
        calls.clear()
        model(images)
    assert len(calls) == 1


def test_inference_mode_leaves_nothing_that_training_trips_over() -> None:
    model, images = small(), torch.rand(2, 3, 28, 28)
    with torch.inference_mode():
        first = model(images)[0][-1]
    with torch.no_grad():
        second = model(images)[0][-1]
    assert torch.equal(first, second)
    with torch.inference_mode():
        positions = grid_positions(2, 2, 5)[None]
        model.aggregator.rope(torch.rand(1, 2, 9, 16), positions)
    tokens = torch.rand(1, 2, 9, 16, requires_grad=True)
    model.aggregator.rope(tokens, positions).sum().backward()
    assert tokens.grad is not None


def test_half_precision_and_autocast() -> None:
    model, images = small(), torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        exact = model(images)[0][-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(images)[0][-1]
        model = model.bfloat16()
        low = model(images.bfloat16())[0][-1]
        mixed = model(images)[0][-1]  # float32 pictures into a bfloat16 model
    assert low.dtype == mixed.dtype == torch.bfloat16
    for other in (cast, low, mixed):
        assert (other.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
def test_compiled() -> None:
    model, images = small(), torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        compiled = torch.compile(model)
        for _ in range(2):
            assert torch.allclose(compiled(images)[0][-1], model(images)[0][-1], atol=1e-5)


def test_positional_embedding_at_its_own_size_is_untouched() -> None:
    model = small(patch_embed=ViTConfig(depth=1, num_heads=2), img_size=42)
    vit = model.aggregator.patch_embed
    assert isinstance(vit, VisionTransformer)
    assert vit.positions(3, 3) is vit.pos_embed
    assert vit.positions(2, 5).shape == (1, 11, 32)
    assert torch.equal(vit.positions(2, 5)[:, 0], vit.pos_embed[:, 0])


def test_copies_are_independent() -> None:
    model = small()
    other = copy.deepcopy(model)
    assert other.aggregator.frame_blocks[0].attn.rope is other.aggregator.rope
    assert other.aggregator.rope is not model.aggregator.rope


def test_scale_is_the_kernels_default() -> None:
    attn = Attention(32, 2, qk_norm=True)
    assert attn.scale == attn.head_dim**-0.5 == 0.25


# -- sizes -----------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_1b_model() -> None:
    config = VGGTConfig()
    assert config.vit == ViTConfig(depth=24, num_heads=16, num_register_tokens=4)
    assert (config.embed_dim, config.depth, config.num_heads) == (1024, 24, 16)


@pytest.mark.parametrize("name", DINOV2_NAMES)
def test_names_of_patch_embeddings(name: str) -> None:
    width = {"s": 384, "b": 768, "l": 1024}[name[10]]
    with torch.device("meta"):
        model = VGGT.from_config(embed_dim=width, depth=1, num_heads=width // 64, patch_embed=name)
    registers = model.state_dict().get("aggregator.patch_embed.register_tokens")
    assert (registers is not None) == name.endswith("_reg")


def test_a_patch_embedding_with_depth_heads_and_registers_of_its_own() -> None:
    given = {"depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "num_register_tokens": 0}
    model = small(patch_embed=given, img_size=56)
    vit = model.aggregator.patch_embed
    assert isinstance(vit, VisionTransformer)
    assert (len(vit.blocks), vit.blocks[0].attn.num_heads) == (3, 4)
    assert vit.blocks[0].mlp.fc1.weight.shape == (64, 32)
    assert vit.pos_embed.shape == (1, 17, 32)
    assert model(torch.rand(1, 3, 28, 42))[0][-1].shape == (1, 1, 11, 64)


def test_config_survives_json() -> None:
    for patch_embed in ("conv", "dinov2_vits14_reg", ViTConfig(depth=2, num_heads=4)):
        config = VGGTConfig(embed_dim=384, num_heads=6, patch_embed=patch_embed)
        back = VGGTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert back == config
        assert hash(back) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"embed_dim": 100, "num_heads": 8, "patch_embed": "conv"}, r"4 · num_heads.*use 128"),
        ({"img_size": 520}, "multiple of patch_size.*use 518"),
        ({"depth": -1}, "depth must be an integer from 0 to 1000"),
        ({"num_heads": 2.0}, "num_heads must be an integer"),
        ({"patch_embed": "dinov2_vits14"}, "384 wide.*embed_dim=1024"),
        ({"patch_embed": "resnet"}, "one of dinov2_vits14"),
        ({"patch_embed": 3}, "ViTConfig"),
        ({"patch_embed": {"deep": 3}}, "no 'deep'.*depth, num_heads"),
        ({"patch_embed": ViTConfig(depth=1, num_heads=3)}, "multiple of the patch"),
        ({"width": 64}, "no 'width'.*embed_dim"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        VGGT.from_config(**sizes)


def test_a_config_and_sizes_together_are_refused() -> None:
    with pytest.raises(InputError, match=r"not both.*depth"):
        VGGT.from_config(VGGTConfig(), depth=2)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.rand(3, 28, 28), r"\(3, 28, 28\).*images\[None\]"),
        (torch.rand(2, 4, 28, 28), r"\(S, 3, H, W\)"),
        (torch.rand(2, 28, 28, 3), r"\(S, 3, H, W\)"),
        (torch.rand(0, 3, 28, 28), "at least one frame"),
        (torch.rand(1, 3, 30, 28), r"multiples of the patch size 14, got 30×28; resize to 28×28"),
        (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), r"uint8.*/ 255"),
        ([1], "got list"),
    ],
)
def test_images_that_do_not_fit(images: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        small()(images)


def test_neither_timm_nor_torchvision_is_needed(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("timm", "torchvision", "matplotlib", "transformers"):
    sys.modules[name] = None     # importing them now fails
import torch
from PIL import Image
from vggt_adapter import VGGT, load_and_preprocess_images
Image.new("RGB", (40, 30), "red").save({str(tmp_path / "a.png")!r})
images = load_and_preprocess_images([{str(tmp_path / "a.png")!r}], size=56)
print(VGGT.tiny()(images)[0][-1].shape[:3])
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 1, 17])"


def test_pictures_of_the_golden_cases_are_float32_numbers() -> None:
    made = pictures([1, 1, 3, 14, 14])
    assert torch.equal(made, made.float().double())
