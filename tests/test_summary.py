"""The table of every site's numbers equals the single functions, and what is made of it."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import dense_of
from test_analysis import LAYOUT, SOURCES, N, sharp
from torch import Tensor

import vistvis
from vistvis import Attention, TokenOrder, open_run, save_run
from vistvis.analysis import (
    Summary,
    Table,
    distance,
    entropy,
    frame_mass,
    received,
    sink_tokens,
    special_mass,
    top_keys,
)
from vistvis.errors import InputError, SiteError

NUMBERS = ("entropy", "strongest", "special_mass", "distance")


def same(column: np.ndarray, expected: Tensor) -> None:
    np.testing.assert_allclose(column, expected.reshape(-1).numpy(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("max_bytes", [1, 2000, None])
@pytest.mark.parametrize("kind", [*SOURCES, "stored"])
def test_it_equals_the_single_functions(kind: str, max_bytes: int | None, tmp_path: Path) -> None:
    a = SOURCES[kind]() if kind in SOURCES else sharp()
    captured: object = {"one": a, "two": sharp()}
    if kind == "stored":
        save_run(captured, tmp_path / "run")  # type: ignore[arg-type]
        captured = open_run(tmp_path / "run")
    found = vistvis.summarize(captured, queries=True, max_bytes=max_bytes)  # type: ignore[arg-type]
    assert isinstance(found, Summary)
    assert len(found) == 2 * 2 * 4
    one = found.where(site="one")
    assert one["batch"].tolist() == [0] * 4 + [1] * 4
    assert one["head"].tolist() == [0, 1, 2, 3] * 2
    p = dense_of(a)
    same(one["entropy"], -(p * p.clamp_min(1e-300).log()).sum(-1).mean(-1))
    same(one["effective_rank"], entropy(a).exp().mean(-1))
    same(one["strongest"], p.amax(-1).mean(-1))
    masses = special_mass(a)
    same(one["special_mass"], sum(masses.values()).mean(-1))  # type: ignore[union-attr]
    same(one["camera_mass"], masses["camera"].mean(-1))
    shares = p.sum(2) * a.shape[3] / N
    same(one["most_received"], shares.amax(-1))
    assert one["most_received_token"].tolist() == shares.argmax(-1).reshape(-1).tolist()
    mass = frame_mass(a)
    assert len(found.frames.where(site="one")) == mass.numel()
    same(found.frames.where(site="one")["mass"], mass)
    if kind != "cross":
        same(one["distance"], distance(a).nanmean(-1))
        inside = mass[..., 1, :].sum(-1)
        same(one["own_frame_mass"], (inside[:, :, 0, 0] + inside[:, :, 1, 1]) / 2)
        same(one["other_frames_mass"], (inside[:, :, 0, 1] + inside[:, :, 1, 0]) / 2)
    queries = found.queries.where(site="one")  # type: ignore[union-attr]
    assert len(queries) == 2 * 4 * N
    same(queries["entropy"], entropy(a))
    at = torch.from_numpy(queries["strongest_key"]).view(2, 4, N, 1)
    same(queries["strongest"], p.gather(-1, at))
    same(queries["strongest"], top_keys(a, 1).weights)
    assert queries["frame"][:N].tolist() == [0] * 15 + [1] * 15


def test_sinks_are_those_of_sink_tokens() -> None:
    a = sharp()
    for times in (1.5, 3.0):
        found, table = sink_tokens(a, times), vistvis.summarize(a, times=times)
        gets = received(a)[tuple(found.tokens.T)]
        for line, (batch, head) in enumerate(zip(table["batch"], table["head"], strict=True)):
            mine = (found.tokens[:, 0] == batch) & (found.tokens[:, 1] == head)
            assert table["sinks"][line] == int(mine.sum())
            assert table["sink_mass"][line] == pytest.approx(float(gets[mine].sum()) / N)
    assert vistvis.summarize(a, times=1.5)["sinks"].sum() > 0


def test_what_a_site_does_not_say_is_missing() -> None:
    a = sharp()
    bare = Attention(query=a.query, key=a.key)
    found = vistvis.summarize({"told": a, "bare": bare})
    for name in ("special_mass", "distance", "own_frame_mass"):
        assert np.isnan(found.where(site="bare")[name]).all()
        assert np.isfinite(found.where(site="told")[name]).all()
    same(found.where(site="bare")["entropy"], entropy(a).mean(-1))
    assert set(found.frames["site"]) == {"told"}
    assert len(vistvis.summarize(bare).frames) == 0
    # Merged tokens lie in several places: masses are known, distances are not.
    assert a.site is not None
    order = TokenOrder(torch.arange(N), torch.arange(N))
    merged = a.with_site(replace(a.site, query_order=order, key_order=order))
    found = vistvis.summarize(merged, queries=True)
    assert "distance" not in found.columns
    same(found["special_mass"], sum(special_mass(a).values()).mean(-1))  # type: ignore[union-attr]
    assert found.queries is not None
    assert set(found.queries["token"]) == {-1}


def test_only_what_is_asked_for() -> None:
    many = {f"global_block_{n}": sharp() for n in range(3)} | {"frame_block_0": sharp()}
    found = vistvis.summarize(many, sites="global_*", of=("entropy",))
    assert set(found["site"]) == {"global_block_0", "global_block_1", "global_block_2"}
    assert "entropy" in found.columns
    assert not {"sinks", "strongest", "special_mass", "distance"} & set(found.columns)
    with pytest.raises(SiteError, match="did you mean 'global_block_0'"):
        vistvis.summarize(many, sites="globl_block_0")
    with pytest.raises(InputError, match="did you mean 'entropy'"):
        vistvis.summarize(many, of=("entropi",))
    with pytest.raises(InputError, match="of= is a tuple"):
        vistvis.summarize(many, of="entropy")
    with pytest.raises(InputError, match="there is no site"):
        vistvis.summarize({})
    with pytest.raises(InputError, match="several passes"):
        vistvis.summarize({"a": [sharp(), sharp()]})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="positive"):
        vistvis.summarize(sharp(), times=0)


def test_no_matrix_is_made() -> None:
    """Blocks of rows are as large as they may be, and two are held."""
    a = sharp()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                largest = max(largest, out.numel())
            return out

    with Sizes():
        vistvis.summarize(a, max_bytes=4 * N)
    # The tables of places: N tokens by kinds and frames, and the distances on one grid.
    assert largest <= max(a.query.numel(), N * N // 2)
    assert largest < a.shape.numel()


def test_a_table_is_saved_and_read_back(tmp_path: Path) -> None:
    found = vistvis.summarize({'a,"b': sharp()})
    found.save(tmp_path / "stats.csv")
    with open(tmp_path / "stats.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(found.columns)
    assert [float(line["entropy"]) for line in lines] == found["entropy"].tolist()
    assert lines[0]["site"] == 'a,"b'
    found.save(tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as data:
        for name, column in found.columns.items():
            np.testing.assert_array_equal(data[name], column)
        assert json.loads(str(data["units"])) == found.units
    assert found.units["entropy"] == "nats"
    with pytest.raises(InputError, match=r"\.csv, \.npz, \.parquet; got 'stats.xls'"):
        found.save(tmp_path / "stats.xls")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stats.csv", "stats.npz"]


def test_a_table_as_pandas_and_parquet(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    found = vistvis.summarize({"a": sharp()})
    frame = found.to_pandas()
    assert frame["entropy"].tolist() == found["entropy"].tolist()
    assert frame.attrs["units"]["entropy"] == "nats"
    parquet = pytest.importorskip("pyarrow.parquet")
    found.save(tmp_path / "stats.parquet")
    pd.testing.assert_frame_equal(
        parquet.read_table(tmp_path / "stats.parquet").to_pandas(), frame, check_like=True
    )
    units = parquet.read_schema(tmp_path / "stats.parquet").metadata[b"units"]
    assert json.loads(units) == found.units


def test_two_tables_beside_each_other() -> None:
    first = vistvis.summarize({"a": sharp(), "b": sharp()})
    second = vistvis.summarize({"b": sharp(causal=True), "c": sharp()})
    both = first.compare(second)
    assert list(dict.fromkeys(both["site"])) == ["a", "b", "c"]
    b = both.where(site="b")
    np.testing.assert_allclose(
        b["entropy_change"],
        second.where(site="b")["entropy"] - first.where(site="b")["entropy"],
    )
    assert (b["entropy_change"] < 0).all()
    assert np.isnan(both.where(site="a")["entropy_other"]).all()
    assert np.isnan(both.where(site="c")["entropy"]).all()
    assert both.units["entropy_change"] == "nats"
    assert "most_received_token_change" not in both.columns
    with pytest.raises(InputError, match="no line in common"):
        first.compare(vistvis.summarize({"d": sharp()}))
    with pytest.raises(InputError, match="same keys"):
        first.compare(first.frames)


def test_a_table_shows_itself_and_says_what_is_wrong() -> None:
    table = Table({"head": [0, 1], "<b>": [0.123456, math.nan]}, keys=["head"])
    assert "2 lines" in repr(table)
    shown = table._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "0.1235" in shown
    with pytest.raises(InputError, match="did you mean 'head'"):
        table["hed"]
    with pytest.raises(InputError, match="one length"):
        Table({"a": [1], "b": [1, 2]})
    assert LAYOUT.num_tokens == N
