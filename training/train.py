"""Trains the small VGGT that the package carries.

    python training/train.py --data DATA --out training/out [--device cuda] [--set steps=100 …]

Run it again with the same --out to go on where it was stopped: what a step sees follows from the
seed and the step's number, so on a CPU a stopped and resumed run ends with the same weights as one
that never stopped. Writes last.pt (checkpoint), metrics.csv, metrics.png and model.safetensors.

What is trained: matching. (a) One head of the last global block gets a loss on its attention: the
logits of a patch over another view's patches against a Gaussian around the true place, and its
whole row against equal shares on every place where the patch is seen. (b) The last global block's
patch tokens get the same matching loss by cosine similarity. All other heads are free.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from data import Batch, Scenes
from matching import (
    Hits,
    forward_with_kernels,
    frames_apart,
    kernels,
    match_loss,
    row_loss,
    soft_targets,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from vggt_adapter import VGGT

HERE = Path(__file__).resolve().parent


def read_config(path: Path, changes: list[str]) -> dict[str, Any]:
    """The YAML file with `key=value` changes (dots go deeper)."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for change in changes:
        key, _, value = change.partition("=")
        *above, last = key.split(".")
        place = config
        for name in above:
            place = place[name]
        if last not in place:
            raise SystemExit(f"--set {key}: the configuration has no such key")
        place[last] = yaml.safe_load(value)
    return config


class Course:
    """Model, optimisers and step number: everything a checkpoint holds."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(config["seed"])
        self.config, self.device, self.step = config, device, 0
        self.model = VGGT.from_config(**config["model"]).to(device).train()
        self.model.aggregator.gradient_checkpointing = False
        for name, parameter in self.model.named_parameters():
            if name.endswith(("attn.qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
                nn.init.trunc_normal_(parameter, std=0.02 if parameter.ndim == 2 else 0.04)
        self.sharpness = nn.Parameter(torch.tensor(np.log(10.0), device=device).float())
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            hidden = "blocks" in name and parameter.ndim == 2
            (matrices if hidden and config["optimizer"] == "muon" else others).append(parameter)
        decay, rate = config["weight_decay"], config["adam_rate"]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [*others, self.sharpness], lr=rate, betas=(0.9, 0.98), weight_decay=decay
            )
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=config["muon_rate"],
                    weight_decay=decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["full_rate"] = group["lr"]

    def rate(self) -> float:
        """This step's share of the full learning rate."""
        c = self.config
        if self.step < c["warmup"]:
            return float((self.step + 1) / c["warmup"])
        if self.step < c["decay_from"]:
            return 1.0
        done = min((self.step - c["decay_from"]) / max(c["steps"] - c["decay_from"], 1), 1.0)
        return float(0.02 + 0.98 * (1 + np.cos(np.pi * done)) / 2)

    def draw(self, data: dict[str, Scenes]) -> tuple[Batch, tuple[int, int]]:
        """This step's batch: a function of seed and step alone."""
        rng = np.random.default_rng((self.config["seed"], 77, self.step))
        ways = next(p for p in self.config["phases"] if self.step < p["until"])["ways"]
        share = np.array([way["weight"] for way in ways], float)
        way = ways[rng.choice(len(ways), p=share / share.sum())]
        scenes = data[way["data"]]
        numbers = rng.choice(len(scenes), way["batch"], replace=len(scenes) < way["batch"])
        grid = (way["grid"][0], way["grid"][1])
        if rng.random() < 0.5:
            grid = grid if grid[1] * 14 > scenes.size[0] else grid[::-1]
        batch = scenes.batch(
            numbers.tolist(), views=way["views"], grid=grid, halve=way["halve"], rng=rng
        )
        return batch, grid

    def losses(self, batch: Batch, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The three losses of one batch."""
        images = batch.images.to(self.device)
        place, visible = batch.place.to(self.device), batch.visible.to(self.device)
        views = images.shape[1]
        with torch.autocast(self.device.type, torch.bfloat16), kernels() as seen:
            tokens, start = self.model(images, pairs=[-1])
        head = self.config["pointing_head"]
        q, k = (frames_apart(x, views)[:, :, head].float() for x in seen.calls[-1])
        targets = soft_targets(place, grid)
        own = torch.eye(views, device=self.device, dtype=torch.bool)[:, :, None]
        here = torch.eye(targets.shape[-1], device=self.device)
        targets = torch.where(own[..., None], here, targets)
        logits = torch.einsum("bind,bjmd->bijnm", q[:, :, start:], k[:, :, start:])
        last = tokens[-1][:, :, start:].float()
        last = F.normalize(last[..., last.shape[-1] // 2 :], dim=-1)
        near = torch.einsum("bind,bjmd->bijnm", last, last) * self.sharpness.exp()
        return {
            "attention": match_loss(logits * q.shape[-1] ** -0.5, targets, visible),
            "row": row_loss(q, k, targets, visible, start),
            "tokens": match_loss(near, targets, visible),
        }

    def advance(self, data: dict[str, Scenes]) -> dict[str, float]:
        """One step; returns what there is to log."""
        batch, grid = self.draw(data)
        losses = self.losses(batch, grid)
        total = sum((losses[k] * w for k, w in self.config["weights"].items()), torch.tensor(0.0))
        rate = self.rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * rate
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
        if np.isfinite(norm):  # a broken step is left out, not taken
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        told = {key: float(value.detach()) for key, value in losses.items()}
        return told | {"norm": norm, "rate": rate, "patches": grid[0] * grid[1]}

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "sharpness": self.sharpness.detach(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"], strict=True)
        with torch.no_grad():
            self.sharpness.copy_(state["sharpness"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@torch.no_grad()
def check(
    course: Course, scenes: Scenes, *, grid: tuple[int, int], views: int = 2, limit: int = 48
) -> dict[str, float]:
    """Hit-rates of the pointing head and of the tokens on validation scenes."""
    model = course.model.eval()
    attention, tokens = Hits(), Hits()
    for first in range(0, min(limit, len(scenes)), 8):
        numbers = range(first, min(first + 8, len(scenes)))
        batch = scenes.batch(numbers, views=views, grid=grid)
        place, visible = batch.place.to(course.device), batch.visible.to(course.device)
        with torch.autocast(course.device.type, torch.bfloat16):
            last, start, blocks = forward_with_kernels(model, batch.images.to(course.device))
        q, k = (frames_apart(x, views)[:, :, course.config["pointing_head"]] for x in blocks[-1])
        logits = torch.einsum("bind,bjmd->bijnm", q[:, :, start:].float(), k[:, :, start:].float())
        attention.add(logits.argmax(-1), place, visible, grid[1])
        x = last[:, :, start:].float()
        x = F.normalize(x[..., x.shape[-1] // 2 :], dim=-1)
        tokens.add(torch.einsum("bind,bjmd->bijnm", x, x).argmax(-1), place, visible, grid[1])
    model.train()
    a, t = attention.shares, tokens.shares
    return {
        "val_attention_within": a[0],
        "val_attention_exact": a[1],
        "val_tokens_within": t[0],
        "val_tokens_exact": t[1],
    }


COLUMNS = [
    *("step", "seconds", "attention", "row", "tokens", "norm", "rate", "patches"),
    *("val_attention_within", "val_attention_exact", "val_tokens_within", "val_tokens_exact"),
]


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Losses (running mean) and hit-rates over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = np.array([float(r["step"]) for r in rows])
    for name in ("attention", "row", "tokens"):
        values = np.array([float(r[name]) for r in rows])
        width = min(50, len(values))
        left.plot(
            steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"), label=name
        )
    checked = [r for r in rows if r["val_attention_within"]]
    for name in COLUMNS[-4:]:
        right.plot(
            [float(r["step"]) for r in checked],
            [100 * float(r[name]) for r in checked],
            marker="o",
            label=name.removeprefix("val_").replace("_", ", "),
        )
    left.set(xlabel="step", ylabel="loss", title="training loss (mean of 50 steps)")
    right.set(xlabel="step", ylabel="%", title="validation scenes, 16×16 grid", ylim=(0, 100))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def save(course: Course, out: Path) -> None:
    """Checkpoint and weights, each written aside and then put in place."""
    torch.save(course.state(), out / "last.part")
    os.replace(out / "last.part", out / "last.pt")
    tensors = {k: v.detach().cpu().contiguous() for k, v in course.model.state_dict().items()}
    save_file(tensors, out / "model.part")
    os.replace(out / "model.part", out / "model.safetensors")


def train(config: dict[str, Any], data: Path, out: Path, device: torch.device) -> Course:
    """Trains to config["steps"]; SIGTERM and Ctrl-C save a checkpoint first."""
    out.mkdir(parents=True, exist_ok=True)
    course = Course(config, device)
    if (out / "last.pt").exists():
        course.load(torch.load(out / "last.pt", map_location=device, weights_only=True))
    names = {way["data"] for phase in config["phases"] for way in phase["ways"]}
    loaded = {name: Scenes(data / name) for name in sorted(names)}
    validation = Scenes(data / "validation") if (data / "validation").exists() else None
    rows: list[dict[str, str]] = []
    log = out / "metrics.csv"
    if log.exists():
        with log.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= course.step]
    with log.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    spent = float(rows[-1]["seconds"]) if rows else 0.0
    started = time.monotonic()
    bar = tqdm(total=config["steps"], initial=course.step, desc="training", mininterval=5)
    try:
        while course.step < config["steps"] and not stopped:
            told = course.advance(loaded)
            told |= {"step": course.step, "seconds": round(spent + time.monotonic() - started, 1)}
            last = course.step == config["steps"]
            if validation and (last or course.step % config["check_every"] == 0):
                told |= check(course, validation, grid=tuple(s // 14 for s in validation.size))
                bar.write(", ".join(f"{k} {v:.4g}" for k, v in told.items()))
            rows.append({k: f"{told[k]:.6g}" if k in told else "" for k in COLUMNS})
            with log.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, COLUMNS).writerow(rows[-1])
            bar.update()
            bar.set_postfix(attention=f"{told['attention']:.3f}", refresh=False)
            if last or course.step % config["save_every"] == 0:
                save(course, out)
            if last or course.step % config["check_every"] == 0:
                plot(rows, out / "metrics.png")
    finally:
        bar.close()
        signal.signal(signal.SIGTERM, before)
        save(course, out)
    return course


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of training/data.py")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="changes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train(
        read_config(given.config, given.changes), given.data, given.out, torch.device(given.device)
    )
