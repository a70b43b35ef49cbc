"""The import table: which module may lean on which, and that importing stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CORE = {"errors", "checks", "indexing", "tokens", "siteinfo", "attention"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "indexing": {"errors"},
    # `TokenLayout.from_model` hands over to sites, where the knowledge of models lives.
    "tokens": {"errors", "sites"},
    "siteinfo": {"errors", "tokens"},
    "attention": {"errors", "checks", "indexing", "siteinfo", "tokens"},
    "layouts": CORE,
    "sites": CORE | {"layouts"},
    "patching": CORE,
    "kernels": CORE,
    "projections": CORE,
    "verify": CORE | {"kernels"},
    "windows": CORE,
    "multihead": CORE | {"kernels"},
    "capture": CORE
    | {"sites", "patching", "kernels", "multihead", "projections", "verify", "windows"},
    "analysis": CORE,
    "files": CORE,
    "paths": CORE | {"files"},
    "store": CORE | {"files", "paths"},
    "overlay": CORE,
    "views": CORE | {"analysis", "files", "overlay", "store", "paths", "views"},
    "png": CORE,
    "sources": CORE | {"files", "paths", "overlay", "sites"},
    "state": CORE,
    "decorators": CORE | {"state", "files", "paths", "store"},
    "reconstruction": CORE | {"files", "paths", "store", "overlay", "png", "sources", "views"},
}
FREE = {"__init__", "__main__", "cli", "commands"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "vistvis")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


FILES = sorted((ROOT / "vistvis").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    part = part_of(path)
    names = imported(path)
    assert not [name for name in names if name.startswith("vggt_adapter")]
    if part in FREE:
        return
    assert part in MAY_IMPORT, f"{part} is not in the table: add it with what it may import"
    used = {name.split(".")[1] for name in names if name.startswith("vistvis.")}
    modules = {part_of(p) for p in FILES}
    assert (used & modules) - MAY_IMPORT[part] - {part} == set()


def test_the_table_has_no_dead_rows() -> None:
    missing = set(MAY_IMPORT) - {part_of(path) for path in FILES}
    assert missing <= {"analysis"}


@pytest.mark.parametrize("package", ["vistvis", "vggt_adapter"])
def test_importing_is_light(package: str) -> None:
    heavy = (
        "matplotlib",
        "timm",
        "torchvision",
        "transformers",
        "huggingface_hub",
        "PIL",
        "IPython",
    )
    code = (
        f"import sys, {package}; "
        f"print(*[name for name in {heavy!r} if name in sys.modules], sep=',')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""
