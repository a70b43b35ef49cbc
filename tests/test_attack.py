"""A few cases of the attacks, and that each attack sees what is broken on purpose.

Signals at random moments are left to `nox -s attack`: no two runs of them are alike.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attack import commands, disks, exact, flips, forged, interrupts, kills, writers
from attack.case import Attack, Case, Outcome, Setting, carry_out
from attack.runs import contents, sound

from vistvis import Attention, cli, save_run
from vistvis.attention import arithmetic
from vistvis.store import folders
from vistvis.store.background import Background


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Forks can't go on with more; afterwards as many as other threads have, or these round
    otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some(attack: Attack, folder: Path, share: float, count: int = 1000) -> Outcome:
    """At most `count` cases of a small share of an attack."""
    folder.mkdir(exist_ok=True)
    return carry_out(attack.__name__, itertools.islice(attack(Setting(folder, share=share)), count))


PARTS = {
    exact.attention: (0.01, 200),
    exact.orders: (0.02, 30),
    flips.flips: (0.002, 100),
    forged.forged: (0.01, 25),
    kills.kills: (0.01, 1),
    interrupts.interrupts: (0.003, 8),
    commands.commands: (0.005, 30),
    writers.writers: (0.02, 3),
    disks.disks: (0.01, 4),
}


@pytest.mark.parametrize("attack", PARTS, ids=lambda attack: attack.__name__)
def test_a_part_of(attack: Attack, tmp_path: Path) -> None:
    outcome = some(attack, tmp_path / "a", *PARTS[attack])
    assert outcome.survived == outcome.tried > 0, outcome.failures[:3]


def test_a_case_that_fails_or_takes_too_long_is_counted_and_named() -> None:
    def fail() -> None:
        raise ValueError("bad\x1b")

    def hang() -> None:
        while True:
            pass

    cases = [Case("1", fail), Case("2", hang), Case("3", lambda: None, count=4)]
    outcome = carry_out("made", iter(cases), limit=0.1)
    assert (outcome.tried, outcome.survived) == (6, 4)
    assert outcome.failures[0].startswith("1: ValueError: bad\\x1b [test_attack.py:")
    assert outcome.failures[1].startswith("2: Slow")
    assert carry_out("made", iter(cases), only="3").tried == 4


# -- breaks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def old_columns(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A column through the log-sum-exp, which loses log N beside a far mask."""

    def by_log_sum_exp(logits: torch.Tensor, maximum_and_sum: torch.Tensor) -> torch.Tensor:
        highest, total = maximum_and_sum.unsqueeze(-1).unbind()
        return (logits - (highest + total.log())).exp()

    patch.setattr(arithmetic, "softmax_of_part", by_log_sum_exp)
    yield


@contextlib.contextmanager
def no_causal(patch: pytest.MonkeyPatch) -> Iterator[None]:
    made = Attention.__init__

    def forgetful(self: Attention, *, causal: bool = False, **named: Any) -> None:
        made(self, **named)

    patch.setattr(Attention, "__init__", forgetful)
    yield


@contextlib.contextmanager
def torn_writes(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files that are written in place, in two steps."""

    def write(self: Any, name: str, pieces: Any) -> tuple[int, int]:
        data = b"".join(pieces)
        path = self.local(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data[:100])
            file.flush()
            time.sleep(0.02 if "manifest" in name else 0)
            file.write(data[100:])
        return len(data), zlib.crc32(data)

    patch.setattr(folders.LocalFolder, "write", write)
    yield


@contextlib.contextmanager
def greedy_writer(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A writer that removes what it finds in the folder and did not make."""
    write = folders.LocalFolder.write

    def removing(self: Any, name: str, pieces: Any) -> tuple[int, int]:
        for path in self.folder.rglob("*.part"):
            path.unlink()
        return write(self, name, pieces)

    patch.setattr(folders.LocalFolder, "write", removing)
    yield


@contextlib.contextmanager
def no_checksums(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Manifests and records that are read without theirs."""
    real = zlib.crc32
    patch.setattr(zlib, "crc32", lambda data, value=0: 0 * real(data, value))
    yield


@contextlib.contextmanager
def one_name(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """All writers give their files the same names, where nothing can be locked."""
    patch.setattr("vistvis.store.writer.new_writer", lambda: "0" * 16)
    yield


@contextlib.contextmanager
def kept_lock(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A writer that is interrupted lets nothing go."""
    patch.setattr(Background, "end", lambda self: None)
    yield


@contextlib.contextmanager
def no_guard(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Symbolic links may lead out of the folder."""
    patch.setattr(folders, "inside", lambda base, *names: Path(base, *names))
    yield


@contextlib.contextmanager
def raw_errors(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was wrong is printed as it came."""
    patch.setattr(cli, "harmless", str)
    patch.setattr(cli, "_text", lambda error: f"\x1b[1m{error}")
    yield


@contextlib.contextmanager
def silent_refusals(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the disk refuses is not told as a StoreError."""

    @contextlib.contextmanager
    def through(action: str) -> Iterator[None]:
        yield

    patch.setattr("vistvis.store.writer.reported", through)
    yield


BREAKS = [
    pytest.param(*one, id=f"{one[0].__name__} {one[1].__name__}", marks=marks)
    for marks, *one in (
        ((), exact.attention, old_columns, 0.03),
        ((), exact.attention, no_causal, 0.005),
        ((), flips.flips, no_checksums, 0.002),
        ((), forged.forged, no_guard, 1.0),
        ((), commands.commands, raw_errors, 0.005),
        (pytest.mark.slow, kills.kills, torn_writes, 0.1),
        (pytest.mark.slow, kills.kills, greedy_writer, 0.1),
        (pytest.mark.slow, writers.writers, one_name, 0.3),
        (pytest.mark.slow, interrupts.interrupts, kept_lock, 0.01),
        (pytest.mark.slow, disks.disks, silent_refusals, 0.02),
    )
]


@pytest.mark.parametrize(("attack", "broken", "share"), BREAKS)
def test_what_is_broken_is_seen(
    attack: Attack, broken: Any, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = attack(Setting(tmp_path, share=share))
    if attack is writers.writers:
        cases = (case for case in cases if "memory" in case.name)
    if attack is forged.forged:
        cases = (case for case in cases if "link" in case.name)
    with broken(monkeypatch):
        for case in cases:
            if carry_out("broken", iter([case])).failures:
                break
        else:
            pytest.fail(f"{attack.__name__} did not see {broken.__name__}")
    cases.close()


def test_a_pass_of_two_seeds_is_seen(tmp_path: Path) -> None:
    mixed = {**contents(1), "site_2": contents(2)["site_2"]}
    with pytest.raises(AssertionError, match="several passes"):
        sound(save_run(mixed, tmp_path / "run"))
