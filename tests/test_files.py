"""Names that stay in their folder, and what the system refuses as one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hpc_ddpm.errors import ClusterError, DataFormatError
from hpc_ddpm.files import first_unfit, is_file_name, reading_from, writing_to


def test_names_of_files() -> None:
    good = ["a", "sub-01", "ü b.c", "日本", "a;b", "a\n.b"]
    assert all(map(is_file_name, good))
    assert first_unfit(good) is None
    assert first_unfit([]) is None
    for bad in ("", ".", "..", ".a", "a/b", "../a", "a\\b", "a\0", "M\udcfcller"):
        assert not is_file_name(bad)
        assert first_unfit(["a", bad, "b"]) == first_unfit([*good, bad]) == bad


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


def test_a_fault_without_a_name_may_be_that_of_the_source(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="storage fails, here or at the source"), writing_to(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
