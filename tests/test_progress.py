"""Bars are seen where they are asked for; where they are not, there is no tqdm at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vistvis.progress import progress

ROOT = Path(__file__).parents[1]


def test_a_bar_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "working")) == [0, 1, 2]
    assert "working: 100%" in capsys.readouterr().err
    with progress(None, "by hand", total=2) as bar:
        bar.update()
        bar.update()
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("shown", [False, None])
def test_nothing_is_seen_and_nothing_runs_where_nobody_looks(shown: bool | None) -> None:
    """A disabled bar of tqdm starts a thread with a lock, which a forked child never gets."""
    code = (
        "import sys, threading\n"
        "from vistvis.progress import progress\n"
        f"assert list(progress(range(3), 'x', shown={shown})) == [0, 1, 2]\n"
        f"with progress(None, 'x', total=2, shown={shown}) as bar: bar.update()\n"
        "assert 'tqdm.auto' not in sys.modules and threading.active_count() == 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
