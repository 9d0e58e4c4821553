"""JSON that is read back: every object carries a checksum, and one reader checks it and the shape of the content.

The checksum is the last entry of an object and counts all bytes before it, so the file stays plain JSON:

    {"id": "head_r000", "seed": 5, "checksum": "crc32:89abcdef"}

`hpc_ddpm.files` writes it. Files of earlier versions have none: they are read, and a warning says so.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from hpc_ddpm.errors import DataFormatError, HpcDdpmError
from hpc_ddpm.text import one_line, show

KEY = "checksum"
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of things, bytes or steps."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
LONGEST = 160
"""Characters of a file's content that a message shows."""

_TAIL_BYTES = 200
_TAIL = re.compile(rb',?(?:\n  | )"checksum": "crc32:([0-9a-f]{8})"(?:\n)?}\s*\Z')
_LIKE_A_TAIL = re.compile(rb'"checksum":\s*[^\s{}\[\]]*\s*}\s*\Z|:\s*"crc32:[^"]*"\s*}\s*\Z')
"""One of its two words is there: a checksum that is damaged itself, or that somebody put in other white space."""

T = TypeVar("T")


class UnreadableError(ValueError):
    """Damaged, or of another shape than expected; says what was found in one line."""


def seal(text: str) -> str:
    """A JSON object, as `json.dumps` writes it, with its checksum as the last entry."""
    head = text.removesuffix("}")
    before, after = ("\n  ", "\n}") if head.endswith("\n") else (" ", "}")
    head = head.rstrip()
    comma = "" if head == "{" else ","
    return f'{head}{comma}{before}"{KEY}": "crc32:{zlib.crc32(head.encode()):08x}"{after}'


def unseal(data: bytes) -> tuple[bytes, bool]:
    """A JSON object without its checksum, and whether it had one.

    Raises:
        UnreadableError: the checksum is another.
    """
    begin = max(0, len(data) - _TAIL_BYTES)
    tail = data[begin:]
    if found := _TAIL.search(tail):
        head = data[: begin + found.start()]
        if f"{zlib.crc32(head):08x}".encode() == found[1]:
            return head + b"}", True
    if found or _LIKE_A_TAIL.search(tail):
        raise UnreadableError(f"its content does not fit its {KEY}: damaged, or changed by hand")
    return data, False


def parse(data: bytes, shape: type[T]) -> tuple[T, bool]:
    """What a JSON text holds, without its checksum, and whether it had one.

    Args:
        data: UTF-8.
        shape: of the content: any type that pydantic validates. Nothing is converted: text is no number.

    Raises:
        UnreadableError: no JSON, of another shape, or the checksum is another.
    """
    content, is_sealed = unseal(data)
    try:
        return _adapter(cast("Any", shape)).validate_json(content, strict=True), is_sealed
    except ValidationError as error:
        raise UnreadableError(_in_words(error)) from None


def read_json(
    path: Path, shape: type[T], advice: str, error: type[HpcDdpmError] = DataFormatError, *, is_sealed: bool = True
) -> T:
    """The content of a JSON file.

    Args:
        path: of the file.
        shape: of its content, as for `parse`.
        advice: what to do about a damaged file; ends the message.
        error: what to raise.
        is_sealed: this version writes it with a checksum; without one it is called old.

    Raises:
        error: it cannot be read (the OSError is its cause), is damaged, or of another shape.
    """
    try:
        content, was_sealed = parse(path.read_bytes(), shape)
    except OSError as caught:
        raise error(f"{path}: cannot be read ({caught.strerror}); {advice}") from caught
    except UnreadableError as caught:
        raise error(f"{path}: {caught}; {advice}") from None
    if is_sealed and not was_sealed:
        say_old(path.parent)
    return content


def read_lines(
    path: Path, shape: type[T], advice: str, error: type[HpcDdpmError] = DataFormatError, *, is_sealed: bool = True
) -> list[T]:
    """The objects of a JSONL file that is written as a whole, in their order; arguments as for `read_json`.

    Raises:
        error: it cannot be read, or a line is damaged.
    """
    lines = []
    for number, content, problem in _lines(path, shape, error, is_sealed):
        if content is None:
            raise error(f"{path}:{number}: {problem}; {advice}")
        lines.append(content)
    return lines


def read_log(
    path: Path, shape: type[T], error: type[HpcDdpmError] = DataFormatError, *, is_sealed: bool = True
) -> list[T]:
    """The objects of a JSONL file that grows line by line; none where there is no file. Arguments as for `read_json`.

    A last line without its end (killed while writing) is passed over, damaged ones too, with a warning.

    Raises:
        error: it cannot be read.
    """
    if not path.exists():
        return []
    lines, bad = [], []
    for number, content, problem in _lines(path, shape, error, is_sealed, is_log=True):
        if content is None:
            bad.append(f"line {number}: {problem}")
        else:
            lines.append(content)
    if bad:
        warnings.warn(f"{path}: {len(bad)} damaged lines passed over; {bad[0]}", stacklevel=2)
    return lines


def _lines(
    path: Path, shape: type[T], error: type[HpcDdpmError], is_sealed: bool, *, is_log: bool = False
) -> Iterator[tuple[int, T | None, str]]:
    """Number, content and problem of each line; blank ones are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as caught:
        raise error(f"{path}: cannot be read ({caught.strerror}); mend its permissions or its storage") from caught
    if is_log:
        lines.pop()  # empty, or torn
    all_sealed = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                content, was_sealed = parse(line, shape)
            except UnreadableError as caught:
                yield number, None, str(caught)
            else:
                all_sealed &= was_sealed
                yield number, content, ""
    if is_sealed and not all_sealed:
        say_old(path.parent)


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


@cache
def say_old(folder: Path) -> None:
    """Once for each folder."""
    warnings.warn(
        f"{folder}: written by an earlier version, without checksums in its small files; damage there may go unseen",
        stacklevel=3,
    )


def _in_words(error: ValidationError) -> str:
    """The first problem, in one short line."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place, found = ".".join(map(str, problem["loc"])), problem["input"]
    if problem["type"] == "json_invalid":
        text = f"not readable as JSON ({problem['msg'].removeprefix('Invalid JSON: ')})"
    else:
        shown = show(found) if isinstance(found, str | float | None) else f"a {type(found).__name__}"
        found_text = "" if problem["type"] in ("missing", "extra_forbidden") else f", found {shown}"
        text = f"{place + ': ' if place else ''}{problem['msg']}{found_text}"
    return one_line(text, LONGEST)
