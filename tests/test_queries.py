"""The one grammar of a query: every way to name a token, and what is said of the others."""

from __future__ import annotations

import pytest

from vistvis import TokenLayout
from vistvis.errors import InputError
from vistvis.queries import HELP, parse_query

LAYOUT = TokenLayout(3, (28, 37), ("camera",) + ("register",) * 4)
P = LAYOUT.tokens_per_frame


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("0:r13,c15", 5 + 13 * 37 + 15),
        ("r13c15", 5 + 13 * 37 + 15),
        ("2:r0,c0", 2 * P + 5),
        ("1:120,80px", P + 5 + 5 * 37 + 8),
        (" 1 : 120 , 80 px ", P + 5 + 5 * 37 + 8),
        ("13.5,0px", 5),
        ("14,0px", 6),
        ("middle", 5 + 14 * 37 + 18),
        ("2:middle", 2 * P + 5 + 14 * 37 + 18),
        ("camera", 0),
        ("camera@2", 2 * P),
        ("2:camera", 2 * P),
        ("register@1", P + 1),
        ("register3@1", P + 4),
        ("40", 40),
        ("2:40", 2 * P + 40),
        ("token 1750", 1750),
        ("token1750", 1750),
        ("1:token 40", P + 40),
    ],
)
def test_ways_to_name_a_token(text: str, token: int) -> None:
    assert parse_query(text).index(LAYOUT) == token


def test_every_example_of_the_help_names_a_token() -> None:
    examples = [line[2:17].strip() for line in HELP.splitlines() if line.startswith("  ")]
    examples = [text for text in examples if text]
    assert len(examples) == 6
    for text in examples:
        layout = TokenLayout(3, (28, 37), ("cls", "camera", "register", "register"))
        parse_query(text).index(layout)


def test_pixels_go_through_the_way_of_the_photo() -> None:
    asked = []

    def to_model(frame: int, x: float, y: float) -> tuple[float, float]:
        asked.append((frame, x, y))
        return x / 10, y / 10

    token = parse_query("2:1200,800px").index(LAYOUT, to_model=to_model)
    assert asked == [(2, 1200.0, 800.0)]
    assert token == LAYOUT.token_at(2, 120, 80)


def test_a_frame_stands_in_where_none_was_named() -> None:
    assert parse_query("40").within(1).index(LAYOUT) == P + 40
    assert parse_query("2:40").within(1).index(LAYOUT) == 2 * P + 40
    assert parse_query("token 1750").within(2).index(LAYOUT) == 1750


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3,5", "write r3,c5 for a grid cell or 3,5px for a pixel"),
        ("1:3,5", "write 1:r3,c5 for a grid cell or 1:3,5px"),
        ("", "names no token"),
        ("1:2:3", "names no token"),
        ("camera@1@2", "names no token"),
        ("x:40", "names no token"),
        ("-5", "names no token"),
        ("9" * 5000, "names no token"),
        ("midle!", "did you mean 'middle'?"),
        ("tokn 40", "did you mean 'token 40'?"),
    ],
)
def test_what_names_no_token(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_query(text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("7:middle", "there is no frame 7, only 0…2"),
        ("r28,c0", "row 28 is outside 0…27"),
        ("cls", "no special token of kind 'cls': this layout has 1 × camera, 4 × register"),
        ("register4", "nth register 4 is outside 0…3"),
        ("token 99999", "token 99999 is outside"),
        ("9999,0px", "lies outside the 518×392 picture"),
        ("2:2000", "token 2000 is outside 0…1040"),
    ],
)
def test_tokens_that_a_layout_does_not_have(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_query(text).index(LAYOUT)
    assert str(caught.value).startswith(f"query {text!r}: ")
    assert said in str(caught.value)
