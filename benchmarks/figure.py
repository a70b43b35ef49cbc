"""The figure of one token over eight frames: from Q and K, and by the dense matrix for comparison.

Each way runs in a process of its own; its peak counts from after the imports.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from _measure import (
    in_fresh_process,
    megabytes,
    peak_bytes,
    reset_peak,
    resident_bytes,
    table,
    verdict,
)

from vistvis import Attention, SiteInfo, TokenLayout

FRAMES, GRID, HEADS, WIDTH = 8, (37, 37), 16, 64
LAYOUT = TokenLayout(FRAMES, GRID, ("camera", *("register",) * 4))
TOKEN = LAYOUT.index(frame=2, row=20, col=11)


def measure(way: str, heads: int) -> None:
    # What is imported and set up once (fonts, the matrix library) comes before the count.
    from vggt_adapter.figures import visualize_attention_on_image

    small = Attention(query=torch.randn(1, 2, 9, WIDTH), key=torch.randn(1, 2, 9, WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        visualize_attention_on_image(small, torch.zeros(1, 3, 28, 28), 6, "mean", save_path=path)

        reset_peak()
        before, start = resident_bytes(), time.perf_counter()
        torch.manual_seed(0)
        query, key = (torch.randn(1, heads, LAYOUT.num_tokens, WIDTH) for _ in range(2))
        site = SiteInfo("global_block_23", "global", 23, "", LAYOUT, LAYOUT)
        attention = Attention(query=query, key=key, site=site)
        images = torch.rand(FRAMES, 3, *LAYOUT.image_size)
        given = attention.dense(max_bytes=2**40) if way == "dense" else attention
        visualize_attention_on_image(
            given, images, TOKEN, "mean", attention_type="global", save_path=path
        )
    measured = {"extra": peak_bytes() - before, "seconds": time.perf_counter() - start}
    print(json.dumps(measured | {"held": query.nbytes + key.nbytes}))


def dense_heads() -> int:
    """As many heads as the dense matrix of fits in free memory, twice over."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    one = LAYOUT.num_tokens**2 * 4
    return max(1, min(HEADS, int(free / one / 1.5)))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        lazy = in_fresh_process(__file__, "lazy", str(HEADS))
        heads = dense_heads()
        dense = in_fresh_process(__file__, "dense", str(heads))
        over = (lazy["extra"] - lazy["held"]) / 2**20
        table(
            f"one token over {FRAMES} frames of 518×518, N = {LAYOUT.num_tokens:,}, "
            "mean of all heads, float32, drawn and saved",
            ["from", "heads", "Q and K", "peak above imports", "seconds", "bar over Q and K"],
            [
                [
                    *("Q and K", HEADS, megabytes(lazy["held"]), megabytes(lazy["extra"])),
                    *(f"{lazy['seconds']:.1f}", verdict(over, 100, " MB")),
                ],
                [
                    *("dense weights", heads, megabytes(dense["held"])),
                    *(megabytes(dense["extra"]), f"{dense['seconds']:.1f}", ""),
                ],
            ],
        )
