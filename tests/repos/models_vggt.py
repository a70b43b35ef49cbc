"""VGGT and the forks that keep its aggregator."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .model import Model, Run, draw_frames, draw_last_blocks, pictures, shrunk, stub

_DPT = {"features": 16, "out_channels": [16] * 4, "intermediate_layer_idx": [0, 1, 2, 2]}


def tiny(
    package: str, name: str, *, width: int = 64, heads: int = 4, depth: int = 3, **arguments: Any
) -> Any:
    """A model of VGGT's code: a few pairs of blocks, two blocks of DINOv2 in front."""
    vit = {"embed_dim": width, "depth": 2, "num_heads": heads}
    track = {"features": 16, "corr_levels": 3, "corr_radius": 2}
    with (
        shrunk(f"{package}.layers.vision_transformer", DinoVisionTransformer=vit),
        shrunk(f"{package}.heads.track_head", DPTHead=_DPT, BaseTrackerPredictor={"depth": 2}),
        shrunk(
            f"{package}.models.{name.lower()}",
            Aggregator={"depth": depth, "num_heads": heads},
            CameraHead={"trunk_depth": 2, "num_heads": 4},
            DPTHead=_DPT,
            TrackHead=track,
        ) as module,
    ):
        return getattr(module, name)(img_size=56, embed_dim=width, **arguments)


def build_vggt(folder: Path) -> nn.Module:
    model: nn.Module = tiny("vggt", "VGGT")
    return model


def run_with_points(model: nn.Module, images: Tensor) -> object:
    return model(images, query_points=torch.tensor([[5.0, 9.0], [30.0, 20.0]]))


# -- VGGT-Ω ----------------------------------------------------------------------------------------


def build_omega(folder: Path) -> nn.Module:
    dense = {"features": 16, "out_channels": [16] * 4, "intermediate_layer_idx": [0, 1, 2, 3]}
    blocks = {
        "depth": 4,
        "num_heads": 4,
        "register_attention_block_indices": [2],
        "cached_layer_indices": (0, 1, 2, 3),
    }
    with (
        shrunk("vggt_omega.models.aggregator", DinoVisionTransformer={"depth": 2, "num_heads": 4}),
        shrunk("vggt_omega.models.vggt_omega", Aggregator=blocks, DenseHead=dense) as module,
    ):
        model: nn.Module = module.VGGTOmega(embed_dim=64, enable_alignment=True)
    # The masks of the bias are NaN until weights are loaded: keys have no bias there.
    for one in model.modules():
        mask = getattr(one, "bias_mask", None)
        if mask is not None:
            mask.fill_(1)
            mask[len(mask) // 3 : 2 * len(mask) // 3].fill_(0)
    return model


# -- StreamVGGT ------------------------------------------------------------------------------------


def build_stream(folder: Path) -> nn.Module:
    from transformers.utils import ModelOutput

    stub("transformers.file_utils", ModelOutput=ModelOutput)
    model: nn.Module = tiny("streamvggt", "StreamVGGT")
    return model


def run_views(model: nn.Module, images: Tensor) -> object:
    return model([{"img": image[None]} for image in images])


def run_stream(model: Any, images: Tensor) -> object:
    return model.inference([{"img": image[None]} for image in images])


def draw_stream(model: nn.Module, images: Tensor, run: Run) -> str:
    """Of the last step: its own picture's frame block; a global block, whose keys are of all."""
    from vggt_adapter import AttentionExtractor, visualize_attention_on_image

    with AttentionExtractor(model) as extractor, torch.no_grad():
        extractor.register_hooks(2)
        run(model, images)
        maps = extractor.get_attention_maps()
    last = len(images) - 1
    visualize_attention_on_image(maps["frame_block_2"]["attn_weights"], images[last:], 8)
    weights = maps["global_block_2"]["attn_weights"]
    token = weights.site.key_layout.index(frame=last, row=2, col=0)
    visualize_attention_on_image(weights, images, token)
    return "drawn"


# -- FastVGGT --------------------------------------------------------------------------------------


class HostTorch:
    """torch for a module that says "cuda" whatever the device: the same on the host."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: int, device: str, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*size, dtype=dtype)


class HeldChoice:
    """Which tokens merge is chosen by likeness; for pictures that were dyed, as before."""

    def __init__(self, choose: Any) -> None:
        self.choose, self.kept, self.count = choose, [], 0
        self.pictures: Tensor | None = None
        self.dyed = False

    def begin(self, images: Tensor) -> None:
        if self.pictures is None:
            self.pictures = images
        self.dyed, self.count = not torch.equal(images, self.pictures), 0
        if not self.dyed:
            self.kept = []

    def __call__(self, *args: Any) -> Any:
        if not self.dyed:
            self.kept.append(self.choose(*args))
        self.count += 1
        return self.kept[self.count - 1]


def build_fast(folder: Path) -> nn.Module:
    model = tiny("vggt", "VGGT", depth=5, enable_depth=False, merging=2)
    importlib.import_module("vggt.models.aggregator").__dict__["torch"] = HostTorch()
    positions = model.aggregator.position_getter
    model.aggregator.position_getter = lambda *size, device: positions(*size, device="cpu")
    model.update_patch_dimensions(4, 3)
    merge = importlib.import_module("merging.merge").__dict__
    model.choice = merge["fast_similarity_chunks"] = HeldChoice(merge["fast_similarity_chunks"])
    fast: nn.Module = model
    return fast


def run_half(model: Any, images: Tensor) -> object:
    model.choice.begin(images)
    with torch.autocast("cpu", torch.bfloat16):
        return model(images)


# -- block-sparse attention ------------------------------------------------------------------------


def sparse_kernel(
    query: Tensor, key: Tensor, value: Tensor, pooled_score: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Stands in for the CUDA extension: no softmax nor attention kernel of torch is seen."""
    weights = (query @ key.mT / query.shape[-1] ** 0.5).exp()
    return weights / weights.sum(-1, keepdim=True) @ value, torch.zeros(())


def build_sparse(folder: Path) -> nn.Module:
    return _sparse(hilbert=False)


def build_hilbert(folder: Path) -> nn.Module:
    return _sparse(hilbert=True)


def _sparse(*, hilbert: bool) -> nn.Module:
    stub("pi3", "pi3.models", "pi3.models.pi3", Pi3=None)
    stub("spas_sage_attn", "spas_sage_attn._qattn")
    stub("spas_sage_attn.quant_per_block", per_block_int8=None)
    names = ("block_map_lut_triton", "fill_block_map_triton", "hyperparameter_check")
    stub("spas_sage_attn.utils", **dict.fromkeys(names))
    convert = importlib.import_module("sparse_vggt.models.vggt").sparse_aggregator_from_vggt
    attention = importlib.import_module("sparse_vggt.models.attention")
    attention.__dict__["block_sparse_attn_cuda"] = sparse_kernel
    model = tiny("vggt", "VGGT", width=128, heads=16)
    model.aggregator.intermediate_layer_idx = [0, 1, 2]
    convert(model.aggregator, use_hilbert=hilbert, sparse_ratio=0.5, verbose=False)
    sparse: nn.Module = model
    return sparse


def draw_sparse(model: nn.Module, images: Tensor, run: Run) -> str:
    """Frame blocks are drawn; a global one, of which only special queries are seen, is refused."""
    from vistvis.errors import VistvisError

    draw_frames(model, images, run)
    try:
        draw_last_blocks(model, images, run, kinds=("global",))
    except VistvisError as error:
        return f"frame blocks drawn; global blocks refused: {error}"
    raise AssertionError("the figure of a global block is of the wrong tokens")


_SPARSE = "spas_sage_attn, a CUDA extension, is stood in for by code that torch's kernels don't see"
MODELS = [
    Model("VGGT", "vggt", build_vggt, pictures(3, 3, 4), run=run_with_points),
    # 17 special tokens and 5 frames of 4×17: a register block has as many tokens as one frame.
    Model(
        "VGGT-Ω",
        "vggt-omega",
        build_omega,
        pictures(5, 4, 17, 16),
        patch=16,
        note="Five frames of 4×17: a register block has as many tokens as a frame.",
    ),
    Model(
        "StreamVGGT",
        "StreamVGGT",
        build_stream,
        pictures(3, 3, 4),
        run=run_views,
        paths=("src",),
    ),
    Model(
        "StreamVGGT, streaming",
        "StreamVGGT",
        build_stream,
        pictures(3, 3, 4),
        run=run_stream,
        draw=draw_stream,
        steps=True,
        raises="ran 3 times in one forward pass",
        paths=("src",),
    ),
    Model(
        "FastVGGT",
        "FastVGGT",
        build_fast,
        pictures(3, 3, 4),
        run=run_half,
        # A merged token changes by a fraction only; what blocks add has to stay below it.
        stays=0.01,
        note='Under autocast to bfloat16; "cuda" in its aggregator is read as the host. Global '
        "blocks 2 to 4 merge, and choose what they merge as before where a patch is replaced. "
        "Without the depth head, which wants 24 blocks.",
    ),
    Model(
        "sparse-vggt",
        "sparse-vggt",
        build_sparse,
        pictures(2, 4, 5),
        paths=("src", "../vggt"),
        draw=draw_sparse,
        raises="its kernel saw 10 of the 50 queries",
        note=f"{_SPARSE}.",
    ),
    Model(
        "sparse-vggt, Hilbert order",
        "sparse-vggt",
        build_hilbert,
        pictures(2, 4, 5),
        paths=("src", "../vggt"),
        draw=draw_sparse,
        raises="its kernel saw 10 of the 50 queries",
        note=f"{_SPARSE}.",
    ),
]
