"""Runs on disk: queries and keys against dense weights, one stored row, storing as a model runs."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import in_fresh_process, megabytes, table, verdict

from vggt_adapter import VGGT
from vistvis import Attention, RunWriter, capture, open_run, save_run

HEADS, WIDTH = 16, 64
SIZES = (1370, 4122, 10_992)  # one picture of 518×518; three and eight frames of VGGT


def made(tokens: int, dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    shape = (1, HEADS, tokens, WIDTH)
    return Attention(query=torch.randn(shape).to(dtype), key=torch.randn(shape).to(dtype))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -- bytes and seconds ---------------------------------------------------------------------------


def dense_half(attention: Attention) -> torch.Tensor:
    """All weights in float16, computed some rows at a time, as a careful dense store would."""
    out = torch.empty(attention.shape, dtype=torch.float16)
    for start in range(0, attention.shape[2], 128):
        part = slice(start, start + 128)
        out[:, :, part] = attention.rows(part)
    return out


def against_dense(base: Path) -> None:
    rows = []
    for tokens in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            attention, run = made(tokens, dtype), base / "run"
            times = []
            for _ in range(3):
                shutil.rmtree(run, ignore_errors=True)
                times.append(seconds(lambda a=attention, r=run: save_run({"site": a}, r)))
            name = f"Q and K, {str(dtype).removeprefix('torch.')}"
            rows.append([tokens, name, folder_bytes(run), statistics.median(times), 0.0])
        attention, file = made(tokens), base / "dense.pt"
        start = time.perf_counter()
        weights = dense_half(attention)
        computing = time.perf_counter() - start
        writing = seconds(lambda w=weights, f=file: torch.save(w, f))
        rows.append([tokens, "dense, float16", file.stat().st_size, writing, computing])
        del weights
        file.unlink()
    dense = {row[0]: row for row in rows if row[1].startswith("dense")}
    table(
        f"storing one site of {HEADS} heads (Q and K: flushed to the disk, with checksum)",
        ["N", "what", "bytes", "write", "compute", "smaller", "sooner"],
        [
            [
                f"{tokens:,}",
                name,
                megabytes(size),
                f"{write:.3f} s",
                f"{compute:.2f} s" if compute else "",
                f"{dense[tokens][2] / size:.1f} ×",
                f"{(dense[tokens][3] + dense[tokens][4]) / (write + compute):.0f} ×",
            ]
            for tokens, name, size, write, compute in rows
        ],
    )


# -- reading -------------------------------------------------------------------------------------


def one_row(run: Path) -> None:
    opened = open_run(run)
    opening = statistics.median(seconds(lambda: open_run(run)) for _ in range(21))
    first = seconds(lambda: opened["site"].rows(77))
    wall, cpu = [], []
    for number in range(101):
        start, used = time.perf_counter(), time.process_time()
        opened["site"].rows(100 * number)
        wall.append(1000 * (time.perf_counter() - start))
        cpu.append(1000 * (time.process_time() - used))
    memory = made(SIZES[-1])
    live = statistics.median(
        1000 * seconds(lambda q=q: memory.rows(q)) for q in range(0, 10_000, 100)
    )
    table(
        f"one stored row, all {HEADS} heads, N = {SIZES[-1]:,}, float32, file cached, one thread",
        ["what", "median", "bar"],
        [
            ["open_run", f"{1000 * opening:.2f} ms", ""],
            ["the first row: checksum of the file, and the row", f"{1000 * first:.1f} ms", ""],
            [
                "a row after that",
                f"{statistics.median(cpu):.1f} ms of CPU ({statistics.median(wall):.1f} ms wall)",
                verdict(statistics.median(cpu), 30) + " ms",
            ],
            ["the same from memory", f"{live:.1f} ms", ""],
        ],
    )


def reading_memory(run: str) -> None:
    """Memory of this process that one row of a stored run costs, in pages that are its own."""
    opened = open_run(run)
    opened["site"].rows(slice(0, 1), heads=[0])  # the libraries
    before = own_bytes()
    opened = open_run(run)
    opened["site"].rows(77)
    print(json.dumps({"own": own_bytes() - before, "held": opened["site"].nbytes}))


def own_bytes() -> int:
    with open("/proc/self/smaps_rollup") as file:
        line = next(line for line in file if line.startswith("Anonymous"))
    return int(line.split()[1]) * 1024


# -- writing while a model runs ------------------------------------------------------------------


def vggt() -> tuple[VGGT, torch.Tensor]:
    """The shape of VGGT-1B with 2 + 2 blocks, and without its patch embedding of 24 blocks more,
    which would only make the forward pass longer."""
    torch.manual_seed(0)
    model = VGGT.from_config(
        patch_embed="conv", img_size=518, patch_size=14, embed_dim=1024, depth=2, num_heads=16
    )
    return model.eval(), torch.rand(1, 3, 3, 392, 518)


@torch.no_grad()
def while_running(base: Path, threads: int) -> list[object]:
    torch.set_num_threads(threads)
    model, images = vggt()
    number = 0

    def plain() -> None:
        model(images)

    def stored() -> None:
        nonlocal number
        number += 1
        with (
            RunWriter(base / f"run{number}", images=images) as writer,
            capture(model, "**blocks.*.attn", sink=writer),
        ):
            model(images)

    plain(), stored()
    walls: dict[str, list[float]] = {"plain": [], "stored": []}
    cpus: dict[str, list[float]] = {"plain": [], "stored": []}
    for turn in range(5):
        pair = [("plain", plain), ("stored", stored)]
        for name, function in pair if turn % 2 == 0 else reversed(pair):
            start, used = time.perf_counter(), time.process_time()
            function()
            walls[name].append(time.perf_counter() - start)
            cpus[name].append(time.process_time() - used)
    run = open_run(base / "run1")
    assert len(run) == 4
    # All of the writing by itself, beside nothing: no more than this can be added.
    sites = {name: run[name] for name in run}
    alone = [
        seconds(lambda n=n: save_run(sites, base / f"alone{n}", images=images)) for n in (1, 2)
    ]
    size = folder_bytes(base / "run1")
    for path in base.glob("[ra]*[0-9]"):
        shutil.rmtree(path)
    wall = min(walls["stored"]) / min(walls["plain"])
    cpu = statistics.median(cpus["stored"]) / statistics.median(cpus["plain"])
    bound = 1 + min(alone) / min(walls["plain"])
    return [
        threads,
        f"{min(walls['plain']):.2f} s",
        f"{min(walls['stored']):.2f} s",
        f"{wall:.3f}, {verdict(wall, 1.10)}",
        f"{cpu:.3f}, {verdict(cpu, 1.10)}",
        f"{min(alone):.2f} s",
        f"{bound:.3f}, {verdict(bound, 1.10)}",
        megabytes(size),
    ]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        torch.set_num_threads(1)
        reading_memory(sys.argv[2])
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        threads = torch.get_num_threads()
        against_dense(base)
        torch.set_num_threads(1)
        save_run({"site": made(SIZES[-1])}, base / "row")
        one_row(base / "row")
        memory = in_fresh_process(__file__, "memory", str(base / "row"))
        table(
            "memory of one row from a stored site",
            ["Q and K of the site", "of its own the process took"],
            [[megabytes(memory["held"]), megabytes(memory["own"])]],
        )
        table(
            "storing all blocks while a VGGT-1B-shaped model runs (2 + 2 blocks, 3 frames of "
            "518×392, float32), images and close included; alternating passes, the fastest of 5 by "
            "the clock (a shared machine can't resolve it), the median of CPU time",
            [
                *("threads", "plain", "stored", "ratio", "ratio of CPU time"),
                *("writing alone", "ratio if none of it overlaps", "written"),
            ],
            [while_running(base, count) for count in sorted({1, threads})],
        )
