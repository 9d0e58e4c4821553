"""Names that stay in their folder, and what the system refuses as one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hpc_ddpm.errors import ClusterError, DataFormatError
from hpc_ddpm.files import is_file_name, reading_from, writing_to


def test_names_of_files() -> None:
    assert all(map(is_file_name, ("a", "sub-01", "ü b.c", "日本", "a;b")))
    assert not any(map(is_file_name, ("", ".", "..", ".a", "a/b", "../a", "a\\b", "a\0", "M\udcfcller")))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EISDIR, errno.EEXIST])
def test_what_cannot_be_written_is_one_line(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(
            ClusterError, match=rf"cannot write here \({os.strerror(code)}\); make room or choose another --out"
        ),
        writing_to(tmp_path),
    ):
        raise OSError(code, os.strerror(code), str(tmp_path / "x"))


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(
            DataFormatError, match=r"gone: cannot be read \(No such file or directory\); mend its permissions"
        ),
        reading_from(tmp_path),
    ):
        (tmp_path / "gone").read_bytes()
