"""What of attention a run holds: segments, orders, first frames; and no functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vistvis
from vistvis import Attention, RunWriter, SiteInfo, TokenLayout
from vistvis.attention import TokenOrder
from vistvis.errors import StoreError
from vistvis.store.formats import read_attention, write

LAYOUT = TokenLayout(2, (1, 3))
SITE = SiteInfo("block.1", query_layout=LAYOUT, key_layout=LAYOUT)
ORDER = TokenOrder(torch.arange(6).flip(0))
MERGED = TokenOrder(torch.tensor([[3, 0, 1, 5, 4, 2, -1]]), torch.tensor([[0, 1, 1, 2, 3, 4, 5]]))


def nothing(score: Tensor, *_: Tensor) -> Tensor:
    return score


def made(site: SiteInfo = SITE, **more: Any) -> Attention:
    query = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    return Attention(query=query, key=query.roll(1, 2), site=site, **more)


HELD: dict[str, Callable[[], Attention]] = {
    "segments": lambda: made(segments=[0, 2]),
    "causal segments": lambda: made(segments=[0, 1, 5], causal=True, scale=0.7),
    "an order": lambda: made(replace(SITE, key_order=ORDER)),
    "a merge map": lambda: made(replace(SITE, query_order=MERGED, key_order=MERGED)),
    "an order of frames": lambda: made(
        replace(SITE, frames_in_batch=True, frame_order=torch.tensor([[1, 0]]))
    ),
    "later frames": lambda: made(replace(SITE, first_frame=1)),
    "weights with an order": lambda: Attention.from_weights(
        torch.rand(1, 2, 6, 6), site=replace(SITE, query_order=ORDER)
    ),
}
REFUSED: dict[str, Callable[[], Attention]] = {
    "score_mod": lambda: made(score_mod=nothing),
    "mask_mod": lambda: made(mask_mod=lambda b, h, q, k: q >= k),
}


@pytest.mark.parametrize("file", [False, True], ids=["run", "file"])
@pytest.mark.parametrize("what", HELD)
def test_it_comes_back_the_same(tmp_path: Path, what: str, file: bool) -> None:
    given = HELD[what]()
    if file:
        stored = read_attention(write(given, tmp_path / "block.safetensors"))
    else:
        vistvis.save_run({"plain": made(), "block.1": given}, tmp_path / "run")
        stored = vistvis.open_run(tmp_path / "run")["block.1"]
    assert stored.site == given.site
    assert stored.site is not None
    assert given.site is not None
    frames = stored.site.frame_order, given.site.frame_order
    assert torch.equal(*frames) if frames[1] is not None else frames[0] is None  # type: ignore[arg-type]
    if given.segments is not None:
        assert torch.equal(stored.segments, given.segments)  # type: ignore[arg-type]
    assert torch.equal(stored.rows(slice(1, 5)), given.rows(slice(1, 5)))
    assert torch.equal(stored.dense(), given.dense())


def test_another_order_is_another_pass(tmp_path: Path) -> None:
    """The queries and keys are the same, and what their indices mean is not."""
    with RunWriter(tmp_path / "run", expected=["block.1", "b"], pass_id="one") as writer:
        writer.write("block.1", made(replace(SITE, key_order=ORDER)))
    with (
        pytest.raises(StoreError, match="left as it was"),
        RunWriter(tmp_path / "run", expected=["block.1", "b"], pass_id="one") as writer,
    ):
        writer.write("block.1", made())
    stored = vistvis.open_run(tmp_path / "run")["block.1"].site
    assert stored is not None
    assert stored.key_order == ORDER


@pytest.mark.parametrize("what", REFUSED)
def test_nothing_is_written_of_functions_of_indices(tmp_path: Path, what: str) -> None:
    attention, plain = REFUSED[what](), made()
    with pytest.raises(StoreError, match=r"'block\.1' has functions of indices .*can't hold"):
        vistvis.save_run({"plain": plain, "block.1": attention}, tmp_path / "run")
    with pytest.raises(StoreError, match="can't hold"):
        write(attention, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(StoreError, match="can't hold"),
        RunWriter(tmp_path / "run") as writer,
    ):
        writer.write("block.1", attention)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_sink_tells_at_the_end(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer("block.1", REFUSED["mask_mod"]())
    writer("plain", made())
    with pytest.raises(StoreError, match="has functions of indices"):
        writer.close()
    assert list(vistvis.open_run(tmp_path / "run")) == ["plain"]


def test_an_earlier_run_stays(tmp_path: Path) -> None:
    vistvis.save_run({"plain": made()}, tmp_path / "run")
    with pytest.raises(StoreError):
        vistvis.save_run({"block.1": REFUSED["mask_mod"]()}, tmp_path / "run")
    assert torch.equal(vistvis.open_run(tmp_path / "run")["plain"].dense(), made().dense())


def test_dense_weights_of_segments_can_be_written(tmp_path: Path) -> None:
    attention = HELD["segments"]()
    write(attention.with_site(None).dense(), tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt"), attention.dense())
