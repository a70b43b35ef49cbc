"""The one grammar of a query: how people name a token, on the command line and elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from vistvis.errors import InputError, LayoutError
from vistvis.names import nearest
from vistvis.tokens import TokenLayout

HELP = """\
A query is one token, named as FRAME:PLACE; without FRAME it lies in frame 0.

  0:120,80px     the patch under pixel x = 120, y = 80 of the original photo of frame 0
  0:r13,c15      the patch in grid row 13, column 15; rows and columns count from 0
  1:middle       the patch in the middle of frame 1
  cls            a special token by its kind; camera@2 or 2:camera is frame 2's camera token,
                 register1@2 the second of its registers
  2:40           token 40 of frame 2, its special tokens counted
  token 1750     a token counted over all frames, special ones too

Pixels count from the top left of the photo as it is shown (turned by its EXIF orientation), before
any crop. Where a command takes several queries they are separated by spaces; 'token 1750' is quoted
or written token1750."""

Pixel: TypeAlias = tuple[float, float]

_NUMBER = r"-?\d+(?:\.\d+)?"
_PLACES = {
    "pixel": re.compile(rf"({_NUMBER})\s*,\s*({_NUMBER})\s*px"),
    "cell": re.compile(r"r(\d+)\s*,?\s*c(\d+)"),
    "token": re.compile(r"token\s*(\d+)"),
    "in_frame": re.compile(r"(\d+)"),
    "kind": re.compile(r"([A-Za-z_]+?)(\d*)"),
}
_MIDDLE = "middle"
# More digits than any index has: Python itself refuses to read numbers of thousands of them.
_LONGEST = 60


@dataclass(frozen=True)
class TokenQuery:
    """A token as it was named: by just one of `pixel`, `cell`, `kind`, `token`, `in_frame`."""

    text: str
    frame: int | None = None
    pixel: Pixel | None = None
    cell: tuple[int, int] | None = None
    kind: str | None = None
    """Of a special token, of which it is the `nth`; or "middle"."""
    nth: int = 0
    token: int | None = None
    """Over all frames."""
    in_frame: int | None = None

    def within(self, frame: int) -> TokenQuery:
        """The same token of another frame, where the text named none."""
        return (
            self if self.frame is not None or self.token is not None else replace(self, frame=frame)
        )

    def index(
        self, layout: TokenLayout, *, to_model: Callable[[int, float, float], Pixel] | None = None
    ) -> int:
        """The absolute index of the token in a layout.

        `to_model(frame, x, y)` gives the pixel of the model's picture that shows a pixel of the
        photo; without it pixels count in the model's picture. InputError if there is no such token;
        the message begins with the query as it was written.
        """
        frame = self.frame or 0
        try:
            if not 0 <= frame < layout.frames:
                raise InputError(f"there is no frame {frame}, only 0…{layout.frames - 1}")
            if self.pixel is not None:
                x, y = to_model(frame, *self.pixel) if to_model else self.pixel
                return layout.token_at(frame, x, y)
            if self.cell is not None:
                return layout.index(frame=frame, row=self.cell[0], col=self.cell[1])
            if self.token is not None:
                return layout.locate(self.token).token
            if self.in_frame is not None:
                return layout.index(frame=frame, token=self.in_frame)
            if self.kind == _MIDDLE:
                return layout.center(frame=frame)
            return layout.index(frame=frame, kind=self.kind, nth=self.nth)
        except (InputError, LayoutError) as error:
            raise InputError(f"query {self.text!r}: {error}") from error


def parse_query(text: str) -> TokenQuery:
    """Read one query, as `HELP` has it; InputError for anything else, with what was probably meant.

    >>> parse_query("0:r13,c15").cell
    (13, 15)
    """
    short = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    plain = " ".join(text.split())
    head, colon, rest = plain.partition(":")
    place, at, behind = (rest if colon else plain).partition("@")
    frames = [part.strip() for part, said in ((head, colon), (behind, at)) if said]
    if len(text) > _LONGEST or len(frames) > 1 or not all(re.fullmatch(r"\d+", f) for f in frames):
        raise _meant(short)
    frame = int(frames[0]) if frames else None
    place = place.strip()
    for way, pattern in _PLACES.items():
        match = pattern.fullmatch(place)
        if match is None:
            continue
        one, two = match[1], match[match.lastindex or 1]
        if way == "pixel":
            return TokenQuery(short, frame, pixel=(float(one), float(two)))
        if way == "cell":
            return TokenQuery(short, frame, cell=(int(one), int(two)))
        if way == "token" and frame is None:
            return TokenQuery(short, token=int(one))
        if way in ("token", "in_frame"):
            return TokenQuery(short, frame, in_frame=int(one))
        return TokenQuery(short, frame, kind=one, nth=int(two or 0))
    raise _meant(short)


def _meant(text: str) -> InputError:
    """What is said of a text that names no token."""
    pair = re.fullmatch(rf"\s*(?:(\d+)\s*:)?\s*({_NUMBER})\s*[,x ]\s*({_NUMBER})\s*", text)
    if pair:
        frame = f"{pair[1]}:" if pair[1] else ""
        hint = f"write {frame}r{pair[2]},c{pair[3]} for a grid cell or {frame}{pair[2]},{pair[3]}px"
        return InputError(f"query {text!r}: {hint} for a pixel of the photo")
    near = nearest(text, (_MIDDLE, "cls", "camera", "register", "token 40"), count=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(
        f"query {text!r} names no token: {hint}it is FRAME:X,Ypx, FRAME:rROW,cCOL, a special token "
        "such as cls or camera@2, FRAME:N or 'token N'; see vistvis help queries"
    )
