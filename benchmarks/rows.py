"""What a click costs: rows, columns and the log-sum-exp of one global block over 8 frames.

N = 10,992 tokens (8 frames of 518×518), 16 heads of width 64, float32.
"""

from __future__ import annotations

import json
import sys

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
)

from vistvis import Attention

N, HEADS, WIDTH = 10_992, 16, 64


def make() -> Attention:
    torch.manual_seed(0)
    shape = (1, HEADS, N, WIDTH)
    return Attention(query=torch.randn(shape), key=torch.randn(shape))


def speed() -> None:
    torch.set_num_threads(1)
    attention = make()
    assert attention.query is not None
    assert attention.key is not None
    key, one_key, one_query = attention.key, attention.key[0, 3], attention.query[0, 3, 77]
    attention.log_sum_exp()
    times = cpu_times(
        {
            "product": lambda: one_key @ one_query,
            "sum": lambda: key.sum(),
            "row": lambda: attention.rows(77, batch=0, heads=3),
            "indexed": lambda: attention[0, 3, 77],
            "all": lambda: attention.rows(77),
            "column": lambda: attention.columns(77, batch=0, heads=3),
            "all columns": lambda: attention.columns(77),
        },
        rounds=201,
        warmup=5,
    )

    def line(label: str, name: str, base: str, limit: float) -> list[str]:
        ratio = times[name].over(times[base])
        what = {"product": "K @ q of that head", "sum": "K.sum()"}[base]
        return [label, f"{times[name].median:.3f} ms", what, f"{ratio:.2f}", verdict(ratio, limit)]

    table(
        f"rows and columns, N = {N:,}, {HEADS} heads, d = {WIDTH}, float32, CPU time of one thread",
        ["what", "time", "against", "ratio", "bar"],
        [
            ["K @ q of one head", f"{times['product'].median:.3f} ms", "", "", ""],
            ["K.sum()", f"{times['sum'].median:.3f} ms", "", "", ""],
            line("rows(q, batch=0, heads=3)", "row", "product", 2),
            line("attention[0, 3, q]", "indexed", "product", 2),
            line("rows(q), all heads", "all", "sum", 2),
            line("columns(k, batch=0, heads=3)", "column", "product", 3),
            line("columns(k), all heads", "all columns", "sum", 3),
        ],
    )


def log_sum_exp_memory() -> None:
    attention = make()
    reset_peak()
    before = resident_bytes()
    attention.log_sum_exp()
    print(json.dumps({"extra": peak_bytes() - before}))


if __name__ == "__main__":
    if sys.argv[1:] == ["log-sum-exp"]:
        log_sum_exp_memory()
    else:
        speed()
        extra = in_fresh_process(__file__, "log-sum-exp")["extra"]
        table(
            "log-sum-exp of all rows and heads, the first time",
            ["extra memory", "bar"],
            [[megabytes(extra), verdict(extra / 2**20, 128, " MB")]],
        )
