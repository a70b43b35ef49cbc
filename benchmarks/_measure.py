"""How the benchmarks measure: times in alternating order, peak memory by process.

Wall time on a busy machine cannot resolve a few percent. CPU time of one thread can, if the things
compared take turns, so that a slow minute slows them alike. What uses several threads is timed by
the wall, and its minima compared, on an idle machine.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass
class Timing:
    """What every round of one function took."""

    milliseconds: list[float]
    new_pages: list[int]

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def minimum(self) -> float:
        """Milliseconds."""
        return min(self.milliseconds)

    @property
    def median_new_pages(self) -> float:
        """Pages of memory that the system had to give (minor page faults)."""
        return statistics.median(self.new_pages)

    def over(self, base: Timing) -> float:
        """The median of each round's ratio to `base`, which ran in the same round.

        What a machine gives changes from minute to minute: over 50 rounds of one forward pass
        beside itself, the ratio of the medians came out 9 % off, the median of the ratios 1 %.
        """
        pairs = zip(self.milliseconds, base.milliseconds, strict=True)
        return statistics.median(mine / other for mine, other in pairs)


def cpu_times(
    functions: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """CPU time of each function; the order turns round every round."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    return _take_turns({name: partial(_timed, call) for name, call in functions.items()}, rounds)


def wall_times(
    functions: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """As `cpu_times`, by the wall: what several threads take together."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    turns = {name: partial(_timed, call, time.perf_counter_ns) for name, call in functions.items()}
    return _take_turns(turns, rounds)


def cpu_times_of_processes(
    script: str, arguments: dict[str, Sequence[str]], *, rounds: int
) -> dict[str, Timing]:
    """As `cpu_times`, of what `script` serves (see `serve`) when it is called with arguments.

    Each has a process of its own and waits while another has its turn. In one process they would
    pay for each other's memory: what one keeps stops the allocator from giving the top of the heap
    back, and so spares the other pages that it would have to take anew by itself.
    """
    processes = []
    with contextlib.ExitStack() as stack:

        def start(given: Sequence[str]) -> Callable[[], tuple[float, int]]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, script, *given],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            processes.append(process)
            assert process.stdin is not None
            assert process.stdout is not None
            asked, answers = process.stdin, process.stdout

            def turn() -> tuple[float, int]:
                print(file=asked, flush=True)
                milliseconds, pages = json.loads(answers.readline())
                return milliseconds, pages

            turn()  # the first one warms up
            return turn

        times = _take_turns({name: start(given) for name, given in arguments.items()}, rounds)
    failed = [process.args for process in processes if process.returncode]
    if failed:
        raise RuntimeError(f"failed at their end: {failed}")
    return times


def serve(function: Callable[[], Any]) -> None:
    """Time one call for each line of the standard input, until it ends."""
    for _ in sys.stdin:
        print(json.dumps(_timed(function)), flush=True)


def _take_turns(
    turns: dict[str, Callable[[], tuple[float, int]]], rounds: int
) -> dict[str, Timing]:
    times = {name: Timing([], []) for name in turns}
    names = list(turns)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            milliseconds, pages = turns[name]()
            times[name].milliseconds.append(milliseconds)
            times[name].new_pages.append(pages)
    return times


def _timed(
    function: Callable[[], Any], clock: Callable[[], int] = time.process_time_ns
) -> tuple[float, int]:
    pages, start = _minor_faults(), clock()
    function()
    return (clock() - start) / 1e6, _minor_faults() - pages


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def in_fresh_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run `script arguments` by itself and read the JSON of its last line of output.

    Blocks of a megabyte and more are mapped, and so given back when they are freed. By default
    glibc keeps freed blocks of up to 32 MB in the heap wherever something behind them is in use:
    peaks of the same plain forward pass then differ by 100 MB from run to run.
    """
    result = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def extra_peak(script: str, name: str, ours: str, *, processes: int = 3) -> tuple[float, int]:
    """How much higher the peak of `script memory name ours` is than with "plain", and what it kept.

    In bytes; `script` prints both as JSON, `peak` and `kept`. Medians over fresh processes.
    """
    runs = {
        how: [in_fresh_process(script, "memory", name, how) for _ in range(processes)]
        for how in ("plain", ours)
    }
    plain, peak = (statistics.median(run["peak"] for run in found) for found in runs.values())
    return peak - plain, runs[ours][0]["kept"]


def peak_bytes() -> int:
    """The greatest resident size this process has had, in bytes (Linux)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The resident size of this process now, in bytes (Linux)."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Let `peak_bytes` count from now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MB"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as Markdown, and keep it for `write_results`."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [f"### {title[0].upper()}{title[1:]}", ""]
    for number, row in enumerate(cells):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            lines.append(f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    _TABLES.append("\n".join(lines))
    print(f"\n{_TABLES[-1]}\n", flush=True)


def write_results(script: str, notes: str = "") -> None:
    """Put the tables that were printed into RESULTS.md, in place of what it had of this script."""
    import torch

    path = Path(__file__).with_name("RESULTS.md")
    name = Path(script).name
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    head = (
        f"{datetime.date.today()}, {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"threads, Python {platform.python_version()}, torch {torch.__version__}"
    )
    section = "\n\n".join(part for part in (f"## {name}", head, notes, *_TABLES) if part)
    known = path.read_text(encoding="utf-8") if path.exists() else _RESULTS
    start, *sections = known.rstrip().split("\n\n## ")
    others = {part.split("\n")[0]: f"## {part}" for part in sections}
    others[name] = section
    text = "\n\n".join([start, *(others[key] for key in sorted(others))])
    path.write_text(f"{text}\n", encoding="utf-8")


_TABLES: list[str] = []
_RESULTS = """# Results

Written by the scripts in this folder, each its own section when it is run. Times are wall times;
where both are given, minimum / median of all rounds, and ratios are of minima, in one run."""


def verdict(value: float, limit: float, unit: str = "") -> str:
    """Whether a measured value keeps to its bar."""
    return f"≤ {limit:g}{unit}: {'met' if value <= limit else 'MISSED'}"
