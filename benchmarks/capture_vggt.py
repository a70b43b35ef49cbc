"""What capturing every block adds to a forward pass of VGGT: time and memory.

3 frames of 518×392 (1,041 tokens each), float32; a small model, and one of the shape of VGGT-1B
with 2 + 2 blocks.
"""

from __future__ import annotations

import json
import statistics
import sys

import torch
from _measure import (
    cpu_milliseconds,
    in_fresh_process,
    megabytes,
    peak_bytes,
    table,
    verdict,
)

from vggt_adapter import VGGT, AttentionExtractor

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


def overhead(label: str) -> tuple[float, float]:
    model, images = make(label)
    extractor = AttentionExtractor(model)

    @torch.no_grad()
    def plain() -> None:
        model(images)

    @torch.no_grad()
    def captured() -> None:
        with extractor:
            extractor.register_hooks()
            model(images)

    rounds = 61 if "small" in label else 21
    times = cpu_milliseconds({"plain": plain, "captured": captured}, rounds=rounds)
    return times["plain"], times["captured"]


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


def extra_memory(label: str) -> tuple[float, float]:
    """Bytes of Q and K, and the extra peak over them; each process starts fresh, three times."""
    plain, captured = (
        statistics.median(
            in_fresh_process(__file__, "memory", label, how)["peak"] for _ in range(3)
        )
        for how in ("plain", "captured")
    )
    kept = in_fresh_process(__file__, "memory", label, "captured")["kept"]
    return kept, (captured - plain) / kept


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        memory(*sys.argv[2:])
        sys.exit()
    rows = []
    for label in MODELS:
        plain, captured = overhead(label)
        kept, share = extra_memory(label)
        ratio = captured / plain
        rows.append(
            [
                label,
                f"{plain:,.0f} ms",
                f"{ratio:.4f}",
                verdict(ratio, 1.03),
                megabytes(kept),
                f"{share:.3f}",
                verdict(share, 1.05),
            ]
        )
    table(
        "capturing all blocks, 3 frames of 518×392, CPU time of one thread",
        ["model", "plain forward", "ratio", "bar", "Q and K", "extra memory / Q and K", "bar"],
        rows,
    )
