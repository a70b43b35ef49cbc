"""Window attention put back in the picture, against the model's own cutting of windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vistvis
from vistvis import Attention, SiteInfo, WindowInfo
from vistvis.attention.windows import place_in_windows, stitch
from vistvis.errors import IndexOutOfRange, InputError


def numbered(rows: int, cols: int) -> Tensor:
    return torch.arange(rows * cols, dtype=torch.float32).view(1, rows, cols, 1)


def cut(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Windows in reading order, written out: `(windows, tokens)`."""
    _, rows, cols, _ = x.shape
    return torch.stack(
        [
            x[0, r : r + window[0], c : c + window[1], 0].flatten()
            for r in range(0, rows, window[0])
            for c in range(0, cols, window[1])
        ]
    )


@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (2, 1)])
def test_places_follow_the_roll(shift: tuple[int, int]) -> None:
    info = WindowInfo((6, 9), (3, 3), shift)
    windows = cut(numbered(6, 9).roll((-shift[0], -shift[1]), (1, 2)), (3, 3))
    for row in range(6):
        for col in range(9):
            window, token = place_in_windows(info, row, col)
            assert windows[window, token] == row * 9 + col


def test_strided_windows_follow_maxvit() -> None:
    timm = pytest.importorskip("timm.models.maxxvit")
    info = WindowInfo((6, 8), (3, 2), strided=True)
    windows = timm.grid_partition(numbered(6, 8), (3, 2)).flatten(1)
    for row in range(6):
        for col in range(8):
            window, token = place_in_windows(info, row, col)
            assert windows[window, token] == row * 8 + col


def swin() -> nn.Module:
    models = pytest.importorskip("timm.models.swin_transformer")
    return models.SwinTransformer(
        img_size=48, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4
    )


def torchvision_swin() -> nn.Module:
    models = pytest.importorskip("torchvision.models.swin_transformer")
    return models.SwinTransformer([4, 4], 16, [2], [2], [4, 4])


def hugging_face_swin() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=48, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    return transformers.SwinModel(config)


def maxvit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("maxvit_pico_rw_256", pretrained=False, img_size=128)


CASES: dict[str, Any] = {
    "timm": (swin, 48),
    "torchvision": (torchvision_swin, 44),  # 11×11 tokens, padded to 12×12
    "transformers": (hugging_face_swin, 48),
    "maxvit": (maxvit, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_stitched_weights_reach_the_values_of_the_picture(case: str) -> None:
    """A query looks at its own window: every grid position gets one weight, in its own place."""
    make, size = CASES[case]
    model = make().eval()
    with torch.no_grad(), vistvis.capture(model) as captured:
        model(torch.randn(2, 3, size, size))
    kinds = {name: attention.site.window for name, attention in captured.items()}
    assert all(kinds.values()), kinds
    assert any(info.shift != (0, 0) or info.strided for info in kinds.values())
    for attention in list(captured.values())[:3]:
        info = attention.site.window
        rows, cols = info.grid
        for row, col in ((0, 0), (rows - 1, cols // 2), (rows // 2, cols - 1)):
            heat = stitch(attention, row, col, picture=1)
            assert heat.shape == (attention.shape[1], rows, cols)
            assert heat.sum((1, 2)).max() < 1 + 1e-5
            window, query = place_in_windows(info, row, col)
            batch = attention.shape[0] // 2 + window
            assert torch.equal(heat[:, row, col], attention[batch, :, query, query])
            # Windows are local, or spread over the whole picture.
            touched = heat.sum(0).nonzero()
            assert len(touched) <= info.window[0] * info.window[1]


def test_bad_requests() -> None:
    bare = Attention(query=torch.randn(4, 2, 9, 4), key=torch.randn(4, 2, 9, 4))
    with pytest.raises(InputError, match="no window description"):
        stitch(bare, 0, 0)
    site = SiteInfo("attn", kind="window", window=WindowInfo((6, 6), (3, 3)))
    with pytest.raises(IndexOutOfRange, match="1 picture"):
        stitch(bare.with_site(site), 6, 0)
    assert stitch(bare.with_site(site), 5, 5).sum() == pytest.approx(2, abs=1e-5)
