"""The golden numbers: what the published VGGT code computes, with weights filled by a formula.

Made once by running that code in float64 on a CPU; `tests/data/aggregator_*.safetensors` holds, for
each case, tokens, and queries, keys and attention of every block. The pictures went into that run
as float32 numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vggt_adapter import VGGT

DATA = Path(__file__).parent / "data"
CASES: dict[str, Any] = json.loads((DATA / "aggregator.json").read_text())


def published_1b_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all `aggregator.*` of facebook/VGGT-1B."""
    # {name with * for the block: [how many blocks, shape]}
    listed = json.loads((DATA / "vggt_1b_aggregator.json").read_text())
    return {
        name.replace("*", str(index)): tuple(shape)
        for name, (count, shape) in listed.items()
        for index in range(count)
    }


def fill(module: nn.Module) -> None:
    """Weights by formula: `0.08 · sin(0.37 · i + crc32(name) mod 1000)`, norms and gammas + 1."""
    for name, value in module.state_dict().items():
        index = torch.arange(value.numel(), dtype=torch.float64)
        made = 0.08 * torch.sin(0.37 * index + zlib.crc32(name.encode()) % 1000)
        if any(part in name for part in ("norm1.weight", "norm2.weight")) or name.endswith(
            ("norm.weight", "gamma")
        ):
            made += 1
        value.copy_(made.view(value.shape))


def pictures(shape: list[int]) -> Tensor:
    """(B, S, 3, H, W), float64 with float32's values."""
    batches, frames, *_, height, width = shape

    def along(axis: int, count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float64).view(
            [-1 if i == axis else 1 for i in range(5)]
        )

    b, s, c, y, x = map(along, range(5), (batches, frames, 3, height, width))
    wave = torch.sin(0.11 * (c + 1) * x + 0.07 * (s + 2) * y + 0.3 * b + c)
    return (0.5 + 0.5 * wave).float().double()


def model_of(case: str) -> VGGT:
    """The model of a case in float64, eval mode."""
    model = VGGT.from_config(**CASES[case]["config"]).double().eval()
    fill(model.aggregator)
    return model


def expected(case: str) -> dict[str, Tensor]:
    return load_file(DATA / f"aggregator_{case}.safetensors")


@contextmanager
def kernel_calls() -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """(q, k, v, output) of every call of the attention kernel inside."""
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    original = F.scaled_dot_product_attention

    def listening(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = original(q, k, v, *args, **kwargs)
        calls.append((q, k, v, out))
        return out

    F.scaled_dot_product_attention = listening
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


def run(case: str, model: VGGT, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model makes of a case, under the golden file's names."""
    images = pictures(CASES[case]["images"]).to(dtype)
    with torch.no_grad(), kernel_calls() as calls:
        tokens, start = model.to(dtype)(images)
    assert start == CASES[case]["patch_start_idx"]
    found = {"tokens_first": tokens[0], "tokens_last": tokens[-1]}
    names = [f"{kind}.{i}" for i in range(model.config.depth) for kind in ("frame", "global")]
    for name, (q, k, *_) in zip(names, calls[-len(names) :], strict=True):
        found[f"{name}.q"], found[f"{name}.k"] = q, k
        found[f"{name}.attention"] = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return found


def differences(case: str, model: VGGT, *, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference for each golden tensor."""
    found = run(case, model, dtype=dtype)
    return {
        name: float((found[name].double() - value).abs().max())
        for name, value in expected(case).items()
    }
