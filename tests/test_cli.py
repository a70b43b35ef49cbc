"""The command line: finding commands, one line for every error, nothing loaded that is not used."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from vistvis import cli
from vistvis.errors import CheckpointError, InputError, VistvisWarning

ROOT = Path(__file__).parents[1]


def command(run: Callable[[argparse.Namespace], object]) -> types.SimpleNamespace:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", nargs="?")
        parser.add_argument("--count", type=int, default=1)

    return types.SimpleNamespace(
        __name__="made", HELP="a command of the tests", add_arguments=add_arguments, run=run
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make commands known, as if a front end had brought them."""

    def do(**made: object) -> None:
        found = {name: (lambda module=module: module) for name, module in made.items()}
        monkeypatch.setattr(cli, "find_commands", lambda: found)

    return do


def test_a_command_gets_its_arguments(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    install(made=command(seen.append))
    assert cli.main(["made", "x", "--count", "3"]) == 0
    assert (seen[0].name, seen[0].count) == ("x", 3)
    install(made=command(lambda _: 7))
    assert cli.main(["made"]) == 7
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_commands(
    argv: list[str], install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(made=command(lambda _: 0), broken=types.SimpleNamespace(__name__="broken"))
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "made      a command of the tests" in out
    assert "can't be loaded: the command 'broken' (broken) lacks HELP" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vistvis ")


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (InputError("no such\n  thing"), "vistvis made: error: no such thing"),
        (CheckpointError("weights"), "vistvis made: error: weights"),
        (FileNotFoundError(2, "No such file", "a.jpg"), "vistvis made: error: a.jpg: No such file"),
        (PermissionError(13, "Denied"), "vistvis made: error: Denied"),
        (ModuleNotFoundError("No module named 'q'", name="q"), "pip install q"),
        (MemoryError(), "vistvis made: error: out of memory"),
        (KeyboardInterrupt(), "vistvis made: interrupted"),
    ],
)
def test_errors_are_one_line(
    raised: BaseException,
    line: str,
    install: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: argparse.Namespace) -> None:
        raise raised

    install(made=command(run))
    assert cli.main(["made"]) == (130 if isinstance(raised, KeyboardInterrupt) else 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert line in err


def test_a_mistake_of_the_program_keeps_its_traceback(install: Callable[..., None]) -> None:
    def run(_: argparse.Namespace) -> None:
        raise ZeroDivisionError

    install(made=command(run))
    with pytest.raises(ZeroDivisionError):
        cli.main(["made"])
    missing = ModuleNotFoundError("No module named 'vistvis.gone'", name="vistvis.gone")

    def own(_: argparse.Namespace) -> None:
        raise missing

    install(made=command(own))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["made"])


@pytest.mark.parametrize("argv", [["--count", "many"], ["--no-such"], ["a", "b"]])
def test_wrong_arguments_are_one_line(
    argv: list[str], install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(made=command(lambda _: 0))
    with pytest.raises(SystemExit) as caught:
        cli.main(["made", *argv])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("vistvis made: error: ")
    assert err.count("\n") == 1


def test_warnings_are_plain_lines(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> None:
        for _ in range(2):
            warnings.warn("moved to 5", VistvisWarning, stacklevel=1)

    install(made=command(run))
    before = warnings.showwarning
    assert cli.main(["made"]) == 0
    assert warnings.showwarning is before
    assert capsys.readouterr().err == "vistvis made: warning: moved to 5\n" * 2


def test_help_of_commands_and_topics(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(made=command(lambda _: 0))
    assert cli.main(["help"]) == 0
    assert "vistvis help queries" in capsys.readouterr().out
    assert cli.main(["help", "queries"]) == 0
    assert capsys.readouterr().out.startswith("A query is one token")
    with pytest.raises(SystemExit) as caught:
        cli.main(["help", "made"])
    assert caught.value.code == 0
    assert "usage: vistvis made [name] [options]" in capsys.readouterr().out
    assert cli.main(["help", "qeries"]) == 2
    assert "did you mean 'queries'?" in capsys.readouterr().err


def test_an_unknown_command_gives_the_nearest(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install(made=command(lambda _: 0))
    assert cli.main(["maed"]) == 2
    assert "did you mean 'made'?" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    assert "there are made" in capsys.readouterr().err


def test_a_front_end_does_not_replace_a_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=name, load=lambda: f"from the entry point {name}")

    def module(name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=name)

    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [entry("demo"), entry("info")])
    monkeypatch.setattr(cli.pkgutil, "iter_modules", lambda _: [module("info"), module("_own")])
    monkeypatch.setattr(cli.importlib, "import_module", lambda path: path)
    found = cli.find_commands()
    assert list(found) == ["demo", "info"]
    assert found["demo"]() == "from the entry point demo"
    assert found["info"]() == "vistvis.commands.info"


def test_every_builtin_has_what_a_command_has() -> None:
    for name in cli.find_commands():
        loaded = cli.load(name)
        parser = argparse.ArgumentParser()
        loaded.add_arguments(parser)
        assert loaded.HELP
        assert "\n" not in loaded.HELP
        assert parser.format_help()  # a stray % in a help text fails only here


@pytest.mark.parametrize("name", list(cli.find_commands()))
def test_help_is_one_screen_with_an_example_that_works(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "102")
    monkeypatch.chdir(tmp_path)  # where no file of an example is in the way
    parser = cli.parser_of(f"vistvis {name}", cli.load(name))
    lines = parser.format_help().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    examples = [line.strip() for line in lines if line.startswith(f"  vistvis {name}")]
    if name in ("demo", "overlay", "vit"):
        assert examples
    for example in examples:
        parser.parse_args(shlex.split(example)[2:])


def test_the_package_runs_from_a_checkout() -> None:
    """Without an install, and no command is imported that was not chosen."""
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vistvis", "nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    *imported, said = found.stderr.splitlines()
    assert said.startswith("vistvis nothing: error: no command 'nothing'")
    names = [line.rsplit("|", 1)[1].strip() for line in imported]
    assert "vistvis.commands" in names
    assert not [n for n in names if n.startswith(("vistvis.commands.", "matplotlib", "vggt_"))]


def test_what_commands_say_of_themselves_needs_no_torch() -> None:
    """`vistvis --help` and that of each command here start at once."""
    code = (
        "import sys, argparse\n"
        "from vistvis import cli\n"
        "cli.overview()\n"
        "for name in ('demo', 'overlay', 'vit'):\n"
        "    cli.parser_of(name, cli.load(name)).format_help()\n"
        "slow = {'torch', 'numpy', 'matplotlib', 'timm', 'PIL'} & set(sys.modules)\n"
        "sys.exit(', '.join(slow) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--help"], ["help", "queries"], ["demo", "--help"]])
def test_a_reader_that_has_left_before_the_help_is_no_error(argv: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vistvis", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import sys, types\n"
        "from vistvis import cli\n"
        "def run(arguments):\n"
        "    for _ in range(100000): print('line')\n"
        "made = types.SimpleNamespace(HELP='', add_arguments=lambda p: None, run=run)\n"
        "sys.exit(cli.guarded('vistvis made', lambda: cli.run('vistvis made', made, [])))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
