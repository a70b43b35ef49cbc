"""What runs and files don't hold yet is refused with its reason, before anything is written."""

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
from vistvis.store.formats import write

LAYOUT = TokenLayout(2, (1, 3))
SITE = SiteInfo("block.1", query_layout=LAYOUT, key_layout=LAYOUT)
ORDER = TokenOrder(torch.arange(6).flip(0))


def nothing(score: Tensor, *_: Tensor) -> Tensor:
    return score


def made(site: SiteInfo = SITE, **more: Any) -> Attention:
    query = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    return Attention(query=query, key=query.roll(1, 2), site=site, **more)


CASES: dict[str, Callable[[], Attention]] = {
    "segments": lambda: made(segments=[0, 2]),
    "functions of indices": lambda: made(score_mod=nothing),
    "functions of indices (score_mod, mask_mod)": lambda: made(mask_mod=lambda b, h, q, k: q >= k),
    "an order of tokens": lambda: made(replace(SITE, key_order=ORDER)),
    "an order of frames": lambda: made(
        replace(SITE, frames_in_batch=True, frame_order=torch.tensor([[1, 0]]))
    ),
    "later frames": lambda: made(replace(SITE, first_frame=1)),
}


@pytest.mark.parametrize("what", CASES)
def test_nothing_is_written_of_what_runs_do_not_hold(tmp_path: Path, what: str) -> None:
    attention, plain = CASES[what](), made()
    with pytest.raises(StoreError, match=r"'block\.1' has .*don't hold yet") as error:
        vistvis.save_run({"plain": plain, "block.1": attention}, tmp_path / "run")
    assert what in str(error.value)
    with pytest.raises(StoreError, match="don't hold yet"):
        write(attention, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(StoreError, match="don't hold yet"),
        RunWriter(tmp_path / "run") as writer,
    ):
        writer.write("block.1", attention)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_sink_tells_at_the_end(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer("block.1", CASES["segments"]())
    writer("plain", made())
    with pytest.raises(StoreError, match="has segments"):
        writer.close()
    assert list(vistvis.open_run(tmp_path / "run")) == ["plain"]


def test_an_earlier_run_stays(tmp_path: Path) -> None:
    vistvis.save_run({"plain": made()}, tmp_path / "run")
    with pytest.raises(StoreError):
        vistvis.save_run({"block.1": CASES["segments"]()}, tmp_path / "run")
    assert torch.equal(vistvis.open_run(tmp_path / "run")["plain"].dense(), made().dense())


def test_dense_weights_of_segments_can_be_written(tmp_path: Path) -> None:
    attention = CASES["segments"]()
    write(attention.with_site(None).dense(), tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt"), attention.dense())
