"""Capturing every block of a ViT-S/14 at 518², beside other tools: time and memory.

Each tool is compared with the plain forward of the same model in the same run: its own model where
it needs another one (eager attention), with the fused forward as "plain" for all of timm's. Other
tools build the 1370×1370 matrices of all heads; what ours keeps gives any row of them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

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

SIZE = {"img_size": 518, "num_classes": 0}
BAR, MEMORY_BAR = 1.05, 1.1


def timm_model(*, fused: bool) -> torch.nn.Module:
    import timm
    from timm.layers import set_fused_attn

    set_fused_attn(fused)
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model("vit_small_patch14_dinov2", **SIZE).eval()
    set_fused_attn(True)
    return model


def hugging_face_model(kernel: str) -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    config._attn_implementation = kernel
    torch.manual_seed(0)
    return Dinov2Model(config).eval()


def tools() -> dict[str, Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]]:
    """Name → a call that gives the plain forward and the forward with all attention taken."""
    images = torch.rand(1, 3, 518, 518)

    def ours() -> tuple[Callable[[], Any], Callable[[], Any]]:
        model = timm_model(fused=True)

        def run() -> Any:
            with vistvis.capture(model, "blocks.*.attn") as captured:
                model(images)
            return captured

        return lambda: model(images), run

    def timm_fx() -> tuple[Callable[[], Any], Callable[[], Any]]:
        from timm.utils import AttentionExtract

        extract = AttentionExtract(timm_model(fused=False), method="fx")
        model = timm_model(fused=True)
        return lambda: model(images), lambda: extract(images)

    def rollout() -> tuple[Callable[[], Any], Callable[[], Any]]:
        from fast_vit_rollout import ViTAttentionRollout

        eager = timm_model(fused=False)
        rollout = ViTAttentionRollout(eager, discard_ratio=0.0)
        model = timm_model(fused=True)

        def run() -> Any:
            rollout.attentions.clear()
            eager(images)
            return rollout._compute_rollout()

        return lambda: model(images), run

    def eager() -> tuple[Callable[[], Any], Callable[[], Any]]:
        model, watched = hugging_face_model("sdpa"), hugging_face_model("eager")
        return lambda: model(images), lambda: watched(images, output_attentions=True)

    found = {"vistvis.hooks.capture": ours, "timm AttentionExtract (fx)": timm_fx}
    if importlib.util.find_spec("transformers"):
        found["transformers eager, output_attentions"] = eager
    if importlib.util.find_spec("fast_vit_rollout") and importlib.util.find_spec("cv2"):
        found["fast-vit-rollout"] = rollout
    return found


@torch.inference_mode()
def run_passes(name: str, how: str) -> None:
    """Serve forward passes, plain or watched."""
    plain, watched = tools()[name]()
    serve(plain if how == "plain" else watched)


def overhead(name: str) -> tuple[float, float]:
    """Milliseconds of the plain forward, and the ratio of the watched one to it."""
    commands = {how: ("passes", name, how) for how in ("plain", "watched")}
    rounds = 31 if name.startswith("vistvis") else 3
    times = cpu_times_of_processes(__file__, commands, rounds=rounds)
    return times["plain"].median, times["watched"].over(times["plain"])


@torch.inference_mode()
def memory(name: str, how: str) -> None:
    """Peak of a process that runs two forwards."""
    plain, watched = tools()[name]()
    result = None
    for _ in range(2):
        del result  # one run's worth is what a run needs
        result = plain() if how == "plain" else watched()
    kept = result.nbytes if isinstance(result, vistvis.Capture) else 0
    print(json.dumps({"peak": peak_bytes(), "kept": kept}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        measure, name, how = sys.argv[1:]
        {"passes": run_passes, "memory": memory}[measure](name, how)
        sys.exit()
    rows = []
    for name in tools():
        plain, ratio = overhead(name)
        ours = name.startswith("vistvis")
        extra, kept = extra_peak(__file__, name, "watched", processes=3 if ours else 1)
        bars, memory_text = "–", megabytes(extra)
        if ours:
            share = extra / kept
            memory_text += f" ({share:.2f} × Q and K)"
            bars = f"{verdict(ratio, BAR)}, {verdict(share, MEMORY_BAR)}"
        rows.append([name, f"{plain:,.0f} ms", f"{ratio:.3f}", memory_text, bars])
    table(
        "ViT-S/14 at 518², all 12 blocks, CPU time of one thread",
        ["tool", "plain forward", "ratio", "extra peak memory", "bars"],
        rows,
    )
    if not importlib.util.find_spec("fast_vit_rollout"):
        print("fast-vit-rollout is not installed: pip install fast-vit-rollout")
