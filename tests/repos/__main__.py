"""`python -m repos FOLDER`: run every model, each in a process of its own; write the table.

The models share package names, and some change what they import: hence the processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from dataclasses import asdict, fields
from pathlib import Path

import torch

from .check import Outcome, measure
from .model import Model
from .table import write

PAGE = Path(__file__).parents[2] / "docs" / "multiview.md"


def every_model() -> dict[str, Model]:
    from . import models_vggt

    models = list(models_vggt.MODELS)
    try:
        from . import models_others
    except ImportError:
        pass
    else:
        models += models_others.MODELS
    return {model.name: model for model in models}


def commit_of(folder: Path, entry: Model) -> str:
    """The first ten digits of a checkout's commit, or a package's version."""
    if entry.package:
        from importlib.metadata import version

        return f"{entry.package} {version(entry.package)}"
    noted = folder / "COMMIT"
    if noted.exists():
        return noted.read_text().strip()[:10]
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()[:10]


def run_one(entry: Model, folder: Path) -> Outcome:
    """Build and measure one model in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    home = folder / entry.repository
    outcome = Outcome(entry.name, note=entry.note)
    if entry.repository and not home.is_dir():
        outcome.failures.append(f"no checkout {entry.repository} in the folder")
        return outcome
    for path in reversed(entry.paths):
        sys.path.insert(0, str(home / path))
    try:
        outcome.commit = commit_of(home, entry)
        measure(entry, entry.build(home), outcome)
    except Exception as error:
        traceback.print_exc()
        outcome.failures.append(f"{type(error).__name__}: {error}")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s repos --", description=__doc__)
    parser.add_argument("folder", type=Path, help="one subfolder for each repository")
    parser.add_argument("--only", nargs="*", help="names of models; the page is then not written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, models = arguments.folder.resolve(), every_model()
    if arguments.one:
        print("\n" + json.dumps(asdict(run_one(models[arguments.one], folder))))
        return 0
    outcomes = []
    for name in arguments.only or models:
        command = [sys.executable, "-m", "repos", str(folder), "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        try:
            data = json.loads(done.stdout.strip().splitlines()[-1])
            outcome = Outcome(**{f.name: data[f.name] for f in fields(Outcome)})
        except (IndexError, ValueError):
            outcome = Outcome(name, failures=[f"the process ended with {done.returncode}"])
        outcomes.append(outcome)
        state = "ok" if not outcome.failures else f"{len(outcome.failures)} failures"
        print(
            f"{name}: {state}; sites {outcome.found}, captured {outcome.captured}, calls "
            f"{outcome.calls} = {outcome.calls_captured} captured + {outcome.calls_refused} "
            f"refused + {outcome.calls_outside} outside + {outcome.calls_other} no attention + "
            f"{len(outcome.silent)} silent; rows {outcome.rows:.0e} columns "
            f"{outcome.columns:.0e}; places {outcome.right} right {len(outcome.wrong)} wrong, "
            f"{outcome.values} values, {len(outcome.unvalued)} sites without values, "
            f"{len(outcome.no_layout)} sites without; largest {outcome.largest}; "
            f"figure {outcome.figure}",
            flush=True,
        )
        for failure in outcome.failures[:12]:
            print(f"    {failure}", flush=True)
    if not arguments.only:
        write(PAGE, outcomes)
    return int(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
