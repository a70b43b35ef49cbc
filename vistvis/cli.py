"""The command line: find the command, let it parse and run, turn errors into one plain line.

A command is a module with `HELP: str` (one line), `add_arguments(parser)` and
`run(arguments) -> int`. Built-in ones lie in `vistvis/commands/`; front ends bring theirs through
the entry-point group "vistvis.commands". Only the module of the chosen command is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NoReturn

from vistvis import commands
from vistvis.errors import InputError, VistvisError, VistvisWarning
from vistvis.files import version
from vistvis.names import suggestion

GROUP = "vistvis.commands"
USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` without the program's name, default `sys.argv[1:]`.

    Returns the exit code: 0, 2 for wrong input of any kind, 130 after Ctrl-C. As with every
    argparse program, `--help` and arguments that can't be parsed end in `SystemExit`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"vistvis {version() or '(from a checkout, not installed)'}")
        return 0
    name, *rest = arguments
    return guarded(f"vistvis {name}", lambda: run(f"vistvis {name}", load(name), rest))


def run(program: str, command: Any, argv: Sequence[str]) -> int:
    """Parse `argv` for a command module and run it."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=program, description=command.HELP, formatter_class=plain)
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(argv)) or 0)


def guarded(program: str, call: Callable[[], int]) -> int:
    """Call, with errors of input as one line on stderr instead of a traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", VistvisWarning)
        warnings.showwarning = _plain_warnings(program, warnings.showwarning)
        try:
            return call()
        except KeyboardInterrupt:
            _say(program, "interrupted")
            return INTERRUPTED
        except BrokenPipeError:
            # The reader (`| head`) has gone: nothing is wrong, and nobody is there to be told.
            # stdout is turned away so that Python's flush at exit stays quiet too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (VistvisError, OSError) as error:
            text = _text(error)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("", "vistvis", "vggt_adapter"):
                raise
            text = f"{error}; install it: pip install {error.name}"
        except (MemoryError, RuntimeError) as error:
            # torch's own class is not imported here: a command that never loads torch stays quick.
            if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
                raise
            text = f"out of memory: {_text(error)}"
    _say(program, f"error: {text}")
    return USAGE_ERROR


def load(name: str) -> Any:
    """The module of a command; `InputError` if there is none or it lacks what a command has."""
    available = find_commands()
    if name not in available:
        hint = suggestion(name, available, otherwise=f"there are {', '.join(available) or 'none'}")
        raise InputError(f"no command {name!r}: {hint} (front ends bring theirs when installed)")
    command = available[name]()
    lacking = [part for part in ("HELP", "add_arguments", "run") if not hasattr(command, part)]
    if lacking:
        raise InputError(f"the command {name!r} ({command.__name__}) lacks {', '.join(lacking)}")
    return command


def find_commands() -> dict[str, Callable[[], Any]]:
    """Names of all commands, each with a call that imports its module. Nothing is imported yet."""
    importers: dict[str, Callable[[], Any]] = {
        entry.name: entry.load for entry in metadata.entry_points(group=GROUP)
    }
    # Built-in commands come last: a front end can't take their place.
    for module in pkgutil.iter_modules(commands.__path__):
        if not module.name.startswith("_"):
            path = f"{commands.__name__}.{module.name}"
            importers[module.name] = partial(importlib.import_module, path)
    return dict(sorted(importers.items()))


def overview() -> str:
    """What `vistvis --help` prints."""
    lines = [
        "usage: vistvis COMMAND [arguments]    vistvis COMMAND --help    vistvis --version",
        "",
        "See where vision transformers look: exact attention at any size.",
        "",
    ]
    for name in find_commands():
        try:
            help_text = load(name).HELP
        except Exception as error:  # a broken front end must not take the help away
            help_text = f"(can't be loaded: {_text(error)})"
        lines.append(f"  {name:<10}{help_text}")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, VistvisError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _say(program: str, text: str) -> None:
    print(f"{program}: {text}", file=sys.stderr)


def _plain_warnings(program: str, default: Callable[..., None]) -> Callable[..., None]:
    def show(message: Any, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, VistvisWarning):
            _say(program, f"warning: {_text(message)}")
        else:
            default(message, category, *rest, **named)

    return show
