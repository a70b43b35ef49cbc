"""Values go along with an `Attention`: moved, pickled, stored; the explorer leaves them out."""

from __future__ import annotations

import copy
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_capture import sharp_model
from test_explorer_packing import sharp
from test_values_kept import close, projected

import vistvis
from vistvis import Attention, RunWriter, SiteInfo, open_run, save_run
from vistvis.commands import info
from vistvis.errors import InputError, StoreError
from vistvis.store.codec import attention_of, tensors_of
from vistvis.store.formats import read_attention, write
from vistvis.store.tensors import Encoded
from vistvis.views.explorer.packing import pack_site, packed_bytes

# -- an Attention with values --------------------------------------------------------------------


def attention_with(heads: int = 4, **more: Any) -> Attention:
    return sharp(value=torch.randn(2, heads, 9, 5), site=SiteInfo("a"), **more)


@pytest.mark.parametrize("given", [False, True])
def test_values_go_along(given: bool) -> None:
    one = attention_with(2, key_heads=2)
    if given:
        one = Attention.from_weights(one.dense(), value=one.value, site=one.site)
    assert "with V" in repr(one)
    bare = one.replace(value=None)
    assert "with V" not in repr(bare)
    assert one.value is not None
    assert one.nbytes == bare.nbytes + one.value.nbytes
    others = [
        *(one.with_site(None), one.cpu(), one.detach(), one.replace(site=None)),
        *(copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one.to("cpu")),
    ]
    for other in others:
        assert other.value is not None
        assert torch.equal(other.value, one.value)
        assert torch.equal(other.dense(), one.dense())
    wide = one.to(torch.float64)
    assert wide.value is not None
    assert wide.value.dtype == torch.float64
    assert bare.to(torch.float64).value is None
    assert bare.cpu().value is None


def test_values_of_functions_of_indices_are_pickled() -> None:
    one = attention_with(mask_mod=lambda b, h, i, j: j <= i + 2)
    again = pickle.loads(pickle.dumps(one))
    assert torch.equal(again.value, one.value)
    assert torch.equal(again.dense(), one.dense())
    moved = one.to(torch.float64)
    assert moved.mask_mod is one.mask_mod


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 4, 9, 5).long(), "value is a floating tensor"),
        (torch.zeros(4, 9, 5), "value is a floating tensor"),
        ("far", "value is a floating tensor .* got str"),
        (torch.zeros(1, 4, 9, 5), r"\(2, 4, 7, 9\).* got \(1, 4, 9, 5\)"),
        (torch.zeros(2, 3, 9, 5), "h_v divides h"),
        (torch.zeros(2, 4, 7, 5), "the B and Nk"),
        (torch.zeros(2, 4, 9, 0), "dv is 1 at least"),
        (torch.zeros(2, 4, 9, 5, device="meta"), "value is on meta"),
    ],
)
def test_values_that_do_not_fit(value: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        sharp(value=value)
    with pytest.raises(InputError, match=text):
        Attention.from_weights(torch.rand(2, 4, 7, 9), value=value)


# -- on disk, and on the explorer's page ---------------------------------------------------------


def kinds() -> dict[str, Attention]:
    grouped = attention_with(2, key_heads=2, mask=torch.arange(9) > 1)
    given = Attention.from_weights(grouped.dense(), value=grouped.value, site=SiteInfo("b"))
    return {"a": grouped, "b": given}


@pytest.mark.parametrize("name", ["a", "b"])
def test_runs_and_files_keep_values(name: str, tmp_path: Path) -> None:
    one = kinds()[name]
    run = save_run({name: one}, tmp_path / "run")
    run.check()
    path = write(one, tmp_path / "one.safetensors")
    for other in (open_run(tmp_path / "run")[name], read_attention(path)):
        assert other.value is not None
        assert one.value is not None
        assert torch.equal(other.value, one.value)
        assert torch.equal(other.dense(), one.dense())
    line = next(line for line in info.lines(run, checked=False) if line.startswith(name))
    assert " + value" in line


def test_a_damaged_value_is_noticed(tmp_path: Path) -> None:
    run = save_run({"a": kinds()["a"]}, tmp_path)
    path = tmp_path / run.record("a").file.file
    data = bytearray(path.read_bytes())
    stored = open_run(tmp_path)["a"].value
    assert stored is not None
    at = bytes(data).index(stored.contiguous().numpy().tobytes())
    data[at + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        open_run(tmp_path)["a"]


def test_values_that_do_not_fit_are_no_site() -> None:
    tensors, facts = tensors_of(kinds()["a"])
    with pytest.raises(InputError, match="h_v divides h"):
        attention_of({**tensors, "value": torch.zeros(2, 3, 9, 5)}, facts, None)


def test_a_writer_takes_values_from_a_capture(tmp_path: Path) -> None:
    model, images = sharp_model(), torch.rand(2, 3, 28, 42)
    with (
        torch.no_grad(),
        RunWriter(tmp_path, images=images) as writer,
        vistvis.capture(model, sink=writer, values=True),
    ):
        model(images)
    with torch.no_grad(), projected(model) as out:
        model(images)
    run = open_run(tmp_path)
    assert len(run) == 4
    for name, attention in run.items():
        close(attention, out[name])


def test_sites_without_values_are_the_same_bytes_as_before(tmp_path: Path) -> None:
    """Checksums of files that the version before values wrote."""
    query = (torch.arange(96.0) * 37 % 11 / 8).view(1, 4, 6, 4)
    key = (torch.arange(40.0) * 29 % 13 / 8).view(1, 2, 5, 4)
    mask = torch.arange(5) > 1
    qk = Attention(query=query, key=key, mask=mask, site=SiteInfo("a"))
    given = Attention.from_weights(torch.arange(120.0).view(1, 4, 6, 5) / 128)
    sums = []
    for one in (qk, given):
        path = write(one, tmp_path / "one.safetensors")
        sums.append(f"{Encoded(tensors_of(one)[0]).crc32():08x}")
        sums.append(f"{zlib.crc32(path.read_bytes()):08x}")
    assert sums == ["e097b03a", "dfa92f6a", "ed922c68", "a92d8bd0"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_explorer_leaves_values_out(name: str) -> None:
    one = kinds()[name]
    bare = one.replace(value=None)
    packed, plain = pack_site(name, one), pack_site(name, bare)
    assert packed.data == plain.data
    assert packed.header == plain.header
    assert packed_bytes(one) == packed_bytes(bare)
