"""Every test that the promises name is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")


def test_what_holds_a_promise_exists() -> None:
    file, named = "", 0
    for words in re.findall(r"`([^`]+)`", PAGE):
        match = re.fullmatch(r"(?:tests/)?(\w+\.py)?(?:::)?(test_\w+)?", words)
        if match is None or not any(match.groups()):
            continue
        file = match[1] or file
        text = (TESTS / file).read_text(encoding="utf-8")
        if match[2]:
            assert f"def {match[2]}(" in text, f"{file} has no {match[2]}"
            named += 1
    assert named >= 30
