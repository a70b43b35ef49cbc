"""Puts trained weights into the package: float16 safetensors, their sizes, SHA-256 and defaults.

python training/export.py --out training/out
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from vggt_adapter import VGGT

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "vggt_adapter" / "weights"
LIMIT = 12_000_000  # bytes that the package may carry


def export(out: Path, config: dict[str, Any], folder: Path, *, size: int) -> Path:
    """Writes vggt_tiny.safetensors and vggt_tiny.json; returns the weights' path."""
    weights = load_file(out / "model.safetensors")
    model = VGGT.from_config(**config["model"])
    model.load_state_dict(weights, strict=True)
    half = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    if not all(torch.isfinite(value).all() for value in half.values()):
        raise SystemExit("a weight does not fit float16: train with more weight decay")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vggt_tiny.safetensors"
    save_file(half, file)
    if file.stat().st_size > LIMIT:
        raise SystemExit(f"{file.stat().st_size} bytes, at most {LIMIT} may be shipped")
    head = config["pointing_head"]
    told = {
        "config": model.config.to_dict(),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "default": {"size": size, "block": model.config.depth - 1, "head": head},
        "supervised": [
            {
                "block": f"global_block_{model.config.depth - 1}",
                "head": head,
                "how": "matching loss on its attention logits and rows, from rendered scenes",
            }
        ],
    }
    text = json.dumps(told, indent=2) + "\n"
    (folder / "vggt_tiny.json").write_text(text, encoding="utf-8")
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of train.py")
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--size", type=int, default=224, help="picture width the demo should use")
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    file = export(given.out, config, given.folder, size=given.size)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
