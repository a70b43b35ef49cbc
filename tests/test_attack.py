"""A few cases of every attack, and that each attack sees what is broken on purpose."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attack import commands, disks, exact, flips, forged, interrupts, kills, writers
from attack.case import Attack, Case, Outcome, Setting, carry_out
from attack.runs import contents

from vistvis import Attention, cli
from vistvis.attention import arithmetic
from vistvis.store import folders


def some(attack: Attack, folder: Path, share: float, count: int = 1000) -> Outcome:
    """At most `count` cases of a small share of an attack."""
    torch.set_num_threads(1)  # forks can't go on with more
    folder.mkdir(exist_ok=True)
    return carry_out(attack.__name__, itertools.islice(attack(Setting(folder, share=share)), count))


PARTS = {
    exact.attention: (0.01, 200),
    exact.orders: (0.02, 30),
    flips.flips: (0.002, 200),
    forged.forged: (0.01, 25),
    kills.kills: (0.02, 3),
    interrupts.interrupts: (0.003, 20),
    interrupts.signals: (0.01, 5),
    commands.commands: (0.005, 40),
    writers.writers: (0.04, 8),
    disks.disks: (0.02, 20),
}


@pytest.mark.parametrize("attack", PARTS, ids=lambda one: one.__name__)
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
        import time
        import zlib

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
    import zlib

    real = zlib.crc32
    patch.setattr(zlib, "crc32", lambda data, value=0: 0 * real(data, value))
    yield


@contextlib.contextmanager
def no_guard(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Symbolic links may lead out of the folder."""
    patch.setattr(folders, "inside", lambda base, *names: Path(base, *names))
    yield


@contextlib.contextmanager
def raw_errors(patch: pytest.MonkeyPatch) -> Iterator[None]:
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
    (exact.attention, old_columns, 0.03),
    (exact.attention, no_causal, 0.005),
    (flips.flips, no_checksums, 0.002),
    (forged.forged, no_guard, 1.0),
    (kills.kills, torn_writes, 0.1),
    (kills.kills, greedy_writer, 0.1),
    (commands.commands, raw_errors, 0.005),
    (disks.disks, silent_refusals, 0.02),
]


@pytest.mark.parametrize(("attack", "broken", "share"), BREAKS, ids=lambda one: str(one)[:40])
def test_what_is_broken_is_seen(
    attack: Attack, broken: Any, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = attack(Setting(tmp_path, share=share))
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
    from attack.runs import sound

    from vistvis import save_run

    mixed = {**contents(1), "site_2": contents(2)["site_2"]}
    with pytest.raises(AssertionError, match="several passes"):
        sound(save_run(mixed, tmp_path / "run"))
    assert os.path.exists(tmp_path / "run")
