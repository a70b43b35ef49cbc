"""Names that people type and read: globs, the nearest names, short lists, tables for notebooks."""

from __future__ import annotations

import difflib
import functools
import html
import re
from collections.abc import Iterable, Sequence

_PIECES = {"**.": r"(?:.*\.)?", ".**": r"(?:\..*)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name fits a glob: `*` stays within one part, `**` crosses dots."""
    return _glob(pattern).fullmatch(name) is not None


@functools.lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*\*\.|\.\*\*|\*\*|\*|\?)", pattern)
    return re.compile("".join(_PIECES.get(piece, re.escape(piece)) for piece in pieces))


def nearest(name: str, names: Iterable[str], *, count: int = 3, cutoff: float = 0.6) -> list[str]:
    """The names that look most like `name`, the best first."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=cutoff)


def suggestion(name: str, names: Iterable[str], *, otherwise: str) -> str:
    """For messages: "did you mean 'x'?", or `otherwise` where nothing is near."""
    near = nearest(name, names, count=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def few(names: Sequence[str], *, count: int = 5) -> str:
    """For messages: the first names, quoted, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def harmless(text: object) -> str:
    """For printing what a file says: signs that move a cursor, hide or reorder text are escaped."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(text)
    )


def html_table(rows: Sequence[Sequence[object]], *, caption: str = "", most: int = 100) -> str:
    """Rows of words, the first one their head, as HTML that a notebook shows; all text is escaped.

    Of more than `most` rows the first are shown, and how many more there are.
    """

    def line(cells: Sequence[object], tag: str) -> str:
        style = ' style="text-align: left"'
        texts = (f"<{tag}{style}>{html.escape(harmless(cell))}</{tag}>" for cell in cells)
        return f"<tr>{''.join(texts)}</tr>"

    head, *body = rows
    shown = [line(head, "th"), *(line(row, "td") for row in body[:most])]
    if len(body) > most:
        shown.append(line([f"… and {len(body) - most} more"], "td"))
    above = f"<div>{html.escape(harmless(caption))}</div>" if caption else ""
    return f"{above}<table>{''.join(shown)}</table>"
