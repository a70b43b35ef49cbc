"""Packed sites, read back by a decoder written here from the description of the format."""

from __future__ import annotations

import math
import shutil
import subprocess
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import reference_weights
from torch import Tensor

from vistvis import Attention, SiteInfo
from vistvis.attention.order import TokenOrder
from vistvis.errors import InputError
from vistvis.views.explorer import packing
from vistvis.views.explorer.packing import PackedSite, pack_site, packed_bytes


def unpacked(packed: PackedSite) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a packed site: inflate, join the planes of bytes."""
    assert packed.header["crc32"] == zlib.crc32(packed.data)
    found, end = {}, 0
    for name, one in packed.header["tensors"].items():
        assert one["start"] == end
        end += one["bytes"]
        planes = np.frombuffer(zlib.decompress(packed.data[one["start"] : end]), np.uint8)
        dtype = np.dtype(one["dtype"])
        joined = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T)
        found[name] = joined.reshape(-1).view(dtype).reshape(one["shape"])
    assert end == len(packed.data)
    return found


def sharp(*, shape: tuple[int, ...] = (2, 4, 7, 9), key_heads: int = 4, **more: Any) -> Attention:
    batch, heads, queries, keys = shape
    query = torch.randn(batch, heads, queries, 16) * 2
    key = torch.randn(batch, key_heads, keys, 16)
    return Attention(query=query, key=key, **more)


FLOAT_MASK = torch.where(torch.rand(1, 4, 1, 9, generator=torch.Generator()) < 0.3, -torch.inf, 0.5)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"key_heads": 2},
    "causal": {"causal": True},
    "segments": {"shape": (1, 4, 9, 9), "segments": [0, 2, 5]},
    "causal segments": {"shape": (1, 4, 9, 9), "segments": [0, 4], "causal": True},
    "bool mask by key": {"mask": torch.arange(9) > 2},
    "bool mask": {"mask": (torch.arange(7)[:, None] + torch.arange(9)) % 3 > 0},
    "float mask by head": {"mask": FLOAT_MASK},
    "scale by head": {"scale": torch.tensor([0.1, 0.2, 0.3, 0.4])},
}


def dense(query: Tensor, key: Tensor, attention: Attention) -> Tensor:
    mask = None if attention.mask is None else attention.mask
    if attention.segments is not None:
        starts = attention.segments.tolist()
        of = torch.tensor([max(i for i, s in enumerate(starts) if s <= t) for t in range(9)])
        mask = of[:, None] == of
    return reference_weights(query, key, scale=attention.scale, mask=mask, causal=attention.causal)


@pytest.mark.parametrize("case", CASES)
def test_everything_comes_back(case: str) -> None:
    attention = sharp(**CASES[case])
    packed = pack_site("a", attention)
    found, header = unpacked(packed), packed.header
    assert header["dtype"] == "float16"
    assert header["difference"] < packing.LARGEST_DIFFERENCE
    assert np.array_equal(found["query"], attention.query.half().mT.numpy())
    assert np.array_equal(found["key"], attention.key.half().mT.numpy())
    assert header["shape"] == list(attention.shape)
    assert header["groups"] == attention.groups
    assert header["causal"] == attention.causal
    if attention.mask is not None:
        mask = attention.mask
        assert found["mask"].ndim == 4  # as the browser indexes it
        assert np.array_equal(found["mask"].reshape(mask.shape), mask.numpy())
        assert found["mask"].dtype == (np.uint8 if mask.dtype == torch.bool else np.float32)
    if attention.segments is not None:
        assert found["segments"].tolist() == attention.segments.tolist()
    if isinstance(attention.scale, Tensor):
        assert header["scale"] == attention.scale.flatten().tolist()
    # A column by the kept maxima and sums is the column of the whole matrix.
    expected = dense(attention.query.half(), attention.key.half(), attention)
    assert expected.max() > 0.3
    maximum, total = found["rows"].astype(np.float64)
    scale = torch.as_tensor(attention.scale).reshape(-1, 1, 1).double()
    keys = attention.key.half().double().repeat_interleave(attention.groups, 1)
    logits = (scale * (attention.query.half().double() @ keys.mT)).numpy()
    if attention.mask is not None and attention.mask.dtype != torch.bool:
        logits = logits + attention.mask.numpy()
    column = np.exp(logits - maximum[..., None]) / np.where(total == 0, 1, total)[..., None]
    taken = expected.numpy() > 0
    assert np.abs(column - expected.numpy())[taken].max() < 1e-6


def test_a_row_without_keys_has_a_sum_of_zero() -> None:
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[3] = False
    found = unpacked(pack_site("a", sharp(mask=mask)))
    assert (found["rows"][:, :, :, 3] == 0).all()
    assert (found["rows"][1][:, :, [0, 1, 2, 4, 5, 6]] >= 0.6).all()


def test_a_mask_beyond_float32_hides_as_before() -> None:
    mask = torch.zeros(7, 9, dtype=torch.float64)
    mask[:, :4] = torch.finfo(torch.float64).min
    mask[2] = torch.finfo(torch.float64).min  # a row of these alone is uniform, and stays so
    mask[:, 8] = -torch.inf
    found = unpacked(pack_site("a", sharp(mask=mask)))
    assert np.isfinite(found["mask"][..., :8]).all()
    assert np.isneginf(found["mask"][..., 8]).all()
    assert (found["rows"][1][:, :, 2] == 8).all()


def test_values_beyond_halves_go_out_as_floats() -> None:
    query, key = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 6, 16)
    query[0, 0, 0, 0] = 70_000.0
    attention = Attention(query=query, key=key)
    packed = pack_site("a", attention)
    assert packed.header["dtype"] == "float32"
    assert np.array_equal(unpacked(packed)["query"], attention.query.mT.numpy())


def test_rows_that_lie_apart_go_out_as_floats() -> None:
    query, key = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 60, 16)
    attention = Attention(query=query, key=key, scale=20.0)
    packed = pack_site("a", attention)
    assert packed.header["dtype"] == "float32"
    assert packed.header["difference"] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error(value: float) -> None:
    query, key = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 6, 16)
    query[0, 1, 4, 2] = value
    with pytest.raises(InputError, match="must be finite"):
        pack_site("a", Attention(query=query, key=key))


def test_functions_of_indices_are_an_error() -> None:
    with pytest.raises(InputError, match=r"a: .*function of indices"):
        pack_site("a", sharp(mask_mod=lambda b, h, q, k: q >= k))


def test_given_weights_go_as_they_are() -> None:
    weights = torch.rand(2, 3, 5, 6)
    packed = pack_site("a", Attention.from_weights(weights))
    assert np.array_equal(unpacked(packed)["weights"], weights.numpy())
    assert set(packed.header["tensors"]) == {"weights"}


def test_orders_go_along() -> None:
    order = TokenOrder(torch.tensor([4, -1, 0, 2, 1]), torch.tensor([0, 1, 1, 2, 3]))
    site = SiteInfo("a", query_order=order, frame_order=torch.tensor([[1, 0]]))
    found = unpacked(pack_site("a", sharp(shape=(2, 4, 4, 9), site=site)))
    assert found["query_tokens"].tolist() == order.tokens.tolist()
    assert found["query_members"].tolist() == [0, 1, 1, 2, 3]
    assert found["frame_order"].tolist() == [[1, 0]]
    assert "key_tokens" not in found


def test_the_estimate_is_near() -> None:
    # Neighbours alike, as tokens of pictures are.
    smooth = torch.randn(1, 4, 600, 32).cumsum(2) / 20
    weights = Attention.from_weights(torch.softmax(torch.randn(1, 2, 100, 100), -1))
    for attention in (
        Attention(query=smooth, key=smooth.flip(2)),
        Attention(query=smooth, key=smooth * 1e6),
        Attention(query=smooth, key=smooth[:, :2], mask=torch.rand(600, 600) < 0.5),
        weights,
    ):
        true = len(pack_site("a", attention).data)
        assert 1 / 1.15 < packed_bytes(attention) / true < 1.15


def test_memory_is_that_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_CHUNK", 2**16)
    query = torch.randn(1, 16, 8000, 32, dtype=torch.float16)
    tracemalloc.start()
    packed = sum(len(part) for part in packing._deflated(query.mT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed > 0.8 * query.nbytes
    assert peak < query.nbytes / 4


def test_swapped_planes_would_be_seen() -> None:
    """The decoder above is a witness only if a wrong order of bytes fails it."""
    attention = sharp()
    packed = pack_site("a", attention)
    one = packed.header["tensors"]["query"]
    planes = zlib.decompress(packed.data[: one["bytes"]])
    half = len(planes) // 2
    wrong = np.frombuffer(planes[half:] + planes[:half], np.uint8).reshape(2, -1).T
    wrong = np.ascontiguousarray(wrong).view(np.float16).reshape(one["shape"])
    assert not np.array_equal(wrong, attention.query.half().mT.numpy())


def test_the_binary_is_what_its_recipe_gives(tmp_path: Path) -> None:
    if not (shutil.which("clang") and shutil.which("wasm-ld")):
        pytest.skip("clang and wasm-ld are not installed")
    version = subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True)
    if "version 14." not in version.stdout:
        pytest.skip("another clang than 14 gives other bytes")
    folder = Path(packing.__file__).parents[1] / "assets" / "explorer"
    built = tmp_path / "kernel.wasm"
    subprocess.run(["sh", folder / "build_kernel.sh", built], check=True)
    assert built.read_bytes() == (folder / "kernel.wasm").read_bytes()
    assert len(built.read_bytes()) < 12_000
