"""What the README says is there is there, and its first Python example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vggt_adapter.model import VGGT
from vggt_adapter.steps import sample_views
from vistvis import TokenLayout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_commands() -> None:
    indented = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    assert indented[:2] == ["pip install . && vistvis demo", "pip install nox && nox -s tests"]


def test_pictures_and_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
    for name in re.findall(
        r"`((?:vistvis|vggt_adapter|notebooks|tests|training)/[\w/.]+)`", README
    ):
        assert (ROOT / name).exists(), name


def test_sessions_exist() -> None:
    nox = (ROOT / "noxfile.py").read_text()
    for name in re.findall(r"nox -s (\w+)", README):
        assert f"def {name}(" in nox


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples_are_python(number: int) -> None:
    compile(BLOCKS[number], f"README block {number}", "exec")


def test_the_first_example_runs() -> None:
    """As written, but for a small model, small pictures, and numbers that these have."""
    code = BLOCKS[0]
    for written, used in (
        ('VGGT.from_pretrained("facebook/VGGT-1B")', "MODEL"),
        ('(["a.jpg", "b.jpg", "c.jpg"])', "(PATHS, size=70)"),
        ("token_idx=1750", "token_idx=30"),
        ("1750", "30"),
    ):
        assert written in code
        code = code.replace(written, used)
    model = VGGT.from_config(
        img_size=70, embed_dim=32, depth=24, num_heads=4, patch_embed="conv"
    ).eval()
    found: dict[str, Any] = {"MODEL": model, "PATHS": sample_views()}
    with torch.random.fork_rng():
        exec(code, found)
    assert set(found["maps"]) == {
        f"{k}_block_{n}" for k in ("frame", "global") for n in (0, 12, 23)
    }
    assert found["values"]["attention_maps"].shape[0] == 3


def test_the_token_arithmetic() -> None:
    layout = TokenLayout(20, (28, 37), ("camera", *("register",) * 4))
    assert f"P = {layout.tokens_per_frame} tokens" in README
    place = layout.locate(20280)
    assert "| | token 501 of frame 19 |" in README
    assert (place.frame, place.token_in_frame) == (19, 501)
    assert f"grid row {place.row}, col {place.col} |" in README
    assert "`layout.index(frame=19, row=13, col=15)`" in README
    assert layout.index(frame=19, row=13, col=15) == 20280
