"""One volume of a 4-D file as a path of its own: FILE#NUMBER, counted from 0."""

from __future__ import annotations

import re
from pathlib import Path

_MEMBER = re.compile(r"(.+\.[A-Za-z]+)#(\d+)")


def volume_of_series(path: Path, number: int) -> Path:
    """The path of one volume of a 4-D file."""
    return path.with_name(f"{path.name}#{number}")


def split_series(path: Path) -> tuple[Path, int | None]:
    """The file, and which of its volumes is meant; None where the path names the whole file."""
    match = _MEMBER.fullmatch(path.name)
    return (path.with_name(match.group(1)), int(match.group(2))) if match else (path, None)
