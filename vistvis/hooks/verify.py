"""Checking a reading against the kernel: `weights @ V` must be what the kernel returned."""

from __future__ import annotations

import torch

from vistvis.errors import CaptureError
from vistvis.hooks.readings import Reading

SAMPLE = 5
MASKED = -1e9


def verify_reading(reading: Reading) -> None:
    """`CaptureError` if a sample of the kernel's output differs by more than rounding explains."""
    attention, output = reading.attention, reading.output
    value = None if attention is None else attention.value
    if attention is None or value is None or output is None:
        raise CaptureError("verify=True needs the kernel's values and output; they were not seen")
    count = attention.shape[2]
    queries = sorted({round(i * (count - 1) / (SAMPLE - 1)) for i in range(SAMPLE)})
    rows = attention.rows(queries)
    again = rows @ value.to(rows.dtype).repeat_interleave(rows.shape[1] // value.shape[1], 1)
    there = output[:, :, queries].to(again)
    difference = (again - there).abs()
    size = 1.0
    if attention.weights is None:
        logits = attention.logits(queries)
        # A query whose every key is masked by a large negative number has weights by rounding.
        highest = logits.amax(-1, keepdim=True)
        difference = difference.masked_fill(highest < MASKED, 0.0)
        # Masked logits, at −10³⁸ say, tell nothing of rounding.
        counting = logits[(logits > highest - 40) & (highest > MASKED)]
        size = float(counting.abs().max()) if counting.numel() else 1.0
    if not bool(there[~difference.isfinite()].isfinite().all()):
        raise CaptureError(
            "the model itself gives NaN or infinity here: its kernel returned it, so there is "
            "nothing to compare; run it in bfloat16 or float32, or look for what overflows"
        )
    # Kernels take products in float32 at least, so logits carry that rounding times their size into
    # the weights; weights and output are rounded to the kernel's dtype.
    eps = 64 * torch.finfo(torch.float32).eps * max(1.0, size)
    eps += 8 * torch.finfo(output.dtype).eps
    allowed = eps * float(value.abs().max().clamp_min(1e-30))
    worst = float(difference.max()) if difference.numel() else 0.0
    if not worst <= allowed:
        raise CaptureError(
            f"weights @ V differs from the kernel's output by {worst:.3g} (rounding explains "
            f"{allowed:.3g}): what was read is not what the kernel used"
        )
