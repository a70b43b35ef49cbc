"""What an overlay folder says about itself, and what it says when somebody else wrote it."""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import vistvis
from tests.test_reconstruction import LAYOUT, SPECIAL, a_run, draw, stored
from vistvis import Attention
from vistvis.errors import InputError, StoreError, VistvisWarning
from vistvis.views.overlay_manifest import (
    NAME,
    Drawing,
    Origin,
    OverlayRecord,
    add_records,
    read_records,
)
from vistvis.views.overlay_painter import Look
from vistvis.views.png import checksum

GLOBAL = {"layers": "global_*"}


def records(folder: Path) -> list[OverlayRecord]:
    return read_records(str(folder))


def test_every_file_is_recorded_with_what_it_shows(tmp_path: Path) -> None:
    found = draw(
        stored(tmp_path, layers=(0, 2)),
        tmp_path / "o",
        query_idx=[SPECIAL + 6, 1],
        key_frame_idx=[2, 0],
        head="all",
        batch_idx=1,
        norm="auto",
        cmap_name="jet",
        alpha=0.45,
    )
    told = {name: (r, entry) for r in records(tmp_path / "o") for name, entry in r.files.items()}
    assert len(told) == sum(map(len, found.values())) == 32
    for (layer, head), files in found.items():
        for (token, frame), file in zip(((8, 2), (8, 0), (1, 2), (1, 0)), files, strict=True):
            record, entry = told[Path(file).relative_to(tmp_path / "o").as_posix()]
            assert entry == (layer, head, checksum(Path(file).read_bytes()))
            drawing = record.drawing
            assert drawing.origin.path == str(tmp_path / "demo")
            assert (drawing.query_frame, drawing.token, drawing.key_frame) == (1, token, frame)
            assert drawing.place == ("grid row 1, col 2" if token == 8 else "special")
            assert (drawing.batch, drawing.scale_frames) == (1, (2, 0))
            look = drawing.look
            assert (look.norm, look.cmap, look.alpha) == ("auto", "jet", 0.45)
            picture = tmp_path / f"o/query_frames/query_image_{token}.png"
            assert record.query_picture == checksum(picture.read_bytes())
            assert record.when.endswith("UTC")


def test_calls_add_up_and_a_new_picture_takes_its_record_along(tmp_path: Path) -> None:
    run, other = a_run(), a_run(images=torch.zeros_like(a_run().images))  # type: ignore[arg-type]
    draw(run, tmp_path, **GLOBAL)
    draw(run, tmp_path, head=0, **GLOBAL)
    assert [len(r.files) for r in records(tmp_path)] == [3, 3]
    assert len({r.drawing for r in records(tmp_path)}) == 1
    draw(other, tmp_path, layers="global_block_10")
    assert [len(r.files) for r in records(tmp_path)] == [2, 3, 1]
    assert len({r.drawing.origin for r in records(tmp_path)}) == 2
    # Another query under the same names is told.
    with pytest.warns(VistvisWarning, match="3 overlays of another query"):
        draw(run, tmp_path, query_frame_idx=0, **GLOBAL)
    assert [len(r.files) for r in records(tmp_path)] == [3, 3]


def test_runs_are_told_apart_by_folder_and_by_what_is_in_them(tmp_path: Path) -> None:
    origins = []
    for name, number in (("a", 5), ("b", 5), ("a", 6)):
        run = a_run()
        if number == 6:
            run["global_block_10"] = run["global_block_0"]
        vistvis.save_run(run, tmp_path / name, images=run.images, layout=LAYOUT, model="tiny <b>")
        with vistvis.open_run(tmp_path / name) as opened:
            for head in (0, 1):
                draw(opened, tmp_path / "o" / f"{len(origins)}", head=head, **GLOBAL)
        (origin,) = {r.drawing.origin for r in records(tmp_path / "o" / f"{len(origins)}")}
        origins.append(origin)
    assert len(set(origins)) == 3
    assert origins[0].words == f"{tmp_path.name}/a, model tiny <b>"
    random = dataclasses.replace(origins[0], model="vit_tiny@random")
    assert random.words.endswith("model vit_tiny@random (untrained weights)")
    assert [Path(origin.path or "").name for origin in origins] == ["a", "b", "a"]


def test_a_run_that_goes_on_is_the_same_while_its_pass_is(tmp_path: Path) -> None:
    origins = set()
    for count, pass_id in ((2, "one"), (4, "one"), (4, "two")):
        run = a_run()
        some = {name: run[name] for name in list(run)[:count]}
        kept = {"images": run.images, "layout": LAYOUT, "pass_id": pass_id}
        vistvis.save_run(some, tmp_path / "run", **kept)
        with vistvis.open_run(tmp_path / "run") as opened:
            draw(opened, tmp_path / "o", layers="global_block_0")
        origins |= {r.drawing.origin for r in records(tmp_path / "o")}
    assert len(origins) == 2


def test_attention_in_memory_is_told_apart_by_pictures_and_by_weights(tmp_path: Path) -> None:
    one, two, three = a_run(), a_run(), a_run()
    two.images = one.images.flip(1)  # type: ignore[union-attr]
    three["frame_block_0"].query[0, 0, 0] += 1
    for run in (one, two, three):
        draw(run, tmp_path / "o", head=len(records(tmp_path / "o")), layers="global_block_0")
    assert len({r.drawing.origin for r in records(tmp_path / "o")}) == 3


def test_what_was_written_before_an_error_is_recorded(tmp_path: Path) -> None:
    run = a_run()
    run["global_block_9"] = Attention.from_weights(run["global_block_0"].dense() * float("nan"))
    with pytest.raises(InputError, match="NaN"):
        draw(run, tmp_path, **GLOBAL)
    assert [len(r.files) for r in records(tmp_path)] == [2]


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    drawing = Drawing(Origin("/r", "0"), 0, 5, "cls", 1, 0, Look())

    def write(number: int) -> None:
        files: dict[str, tuple[int | str, int | str, str]] = {f"{number}": (0, number, "00000000")}
        add_records(str(tmp_path), [OverlayRecord(drawing, files)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert sorted(int(name) for r in records(tmp_path) for name in r.files) == list(range(40))


GOOD = {"format": "vistvis-overlays", "schema": 1, "records": []}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"1" * 10_000,
        json.dumps({**GOOD, "format": "vistvis-run"}).encode(),
        json.dumps({**GOOD, "schema": True}).encode(),
        json.dumps({**GOOD, "records": {"a": 1}}).encode(),
        json.dumps({**GOOD, "records": [{"origin": {"path": "\x1b[2J"}}]}).encode(),
        b" " * (32 * 2**20 + 1),
    ],
)
def test_a_manifest_that_is_none_says_nothing_and_is_replaced(tmp_path: Path, text: bytes) -> None:
    (tmp_path / NAME).write_bytes(text)
    with pytest.warns(VistvisWarning, match=r"overlays\.json is damaged .*count as not recorded"):
        assert records(tmp_path) == []
    with pytest.warns(VistvisWarning, match="damaged"):
        draw(a_run(), tmp_path, **GLOBAL)
    assert [len(r.files) for r in records(tmp_path)] == [3]


def test_every_field_is_checked(tmp_path: Path) -> None:
    draw(a_run(), tmp_path, **GLOBAL)
    whole = json.loads((tmp_path / NAME).read_text())

    def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(data, dict):
            return [way for key in data for way in leaves(data[key], (*path, key))]
        return [path]

    ways = leaves(whole["records"][0])
    assert len(ways) > 15
    for way in ways:
        for wrong in ({"a": []}, "x" * 5000, -1.5, float("nan")):
            if way == ("look", "alpha") and wrong == -1.5:
                continue  # a number; what is drawn does not depend on it
            if way == ("look", "eps") and wrong == -1.5:
                continue
            changed = json.loads(json.dumps(whole))
            at = changed["records"][0]
            for key in way[:-1]:
                at = at[key]
            at[way[-1]] = wrong
            (tmp_path / NAME).write_text(json.dumps(changed))
            with pytest.warns(VistvisWarning, match="damaged"):
                assert records(tmp_path) == [], (way, wrong)


def test_a_newer_manifest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({**GOOD, "schema": 2, "records": "new"}))
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(StoreError, match=r"schema 2.*update vistvis"):
        draw(a_run(), tmp_path, **GLOBAL)
    assert (tmp_path / NAME).read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_does_not_hold_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.warns(VistvisWarning, match="it is no file"):
        assert records(tmp_path) == []


def test_a_folder_that_can_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"can't write .*overlays\.json: No space"):
        add_records(str(tmp_path), [])
