"""The import table: which wing may lean on which, that nothing goes in circles, and that importing
stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vistvis", "vggt_adapter")

# What every wing may import of the others. Left of `attention`, models are known; right of it they
# are not: neither side imports the other. docs/architecture.md draws this table.
SMALL = {"errors", "names", "progress"}
WINGS: dict[str, set[str]] = {
    "errors": set(),
    "names": set(),
    "progress": set(),
    "files": {"errors", "names"},
    "devices": {"errors", "names"},
    "images": {"errors", "names", "files"},
    "tokens": {"errors", "names"},
    "queries": {"tokens", "errors", "names"},
    "state": {"errors", "names"},
    "photos": SMALL | {"files", "images"},
    "attention": SMALL | {"tokens"},
    "models": {"photos", "attention", "tokens", "files", "images", "devices", "errors", "names"},
    "hooks": SMALL | {"models", "attention", "tokens"},
    "intervention": SMALL | {"hooks", "models", "attention", "tokens"},
    "analysis": SMALL | {"attention", "tokens", "files"},
    "store": SMALL | {"attention", "tokens", "images", "files"},
    "views": SMALL | {"analysis", "store", "attention", "tokens", "queries", "images", "files"},
    "recipes": SMALL
    | {"analysis", "intervention", "hooks", "store", "views", "attention", "tokens", "images"},
    "decorators": SMALL | {"store", "views", "attention", "tokens", "images", "files", "state"},
}
FREE = {"__init__", "__main__", "cli", "commands"}
# The one climb: `TokenLayout.from_model` hands over to where models are known.
CLIMBS = {("vistvis.tokens", "vistvis.models.layouts")}
LIGHT = ("torch", "numpy", "einops")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))}


def imported(module: str) -> set[str]:
    """Every module of these packages that a module imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                names.add(deeper if deeper in FILES else node.module)
    return {name for name in names if name in FILES} - {module}


def wing_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A path that leads back to its start, or nothing."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(arrows.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := walk(module, []))), [])


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("vistvis")])
def test_imports_follow_the_table(module: str) -> None:
    wing, used = wing_of(module), imported(module)
    assert not [name for name in used if name.startswith("vggt_adapter")]
    if wing in FREE:
        return
    assert wing in WINGS, f"{wing} is not in the table: add it with what it may import"
    climbs = {other for one, other in CLIMBS if one == module}
    assert {wing_of(name) for name in used - climbs} - WINGS[wing] - {wing} == set()


def test_the_table_has_no_dead_rows() -> None:
    assert set(WINGS) == {wing_of(name) for name in FILES if name.startswith("vistvis")} - FREE
    assert all(climb in imported(module) for module, climb in CLIMBS)


def test_the_wings_lie_in_an_order() -> None:
    assert circle(WINGS) == []


def test_no_circles_but_the_one_climb() -> None:
    arrows = {module: imported(module) for module in FILES}
    for module, climb in CLIMBS:
        arrows[module].remove(climb)
    assert circle(arrows) == []
    for module, climb in CLIMBS:
        arrows[module].add(climb)
    assert set(circle(arrows)) >= {"vistvis.tokens", "vistvis.models.layouts"}


def test_the_left_and_the_right_of_attention_do_not_know_each_other() -> None:
    left, right = {"models", "hooks"}, {"store", "views", "decorators"}

    def reached(wing: str) -> set[str]:
        return WINGS[wing].union(*(reached(other) for other in WINGS[wing]))

    assert all(reached(wing).isdisjoint(right) for wing in left)
    assert all(reached(wing).isdisjoint(left) for wing in right)


def test_the_root_stays_small() -> None:
    assert len(list((ROOT / "vistvis").glob("*.py"))) <= 12


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_is_light(package: str) -> None:
    code = (
        f"import sys, {', '.join(LIGHT)}; before = set(sys.modules); import {package}; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    new = set(found.stdout.split()) - set(sys.stdlib_module_names)
    # torch loads parts of itself, and the little that it needs, when they are first asked for.
    assert new <= {*PACKAGES, *LIGHT}, new


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_themselves_at_the_second_use(package: str) -> None:
    code = (
        f"import sys, types, {package} as package\n"
        "from importlib import import_module\n"
        "names = [n for n in dir(package) if not n.startswith('_')]\n"
        "first = {name: getattr(package, name) for name in names}\n"
        "from pkgutil import walk_packages\n"
        "for module in walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        import_module(module.name)\n"
        "print(*[n for n in names if getattr(package, n) is not first[n]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_architecture_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    shown = {
        wing.strip().strip("`/"): {name.strip() for name in may.split(",")} - {"–"}
        for wing, _, may in rows
    }
    assert shown == WINGS
