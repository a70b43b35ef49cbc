"""Every check of this project, each a session: `nox -l` lists them, `nox -s tests` runs the tests.

All sessions share one environment. torch alone takes gigabytes and minutes, and what the sessions
need does not conflict, so an environment each would buy nothing. Run from the development
environment in `.venv` (`make install`, `uv run nox`), they use that one as it is.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "notebooks"]
nox.needs_version = ">=2024.4.15"

ROOT = Path(__file__).parent
OWN = Path(sys.prefix) == ROOT / ".venv"
SHARED = ROOT / ".venv" if OWN else ROOT / ".nox" / "shared"
BIN = SHARED / ("Scripts" if os.name == "nt" else "bin")


def environment(session: nox.Session) -> None:
    """Make the shared environment, or bring it up to date with pyproject.toml."""
    if OWN:
        return
    python = BIN / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(SHARED), external=True)
    stamp = SHARED / "installed"
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != state:
        # One call, so that pip chooses versions of torch, torchvision and timm that fit together.
        session.run(str(python), "-m", "pip", "install", "-q", "-e", ".[dev]", external=True)
        stamp.write_text(state)


def run(session: nox.Session, *command: str, **variables: str) -> None:
    """Run a program of the shared environment."""
    path = os.pathsep.join((str(BIN), os.environ.get("PATH", "")))
    session.run(str(BIN / command[0]), *command[1:], external=True, env={"PATH": path, **variables})


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Style and formatting (ruff)."""
    environment(session)
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Types (mypy, strict for the packages)."""
    environment(session)
    run(session, "mypy")


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """The tests; further arguments go to pytest."""
    environment(session)
    run(session, "python", "-m", "pytest", *session.posargs)


@nox.session(python=False)
def slow(session: nox.Session) -> None:
    """Tests that are too long for every run."""
    environment(session)
    run(session, "python", "-m", "pytest", "-m", "slow", *session.posargs)


@nox.session(python=False)
def sweep(session: nox.Session) -> None:
    """Every attention module of timm and the other families; writes docs/families.md."""
    environment(session)
    run(session, "python", "-m", "pytest", "-m", "slow", "tests/sweep", *session.posargs)


@nox.session(python=False)
def repos(session: nox.Session) -> None:
    """Multi-view models of other repositories, from a folder of checkouts; writes its page."""
    if not session.posargs:
        session.error(
            "name a folder with one checkout a repository: nox -s repos -- /path/to/checkouts "
            "[--only NAME …]; docs/multiview.md names the repositories and their commits"
        )
    environment(session)
    extra = filter(None, [os.environ.get("PYTHONPATH")])  # what the repositories need, say
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), *extra))
    run(session, "python", "-m", "repos", *session.posargs, PYTHONPATH=path)


@nox.session(python=False)
def browser(session: nox.Session) -> None:
    """The explorer in real browsers: Chromium and its driver, and Firefox where it is there."""
    environment(session)
    run(session, "python", "-m", "pytest", "-m", "browser", "tests/browser", *session.posargs)


@nox.session(python=False)
def attack(session: nox.Session) -> None:
    """Kills, flips, forgeries, interrupts, odd calls: minutes; `--quick`, `--only NAME …`."""
    environment(session)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    run(session, "python", "-m", "attack", *session.posargs, PYTHONPATH=path)


@nox.session(python=False)
def notebooks(session: nox.Session) -> None:
    """Execute the notebooks; outputs go to a temporary folder, the files stay stripped."""
    environment(session)
    chosen = session.posargs or [str(p) for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    folder = session.create_tmp()
    for notebook in chosen:
        run(
            session,
            *("jupyter", "nbconvert", "--to", "notebook", "--execute", notebook),
            *("--output-dir", folder),
        )


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    """The benchmarks, one after the other; name some to run only those."""
    environment(session)
    scripts = sorted((ROOT / "benchmarks").glob("[!_]*.py"))
    for script in scripts:
        if script.stem == "explorer":  # needs a browser: bench_browser
            continue
        if not session.posargs or script.stem in session.posargs:
            run(session, "python", str(script))


@nox.session(python=False)
def bench_browser(session: nox.Session) -> None:
    """How fast the explorer computes and paints, in Chromium."""
    environment(session)
    run(session, "python", "benchmarks/explorer.py", *session.posargs)


@nox.session(python=False)
def evaluate(session: nox.Session) -> None:
    """Measure the bundled small VGGT; prints the table of its model card."""
    environment(session)
    run(session, "python", "training/evaluate.py", *session.posargs)
