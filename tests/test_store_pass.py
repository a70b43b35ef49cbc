"""A run is of one forward pass: what an earlier writer left counts only where it is the same."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from vistvis import Attention, RunWriter, open_run, save_run
from vistvis.errors import InputError, StoreError
from vistvis.store import clean_run, pass_id_of

SITES = [f"block_{number}" for number in range(4)]


def of(letter: str) -> dict[str, Attention]:
    """A pass in which every number tells which one it is, and the site."""
    value = float(ord(letter))

    def one(number: int) -> Attention:
        query = torch.full((1, 1, 5, 4), value + number / 8)
        return Attention(query=query, key=query)

    return {name: one(number) for number, name in enumerate(SITES)}


def letters(run: Any) -> str:
    return "".join(chr(int(run[name].query[0, 0, 0, 0])) for name in run)


def cut_short(path: Any, given: dict[str, Attention], names: list[str], **said: Any) -> None:
    with contextlib.suppress(ZeroDivisionError), RunWriter(path, expected=SITES, **said) as writer:
        for name in names:
            writer.write(name, given[name])
        _ = 1 / 0


def files(path: Path) -> dict[str, tuple[int, int]]:
    there = path.rglob("*.safetensors")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in there}


# -- passes don't mix -----------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(None, None), ("a", None), (None, "b"), ("a", "b")])
def test_other_weights_for_the_missing_sites(tmp_path: Path, ids: tuple[Any, Any]) -> None:
    """A, A, and then B, B for what is missing: no run of either."""
    cut_short(tmp_path, of("A"), SITES[:2], pass_id=ids[0])
    writer = RunWriter(tmp_path, expected=SITES, pass_id=ids[1])
    assert writer.finished == ()
    for name in SITES[2:]:
        writer.write(name, of("B")[name])
    with pytest.raises(StoreError, match=r"left as it was: .* lacks 'block_0', 'block_1'"):
        writer.close()
    run = open_run(tmp_path)
    assert (letters(run), run.missing) == ("AA", tuple(SITES[2:]))
    assert letters(save_run(of("B"), tmp_path, pass_id=ids[1])) == "BBBB"
    assert len(files(tmp_path)) == 4


def test_a_dog_does_not_get_the_pictures_of_a_cat(tmp_path: Path) -> None:
    cat = {"images": torch.zeros(1, 3, 4, 4), "model": "cat", "metadata": {"cat": 1}}
    cut_short(tmp_path, of("C"), SITES[:2], **cat)
    run = save_run(of("D"), tmp_path)
    assert letters(run) == "DDDD"
    assert (run.images, run.model, run.metadata) == (None, None, {})


@pytest.mark.parametrize("pass_id", [None, "one"])
def test_pictures_and_words_are_those_of_the_writer(tmp_path: Path, pass_id: str | None) -> None:
    """Also where sites of the same pass are gone on with."""
    cat = {"images": torch.zeros(1, 3, 4, 4), "model": "cat", "metadata": {"cat": 1}}
    cut_short(tmp_path, of("C"), SITES[:2], pass_id=pass_id, **cat)
    run = save_run(of("C"), tmp_path, pass_id=pass_id)
    assert (letters(run), run.complete, run.pass_id) == ("CCCC", True, pass_id)
    assert (run.images, run.model, run.metadata) == (None, None, {})
    assert not list(tmp_path.glob("images*"))


# -- what may be used again -----------------------------------------------------------------------


def test_the_same_pass_is_gone_on_with(tmp_path: Path) -> None:
    cut_short(tmp_path, of("A"), SITES[:2], pass_id="a")
    before = files(tmp_path)
    with RunWriter(tmp_path, pass_id="a") as writer:
        assert writer.finished == ("block_0", "block_1")
        assert writer.missing == ("block_2", "block_3")
        for name in writer.missing:
            writer.write(name, of("A")[name])
    run = open_run(tmp_path)
    assert (letters(run), run.complete) == ("AAAA", True)
    assert before.items() <= files(tmp_path).items()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_the_same_bytes_are_not_written_again(tmp_path: Path, whole: bool, resume: bool) -> None:
    images = torch.rand(1, 3, 4, 4)
    if whole:
        save_run(of("A"), tmp_path, images=images)
    else:
        cut_short(tmp_path, of("A"), SITES[:2], images=images)
    before = files(tmp_path)
    run = save_run(of("A"), tmp_path, images=images, resume=resume)
    run.check()
    after = files(tmp_path)
    assert len(after) == 5
    assert (before.items() <= after.items()) == resume
    assert resume or not set(before) & set(after)


def test_a_file_of_the_right_size_that_is_damaged_is_not_used(tmp_path: Path) -> None:
    run = save_run(of("A"), tmp_path)
    path = tmp_path / run.record("block_1").file.file
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    save_run(of("A"), tmp_path).check()
    assert not path.exists()


def test_another_scale_is_another_pass(tmp_path: Path) -> None:
    """The bytes of the tensors are the same; a number beside them is not."""
    given = of("A")["block_0"]
    cut_short(tmp_path, {"block_0": given}, ["block_0"], pass_id="a")
    other = Attention(query=given.query, key=given.key, scale=0.25)
    run = save_run({**of("A"), "block_0": other}, tmp_path, pass_id="a")
    assert run["block_0"].scale == 0.25
    run.check()


def test_a_pass_that_proves_to_be_another_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    cut_short(tmp_path, of("A"), SITES[:2], pass_id="a")
    writer = RunWriter(tmp_path, expected=SITES, pass_id="a")
    for name in SITES[::-1][:3]:
        writer.write(name, of("B")[name])
    with pytest.raises(StoreError, match=r"left as it was: .* lacks 'block_0'"):
        writer.close()
    run = open_run(tmp_path)
    assert (letters(run), run.missing) == ("AA", tuple(SITES[2:]))
    run = save_run(of("B"), tmp_path, pass_id="a")
    assert letters(run) == "BBBB"
    assert len(files(tmp_path)) == 4
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "manifest.json", "sites"}
    assert len(list((tmp_path / "sites").iterdir())) == 4


def test_replacements_cut_short_again_and_again_leave_nothing(tmp_path: Path) -> None:
    save_run(of("A"), tmp_path)
    for letter in "BCDE":
        cut_short(tmp_path, of(letter), SITES[:3])
        assert letters(open_run(tmp_path)) == "AAAA"
    assert letters(save_run(of("F"), tmp_path)) == "FFFF"
    assert len(list((tmp_path / "sites").iterdir())) == 4


# -- the identity ---------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_what_makes_a_pass_another() -> None:
    inputs = torch.ones(2, 3)
    first = pass_id_of(Net(), inputs, size=4)
    assert first == pass_id_of(Net(), inputs.clone(), size=4)
    others = [Net(), Net(), Net().double(), Net().eval()]
    with torch.no_grad():
        others[0].linear.weight[1, 1] += 1e-6
        others[1].table[2] = 7
    ids = [pass_id_of(model, inputs, size=4) for model in others]
    ids += [
        pass_id_of(Net(), inputs.half(), size=4),
        pass_id_of(Net(), inputs.view(3, 2), size=4),
        pass_id_of(Net(), [inputs], size=4),
        pass_id_of(Net(), {"a": inputs, "b": 1}, size=4),
        pass_id_of(Net(), inputs, size=5),
        pass_id_of(Net(), inputs),
    ]
    assert len({first, *ids}) == len(ids) + 1
    for wrong in ({"inputs": object()}, {"inputs": inputs, "a": object()}):
        with pytest.raises(InputError):
            pass_id_of(Net(), **wrong)


def test_the_identity_is_the_same_in_another_process() -> None:
    code = """
import torch
from test_store_pass import Net
from vistvis.store import pass_id_of
print(pass_id_of(Net(), torch.ones(2, 3), name="n", b={"y": 1, "x": 2}))
"""
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "", "PYTHONHASHSEED": "7"},
    )
    here = pass_id_of(Net(), torch.ones(2, 3), b={"x": 2, "y": 1}, name="n")
    assert done.stdout.strip() == here


# -- behind a URL ---------------------------------------------------------------------------------


@pytest.fixture
def url() -> Any:
    system = fsspec.filesystem("memory")
    yield "memory://passes/run"
    if system.exists("/passes"):
        system.rm("/passes", recursive=True)


@pytest.mark.parametrize("order", ["0011", "0101", "0110", "0100", "0111", "0001"])
@pytest.mark.parametrize("before", [False, True])
def test_two_writers_behind_a_url(url: str, order: str, before: bool) -> None:
    """Whatever comes first: the run is one writer's, whole and sound."""
    if before:
        save_run(of("X"), url)
    writers, given = [], [of("A"), of("B")]
    left = [list(SITES), list(SITES)]
    for turn in order:
        number = int(turn)
        while len(writers) <= number:
            writers.append(RunWriter(url, expected=SITES))
        for name in (left[number].pop(0), left[number].pop(0)) if left[number] else ():
            with contextlib.suppress(StoreError):
                writers[number].write(name, given[number][name])
    for number, writer in enumerate(writers):
        with contextlib.suppress(StoreError):
            for name in left[number]:
                writer.write(name, given[number][name])
            writer.close()
    run = open_run(url)
    run.check()
    assert letters(run) in ("AAAA", "BBBB", *(["XXXX"] if before else []))
    clean_run(url, older_than=0)
    open_run(url).check()
    system = fsspec.filesystem("memory")
    names = {name.rpartition("/")[2] for name in system.find("/passes")}
    if "manifest.next.json" not in names:
        assert len(names) == 5
