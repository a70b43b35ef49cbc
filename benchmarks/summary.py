"""What statistics of whole blocks cost, beside the model's own kernel on the same Q, K and V.

16 heads of width 64, float32, 2 threads: one picture of 518×518 in a ViT (N = 1370), and global
blocks of VGGT over 3 and 8 frames (4122 and 10,992).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import (
    in_fresh_process,
    megabytes,
    peak_bytes,
    reset_peak,
    resident_bytes,
    table,
    verdict,
    wall_times,
    write_results,
)

from vistvis import Attention, SiteInfo, TokenLayout, summarize

HEADS, WIDTH = 16, 64
VGGT = ("camera", *["register"] * 4)
LAYOUTS = {
    1370: TokenLayout(1, (37, 37), ("cls",)),
    4122: TokenLayout(3, (37, 37), VGGT),
    10_992: TokenLayout(8, (37, 37), VGGT),
}
ROUNDS = {1370: 15, 4122: 7, 10_992: 3}
SOME = ("entropy", "received", "masses")


def make(tokens: int, sharpness: float = 1.0) -> tuple[Attention, torch.Tensor]:
    torch.manual_seed(0)
    layout = LAYOUTS[tokens]
    assert layout.num_tokens == tokens
    query, key, value = torch.randn(3, 1, HEADS, tokens, WIDTH).unbind()
    site = SiteInfo("block", query_layout=layout, key_layout=layout)
    return Attention(query=sharpness * query, key=key, site=site), value


def dense(a: Attention) -> Any:
    """The way of most scripts: the whole matrix, then its statistics one by one."""
    layout = a.key_layout
    assert layout is not None
    weights = torch.softmax(a.query @ a.key.mT * a.scale, -1)
    frames = torch.arange(layout.num_tokens) // layout.tokens_per_frame
    mass = weights @ F.one_hot(frames).float()
    return torch.special.entr(weights).sum(-1), weights.sum(2), mass, weights.max(-1)


def ways(tokens: int) -> dict[str, Callable[[], Any]]:
    a, value = make(tokens)
    large, _ = make(tokens, 8.0)  # logits up to about 50, whose maxima have to be taken off
    assert a.query is not None
    assert a.key is not None
    query, key = a.query, a.key
    found: dict[str, Callable[[], Any]] = {
        "kernel": lambda: F.scaled_dot_product_attention(query, key, value),
        "some": lambda: summarize(a, of=SOME, progress=False),
        "all": lambda: summarize(a, progress=False),
        "some, large": lambda: summarize(large, of=SOME, progress=False),
        "all, large": lambda: summarize(large, progress=False),
    }
    if tokens < 10_000:  # 7.7 GB a matrix, of which the dense way holds two
        found["dense"] = lambda: dense(a)
    return found


def memory(tokens: int, way: str) -> None:
    call = ways(tokens)[way]
    torch.set_num_threads(2)
    ways(1370)[way]()  # what is loaded and allocated once
    reset_peak()
    before = resident_bytes()
    call()
    print(json.dumps({"extra": peak_bytes() - before}))


def main() -> None:
    torch.set_num_threads(2)
    lines = []
    for tokens in LAYOUTS:
        calls = ways(tokens)
        slow = calls.pop("dense", None)
        times = wall_times(calls, rounds=ROUNDS[tokens], warmup=1 + (tokens < 5000))
        if slow:  # by itself: it leaves memory in pieces, which the others would pay for
            times |= wall_times({"dense": slow}, rounds=ROUNDS[tokens])
        base = times["kernel"].minimum
        for way, label, limit in (
            ("kernel", "scaled_dot_product_attention", None),
            ("some", f"summarize, of={SOME}", 1.3),
            ("all", "summarize", 2.0),
            ("some, large", f"summarize, of={SOME}, large logits", 1.3),
            ("all, large", "summarize, large logits", 2.0),
            ("dense", "dense matrix, then the same", None),
        ):
            if way not in times:
                lines.append([f"{tokens:,}", label, "does not fit: 2 × 7.7 GB", "", "", ""])
                continue
            ratio = times[way].minimum / base
            both = f"{times[way].minimum:,.0f} / {times[way].median:,.0f} ms"
            mine = in_fresh_process(__file__, "memory", str(tokens), way)["extra"]
            bar = "" if limit is None else verdict(ratio, limit)
            if limit is not None:
                bar += f"; memory {verdict(mine / 2**20, 256, ' MB')}"
            lines.append([f"{tokens:,}", label, both, f"{ratio:.2f}", megabytes(mine), bar])
    table(
        f"statistics of all rows of one block, {HEADS} heads, d = {WIDTH}, float32",
        ["N", "what", "time, minimum / median", "to the kernel", "extra memory", "bar"],
        lines,
    )
    write_results(__file__)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        memory(int(sys.argv[2]), sys.argv[3])
    else:
        main()
