import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from hpc_ddpm.runlog import RunLog


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What threads that fail would print."""
    heard: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    return heard


def test_a_folder_that_vanishes_is_one_error(tmp_path: Path, told: list[Any]) -> None:
    """TensorBoard writes in a thread of its own, which would print a traceback beside our line."""
    hook, run_dir = threading.excepthook, tmp_path / "run"
    run_dir.mkdir()
    log = RunLog(run_dir, is_main=True)
    shutil.rmtree(run_dir)
    with pytest.raises(FileNotFoundError):
        for step in range(1, 1000):
            log.scalars(step, {"loss": 1.0})
            assert log._writer is not None
            log._writer.flush()
    with pytest.raises(FileNotFoundError):
        log.close()
    assert not told and threading.excepthook == hook


def test_other_threads_still_tell(tmp_path: Path, told: list[Any]) -> None:
    log = RunLog(tmp_path, is_main=True)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    log.close()
    assert [args.exc_type for args in told] == [ZeroDivisionError]
