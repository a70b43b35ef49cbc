"""Rollout of one query through 12 blocks of ViT-S at 1370 tokens, beside the dense routes.

12 blocks, 6 heads of width 64, float32, the same Q and K for all. Dense is what others do: softmax
matrices, their mean over heads, the identity added, and all of it multiplied; or one row handed
through the matrices. Where `fast_vit_rollout` can be imported, its own code gets the same softmax
matrices, without and with its default discarding.

    python benchmarks/rollout.py [--rounds 15] [--threads 2]

Two threads need two idle cores: they are timed by the clock, one by what the CPU took.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator

import torch
from _measure import (
    cpu_times,
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
from torch import Tensor

from vistvis import Attention
from vistvis.analysis import rollout

BLOCKS, HEADS, TOKENS, WIDTH, QUERY, DISCARD = 12, 6, 1370, 64, 0, 0.9


def make() -> list[Attention]:
    torch.manual_seed(0)
    shape = (1, HEADS, TOKENS, WIDTH)
    return [Attention(query=3 * torch.randn(shape), key=torch.randn(shape)) for _ in range(BLOCKS)]


def softmax(stack: list[Attention]) -> Iterator[Tensor]:
    for block in stack:
        yield torch.softmax(block.scale * block.query @ block.key.mT, -1)


def matrices(stack: list[Attention]) -> Iterator[Tensor]:
    for weights in softmax(stack):
        yield (weights.mean(1) + torch.eye(TOKENS)) / 2


def dense_product(stack: list[Attention]) -> Tensor:
    product = torch.eye(TOKENS)[None]
    for matrix in matrices(stack):
        product = matrix @ product
    return product[:, QUERY]


def dense_row(stack: list[Attention]) -> Tensor:
    row = torch.eye(TOKENS)[None, QUERY : QUERY + 1]
    for matrix in matrices(stack[::-1]):
        row = row @ matrix
    return row[:, 0]


def published(stack: list[Attention], discard: float) -> Tensor:
    from fast_vit_rollout.vit_rollout import ViTAttentionRollout

    other = ViTAttentionRollout.__new__(ViTAttentionRollout)  # without a model to hook
    other.head_fusion, other.discard_ratio = "mean", discard
    other.attentions = list(softmax(stack))
    return other._compute_rollout()[:, QUERY]


WAYS: dict[str, Callable[[list[Attention]], Tensor]] = {
    "rollout": lambda stack: rollout(stack, QUERY),
    "dense, matrices multiplied": dense_product,
    "dense, one row handed on": dense_row,
    "rollout, fusion max": lambda stack: rollout(stack, QUERY, fusion="max"),
    f"rollout, discard {DISCARD:g}": lambda stack: rollout(stack, QUERY, discard=DISCARD),
}
# What these measure is something else: nothing to compare their numbers with.
OTHERS = {"rollout, fusion max", f"rollout, discard {DISCARD:g}"}
if importlib.util.find_spec("fast_vit_rollout"):
    WAYS["fast-vit-rollout, discard 0"] = lambda stack: published(stack, 0.0)
    WAYS[f"fast-vit-rollout, discard {DISCARD:g}"] = lambda stack: published(stack, DISCARD)
    OTHERS.add(f"fast-vit-rollout, discard {DISCARD:g}")


def memory(way: str) -> None:
    """Peak above the queries and keys, which all hold."""
    stack = make()
    rollout(stack[:1], QUERY)  # what is set up once (the matrix library) comes before the count
    reset_peak()
    before = resident_bytes()
    WAYS[way](stack)
    print(json.dumps({"extra": peak_bytes() - before}))


def compare(rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    stack = make()
    ours = rollout(stack, QUERY)
    ways = {name: lambda way=way: way(stack) for name, way in WAYS.items()}  # type: ignore[misc]
    times = (cpu_times if threads == 1 else wall_times)(ways, rounds=rounds)
    lines = []
    for name, way in WAYS.items():
        found = way(stack).double()
        same = f"{float((found - ours).abs().max() / ours.abs().max()):.0e}"
        extra = in_fresh_process(__file__, "--memory", name)["extra"]
        ratio = times["rollout"].over(times[name])
        # The bar: twice as fast as what rollout code does.
        bar = verdict(ratio, 0.5) if name.startswith("dense") else ""
        lines.append(
            [
                name,
                f"{times[name].minimum:.0f} ms",
                f"{times[name].median:.0f} ms",
                f"{times['rollout'].minimum / times[name].minimum:.2f}",
                f"{ratio:.2f}",
                bar,
                megabytes(extra),
                "another measure" if name in OTHERS else same,
            ]
        )
    table(
        f"rollout of one query, {BLOCKS} blocks, {HEADS} heads, {TOKENS} tokens, float32, "
        f"{'CPU time of 1 thread' if threads == 1 else f'{threads} threads'}, {rounds} rounds",
        [
            "way",
            "minimum",
            "median",
            "rollout / it, minima",
            "median of rounds",
            "bar",
            "extra memory",
            "off by, of the largest",
        ],
        lines,
    )
    write_results(__file__)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.memory)
    else:
        compare(arguments.rounds, arguments.threads)
