"""Checking a reading against the kernel: `weights @ V` must be what the kernel returned."""

from __future__ import annotations

import torch

from vistvis.errors import CaptureError
from vistvis.kernels import Reading

SAMPLE = 5


def verify_reading(reading: Reading, *, sample: int = SAMPLE) -> None:
    """Recompute a sample of the kernel's output rows from the weights.

    Raises
    ------
    CaptureError
        If they differ by more than rounding in the kernel's dtype explains.
    """
    attention, value, output = reading.attention, reading.value, reading.output
    if attention is None or value is None or output is None:
        raise CaptureError("verify=True needs the kernel's values and output; they were not seen")
    count = attention.shape[2]
    queries = sorted({round(i * (count - 1) / max(sample - 1, 1)) for i in range(sample)})
    rows = attention.rows(queries).to(value.device)
    again = rows @ value.to(rows.dtype)
    there = output[:, :, queries].to(rows.dtype)
    # Logits carry the rounding of the kernel's dtype times their size into the weights.
    eps = torch.finfo(output.dtype).eps
    logits = 1.0
    if attention.weights is None:
        finite = attention.logits(queries)
        logits = float(finite[finite.isfinite()].abs().max()) if finite.isfinite().any() else 1.0
    allowed = 64 * eps * max(1.0, logits) * float(value.abs().max().clamp_min(1e-30))
    worst = float((again - there).abs().max()) if there.numel() else 0.0
    if not worst <= allowed:
        raise CaptureError(
            f"weights @ V differs from the kernel's output by {worst:.3g} (rounding explains "
            f"{allowed:.3g}): what was read is not what the kernel used"
        )
