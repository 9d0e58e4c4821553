"""A file that exists is complete: write beside it, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from hpc_ddpm.errors import ClusterError, DataFormatError
from hpc_ddpm.sealed import KEY, seal
from hpc_ddpm.text import CONTROL

FAULTS = (errno.EIO, errno.ESTALE)
CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *FAULTS,
}

_NAME = re.compile(rf"(?!\.)[^/\\\ud800-\udfff{CONTROL}]{{1,255}}")


def is_file_name(text: str) -> bool:
    """Whether it names a file or folder by itself: UTF-8, not hidden, no slash or control character, not too long."""
    return _NAME.fullmatch(text) is not None


def _fit(text: str) -> str:
    if not is_file_name(text):
        raise ValueError("a name without slashes or leading dot expected")
    return text


FileName = Annotated[str, AfterValidator(_fit)]
"""In the shape of a JSON file: text that `is_file_name`."""


def _inner(text: str) -> str:
    if not all(map(is_file_name, text.split("/"))):
        raise ValueError("a path within the folder, without leading dots, expected")
    return text


InnerPath = Annotated[str, AfterValidator(_inner)]
"""In the shape of a JSON file: a relative path that does not leave its folder."""


def first_unfit(names: Sequence[str]) -> str | None:
    """The first that is not `is_file_name`; looks at a hundred thousand in a few milliseconds."""
    joined = "/".join(("", *names, ""))
    is_plain = joined.isascii() and joined.isprintable() and joined.count("/") == len(names) + 1
    longest = max(map(len, names), default=0)
    if is_plain and longest <= 255 and not any(part in joined for part in ("\\", "/.", "//")):
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
    temporary = folder / f".{path.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
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
    path: Path,
    value: Any,
    *,
    indent: int | None = None,
    durable: bool = True,
    scratch: Path | None = None,
    is_sealed: bool = True,
) -> None:
    """Atomically write `value` as JSON; the order of keys is kept. `indent` where a person will read it.

    An object gets a checksum (`hpc_ddpm.sealed`), unless other programs define the format: then `is_sealed=False`.
    """
    if is_sealed and isinstance(value, dict):
        inner = {name: part for name, part in value.items() if name != KEY}  # of a file that was read in another way
        text = seal(json.dumps(inner, indent=indent, ensure_ascii=False))
    else:
        text = json.dumps(value, indent=indent, ensure_ascii=False)
    with atomic_path(path, durable=durable, scratch=scratch) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file, on the disk at return; a torn line before them stays by itself."""
    data = "".join(f"{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Add an object with its checksum to a JSONL file, as `append_lines` does."""
    append_lines(path, [seal(json.dumps(value))])


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; on success its files are brought to the disk and it is renamed, else removed.

    Raises:
        FileExistsError: `path` is there already, and not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            fsync(entry)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            raise
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        if error.errno == errno.ENAMETOOLONG:
            raise ClusterError(f"{place}: {error.strerror}; choose a shorter {setting}") from None
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


def private_folder(folder: Path) -> None:
    """Make a folder that nobody else can write in, or see that it is one: for what is read or run without a check.

    Raises:
        ClusterError: it is a link, or another user's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        found = "a link" if stat.S_ISLNK(facts.st_mode) else f"of the user with the number {facts.st_uid}"
        found = found if stat.S_ISDIR(facts.st_mode) or stat.S_ISLNK(facts.st_mode) else "no folder"
        raise ClusterError(f"{folder}: {found}, not a folder of yours; remove it, or name another place")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)


def fsync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
