"""The dye test: it finds what is where by measurement, and says «unknown» where it can't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_adapter import VGGT
from vistvis import SiteInfo, TokenLayout
from vistvis.errors import CaptureError, InputError
from vistvis.hooks import dye, trace
from vistvis.hooks.capture import capture
from vistvis.hooks.trace import trace_layout

PATCH, ROWS, COLS, WIDTH = 4, 3, 4, 32
# An order of a 3×4 grid that is no reading order: along its columns, and back.
CURVE = torch.tensor([0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return x + 0.2 * mixed


class Frames(nn.Module):
    """Frame and global attention over tokens that `arrange` puts where it likes."""

    def __init__(self, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.frame_attn, self.global_attn = Block(), Block()
        self.arrange = arrange

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        tokens = self.embed(images.flatten(0, 1)).flatten(2).mT
        tokens = self.arrange(tokens.unflatten(0, (batch, frames)))
        shape = tokens.shape
        tokens = self.frame_attn(tokens.flatten(0, 1)).view(shape)
        out: Tensor = self.global_attn(self.whole(tokens.flatten(1, 2)))
        return out

    def whole(self, tokens: Tensor) -> Tensor:
        return tokens


def pictures(*lead: int) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(*lead, 3, ROWS * PATCH, COLS * PATCH)


def special(tokens: Tensor, front: int = 0, behind: int = 0) -> Tensor:
    batch, frames, _, width = tokens.shape
    ends = [torch.ones(batch, frames, n, width) * 0.3 for n in (front, behind)]
    return torch.cat([ends[0], tokens, ends[1]], 2)


def by_curve(tokens: Tensor) -> Tensor:
    return special(tokens[:, :, CURVE], front=2)


def turned(tokens: Tensor) -> Tensor:
    """Reference first, another in each batch element: 2, 0, 1 and 1, 0, 2."""
    orders = torch.tensor([[2, 0, 1], [1, 0, 2]])
    return special(tokens[torch.arange(2)[:, None], orders], front=1)


def described(found: trace.Trace, name: str, shape: tuple[int, ...]) -> SiteInfo:
    return found[name].describe(SiteInfo(name), shape)


def test_the_small_vggt_is_as_its_layout_says() -> None:
    model = VGGT.tiny()
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(3, 3, 8, 8), size=(98, 126), mode="bicubic").clamp(0, 1)
    found = trace_layout(model, images)
    layout = TokenLayout.from_model(model, images)
    nameless = replace(layout, special=("special",) * layout.num_special)
    assert found.layout == nameless
    first = found["aggregator.frame_blocks.0.attn"]
    assert first.layout == nameless.frame_layout()
    # What is told of any token of any site is right: truth from the described layout.
    for site in found.values():
        batch, count = site.tokens.patch.shape
        places = [nameless.locate(n) for n in range(layout.num_tokens)]
        truth = torch.tensor([(p.frame_idx, -1 if p.patch is None else p.patch) for p in places])
        frame, patch = truth.T.reshape(2, batch, count)
        known = site.tokens.patch >= 0
        assert torch.equal(site.tokens.picture[known], frame[known])
        assert torch.equal(site.tokens.patch[known], patch[known])
    early = found["aggregator.global_blocks.0.attn"].tokens.patch >= 0
    assert early.sum() >= 0.9 * 3 * layout.num_patches


def test_an_untrained_vit_is_told_whole_at_all_depths() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64)).eval()
    images = torch.rand(2, 3, 48, 64)
    found = trace_layout(model, images)
    layout = TokenLayout.from_model(model, images)
    assert len(found) == 12
    for name, site in found.items():
        assert int((site.tokens.patch >= 0).sum()) == 2 * layout.num_patches
        info = described(found, name, (2, 3, 13, 13))
        assert info.key_layout == replace(layout, special=("special",))
        assert info.key_order is None
        assert not info.frames_in_batch


def test_a_curve_through_the_patches_is_found() -> None:
    found = trace_layout(Frames(by_curve).eval(), pictures(1, 3))
    for name, batch, frames in (("frame_attn", 3, 1), ("global_attn", 1, 3)):
        count = frames * (2 + len(CURVE))
        info = described(found, name, (batch, 2, count, count))
        assert info.query_layout is not None
        assert info.query_layout.frames == frames
        assert info.query_order is not None
        for f in range(frames):
            for place, patch in enumerate(CURVE.tolist()):
                token = info.query_layout.index(frame=f, patch=patch)
                assert info.query_order.index(token) == f * 14 + 2 + place
    assert "REORDERED" in str(found)


def test_a_reference_view_that_goes_first_is_found() -> None:
    found = trace_layout(Frames(turned).eval(), pictures(2, 3))
    info = described(found, "global_attn", (2, 2, 39, 39))
    assert info.key_order is not None
    assert info.key_layout is not None
    for batch, order in enumerate([[2, 0, 1], [1, 0, 2]]):
        for place, frame in enumerate(order):
            token = info.key_layout.index(frame=frame, patch=5)
            assert info.key_order.index(token, batch=batch) == place * 13 + 1 + 5
    single = described(found, "frame_attn", (6, 2, 13, 13))
    assert single.frames_in_batch
    assert single.key_order is None
    assert single.frame_order is not None
    assert single.frame_order.tolist() == [[2, 0, 1], [1, 0, 2]]


def test_special_tokens_behind_and_after_all_are_found() -> None:
    class Scaled(Frames):
        def whole(self, tokens: Tensor) -> Tensor:
            return torch.cat([tokens, torch.ones(len(tokens), 1, WIDTH)], 1)

    found = trace_layout(Scaled(lambda tokens: special(tokens, behind=1)).eval(), pictures(1, 2))
    layout = TokenLayout(
        2, (ROWS, COLS), (), (PATCH, PATCH), behind=("special",), after=("special",)
    )
    assert found["global_attn"].layout == layout == found.layout
    assert found["frame_attn"].layout == layout.frame_layout()


def test_what_attention_has_mixed_is_unknown_and_never_a_guess() -> None:
    def mixed(tokens: Tensor) -> Tensor:
        return 0.02 * tokens + tokens.mean((1, 2), keepdim=True)

    found = trace_layout(Frames(mixed).eval(), pictures(1, 3))
    assert found["global_attn"].layout is None
    assert "unknown" in str(found)
    info = described(found, "global_attn", (1, 2, 36, 36))
    assert info.query_layout is None


def test_an_order_that_depends_on_the_pictures_is_unknown() -> None:
    def brightest_first(tokens: Tensor) -> Tensor:
        order = tokens.sum(-1).argsort(2)
        return tokens.gather(2, order[..., None].expand_as(tokens))

    found = trace_layout(Frames(brightest_first).eval(), pictures(1, 3))
    assert found["frame_attn"].layout is None
    assert found["global_attn"].layout is None


def test_without_its_check_bits_it_would_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """The break: tokens that mix two patches far from each other spell some third one."""

    def halves(tokens: Tensor) -> Tensor:
        return tokens[:, :, :6] + tokens[:, :, 6:]

    def told() -> int:
        first = trace_layout(Frames(halves).eval(), pictures(1, 3))["frame_attn"]
        return int((first.tokens.patch >= 0).sum())

    assert told() == 0
    monkeypatch.setattr(dye, "CHECK_BITS", 0)
    assert told() > 0


def test_what_can_t_be_measured_is_an_error() -> None:
    model = Frames(lambda tokens: F.dropout(tokens, 0.5)).eval()
    with pytest.raises(CaptureError, match="other numbers when the model ran on the same"):
        trace_layout(model, pictures(1, 2))
    with pytest.raises(InputError, match="pass patch_size"):
        trace_layout(Block(), torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match="images are floating"):
        trace_layout(Block(), torch.rand(1, 5, 32))


def test_the_model_is_as_it_was() -> None:
    model = Frames(by_curve).eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    trace_layout(model, pictures(1, 2))
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_pre_hooks
    views = trace_layout(
        nn.ModuleDict({"inner": model})["inner"],
        pictures(2)[None],
        run=lambda images: model(torch.stack(list(images))),
        sites="frame_attn",
    )
    assert list(views) == ["frame_attn"]


def test_a_capture_that_measures_its_layout() -> None:
    model, images = Frames(turned).eval(), pictures(2, 3)
    with torch.no_grad():
        plain = model(images)
        with capture(model, layout="trace") as captured:
            assert torch.equal(model(images), plain)
            assert captured.passes == 1
            model(images.flip(0))
    site = captured["global_attn"].site
    assert site is not None
    assert site.key_layout == TokenLayout(3, (ROWS, COLS), ("special",), (PATCH, PATCH))
    assert site.key_order is not None
    assert site.key_order.index(site.key_layout.index(frame=0, patch=5), batch=0) == 13 + 1 + 5
    frames = captured["frame_attn"].site
    assert frames is not None
    assert frames.frame_order is not None
    assert frames.frame_order.tolist() == [[2, 0, 1], [1, 0, 2]]


def test_pictures_in_a_list_of_views_are_stained_as_well() -> None:
    class Views(Frames):
        def forward(self, views: list[dict[str, Tensor]]) -> Tensor:  # type: ignore[override]
            return super().forward(torch.stack([view["img"] for view in views], 1))

    model, views = Views(by_curve).eval(), [{"img": view} for view in pictures(3, 1)]
    with torch.no_grad(), capture(model, "global_attn", layout="trace") as captured:
        model(views)
    site = captured["global_attn"].site
    assert site is not None
    assert site.key_layout is not None
    assert site.key_layout.frames == 3


def test_a_dye_test_that_fails_does_not_break_the_forward() -> None:
    model = Frames(lambda tokens: F.dropout(tokens, 0.5)).eval()
    captured = capture(model, layout="trace")
    with torch.no_grad():
        assert model(pictures(1, 2)).shape == (1, 24, WIDTH)
    with pytest.raises(CaptureError, match="other numbers when the model ran"):
        captured["frame_attn"]
    captured.close()
    with pytest.raises(InputError, match='"trace"'):
        capture(model, layout="guess")  # type: ignore[arg-type]
