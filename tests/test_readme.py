"""What the README says is there is there; its examples run in test_guides.py."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_token_arithmetic() -> None:
    layout = TokenLayout(20, (28, 37), ("camera", *("register",) * 4))
    assert f"P = {layout.tokens_per_frame} tokens" in README
    place = layout.locate(20280)
    assert "| | token 501 of frame 19 |" in README
    assert (place.frame, place.token_in_frame) == (19, 501)
    assert f"grid row {place.row}, col {place.col} |" in README
    assert "`layout.index(frame=19, row=13, col=15)`" in README
    assert layout.index(frame=19, row=13, col=15) == 20280
