from pathlib import Path

import pytest

from hpc_ddpm import host
from hpc_ddpm.host import free_memory


def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory()
    assert free > 0
    for name, content in {"limit": "1000000", "usage": "300000", "memory.stat": "file 5\ninactive_file 50000"}.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(host, "CGROUPS", ((":", str(tmp_path), "limit", "usage", "inactive_file"),))
    assert free_memory() == 750000
    (tmp_path / "limit").write_text("max")
    assert free_memory() > 750000
