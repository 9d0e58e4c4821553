"""Text from users and files, as it may stand in a message: one line, of bounded length, without control characters."""

from __future__ import annotations

import re
import reprlib
from typing import Any

CONTROL = "\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029"
"""Inside the brackets of a regular expression: characters that end lines or steer terminals."""
LONGEST = 2000

_CONTROL = re.compile(f"[{CONTROL}]")
_BREAK = re.compile(r"\s*[\t\n\r]\s*")
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 4, 20, 20, 20
_REPR.maxstring = _REPR.maxother = 200


def has_control(text: str) -> bool:
    """Whether it has a line break or another control character."""
    return _CONTROL.search(text) is not None


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text on one line: breaks become spaces, other control characters escapes, and a long middle is left out."""
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} … {text[-longest // 4 :]}"
    line = _BREAK.sub(" ", text.strip())
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], line)


def show(value: Any) -> str:
    """As `repr`, of bounded length."""
    return one_line(_REPR.repr(value))
