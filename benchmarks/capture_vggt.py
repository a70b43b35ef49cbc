"""What capturing every block adds to a forward pass of VGGT: time and memory.

3 frames of 518×392 (1,041 tokens each), float32; a small model, and one of the shape of VGGT-1B
with 2 + 2 blocks. "Hooks stay on" is a loop over pictures; "hooks for one pass" also registers and
clears them, and frees what the pass before kept at once, so that its Q and K mostly lie in memory
that the system has to give anew. That is its work, page by page, and is counted. "Plain again" is
the same forward in another process: how far two equal things come out apart. "Every site" and
"discover" are `vistvis.capture(model)`, which accounts for every kernel call, the latter with all
code outside sites followed.
"""

from __future__ import annotations

import json
import mmap
import sys

import torch
from _measure import (
    cpu_times_of_processes,
    extra_peak,
    megabytes,
    peak_bytes,
    serve,
    table,
    verdict,
)

import vistvis
from vggt_adapter import VGGT, AttentionExtractor

HOW = ("plain", "plain again", "hooks stay on", "hooks for one pass", "every site", "discover")
MODELS = {
    "small (128 wide, 4 + 4 blocks, 4 heads)": {"embed_dim": 128, "depth": 4, "num_heads": 4},
    "1B-shaped (1024 wide, 2 + 2 blocks, 16 heads)": {
        "embed_dim": 1024,
        "depth": 2,
        "num_heads": 16,
    },
}


def make(label: str) -> tuple[VGGT, torch.Tensor]:
    torch.manual_seed(0)
    model = VGGT.from_config(patch_embed="conv", img_size=518, patch_size=14, **MODELS[label])
    return model.eval(), torch.rand(1, 3, 3, 392, 518)


@torch.no_grad()
def run_passes(label: str, how: str) -> None:
    """Serve forward passes: plain, watched all the time, or with hooks put on for each."""
    model, images = make(label)
    if how in ("every site", "discover"):
        captured = vistvis.capture(model, discover=how == "discover")
        serve(lambda: model(images))
        assert len(captured) == 2 * model.config.depth
        return
    extractor = AttentionExtractor(model)
    if how == "hooks stay on":
        extractor.register_hooks()

    def one_pass() -> None:
        with extractor:
            extractor.register_hooks()
            model(images)

    serve(one_pass if how == "hooks for one pass" else lambda: model(images))
    if how.startswith("hooks"):
        assert sum(1 for _ in extractor.captured.values()) == 2 * model.config.depth


@torch.no_grad()
def memory(label: str, how: str) -> None:
    """Peak of a process that runs two forward passes, and the bytes of Q and K it keeps."""
    model, images = make(label)
    extractor = AttentionExtractor(model)
    if how == "captured":
        extractor.register_hooks()
    for _ in range(2):
        model(images)
    kept = sum(a.nbytes for a in extractor.captured.values()) if how == "captured" else 0
    print(json.dumps({"peak": peak_bytes(), "kept": kept}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        measure, label, how = sys.argv[1:]
        {"passes": run_passes, "memory": memory}[measure](label, how)
        sys.exit()
    time_rows, memory_rows = [], []
    for label in MODELS:
        commands = {how: ("passes", label, how) for how in HOW}
        rounds = 41 if "small" in label else 15
        times = cpu_times_of_processes(__file__, commands, rounds=rounds)
        for how, timing in times.items():
            ratio = timing.over(times["plain"])
            bar = verdict(ratio, 1.03) if how.startswith(("hooks", "every")) else ""
            new = megabytes(timing.median_new_pages * mmap.PAGESIZE)
            row = [label, how, f"{timing.median:,.0f} ms", f"{ratio:.4f}", bar, new]
            time_rows.append(row)
        extra, kept = extra_peak(__file__, label, "captured")
        share = extra / kept
        memory_rows.append([label, megabytes(kept), f"{share:.3f}", verdict(share, 1.05)])
    table(
        "capturing all blocks, 3 frames of 518×392, CPU time of one thread",
        ["model", "forward", "time", "ratio", "bar", "memory taken anew"],
        time_rows,
    )
    table(
        "memory of capturing all blocks",
        ["model", "Q and K", "extra peak / Q and K", "bar"],
        memory_rows,
    )
