"""Names that stay in their folder, and what the system refuses as one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hpc_ddpm.errors import ClusterError, DataFormatError
from hpc_ddpm.files import first_unfit, is_file_name, private_folder, reading_from, writing_to


def test_names_of_files() -> None:
    good = ["a", "sub-01", "ü b.c", "日本", "a;b", "a b", "x" * 255]
    assert all(map(is_file_name, good))
    assert first_unfit(good) is None
    assert first_unfit([]) is None
    hidden, paths, unseen = ("", ".", "..", ".a"), ("a/b", "../a", "a\\b"), ("a\0", "a\nb", "a\n.b", "a\x1b[2J", "\x7f")
    for bad in (*hidden, *paths, *unseen, "M\udcfcller", "x" * 256, "ü" + "x" * 255):
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


def test_a_private_folder_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scratch" / "mine"
    for mode in (0o700, 0o775, 0o757):
        private_folder(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(mode)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for name, found in (("link", "a link"), ("file", "no folder")):
        with pytest.raises(ClusterError, match=f"{name}: {found}, not a folder of yours; remove it, or name another"):
            private_folder(tmp_path / name)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ClusterError, match=r"mine: of the user with the number \d+, not a folder of yours"):
        private_folder(folder)
