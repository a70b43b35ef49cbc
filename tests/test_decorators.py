"""visTvis_store, visTvis_layer_counter, LayerCounter and state."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vistvis import Attention, LayerCounter, VistvisWarning, state
from vistvis.decorators import visTvis_layer_counter, visTvis_store
from vistvis.errors import InputError, StoreError
from vistvis.store.formats import read, read_attention


@pytest.fixture
def name() -> Iterator[str]:
    identifier = f"test-{uuid.uuid4().hex}"
    yield identifier
    state.reset(identifier)


def layers(base: Path, name: str, folder: str = "attn") -> list[int]:
    return sorted(int(p.name[6:]) for p in (base / name / folder).glob("layer_*"))


def runner(base: Path, name: str, blocks: int = 3, **store: Any) -> Callable[..., Any]:
    options = {"file_name": "attn.pt", "folder_name": "attn", **store}

    @visTvis_store(base_folder_path=str(base), identifier=name, **options)
    def attn_func(weights: Any) -> Any:
        return weights

    @visTvis_layer_counter(identifier=name, var_name="layer_idx")
    def run_blocks(value: float = 0.0, layer_idx: int = 0) -> int:
        for _ in range(blocks):
            attn_func(torch.full((1, 1, 2, 2), value))
            layer_idx += 1
        return int(layer_idx)

    return run_blocks


# -- the counter ---------------------------------------------------------------------------------


def test_it_is_an_int_in_every_way(name: str) -> None:
    counter = LayerCounter(name, 3)
    assert isinstance(counter, int)
    assert counter == 3
    assert counter != 4
    assert 2 < counter <= 3 < 4
    assert hash(counter) == hash(3)
    assert {3: "a"}[counter] == "a"
    assert [0, 1, 2, 30][counter] == 30
    assert list(range(counter)) == [0, 1, 2]
    assert f"{counter} {counter:03d} {counter!s} %d" % counter == "3 003 3 3"
    assert str(counter) == "3"
    assert repr(counter) == f"LayerCounter(identifier={name!r}, value=3)"
    assert (counter.value, counter.identifier, int(counter)) == (3, name, 3)
    assert bool(counter)
    assert torch.arange(5)[counter] == 3


@pytest.mark.parametrize(
    "operation",
    [
        lambda c: c + 2,
        lambda c: 2 + c,
        lambda c: c - 2,
        lambda c: 10 - c,
        lambda c: c * 2,
        lambda c: c // 2,
        lambda c: c % 2,
        lambda c: -c,
        lambda c: c**2,
        lambda c: divmod(c, 2)[0],
    ],
)
def test_what_is_computed_from_it_is_a_plain_int(name: str, operation: Callable[..., Any]) -> None:
    counter = LayerCounter(name, 7)
    found = operation(counter)
    assert type(found) is int
    assert found == operation(7)
    assert counter == state.get_layer(name) == 7


def test_counting_moves_the_state_and_old_values_stay(name: str) -> None:
    counter = first = LayerCounter(name, 0)
    seen = []
    for _ in range(3):
        seen.append(counter)
        counter += 1
    counter -= 1
    assert type(counter) is LayerCounter
    assert state.get_layer(name) == counter == 2
    assert seen == [0, 1, 2]
    assert first == 0


def test_copies_are_plain_ints(name: str) -> None:
    counter = LayerCounter(name, 2)
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert type(other) is int
        assert other == 2


def test_only_whole_numbers_count(name: str) -> None:
    with pytest.raises(InputError, match="whole number"):
        LayerCounter(name, 1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="whole number"):
        state.update(name, "1")  # type: ignore[arg-type]
    assert LayerCounter(name, None) == 0


# -- how it goes on ------------------------------------------------------------------------------


def test_it_starts_at_zero_and_goes_on_until_reset(tmp_path: Path, name: str) -> None:
    run = runner(tmp_path, name)
    assert run() == 3
    assert type(run()) is int
    assert layers(tmp_path, name) == [0, 1, 2, 3, 4, 5]
    state.reset(name)
    assert run() == 3
    assert layers(tmp_path, name) == [0, 1, 2, 3, 4, 5]


def test_an_argument_and_an_update_win(tmp_path: Path, name: str) -> None:
    run = runner(tmp_path, name)
    assert run(layer_idx=10) == 13
    assert run(0.0, 20) == 23
    assert run() == 26
    state.update(name, 5)
    assert run() == 8
    assert run(layer_idx=0) == 3
    assert state.bump(name) == 4
    assert layers(tmp_path, name) == [0, 1, 2, 5, 6, 7, 10, 11, 12, *range(20, 26)]


def test_a_failed_call_counts_nothing(tmp_path: Path, name: str) -> None:
    @visTvis_layer_counter(identifier=name, var_name="i")
    def run(fails: bool, i: int = 0) -> int:
        i += 5
        if fails:
            raise KeyboardInterrupt
        return i

    run(False)
    with pytest.raises(KeyboardInterrupt):
        run(True)
    assert state.get_layer(name) == 5
    assert run(False) == 10


def test_a_function_without_the_parameter_counts_by_state(tmp_path: Path, name: str) -> None:
    @visTvis_store(tmp_path, name, "attn.pt", "attn")
    def attn() -> torch.Tensor:
        return torch.zeros(1)

    @visTvis_layer_counter(identifier=name, var_name="layer_idx")
    def run() -> str:
        for _ in range(2):
            attn()
            state.bump(name)
        return "done"

    assert run() == "done"
    assert run() == "done"
    assert layers(tmp_path, name) == [0, 1, 2, 3]


def test_the_counter_may_stand_anywhere_among_parameters(name: str) -> None:
    @visTvis_layer_counter(name, "i")
    def first(i: int, *rest: int) -> tuple[int, ...]:
        i += 1
        return (i, *rest)

    @visTvis_layer_counter(name, "i")
    def only_named(a: int = 7, *, i: int, **more: int) -> tuple[Any, ...]:
        i += 1
        return a, i, more

    @visTvis_layer_counter(name, "i")
    def after_default(a: int = 7, i: int = 0, b: int = 8) -> tuple[int, int, int]:
        i += 1
        return a, i, b

    assert first() == (1,)  # type: ignore[call-arg]
    assert first(5, 6, 7) == (6, 6, 7)
    assert only_named(b=1) == (7, 7, {"b": 1})  # type: ignore[call-arg]
    assert after_default(b=2) == (7, 8, 2)
    with pytest.raises(TypeError, match="unexpected keyword"):
        after_default(c=1)  # type: ignore[call-arg]


def test_counters_in_what_is_returned_become_ints(name: str) -> None:
    kept = object()

    @visTvis_layer_counter(name, "i")
    def run(i: int = 0) -> Any:
        return (i, [i, kept], {"i": i, "t": (kept,)})

    found = run()
    assert found == (0, [0, kept], {"i": 0, "t": (kept,)})
    assert type(found[0]) is type(found[1][0]) is type(found[2]["i"]) is int

    @visTvis_layer_counter(name, "i")
    def through(value: Any, i: int = 0) -> Any:
        return value

    same = [kept, (1, 2)]
    assert through(same) is same


def test_nested_identifiers_do_not_disturb_each_other(tmp_path: Path, name: str) -> None:
    inner = runner(tmp_path, f"{name}-inner", blocks=2)

    @visTvis_store(tmp_path, name, "attn.pt", "attn")
    def attn() -> torch.Tensor:
        return torch.zeros(1)

    @visTvis_layer_counter(name, "i")
    def outer(i: int = 0) -> int:
        for _ in range(3):
            attn()
            inner()
            i += 1
        return i

    assert outer() == 3
    assert layers(tmp_path, name) == [0, 1, 2]
    assert layers(tmp_path, f"{name}-inner") == list(range(6))
    state.reset(f"{name}-inner")


def test_threads_count_for_themselves(name: str) -> None:
    barrier = threading.Barrier(4)

    @visTvis_layer_counter(name, "i")
    def run(i: int = 0) -> list[int]:
        seen = []
        for _ in range(20):
            barrier.wait(10)
            seen.append(state.get_layer(name))
            i += 1
        return seen

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(run) for _ in range(4)]]
    assert found == [list(range(20))] * 4
    assert state.get_layer(name) == 0
    state.update(name, 6)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(state.get_layer, name).result() == 6


def test_tasks_count_for_themselves(tmp_path: Path, name: str) -> None:
    @visTvis_store(tmp_path, name, "attn.pt", "attn")
    async def attn(value: float) -> torch.Tensor:
        await asyncio.sleep(0)
        return torch.full((1,), value)

    @visTvis_layer_counter(name, "i")
    async def run(start: int, i: int) -> int:
        for n in range(3):
            await attn(start + n)
            i += 1
            await asyncio.sleep(0)
        return i

    async def main() -> list[int]:
        return await asyncio.gather(run(10, i=10), run(20, i=20), run(30, i=30))

    assert asyncio.run(main()) == [13, 23, 33]
    assert layers(tmp_path, name) == [n + k for n in (10, 20, 30) for k in range(3)]
    for layer in layers(tmp_path, name):
        assert read(tmp_path / name / "attn" / f"layer_{layer}" / "attn.pt").one().item() == layer


# -- storing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_name", "on_disk"),
    [
        ("attn", "attn.pt"),
        *((f"attn{e}",) * 2 for e in (".pt", ".pth", ".npy", ".npz", ".safetensors")),
    ],
)
def test_the_ending_chooses_the_format(
    tmp_path: Path, name: str, file_name: str, on_disk: str
) -> None:
    @visTvis_store(tmp_path, name, file_name, "attn")
    def attn() -> torch.Tensor:
        return torch.arange(4.0)

    assert torch.equal(attn(), torch.arange(4.0))
    (path,) = (tmp_path / name / "attn" / "layer_0").iterdir()
    assert path.name == on_disk
    assert torch.equal(read(path).one(), torch.arange(4.0))


@pytest.mark.parametrize("file_name", ["attn.txt", "attn.pt.pkl", "../attn.pt", "a/attn.pt", ""])
def test_other_file_names_fail_at_decoration(tmp_path: Path, name: str, file_name: str) -> None:
    with pytest.raises(InputError, match="file_name"):
        visTvis_store(tmp_path, name, file_name, "attn")


@pytest.mark.parametrize("bad", ["..", "a/b", "/abs", "a\0b", "a\\b"])
def test_names_that_leave_the_base_fail_at_decoration(tmp_path: Path, name: str, bad: str) -> None:
    with pytest.raises(InputError, match="identifier"):
        visTvis_store(tmp_path, bad, "attn.pt", "attn")
    with pytest.raises(InputError, match="folder_name"):
        visTvis_store(tmp_path, name, "attn.pt", bad)
    with pytest.raises(InputError, match="identifier"):
        visTvis_layer_counter(bad)


def test_a_link_out_of_the_base_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        runner(tmp_path / "base", name)()
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_is_returned_passes_through_untouched(tmp_path: Path, name: str) -> None:
    given = (torch.zeros(1), torch.ones(2, requires_grad=True), "more")

    @visTvis_store(tmp_path, name, "attn.pt", "attn", pos_ret=1)
    def attn() -> Any:
        """Its words."""
        return given

    assert attn() is given
    assert attn.__doc__ == "Its words."
    stored = read(tmp_path / name / "attn" / "layer_0" / "attn.pt").one()
    assert torch.equal(stored, torch.ones(2))
    for position in (3, -4):
        choose = visTvis_store(tmp_path, name, "attn.pt", "attn", pos_ret=position)(lambda: given)
        with pytest.raises(InputError, match="pos_ret"):
            choose()
    with pytest.raises(InputError, match="pos_ret"):
        visTvis_store(tmp_path, name, "attn.pt", "attn", pos_ret=0)(lambda: torch.zeros(1))()


def test_arrays_and_attention_are_stored(tmp_path: Path, name: str) -> None:
    array = visTvis_store(tmp_path, name, "a.npy", "array")(lambda: np.arange(3.0))
    array()
    assert read(tmp_path / name / "array" / "layer_0" / "a.npy").one().tolist() == [0, 1, 2]
    attention = Attention(
        query=torch.randn(1, 2, 3, 4).bfloat16(), key=torch.randn(1, 2, 3, 4).bfloat16()
    )
    for file_name in ("attn.safetensors", "attn.pt"):
        assert visTvis_store(tmp_path, name, file_name, "attn")(lambda: attention)() is attention
    folder = tmp_path / name / "attn" / "layer_0"
    assert read_attention(folder / "attn.safetensors").weights is None
    dense = torch.load(folder / "attn.pt", weights_only=True)
    assert torch.equal(dense, attention.dense())


def test_values_that_can_not_be_stored(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="tensor"):
        visTvis_store(tmp_path, name, "attn.pt", "attn")(lambda: "text")()
    with pytest.warns(VistvisWarning, match="None was returned"):
        assert visTvis_store(tmp_path, name, "attn.pt", "attn")(lambda: None)() is None
    state.update(name, -1)
    with pytest.raises(InputError, match="count from 0"):
        visTvis_store(tmp_path, name, "attn.pt", "attn")(lambda: torch.zeros(1))()
    assert not (tmp_path / name).exists()


def test_generators_are_refused_at_decoration(tmp_path: Path, name: str) -> None:
    def generator() -> Iterator[int]:
        yield 1

    with pytest.raises(InputError, match="generator"):
        visTvis_store(tmp_path, name, "attn.pt", "attn")(generator)
    with pytest.raises(InputError, match="generator"):
        visTvis_layer_counter(name, "i")(generator)
    with pytest.raises(InputError, match="many values"):
        visTvis_layer_counter(name, "args")(lambda *args: None)


def test_the_name_state_is_the_object_however_it_is_imported() -> None:
    import vistvis
    import vistvis.state as by_path  # after the package: what `vistvis.state` names

    assert vistvis.state is state
    assert by_path is state
