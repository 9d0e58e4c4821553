import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data import stage as staging
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.data.stage import stage
from hpc_ddpm.errors import ClusterError, ConfigError, DataFormatError
from tests.conftest import rank_environment

ROWS_GIB = 2 * 8 * 10 * 12 * 3 / 2**30


@pytest.fixture
def data(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Six subjects in three shards, to be staged in $SCRATCH."""
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    pack(heads, tmp_path / "packed", tiny(shard_size_gib=ROWS_GIB))
    return tiny(shard_size_gib=ROWS_GIB, path=str(tmp_path / "packed"), stage_dir="${SCRATCH}/fast")


def files(data: DataConfig) -> list[str]:
    """Names in the folder of staged shards."""
    return sorted(path.name for path in (staging.expand(data.stage_dir) / f"hpc_ddpm-{os.getuid()}").glob("*.h5"))


def test_without_a_folder_the_data_stay_where_they_are(data: DataConfig) -> None:
    assert stage(data.model_copy(update={"stage_dir": ""})) == Path(data.path)


def test_the_copy_is_a_packed_dataset_made_once(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    news: list[tuple[int, int]] = []
    copy = stage(data, lambda done, total: news.append((done, total)))
    assert news == [(1, 3), (2, 3), (3, 3)]
    assert copy.is_relative_to(os.environ["SCRATCH"])
    here, there = open_packed(copy), open_packed(data.path)
    assert here.subjects() == there.subjects()
    for index in range(6):
        for found, expected in zip(here.read(index), there.read(index), strict=True):
            np.testing.assert_array_equal(found, expected)
    monkeypatch.setattr(staging, "_copy", None)
    assert stage(data, lambda done, total: news.append((done, total))) == copy
    assert len(news) == 3


def test_only_what_is_missing_is_copied(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stage(data)
    more = write_phantoms(tmp_path / "more", 8, (8, 10, 12), labels=LabelsConfig())
    for file in [*more.rglob("head_0006*"), *more.rglob("head_0007*")]:
        shutil.copyfile(file, tmp_path / "heads" / file.relative_to(more))
    pack(tmp_path / "heads", data.path, data)
    copied, really_copy = [], staging._copy

    def copy(source: Path, folder: Path, entry: staging.ShardEntry) -> None:
        copied.append(entry["file"])
        really_copy(source, folder, entry)

    monkeypatch.setattr(staging, "_copy", copy)
    second = stage(data)
    assert copied == ["shard-00003.h5"]
    assert (len(open_packed(first)), len(open_packed(second))) == (6, 8)


def test_variables_that_are_not_set(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ConfigError, match=r"data\.stage_dir=\$\{SCRATCH\}/fast: the environment variable SCRATCH is"):
        stage(data)


def test_not_enough_space(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10))
    with pytest.raises(ClusterError, match=r"0\.00 GiB needed for 3 of 3 shards, 0\.00 GiB are free; choose another"):
        stage(data)
    assert files(data) == []


def test_a_folder_that_cannot_be_written(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("not a folder")
    with pytest.raises(ClusterError, match=r"cannot write here .* choose another data\.stage_dir"):
        stage(data)


def test_a_damaged_shard_is_not_staged(data: DataConfig) -> None:
    shard = Path(data.path) / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataFormatError, match=r"shard-00001\.h5: SHA-256 differs from index\.json"):
        stage(data)
    assert len(files(data)) <= 2


@pytest.mark.parametrize("whole_path", [Path, Path.resolve])
def test_a_staged_shard_that_was_damaged_is_copied_again_once_deleted(
    data: DataConfig, whole_path: Callable[[Path], Path]
) -> None:
    staged = stage(data)
    shard = staged / "shard-00001.h5"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataFormatError, match=r"shard-00001\.h5: damaged shard .* or delete it and pack again"):
        open_packed(staged).read(2)
    whole_path(shard).unlink()
    assert stage(data) == staged
    assert len(files(data)) == 3
    np.testing.assert_array_equal(open_packed(staged).read(2)[0], open_packed(data.path).read(2)[0])


def test_a_folder_of_someone_else_is_not_used(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted before the first job: a link to a file of ours that would be truncated, and a whole dataset."""
    folder = staging.expand(data.stage_dir) / f"hpc_ddpm-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").write_text("precious")
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match="a link, not a folder of yours; remove it, or name another place"):
        stage(data)
    assert (tmp_path / "elsewhere" / "lock").read_text() == "precious"
    folder.unlink()
    copy = stage(data)
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    someone = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: someone)
    copy.parent.rename(folder.with_name(f"hpc_ddpm-{os.getuid()}"))
    with pytest.raises(ClusterError, match="not a folder of yours"):
        stage(data)


def test_an_index_that_says_otherwise_is_replaced(data: DataConfig) -> None:
    copy = stage(data)
    good = (copy / "index.json").read_bytes()
    for bad in (good.replace(b"head_0001", b"head_0009"), b"{}", b"\xff"):
        (copy / "index.json").write_bytes(bad)
        assert stage(data) == copy
        assert (copy / "index.json").read_bytes() == good


def test_what_arrives_is_compared(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what was sent: the node's disk may be what is broken."""

    def flip(source: Path, target: Path) -> None:
        content = bytearray(source.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content)

    monkeypatch.setattr(shutil, "copyfile", flip)
    with pytest.raises(DataFormatError, match=r"SHA-256 differs from index\.json"):
        stage(data)
    assert files(data) == []


SLOW = """
    import sys, time
    from hpc_ddpm.config import DataConfig
    from hpc_ddpm.data import stage as staging

    really_hash, staging.COPIES_AT_ONCE = staging.sha256, 1

    def slow(content=b""):
        time.sleep(0 if content else float(sys.argv[2]))
        print("hash", flush=True)
        return really_hash(content)

    data = DataConfig.model_validate_json(sys.argv[1])
    staging.sha256 = slow
    staging.stage(data)
"""


def start(data: DataConfig, delay_s: float) -> subprocess.Popen[str]:
    """A process that stages, with a pause within the copy of each shard."""
    command = [sys.executable, "-c", textwrap.dedent(SLOW), data.model_dump_json(), str(delay_s)]
    return subprocess.Popen(command, env=rank_environment(), stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_copies(data: DataConfig, tmp_path: Path) -> None:
    processes = [start(data, 0.3) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(output.count("hash") for output in outputs) == 3 + 3  # each names the dataset; a shard is copied once
    assert len(files(data)) == 3


def test_a_killed_copier_is_taken_over(data: DataConfig, tmp_path: Path) -> None:
    process = start(data, 60)
    folder = staging.expand(data.stage_dir) / f"hpc_ddpm-{os.getuid()}"
    while not (folder / ".copying" / "claims" / "copies").is_symlink():
        time.sleep(0.02)
        assert process.poll() is None
    (folder / ".half.h5.tmp").write_bytes(b"half")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(open_packed(stage(data))) == 6
    assert list(folder.glob(".*")) == []
