"""The command line: find the command, let it parse and run, turn errors into one plain line.

A command is a module with `HELP: str` (one line), `add_arguments(parser)` and
`run(arguments) -> int`. Built-in ones lie in `vistvis/commands/`; front ends bring theirs through
the entry-point group "vistvis.commands". Only the module of the chosen command is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NoReturn, TextIO

from vistvis import commands
from vistvis.errors import InputError, VistvisError, VistvisWarning
from vistvis.files import version
from vistvis.names import harmless, suggestion

GROUP = "vistvis.commands"
# What `vistvis help TOPIC` prints beside the help of commands: the module that has it as `HELP`.
TOPICS = {"queries": ("vistvis.queries", "how a token is named")}
USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` without the program's name, default `sys.argv[1:]`.

    Returns the exit code: 0, 2 for wrong input of any kind, 130 after Ctrl-C. As with every
    argparse program, `--help` and arguments that can't be parsed end in `SystemExit`.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["help"]
    if name in ("-h", "--help", "help"):
        return guarded("vistvis help", lambda: show_help(rest if name == "help" else []))
    if name in ("-V", "--version"):
        print(f"vistvis {version() or '(from a checkout, not installed)'}")
        return 0
    return guarded(f"vistvis {name}", lambda: run(f"vistvis {name}", load(name), rest))


def show_help(topics: Sequence[str]) -> int:
    """Print the overview, the help of a command, or that of a topic."""
    if not topics:
        print(overview())
    elif topics[0] in TOPICS:
        print(getattr(importlib.import_module(TOPICS[topics[0]][0]), "HELP"))  # noqa: B009
    else:
        run(f"vistvis {topics[0]}", load(topics[0], also=TOPICS), ["--help"])
    return 0


def run(program: str, command: Any, argv: Sequence[str]) -> int:
    """Parse `argv` for a command module and run it."""
    parser = parser_of(program, command)
    arguments = parser.parse_args(argv)
    for action in parser._actions:
        # What argparse makes of `--option=--`.
        if action.nargs is None and getattr(arguments, action.dest, None) == []:
            parser.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
    return int(command.run(arguments) or 0)


def parser_of(program: str, command: Any) -> argparse.ArgumentParser:
    """The parser of a command module."""
    parser = _Parser(prog=program, description=command.HELP, formatter_class=_Help)
    command.add_arguments(parser)
    return parser


def guarded(program: str, call: Callable[[], int]) -> int:
    """Call, with errors of input as one line on stderr instead of a traceback."""
    harmless_output: Any = _Harmless(sys.stdout)
    with warnings.catch_warnings(), contextlib.redirect_stdout(harmless_output):
        warnings.simplefilter("always", VistvisWarning)
        warnings.showwarning = _plain_warnings(program, warnings.showwarning)
        try:
            code = call()
            sys.stdout.flush()  # here, where a reader that has gone is not an error
            return code
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


def load(name: str, *, also: Iterable[str] = ()) -> Any:
    """The module of a command; `InputError` if there is none or it lacks what a command has.

    `also` are other names that may be meant.
    """
    available = find_commands()
    if name not in available:
        names = [*available, *also]
        hint = suggestion(name, names, otherwise=f"there are {', '.join(names) or 'none'}")
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
    lines.append("")
    lines += [f"  vistvis help {topic:<10}{what}" for topic, (_, what) in TOPICS.items()]
    return "\n".join(lines)


class _Help(argparse.RawDescriptionHelpFormatter):
    """At most 100 columns; what an option does stands beside its names, one line of usage."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=30, width=min(columns, 100))

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], *rest: Any, **named: Any
    ) -> None:
        words = [_in_usage(action) for action in actions if not action.option_strings]
        super().add_usage(" ".join(["%(prog)s", *words, "[options]"]), actions, *rest, **named)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-o, --out DIR`, where argparse before Python 3.13 says `-o DIR, --out DIR`."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._get_default_metavar_for_optional(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, metavar)}"


def _in_usage(action: argparse.Action) -> str:
    name = f"{action.metavar or action.dest}{' …' if action.nargs in ('+', '*') else ''}"
    return f"[{name}]" if action.nargs in ("?", "*") else name


class _Harmless:
    """A stream on which names and words from elsewhere can't move the cursor or hide text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write("\n".join(map(harmless, text.split("\n"))))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        message = harmless(" ".join(message.split()))
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, VistvisError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _say(program: str, text: str) -> None:
    print(f"{harmless(program)}: {harmless(text)}", file=sys.stderr)


def _plain_warnings(program: str, default: Callable[..., None]) -> Callable[..., None]:
    def show(message: Any, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, VistvisWarning):
            _say(program, f"warning: {_text(message)}")
        else:
            default(message, category, *rest, **named)

    return show
