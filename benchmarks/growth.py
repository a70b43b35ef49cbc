"""How cost grows with frames: what is held, one row, and statistics over all rows.

One global block over 1, 2, 4 … 32 frames of 261 tokens (16×16 patches and 5 special), 16 heads of
width 64, float32, CPU time of one thread. The exponent is the slope of log cost over log tokens,
least squares from 4 frames on (below, a call's fixed cost counts).

    python benchmarks/growth.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import torch
from _measure import (
    cpu_times,
    in_fresh_process,
    megabytes,
    peak_bytes,
    reset_peak,
    resident_bytes,
    table,
    write_results,
)

from vistvis import Attention, SiteInfo, TokenLayout, summarize

FRAMES, TOKENS, HEADS, WIDTH, FITTED = (1, 2, 4, 8, 16, 32), 261, 16, 64, 4
EXPECTED = {"held": 1, "one row": 1, "summarize": 2}
VGGT = ("camera", *["register"] * 4)


def make(frames: int) -> Attention:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1, HEADS, frames * TOKENS, WIDTH)
    layout = TokenLayout(frames, (16, 16), VGGT)
    site = SiteInfo("block", "global", query_layout=layout, key_layout=layout)
    return Attention(query=2 * torch.randn(shape), key=torch.randn(shape), site=site)


def memory(frames: int) -> None:
    """Peak above what is held."""
    one = make(frames)
    summarize(make(1))  # what is set up once (the matrix library) comes before the count
    reset_peak()
    before = resident_bytes()
    summarize(one, progress=False)
    print(json.dumps({"extra": peak_bytes() - before}))


def main(rounds: int) -> None:
    costs: dict[str, list[float]] = {name: [] for name in EXPECTED}
    lines = []
    for frames in FRAMES:
        one = make(frames)
        rows = cpu_times({"": lambda one=one: one.rows(77)}, rounds=20 * rounds, warmup=3)[""]
        every = cpu_times(
            {"": lambda one=one: summarize(one, progress=False)}, rounds=rounds, warmup=0
        )[""]
        extra = in_fresh_process(__file__, "--memory", str(frames))["extra"]
        # Measured on what is held afterwards, with whatever a call has kept.
        for name, cost in zip(EXPECTED, (one.nbytes, rows.minimum, every.minimum), strict=True):
            costs[name].append(cost)
        lines.append(
            [
                frames,
                f"{frames * TOKENS:,}",
                megabytes(one.nbytes),
                f"{rows.minimum:.2f} ms ({rows.median:.2f})",
                f"{every.minimum:,.0f} ms ({every.median:,.0f})",
                megabytes(extra),
                megabytes(4 * HEADS * (frames * TOKENS) ** 2),
            ]
        )
    table(
        f"growth with frames, {HEADS} heads, d = {WIDTH}, minimum (median) of {rounds} rounds",
        ["frames", "tokens", "held", "one row", "summarize", "its memory", "matrix"],
        lines,
    )
    chosen = [number for number, frames in enumerate(FRAMES) if frames >= FITTED]
    tokens = np.log([FRAMES[number] for number in chosen])
    fits = []
    for name, expected in EXPECTED.items():
        slope = float(np.polyfit(tokens, np.log([costs[name][n] for n in chosen]), 1)[0])
        fits.append([name, f"{slope:.2f}", expected])
    table(
        f"exponents, fitted from {FITTED} frames on",
        ["what", "tokens to the power of", "expected, at most"],
        fits,
    )
    write_results(__file__)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.exit(memory(arguments.memory) if arguments.memory else main(arguments.rounds))
