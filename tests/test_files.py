"""Files of tensors: formats, names that stay inside, whole writes, and nothing unpickled."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.errors import CaptureError, DenseLimitError, InputError, StoreError
from vistvis.files import atomic_file, checked_name, inside
from vistvis.store.formats import FORMATS, checked_format, read, read_attention, write


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, ending: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = write(tensor, tmp_path / f"a{ending}")
    found = read(path).one()
    assert torch.equal(found.to(dtype), tensor)
    keeps = dtype != torch.bfloat16 or ending not in (".npy", ".npz")
    assert found.dtype == (dtype if keeps else torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_others_can_read_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensor = torch.arange(6.0).reshape(2, 3)
    for ending in FORMATS:
        write(tensor, tmp_path / f"a{ending}")
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True), tensor)
    assert (np.load(tmp_path / "a.npy") == tensor.numpy()).all()
    with np.load(tmp_path / "a.npz") as arrays:
        assert (arrays[arrays.files[0]] == tensor.numpy()).all()
    assert torch.equal(next(iter(load_file(tmp_path / "a.safetensors").values())), tensor)


def test_a_view_is_stored_without_what_it_looks_into(tmp_path: Path) -> None:
    large = torch.zeros(1000, 1000)
    path = write(large[:2, :3].T, tmp_path / "a.pt")
    assert path.stat().st_size < 10_000
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    loaded = torch.load(write(parameter, tmp_path / "p.pt"), weights_only=True)
    assert type(loaded) is torch.Tensor
    assert not loaded.requires_grad


@pytest.mark.parametrize("kind", ["plain", "grouped", "masked", "causal", "scales", "weights"])
def test_attention_survives_lazily(tmp_path: Path, kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=g), torch.randn(2, 4, 5, 8, generator=g)
    given: dict[str, Any] = {"query": query.bfloat16(), "key": key.bfloat16()}
    if kind == "grouped":
        given["key"] = given["key"][:, :2]
    if kind == "masked":
        given["mask"] = torch.rand(5, 5, generator=g) > 0.3
    if kind == "causal":
        given |= {"causal": True, "scale": 0.1 + 0.2}
    if kind == "scales":
        given["scale"] = torch.rand(4, generator=g)
    site = SiteInfo("blocks.0", block=0, key_layout=TokenLayout(1, (2, 2), ("cls",)))
    attention = Attention(**given, site=site)
    if kind == "weights":
        attention = Attention.from_weights(attention.dense(), site=site)
    found = read_attention(write(attention, tmp_path / "a.safetensors"))
    assert (found.weights is None) == (kind != "weights")
    assert torch.equal(found.dense(), attention.dense())
    assert found.site == site
    if kind != "weights":
        assert found.query is not None
        assert found.query.dtype == torch.bfloat16
    for ending in FORMATS[:-1]:
        dense = read_attention(write(attention, tmp_path / f"a{ending}"))
        assert dense.weights is not None
        assert torch.equal(dense.dense(), attention.dense())


def test_query_and_key_may_be_one_tensor(tmp_path: Path) -> None:
    both = torch.randn(1, 1, 3, 2)
    found = read_attention(write(Attention(query=both, key=both), tmp_path / "a.safetensors"))
    assert torch.equal(found.dense(), Attention(query=both, key=both).dense())


def test_attention_lies_in_the_file_as_it_always_did(tmp_path: Path) -> None:
    """Names of tensors, words of the header: what earlier files have, and their readers expect."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    mask = torch.rand(3) > 0.3
    site = SiteInfo("blocks.0", block=0)
    given = Attention(query=query, key=key, mask=mask.expand(1, 2, 3, 3), scale=0.1, site=site)
    path = write(given, tmp_path / "a.safetensors")
    found = load_file(path)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "query": (1, 2, 3, 4),
        "key": (1, 2, 3, 4),
        "mask": (1, 1, 1, 3),  # what `expand` repeated is not stored
    }
    assert torch.equal(found["query"], query)
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
    about = {"format": "pt", "content": "vistvis attention 1", "scale": "0.1", "causal": "false"}
    assert {**words, "site": json.loads(words["site"])} == {**about, "site": site.to_dict()}

    save_file({"query": query, "key": key}, tmp_path / "old.safetensors", {**words, "scale": "0.3"})
    old = read_attention(tmp_path / "old.safetensors")
    assert (old.scale, old.causal, old.site) == (0.3, False, site)
    weights = write(Attention.from_weights(given.dense()), tmp_path / "w.safetensors")
    with safe_open(weights, framework="pt") as file:
        assert set(file.keys()) == {"weights"}
        assert file.metadata() == {"format": "pt", "content": "vistvis attention 1"}


def test_attention_that_was_written_into_is_not_stored(tmp_path: Path) -> None:
    query = torch.randn(1, 1, 3, 2)
    given = Attention(query=query, key=torch.randn(1, 1, 3, 2))
    query.mul_(2)
    for ending in (".safetensors", ".pt"):
        with pytest.raises(CaptureError, match="written into"):
            write(given, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


def test_dense_writes_keep_to_a_limit(tmp_path: Path) -> None:
    attention = Attention(query=torch.zeros(1, 1, 100, 2), key=torch.zeros(1, 1, 100, 2))
    with pytest.raises(DenseLimitError):
        write(attention, tmp_path / "a.pt", max_bytes=100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["text", 3, None, [torch.zeros(2)], np.array(["a"], object)])
def test_other_values_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match="stored"):
        write(value, tmp_path / "a.pt")
    with pytest.raises(InputError, match="dense"):
        write(torch.eye(2).to_sparse(), tmp_path / "a.pt")


# -- nothing is run ------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _torch_bomb(path: Path, bomb: Bomb) -> None:
    torch.save({"attn": torch.zeros(1, 1, 2, 2), "more": bomb}, path)


def _old_torch_bomb(path: Path, bomb: Bomb) -> None:
    torch.save(bomb, path, _use_new_zipfile_serialization=False)


def _pickle_bomb(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb))


def _numpy_bomb(path: Path, bomb: Bomb) -> None:
    array = np.empty(1, object)
    array[0] = bomb
    with open(path, "wb") as file:
        if path.suffix == ".npz":
            np.savez(file, data=array)
        else:
            np.save(file, array, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("a.pt", _torch_bomb),
        ("a.pth", _old_torch_bomb),
        ("b.pt", _pickle_bomb),
        ("a.npy", _numpy_bomb),
        ("a.npz", _numpy_bomb),
        ("b.npy", _pickle_bomb),
    ],
)
def test_a_malicious_file_runs_nothing(
    tmp_path: Path, name: str, arm: Callable[[Path, Bomb], None]
) -> None:
    mark = tmp_path / "went off"
    arm(tmp_path / name, Bomb(mark))
    with pytest.raises(StoreError, match=name):
        read_attention(tmp_path / name)
    assert not mark.exists()


def test_the_bomb_is_live(tmp_path: Path) -> None:
    mark = tmp_path / "went off"
    _torch_bomb(tmp_path / "a.pt", Bomb(mark))
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("ending", FORMATS)
def test_damage_is_said(tmp_path: Path, ending: str) -> None:
    path = write(torch.zeros(100, 100), tmp_path / f"a{ending}")
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:20], b"", b"nonsense" * 100):
        path.write_bytes(part)
        with pytest.raises(StoreError, match="a\\" + ending):
            read_attention(path)
    path.unlink()
    with pytest.raises(StoreError, match="no file"):
        read(path)


def test_what_is_no_attention_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no attention"):
        read_attention(write(torch.zeros(3, 3), tmp_path / "a.pt"))
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(StoreError, match="a, b"):
        read(tmp_path / "b.pt").one()
    torch.save({"attn": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "c.pt")
    assert read(tmp_path / "c.pt").one().shape == (2,)
    torch.save([1, 2], tmp_path / "d.pt")
    with pytest.raises(StoreError, match="list"):
        read(tmp_path / "d.pt")
    with pytest.raises(StoreError, match="ending"):
        read(tmp_path / "d.txt")


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    tensor = torch.rand(1, 1, 2, 2)
    torch.save(tensor, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read(tmp_path / "a.pt").one(), tensor)


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ".npy", ".safetensors"])
def test_only_rows_that_are_asked_for_are_read(tmp_path: Path, ending: str) -> None:
    n, heads = 4096, 4  # 256 MiB
    weights = torch.zeros(1, heads, n, n)
    weights[0, :, 7] = torch.rand(heads, n)
    expected = weights[0, :, 7].clone()
    path = write(weights, tmp_path / f"a{ending}")
    del weights
    before = private_bytes()
    rows = read_attention(path).rows([7])
    assert torch.equal(rows[0, :, 0], expected)
    assert private_bytes() - before < 16 * 2**20


def private_bytes() -> int:
    """Memory of this process that is no file's (Linux)."""
    with open("/proc/self/smaps_rollup") as file:
        line = next(line for line in file if line.startswith("Anonymous"))
    return int(line.split()[1]) * 1024


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/b", "/a", "a\\b", "a\0b", "C:", "C:a", " ", "x" * 300, 3, None],
)
def test_names_that_lead_elsewhere_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match="name"):
        checked_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "a\x1b[31mb",
        "a\nb",
        "a\x7f",
        "a\x9b",
        "\u202eexe.a",
        "a\u2066b",
        "a\u2028b",
        "\ud800",
        "a\udc80",
        *("CON", "nul", "Aux.tar.gz", "com1.pt", "LPT9 .x", "a:b", "a:", "a.", "a "),
    ],
)
def test_names_that_mislead_or_are_none_on_another_system_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="every system") as caught:
        checked_name(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["COM", "com10", "console", "a.con", "名前", "é", "a b", ".a", "می\u200cخ"]
)
def test_other_names_are_taken(name: str) -> None:
    assert checked_name(name) == name


@given(st.text(max_size=30))
def test_an_accepted_name_stays_in_its_folder(name: str) -> None:
    try:
        checked_name(name)
    except (InputError, UnicodeEncodeError):
        return
    joined = os.path.normpath(os.path.join("/base/folder", name))
    assert os.path.dirname(joined) == "/base/folder"


def test_a_symbolic_link_out_of_the_base_is_refused(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    base.mkdir()
    other.mkdir()
    (base / "way").symlink_to(other)
    (base / "fine").symlink_to(base)
    with pytest.raises(StoreError, match="symbolic link"):
        inside(base, "way", "a.pt")
    assert inside(base, "fine", "a.pt") == base / "fine" / "a.pt"


def test_endings() -> None:
    assert checked_format("attn") == "attn.pt"
    assert checked_format("attn.SAFETENSORS") == "attn.SAFETENSORS"
    for wrong in ("attn.txt", "attn.pt.gz"):
        with pytest.raises(InputError, match=r"\.safetensors"):
            checked_format(wrong)


# -- whole writes --------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(torch.ones(2), tmp_path / "a.pt")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert torch.equal(read(path).one(), torch.ones(2))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StoreError, match=r"a\.pt.*No space"):
        write(torch.zeros(2), path)
    monkeypatch.undo()
    assert torch.equal(read(path).one(), torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
