"""What a rank sees to before it computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_ddpm.device import CACHES, local_device
from hpc_ddpm.distributed import detect_ranks
from hpc_ddpm.errors import ClusterError


def test_compiled_code_of_someone_else_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")
    folder = tmp_path / f"hpc_ddpm-{os.getuid()}"
    for name in CACHES:
        monkeypatch.setenv(name, str(folder / name.lower()))
    assert local_device(detect_ranks()).type == "cpu"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ClusterError, match="a link, not a folder of yours"):
        local_device(detect_ranks())
    for name in CACHES:  # a folder that the user chose for a group
        monkeypatch.setenv(name, str(tmp_path / "shared" / name.lower()))
    assert local_device(detect_ranks()).type == "cpu"
