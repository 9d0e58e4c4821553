"""A file that exists is complete: write beside it, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_ddpm.errors import ClusterError, DataFormatError

FAULTS = (errno.EIO, errno.ESTALE)
CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.EEXIST),
    *FAULTS,
}

_NAME = re.compile(r"(?!\.)[^/\\\0\ud800-\udfff]+")


def is_file_name(text: str) -> bool:
    """Whether it names a file or folder by itself: UTF-8, not empty, not hidden, without slashes and NUL."""
    return _NAME.fullmatch(text) is not None


def first_unfit(names: Sequence[str]) -> str | None:
    """The first that is not `is_file_name`; looks at a hundred thousand in a few milliseconds."""
    lines = "\n".join(("", *names, ""))
    if lines.isascii() and not any(part in lines for part in ("/", "\\", "\0", "\n.", "\n\n")):
        return None
    return next((name for name in names if not is_file_name(name)), None)


@contextmanager
def atomic_path(path: Path, *, durable: bool = True, scratch: Path | None = None) -> Iterator[Path]:
    """A temporary name in `scratch` or beside `path`; renamed to it on success, removed on an exception.

    A killed process leaves the old file or the new one; if `durable`, so does a power cut.
    `scratch` is a folder on the same file system, for callers who remove what killed processes leave.
    """
    folder = scratch or path.parent
    for parent in (folder, path.parent):
        parent.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        if durable:
            fsync(temporary)
        temporary.replace(path)
        if durable:
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomically write UTF-8 text."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: Path, value: Any, *, indent: int | None = None, durable: bool = True, scratch: Path | None = None
) -> None:
    """Atomically write `value` as JSON; the order of keys is kept. `indent` where a person will read it."""
    with atomic_path(path, durable=durable, scratch=scratch) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def writing_to(folder: Path, setting: str = "--out") -> Iterator[None]:
    """Turn a full disk, a quota, a read-only or vanished folder into one line; `setting` is what names the folder.

    Raises:
        ClusterError: the system refused to write in `folder`.
    """
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename or folder)).absolute()
        is_ours = place.is_relative_to(folder.absolute()) or folder.absolute().is_relative_to(place)
        if error.errno not in CANNOT_WRITE or not is_ours:
            raise
        is_vague = error.errno in FAULTS and not error.filename
        what = "storage fails, here or at the source" if is_vague else "cannot write here"
        raise ClusterError(
            f"{folder}: {what} ({error.strerror}); make room or choose another {setting}, then run the same "
            "command again: what is finished is kept"
        ) from None


@contextmanager
def reading_from(place: Path) -> Iterator[None]:
    """Turn what the system does not let be read into one line.

    Raises:
        DataFormatError: names the file or folder; `place` where the system does not.
    """
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or place)
        raise DataFormatError(
            f"{name}: cannot be read ({error.strerror or error}); mend its permissions or its storage",
            "unreadable",
        ) from None


def fsync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
