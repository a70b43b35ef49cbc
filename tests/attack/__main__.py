"""`python -m attack [--only NAME …] [--quick]`: each attack in a process of its own; the table."""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from .case import Outcome, Setting, carry_out

ATTACKS = {
    "attention": "exact",
    "orders": "exact",
    "flips": "flips",
    "forged": "forged",
    "kills": "kills",
    "interrupts": "interrupts",
    "captures": "interrupts",
    "signals": "interrupts",
    "commands": "commands",
    "writers": "writers",
    "disks": "disks",
}
"""Each a function of this name in that module."""

TIME_LIMIT = 1200


def carried_out(name: str, setting: Setting, only: str | None = None) -> Outcome:
    """One attack in this process."""
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f".{ATTACKS[name]}", __package__)
    return carry_out(name, getattr(module, name)(setting), only=only)


def in_a_process(name: str, arguments: list[str]) -> Outcome:
    """One attack in a process of its own: what kills that is a failure."""
    command = [sys.executable, "-m", "attack", *arguments, "--one", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIME_LIMIT)
        return Outcome(**json.loads(done.stdout.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        failure = f"not done after {TIME_LIMIT} s"
    except (IndexError, ValueError):
        failure = f"the process ended with {done.returncode}"
    return Outcome(name, 1, 0, time.perf_counter() - start, [failure])


def line(outcome: Outcome) -> str:
    return f"{outcome.attack:<12}{outcome.tried:>9,}{outcome.survived:>10,}{outcome.seconds:>9.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s attack --", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, help="these attacks")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the cases")
    parser.add_argument("--seed", type=int, default=0, help="for other random cases (default 0)")
    parser.add_argument("--case", metavar="NAME", help="one case, as a failure names it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    share = 0.05 if arguments.quick else 1.0
    if arguments.one:
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            setting = Setting(Path(folder).resolve(), arguments.seed, share)
            outcome = carried_out(arguments.one, setting, arguments.case)
        print("\n" + json.dumps(asdict(outcome)))
        return 0
    passed = ["--seed", str(arguments.seed), *(["--quick"] if arguments.quick else [])]
    passed += ["--case", arguments.case] if arguments.case else []
    print(f"{'attack':<12}{'tried':>9}{'survived':>10}{'seconds':>9}", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(2) as pool:
        outcomes = []
        for outcome in pool.map(lambda name: in_a_process(name, passed), arguments.only or ATTACKS):
            outcomes.append(outcome)
            print(line(outcome), flush=True)
            for failure in outcome.failures[:20]:
                print(f"    {failure}", flush=True)
            if len(outcome.failures) > 20:
                print(f"    … and {len(outcome.failures) - 20} more", flush=True)
    whole = all(outcome.tried and outcome.tried == outcome.survived for outcome in outcomes)
    if not whole:
        print(f"one again: --only ATTACK --seed {arguments.seed} --case 'NAME BEFORE THE COLON'")
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
