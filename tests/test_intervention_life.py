"""Several interventions at once, what they leave behind, sites that are refused, messages."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interrupts import Interrupter, images
from interrupts import Model as Small
from multiview_cases import CASES
from multiview_cases import pictures as views_of
from test_intervention import FRAME, LAYOUT, Model, dense, dense_weights, seen, tensors
from test_reordered import BACK, CURVE, Merging, Moving, along, chosen_first, grid, merging
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from zoo import VGGTLike

import vistvis
import vistvis.hooks
import vistvis.intervention
from vggt_adapter import VGGT
from vistvis import TokenLayout, capture, intervene
from vistvis.errors import CaptureError, IndexOutOfRange, InputError, LayoutError, SiteError


@pytest.fixture(scope="module")
def vggt() -> VGGT:
    return VGGT.tiny().requires_grad_(False)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, 3, 4 * 14, 5 * 14, generator=torch.Generator().manual_seed(2))


# -- several, and what is left behind ------------------------------------------------------------


def test_interventions_add_up() -> None:
    model, call = Model(), tensors()
    hidden = seen(lambda i, j: j == 3 or i == 8, heads=(0, 1)) & seen(
        lambda i, j: FRAME[i] == 1 and FRAME[j] == 0
    )
    with (
        capture(model, verify=True) as captured,
        intervene(model, "attn", heads=[0, 1], cut_keys=[3], cut_queries=[8]),
        intervene(model, "attn", cut=[(1, 0)], layout=LAYOUT),
        intervene(model, "attn", heads=[2], mode="zero"),
        intervene(model, "attn", heads=[3], mode="mean"),
    ):
        out = model(*call)
    assert (out - dense(*call, seen=hidden, zero=(2,), mean=(3,))).abs().max() < 2e-6
    weights = dense_weights(*call[:2], seen=hidden, zero=(2,))
    assert (captured["attn"].dense() - weights).abs().max() < 1e-5
    said = captured["attn"].site.intervened  # type: ignore[union-attr]
    assert said.split("; ")[-2:] == ["head 2 zero", "head 3 mean"]


def test_of_two_modes_of_one_head_the_later_holds() -> None:
    model, call = Model(), tensors()
    for first, second in itertools.permutations(("uniform", "zero", "mean"), 2):
        outer, inner = (
            partial(intervene, model, "attn", heads=[1], mode=m) for m in (first, second)
        )
        with outer():
            with inner():
                out = model(*call)
            after = model(*call)
        assert (out - dense(*call, **{second: (1,)})).abs().max() < 2e-6
        assert (after - dense(*call, **{first: (1,)})).abs().max() < 2e-6


def on(model: nn.Module) -> list[Any]:
    return [
        [sorted(vars(module)) for module in model.modules()],
        list(_get_current_function_mode_stack()),
        torch.is_grad_enabled(),
    ]


def test_everything_is_put_back(vggt: VGGT, pictures: Tensor) -> None:
    before, plain = on(vggt), vggt(pictures)[0][-1]

    def stopped() -> Iterator[None]:
        with intervene(vggt, "global_*", within_frame=True):
            vggt(pictures)
            yield

    for way in ("end", "error", "error in the forward", "generator"):
        with contextlib.suppress(RuntimeError, ZeroDivisionError, IndexOutOfRange):
            if way == "generator":
                generator = stopped()
                next(generator)
                generator.close()
            else:
                with intervene(vggt, "global_*", cut=[(0, 1)]):
                    vggt(pictures)
                    assert on(vggt) != before
                    if way == "error":
                        raise ZeroDivisionError
                    if way == "error in the forward":
                        vggt(pictures[:, :1])
        assert on(vggt) == before, way
        assert torch.equal(vggt(pictures)[0][-1], plain)


class Lines(Interrupter):
    """KeyboardInterrupt at a line of the hooks or of the intervention."""

    FOLDERS = tuple(
        str(Path(str(module.__file__)).parent) for module in (vistvis.hooks, vistvis.intervention)
    )

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.FOLDERS) else None


def _interrupted(step: int) -> int:
    model = Small().eval()
    layout = TokenLayout(1, (1, 5))
    plain, before, x = model(images()), on(model), images()

    def use() -> None:
        with (
            intervene(model, "attn", heads=[1], cut_keys=[2], layout=layout),
            intervene(model, "attn", mode="mean"),
        ):
            model(x)

    use()
    with Lines() as counter:
        use()
    tried = 0
    for at in counter.early[::step]:
        with Lines(at) as lines, contextlib.suppress(KeyboardInterrupt):
            use()
        assert torch.equal(model(x), plain), lines.where
        assert on(model) == before, lines.where
        tried += 1
    assert sys.gettrace() is None
    return tried


def test_interrupts() -> None:
    assert _interrupted(37) > 10


@pytest.mark.slow
def test_interrupts_at_every_line() -> None:
    assert _interrupted(1) > 400


# -- sites of other kinds ------------------------------------------------------------------------


class Eager(nn.Module):
    num_heads = 2

    def __init__(self, fused_attn: bool) -> None:
        super().__init__()
        self.fused_attn = fused_attn
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            for _ in range(times):
                q = F.scaled_dot_product_attention(q, k, v)
            return q
        return ((q @ k.mT) / 2).softmax(-1) @ v


def in_a_model(module: nn.Module) -> nn.Module:
    model = nn.Module()
    model.attn = module
    return model.eval()


def test_sites_without_a_kernel_are_refused() -> None:
    with pytest.raises(SiteError, match=r"'attn' \(Eager\) can't be changed.*fused_attn = True"):
        intervene(in_a_model(Eager(False)), "attn", mode="zero")
    late = in_a_model(Eager(True))
    x = torch.randn(1, 5, 8)
    with intervene(late, "attn", mode="zero"):
        late.attn(x)
        late.attn.fused_attn = False
        with pytest.raises(SiteError, match=r"'attn'.*ran without a call of scaled_dot.*fused_at"):
            late.attn(x)
        late.attn.fused_attn = True
        with pytest.raises(SiteError, match="'attn' calls its kernel more than once"):
            late.attn(x, times=2)
    assert not vars(late.attn).keys() & {"forward", "__reduce_ex__"}


def test_what_never_ran_is_an_error() -> None:
    model = Small().eval()
    with (
        pytest.raises(CaptureError, match="'attn' did not run while it was to be changed"),
        intervene(model, "attn", mode="zero"),
    ):
        pass

    def elsewhere() -> None:
        with intervene(model, "attn", mode="zero"):
            other = threading.Thread(target=model, args=(images(),))
            other.start()
            other.join()

    with pytest.raises(CaptureError, match=r"'attn' did not run.*in its thread"):
        elsewhere()
    once = intervene(model, "attn", mode="zero")
    with once:
        model(images())
    with pytest.raises(InputError, match="entered once"), once:
        pass


def test_multihead_attention() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 6, 8)
    mha = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    model = in_a_model(mha)
    taken: list[Tensor] = []

    def dense_mha(weights: Tensor) -> Tensor:
        value = F.linear(x, mha.in_proj_weight[16:], mha.in_proj_bias[16:])
        heads = value.unflatten(-1, (2, 4)).transpose(1, 2).double()
        return F.linear((weights @ heads).transpose(1, 2).flatten(2).float(), *proj)

    proj = mha.out_proj.weight, mha.out_proj.bias
    with (
        torch.no_grad(),
        capture(model) as plain,
    ):
        mha(x, x, x, need_weights=False)
        weights = plain["attn"].dense().double()
        weights[:, 1] = 1 / 6
        for order in (0, 1):
            both = [partial(intervene, model, "attn", heads=[1], mode="uniform")]
            both.insert(order, partial(capture, model, verify=True))
            with both[0]() as first, both[1]() as second:
                taken.append(mha(x, x, x, need_weights=False)[0])
            captured = (first, second)[order]["attn"]
            assert (captured.dense() - weights).abs().max() < 1e-5
            assert captured.site.intervened == "head 1 uniform"
        for out in taken:
            assert (out - dense_mha(weights)).abs().max() < 1e-5
        with (
            pytest.raises(SiteError, match=r"'attn' returns its weights.*need_weights=False"),
            intervene(model, "attn", mode="zero"),
        ):
            mha(x, x, x)


def test_an_encoder_layer_with_a_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model, x = nn.Sequential(layer), torch.randn(2, 6, 8)
    with torch.no_grad():
        plain = model(x)
        with intervene(model, "**", mode="zero") as made:
            out = model(x)
        assert made.sites.names == ["0.self_attn"]
        alone = layer.norm1(x + layer.self_attn.out_proj.bias)
        expected = layer.norm2(alone + layer.linear2(F.relu(layer.linear1(alone))))
        assert (out - expected).abs().max() < 1e-5
        assert (plain - expected).abs().max() > 1e-2
        assert torch.equal(model(x), plain)


def test_checkpointed_blocks_run_again_with_the_change() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 2, 3, 28, 42)
    grads = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        model = VGGTLike(checkpoint=checkpoint).train()
        with intervene(model, "global_*", cut=[(0, 1)]), intervene(model, "frame_*", mode="mean"):
            model(x)[-1].square().sum().backward()
        grads.append([one.grad for one in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.allclose(plain, again, rtol=1e-5, atol=1e-6)


def test_compiled_code_is_an_error() -> None:
    model = Small().eval()
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(CaptureError, match="'attn' ran in compiled code"),
        torch.no_grad(),
        intervene(compiled, "attn", mode="zero"),
    ):
        compiled(images())
    torch._dynamo.reset()


def test_threads_of_others_are_left_alone() -> None:
    model, x = Small().eval(), images()
    plain, outs = model(x), []
    with intervene(model, "attn", mode="zero"):
        other = threading.Thread(target=lambda: outs.append(model(x)))
        other.start()
        other.join()
        mine = model(x)
    assert torch.equal(outs[0], plain)
    assert not torch.allclose(mine, plain)


def test_a_tool_that_wraps_a_site_between_two_does_not_hide_the_change() -> None:
    model, call = Model(), tensors()
    with capture(model, verify=True) as captured:
        inner = model.attn.forward
        model.attn.forward = lambda *a, **k: inner(*a, **k)  # type: ignore[method-assign]
        with intervene(model, "attn", heads=[0], mode="uniform"):
            model(*call)
        model.attn.forward = inner  # type: ignore[method-assign]
    weights = dense_weights(*call[:2], uniform=(0,))
    assert (captured["attn"].dense() - weights).abs().max() < 1e-5


# -- families ------------------------------------------------------------------------------------


# A frame block, and the one block before it that sees all frames.
BEHIND = {
    "VGGT": ("frame_blocks.1.attn", "global_block_0"),
    "VGGT-Ω": ("aggregator.frame_blocks.1.attn", "global_block_0"),
    "Pi3": ("decoder.2.attn", "global_block_0"),
    "Depth Anything 3": ("da3.backbone.pretrained.blocks.2.attn", "global_block_1"),
    "MapAnything, one scene": ("info_sharing.self_attention_blocks.1.attn", "global_block_0"),
}


@pytest.mark.parametrize("family", BEHIND)
def test_a_frame_that_is_cut_off_does_not_matter(family: str) -> None:
    """Of every family, by its outcome alone: another picture there changes nothing here."""
    torch.manual_seed(0)
    case, (site, before) = CASES[family](), BEHIND[family]
    case.model.eval()
    scene = views_of(case.frames, 1)
    other = scene.clone()
    other[:, 1] = 1 - other[:, 1]

    def differs(**change: Any) -> list[bool]:
        """Whether the queries of each frame are others with another second picture."""
        seen = []
        for shown in (scene, other):
            with (
                torch.no_grad(),
                capture(case.model, site) as captured,
                intervene(case.model, before, **change),
            ):
                case.call(case.model, shown)
            assert captured[site].site.frames_in_batch  # type: ignore[union-attr]
            seen.append(captured[site].query)
        return [not torch.equal(a, b) for a, b in zip(*seen, strict=True)]

    assert differs() == [True, True, True]
    assert differs(within_frame=True) == [False, True, False]
    assert differs(cut=[(0, 1)]) == [False, True, True]
    assert differs(cut=[(2, 1)]) == [True, True, False]


def test_blocks_between_two_views() -> None:
    torch.manual_seed(0)
    case = CASES["DUSt3R"]()
    case.model.eval()
    scene = views_of(2, 1)
    names = [f"{name}.0.cross_attn" for name in ("dec_blocks", "dec_blocks2")]
    with (
        torch.no_grad(),
        capture(case.model, names, verify=True) as captured,
        intervene(case.model, names, cut=[(0, 1)]),
    ):
        case.call(case.model, scene)
    first, second = (captured[name] for name in names)
    assert torch.equal(first.dense(), torch.zeros(first.shape))  # view 0 sees nothing of view 1
    assert (second.dense().sum(-1) - 1).abs().max() < 1e-5
    assert not second.site.intervened  # type: ignore[union-attr]


# -- messages ------------------------------------------------------------------------------------


def test_options_that_can_not_be(vggt: VGGT) -> None:
    def refused(error: type[Exception], match: str, sites: Any = "global_*", **o: Any) -> None:
        with pytest.raises(error, match=match):
            intervene(vggt, sites, **o)

    refused(InputError, 'mode is "uniform", "zero" or "mean", got \'half\'', mode="half")
    refused(InputError, "heads= says which heads, and nothing says what", heads=[0])
    refused(InputError, r"heads is a sequence, got 0; write \[0\]", heads=0, mode="zero")
    refused(InputError, "cut is a list of pairs.*got 1", cut=[1])
    refused(InputError, "cut_keys are whole numbers, got True", cut_keys=torch.ones(3).bool())
    refused(IndexOutOfRange, "'global_block_0' has heads 0…1, got 2", heads=[2], mode="zero")
    refused(SiteError, "no site 'global_block_9': nearest: global_block", "global_block_9")
    with pytest.raises(InputError, match=r"needs an nn\.Module, got str"):
        intervene("vggt", "global_*", mode="zero")  # type: ignore[arg-type]


def test_tokens_and_frames_that_are_not_there(vggt: VGGT, pictures: Tensor) -> None:
    def refused(error: type[Exception], match: str, sites: str = "global_*", **o: Any) -> None:
        with pytest.raises(error, match=match), intervene(vggt, sites, **o):
            vggt(pictures)

    refused(IndexOutOfRange, "'global_block_0' has key frames 0…2, got frame 3", cut=[(0, 3)])
    refused(IndexOutOfRange, "'global_block_0' has query frames 0…2, got.*-1", cut=[(-1, 0)])
    refused(IndexOutOfRange, "has key tokens 0…74, and not 75", cut_keys=[0, 75])
    refused(IndexOutOfRange, "'frame_block_0' has query.*0…24", "frame_*", cut_queries=[25])
    refused(SiteError, "'frame_block_0' sees each frame by itself", "frame_*", cut=[(0, 1)])
    with (
        pytest.raises(LayoutError, match="'global_block_0' belong to is not known"),
        intervene(vggt, "global_*", within_frame=True),
    ):
        vggt.aggregator(pictures)  # its pictures are not those of a call of the model


def test_tokens_in_another_order_are_followed() -> None:
    torch.manual_seed(0)
    model = Moving({0: along(CURVE), 3: along(BACK)}, grid(2, 4), given=True).eval()
    layout, x = TokenLayout(3, (2, 4), ("camera",)), torch.randn(2, 3, 9, 16)
    with (
        torch.no_grad(),
        capture(model, verify=True, layout=layout) as captured,
        intervene(model, "blocks.1.attn", layout=layout, cut_keys=[13], cut=[(2, 0)]),
    ):
        model(x)
    weights, truth = captured["blocks.1.attn"].dense(), model.truth[1]
    assert truth[0].tolist() != list(range(27))
    keys, frames = truth[0] == 13, truth[0] // 9
    hidden = keys[None] | ((frames == 2)[:, None] & (frames == 0)[None])
    assert torch.equal(weights == 0, hidden.expand_as(weights))


def test_tokens_that_can_not_be_followed_are_refused() -> None:
    torch.manual_seed(1)
    moves = {1: chosen_first([2, 1]), 3: lambda x, ids, pos: (x + 1, ids, pos)}
    model, layout = Moving(moves, grid(1, 2)).eval(), TokenLayout(3, (1, 2), 1)

    def refused(match: str, model: nn.Module, x: Tensor, site: str, layout: TokenLayout) -> None:
        with torch.no_grad(), intervene(model, site, heads=[0], mode="zero"):
            model(x)  # which head it is, is known all the same
        with (
            pytest.raises(SiteError, match=match),
            torch.no_grad(),
            intervene(model, site, cut_keys=[1], layout=layout),
        ):
            model(x)

    x = torch.randn(2, 3, 3, 16)
    refused("'blocks.1.attn' are in another order in each", model, x, "blocks.1.attn", layout)
    refused("'blocks.3.attn' were moved", model, x, "blocks.3.attn", layout)
    x, layout = torch.randn(2, 6, 16), TokenLayout(1, (2, 3))
    refused("'0.attn' were merged", merging(Merging), x, "0.attn", layout)
