"""`capture(names=…)`: one name for a site, everywhere; and what iterates is in the mapping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import VGGTLike

import vistvis
from vistvis.errors import CaptureError, InputError, SiteError

NAMES = {
    "frame_blocks.0.attn": "frame_block_0",
    "global_blocks.0.attn": "global_block_0",
    "frame_blocks.1.attn": "frame_block_1",
    "global_blocks.1.attn": "global_block_1",
}


@pytest.fixture
def model() -> VGGTLike:
    return VGGTLike().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 28, 42)


def test_a_name_goes_everywhere_and_the_dotted_one_stays_the_path(
    model: VGGTLike, images: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad(), vistvis.capture(model, names=NAMES) as captured:
        model(images)
    assert list(captured) == captured.sites.names == list(NAMES.values())
    for path, name in NAMES.items():
        site = captured[name].site
        assert site is not None
        assert (site.name, site.path) == (name, path)
        assert captured[path] is captured[name]
        assert name in captured
        assert path in captured
    report = captured.report()
    assert "frame_block_0" in report
    assert "frame_blocks.0.attn" not in report
    run = vistvis.save_run(captured, tmp_path / "run")
    assert list(run) == list(NAMES.values())
    assert run["global_block_1"].site == captured["global_block_1"].site


def test_names_do_not_choose_and_those_without_one_keep_their_own(
    model: VGGTLike, images: Tensor
) -> None:
    some = {"global_blocks.1.attn": "last"}
    with torch.no_grad(), vistvis.capture(model, names=some) as captured:
        model(images)
    others = ["frame_blocks.0.attn", "frame_blocks.1.attn", "global_blocks.0.attn"]
    assert list(captured) == ["last", *others]


@pytest.mark.parametrize(
    "chooser",
    [
        "global_block_*",
        "global_blocks.*.attn",
        ["global_block_0", "global_blocks.1.attn"],
        lambda site: site.name.startswith("global_block_") and site.path.endswith("attn"),
    ],
)
def test_globs_and_predicates_take_either(
    model: VGGTLike, images: Tensor, chooser: vistvis.models.sites.Chooser
) -> None:
    with torch.no_grad(), vistvis.capture(model, chooser, names=NAMES) as captured:
        model(images)
    assert list(captured) == ["global_block_0", "global_block_1"]
    with pytest.raises(SiteError, match="'frame_block_0' was not chosen for this capture"):
        captured["frame_block_0"]


def test_the_sink_gets_the_name(model: VGGTLike, images: Tensor) -> None:
    taken: dict[str, vistvis.Attention] = {}
    with torch.no_grad(), vistvis.capture(model, sink=taken.__setitem__, names=NAMES):
        model(images)
    assert list(taken) == list(NAMES.values())
    assert [attention.site.name for attention in taken.values() if attention.site] == list(taken)


def test_names_that_can_not_be(model: VGGTLike) -> None:
    with pytest.raises(SiteError, match=r"no site 'frame_blocks\.7\.attn': nearest"):
        vistvis.capture(model, names={"frame_blocks.7.attn": "x"})
    with pytest.raises(InputError, match="gives 'x' to more than one site"):
        vistvis.capture(model, names={"frame_blocks.0.attn": "x", "frame_blocks.1.attn": "x"})
    with pytest.raises(InputError, match=r"'global_blocks\.0\.attn' to more than one"):
        vistvis.capture(model, names={"frame_blocks.0.attn": "global_blocks.0.attn"})
    assert all("forward" not in vars(module) for module in model.modules())


class Half(nn.Module):
    """One site that can be read beside one that can't."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = Kernel(0.0), Kernel(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bad(self.good(x))


class Kernel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout)


@pytest.mark.parametrize("names", [None, {"bad": "worse"}])
def test_what_iterates_is_in_it_and_raises_its_reason(names: dict[str, str] | None) -> None:
    capture = vistvis.capture(Half(), names=names)
    capture._model(torch.randn(1, 2, 4, 8))
    capture.remove()
    bad = (names or {}).get("bad", "bad")
    assert sorted(capture) == sorted(["good", bad])
    assert len(capture) == 2
    assert all(name in capture for name in capture)
    assert capture["good"].shape == (1, 2, 4, 4)
    for name in {bad, "bad"}:
        with pytest.raises(CaptureError, match=f"site {name!r}: dropout is active"):
            capture[name]
    assert "neither" not in capture


def test_a_site_that_was_called_by_itself_keeps_its_reason() -> None:
    model = Half()
    capture = vistvis.capture(model)
    model.bad(torch.randn(1, 2, 4, 8))
    assert list(capture) == ["bad"]
    with pytest.raises(CaptureError, match="dropout is active"):
        capture["bad"]
    capture.close()
