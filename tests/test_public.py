"""`import vistvis`: quick, and its public names and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vistvis

ROOT = Path(__file__).parents[1]


def test_dir_shows_the_public_names_only() -> None:
    names = dir(vistvis)
    assert names == sorted(vistvis.__all__)
    assert {"Attention", "analysis", "capture", "find_sites", "open_run", "state"} <= set(names)
    assert not {name for name in names if name.startswith("_")} | {"importlib", "Any"} & set(names)
    for name in names:
        one = getattr(vistvis, name)
        home = one.__name__ if isinstance(one, ModuleType) else getattr(one, "__module__", "")
        assert home.startswith("vistvis."), name


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'atention'"):
        vistvis.atention  # noqa: B018


@pytest.mark.parametrize("code", ["import vistvis", "from vistvis import state", "-m"])
def test_neither_importing_nor_asking_for_the_version_loads_torch(code: str) -> None:
    start = ["import sys; sys.argv = ['vistvis', '--version']", "from vistvis.cli import main"]
    lines = [*start, "main()"] if code == "-m" else [code]
    ending = "import sys; print(*{'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, ending])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == ""


def test_a_star_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from vistvis import *", names)
    assert set(vistvis.__all__) == set(names) - {"__builtins__"}
