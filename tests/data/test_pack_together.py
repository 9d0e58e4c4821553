"""Packing on many processes, nodes and days: always the bytes that one process writes in one go."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data import pack as packing
from hpc_ddpm.data import share
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.pack import PackReport, pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.plan import Shard
from hpc_ddpm.data.preprocess import Prepared
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.data.team import Team, default_workers, detect_team
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.errors import ClusterError, DataFormatError
from hpc_ddpm.workers import owner
from hpc_ddpm.workers.claims import Writer
from tests.conftest import Stranger, rank_environment

SIZE = (16, 16, 16)
SHARD_GIB = 3 * 16**3 * 3 / 2**30
SETTINGS = [f"data.size={list(SIZE)}", f"data.shard_size_gib={SHARD_GIB}"]
NUM_SUBJECTS = 11

MAKE_READY, WRITE_SHARD = share.Share._make_ready, share.write_shard
GIVE_NAMES = packing._give_names

Start = Callable[..., subprocess.Popen[str]]


def small(**changes: Any) -> DataConfig:
    """Three subjects per shard."""
    return DataConfig(**{"size": SIZE, "shard_size_gib": SHARD_GIB, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def voxels(folder: Path) -> dict[str, tuple[str, bytes, bytes]]:
    packed = open_packed(folder)
    return {
        subject.id: (subject.split, *(array.tobytes() for array in packed.read(subject.index)))
        for subject in packed.subjects()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, one of them broken."""
    folder = write_phantoms(tmp_path_factory.mktemp("together") / "heads", NUM_SUBJECTS, SIZE)
    (folder / "mask" / "head_0004.nii.gz").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def serial(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("serial") / "out"
    pack(source, out, small(), skip_bad=True)
    assert len(files(out)) == 1 + -(-NUM_SUBJECTS // 3)
    return files(out)


@pytest.fixture
def start(source: Path, tmp_path: Path) -> Start:
    """Start `hpc-ddpm pack` into tmp_path/out with variables of a launcher; `before` goes in front of the command."""

    def build(*options: str, before: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
        words = ["pack", str(source), "--out", str(tmp_path / "out"), *SETTINGS, *options]
        return subprocess.Popen(
            [*before, sys.executable, "-m", "launch.cli", *words],
            env=rank_environment() | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return build


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


# ------------------------------------------------------------------------------------------------- launchers


def test_workers(start: Start, tmp_path: Path, serial: dict[str, bytes]) -> None:
    out, err = finish(start("--workers", "3", "--skip-bad"))
    assert out.startswith(f"packed {NUM_SUBJECTS - 1} subjects: ")
    assert "head_0004" in err
    assert files(tmp_path / "out") == serial


def test_srun(start: Start, tmp_path: Path, serial: dict[str, bytes]) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_STEP_NODELIST": "n[1-3]"}
    outputs = [finish(p) for p in [start("--skip-bad", SLURM_PROCID=str(i), **step) for i in range(3)]]
    assert [out.startswith("packed 10 subjects: ") for out, _ in outputs] == [True, False, False]
    assert [bool(err) for _, err in outputs] == [True, False, False]
    assert files(tmp_path / "out") == serial


def test_bad_subjects_are_listed_by_rank_0_only(start: Start) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
    outputs = [finish(p, code=2) for p in [start(SLURM_PROCID=str(i), **step) for i in range(2)]]
    assert "1 of 11 subjects cannot be packed" in outputs[0][1]
    assert outputs[1] == ("", "")


def test_array(start: Start, tmp_path: Path, serial: dict[str, bytes]) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}
    tasks = [start("--skip-bad", "--workers", "1", SLURM_ARRAY_TASK_ID=str(5 + i), **array) for i in range(3)]
    said = [finish(task)[0] for task in tasks]
    assert any("packed 10 subjects" in out for out in said)
    assert files(tmp_path / "out") == serial
    late, _ = finish(start("--skip-bad", SLURM_ARRAY_TASK_ID="6", **array))
    assert late.startswith("packed 10 subjects (all were there)")


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_mpirun(start: Start, tmp_path: Path, serial: dict[str, bytes], num_ranks: int) -> None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("mpirun is not there: pip install 'hpc_ddpm[mpi]'")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ranks = (mpirun, "-n", str(num_ranks), "--oversubscribe")
    out, err = finish(start("--skip-bad", before=ranks, **as_root))
    assert out.count("packed 10 subjects: ") == 1
    assert err.count("left out: ") == 1
    assert files(tmp_path / "out") == serial


def test_teams_of_launchers() -> None:
    srun = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}
    one, two = (detect_team(Ranks(i, 2, started_by="srun"), srun) for i in range(2))
    assert (one.run, one.index, two.index, two.size, two.stays) == (two.run, 0, 1, 2, True)
    assert detect_team(Ranks(1, 2, started_by="srun"), srun | {"SLURM_STEP_ID": "2"}).run != two.run
    assert detect_team(Ranks(1, 2, started_by="srun"), srun | {"SLURM_RESTART_COUNT": "1"}).run != two.run
    task = detect_team(Ranks(), array | {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_STEP": "2"})
    assert (task.index, task.size, task.stays) == (3, 4, False)
    both = detect_team(Ranks(1, 2, started_by="srun"), srun | array | {"SLURM_ARRAY_TASK_ID": "3"})
    assert (both.index, both.size, both.run) == (3, 8, task.run)
    assert detect_team(Ranks(), {}).run != detect_team(Ranks(), {}).run
    torchrun = Ranks(1, 2, 1, 2, "torchrun", "localhost", 1234)
    assert detect_team(torchrun, {}) == detect_team(torchrun, {})


def test_default_workers() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_workers(Ranks(), {}) == cores
    assert default_workers(Ranks(0, 4, 0, 1, "srun"), {}) == cores
    assert default_workers(Ranks(0, 4, 0, 2, "mpirun"), {}) == 1
    assert default_workers(Ranks(0, 4, 0, 2, "srun"), {"SLURM_CPUS_PER_TASK": "3"}) == 3


# ------------------------------------------------------------------------------------------------- kills


def start_ranks(source: Path, out: Path, number: int, run: str) -> list[BaseProcess]:
    context = multiprocessing.get_context("fork")
    teams = [Team(run, i, number) for i in range(number)]
    options = [{"skip_bad": True, "team": team} for team in teams]
    ranks = [context.Process(target=pack, args=(source, out, small()), kwargs=option) for option in options]
    for rank in ranks:
        rank.start()
    return ranks


def kill(processes: list[BaseProcess]) -> int:
    """How many of them were running."""
    running = [process for process in processes if process.is_alive()]
    for process in running:
        process.kill()
    for process in processes:
        process.join()
    return len(running)


@pytest.mark.slow
def test_fifty_kills_of_one_rank_or_all(source: Path, tmp_path: Path, serial: dict[str, bytes]) -> None:
    out, rng, num_kills, num_sets = tmp_path / "out", random.Random(7), 0, 0
    begin = time.perf_counter()
    for rank in start_ranks(source, out, 3, "first"):
        rank.join()
    whole_s = time.perf_counter() - begin
    while num_kills < 50:
        if (out / "index.json").exists():
            assert files_only(out) == serial
            shutil.rmtree(out)
            num_sets += 1
        ranks = start_ranks(source, out, 3, f"run {num_kills}")
        time.sleep(rng.uniform(0, whole_s / 2))
        num_kills += kill([rng.choice(ranks)])
        time.sleep(rng.uniform(0, whole_s / 2))
        if rng.random() < 0.5:
            num_kills += kill(ranks)
        for rank in ranks:
            rank.join(60)
            assert rank.exitcode in (0, -signal.SIGKILL)
    pack(source, out, small(), skip_bad=True)
    assert num_sets > 0
    assert files(out) == serial


def test_a_shard_that_another_publishes_meanwhile_is_left_to_it(
    source: Path, tmp_path: Path, serial: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two can hold the claim of one that died: the first takes the rows away while the second reads them."""
    late: list[str] = []

    def make_ready_first(writer: share.Share, shard: Shard, found: share.Found) -> None:
        def write_after(*given: Any) -> None:
            monkeypatch.setattr(share, "write_shard", WRITE_SHARD)
            MAKE_READY(writer, shard, found)
            late.append(shard.name)
            WRITE_SHARD(*given)

        monkeypatch.setattr(share, "write_shard", write_after)
        MAKE_READY(writer, shard, found)

    monkeypatch.setattr(share.Share, "_make_ready", make_ready_first)
    pack(source, tmp_path / "out", small(), skip_bad=True)
    assert late == sorted(name for name in serial if name != "index.json")
    assert files(tmp_path / "out") == serial


@pytest.fixture
def at_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something done directly before the n-th file gets its name in tmp_path/out."""
    really_replace = Path.replace

    def build(number: int, act: Callable[[], None]) -> None:
        counter = itertools.count()

        def replace(self: Path, target: Path) -> Path:
            if Path(target).parent == tmp_path / "out" and next(counter) == number:
                act()
            return really_replace(self, target)

        monkeypatch.setattr(Path, "replace", replace)

    return build


@pytest.mark.parametrize("before", ["nothing", "replaced"])
def test_ended_between_two_renames_it_goes_on(
    source: Path, tmp_path: Path, serial: dict[str, bytes], at_rename: Callable[..., None], before: str
) -> None:
    out, old, is_replaced = tmp_path / "out", tmp_path / "old", before == "replaced"
    if is_replaced:
        pack(source, old, small(shard_size_gib=1e-9, normalization="zscore"), skip_bad=True)

    def stop() -> None:
        raise KeyboardInterrupt

    for number in (0, 2, len(serial) - 1):
        shutil.rmtree(out, ignore_errors=True)
        if is_replaced:
            shutil.copytree(old, out)
        at_rename(number, stop)
        with pytest.raises(KeyboardInterrupt):
            pack(source, out, small(), skip_bad=True, overwrite=is_replaced)
        assert not (out / "index.json").exists()
        assert pack(source, out, small(), skip_bad=True, overwrite=is_replaced).num_written == 0
        assert files(out) == serial


@pytest.mark.parametrize("number", [0, 2, 4])
def test_two_that_publish_at_once(
    source: Path,
    tmp_path: Path,
    serial: dict[str, bytes],
    at_rename: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """Two can hold the claim of one that died: one gives all names while the other is at its n-th."""
    given = list[Any]()

    def give_names(*arguments: Any) -> None:
        given[:] = arguments
        GIVE_NAMES(*arguments)

    def give_all() -> None:
        job, writer, entries = given
        with Writer(writer.state, job.purpose) as another:
            GIVE_NAMES(job, another, entries)
        given.append("twice")

    monkeypatch.setattr(packing, "_give_names", give_names)
    at_rename(number, give_all)
    pack(source, tmp_path / "out", small(), skip_bad=True)
    assert given[-1] == "twice"
    assert files(tmp_path / "out") == serial


def files_only(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


@pytest.mark.slow
def test_kills_of_pool_processes(start: Start, tmp_path: Path, serial: dict[str, bytes]) -> None:
    rng, codes = random.Random(0), set()
    for number in range(6):
        if (tmp_path / "out" / "index.json").exists():
            assert files_only(tmp_path / "out") == serial
            shutil.rmtree(tmp_path / "out")
        process = start("--workers", "3", "--skip-bad")
        deadline = time.monotonic() + 60
        while len(descendants(process.pid)) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # a resource tracker, the fork server, three workers
        time.sleep(rng.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError, IndexError):  # it may be done by now
            os.kill(process.pid if number % 2 else rng.choice(descendants(process.pid)), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 2, -signal.SIGKILL), err
        assert process.returncode != 2 or "a packing process ended with code -9" in err
        codes.add(process.returncode)
    finish(start("--workers", "3", "--skip-bad"))
    assert codes >= {-signal.SIGKILL}
    assert files(tmp_path / "out") == serial


def test_a_rank_that_dies_is_replaced(source: Path, tmp_path: Path, serial: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    ranks = start_ranks(source, out, 2, "run")
    deadline = time.monotonic() + 30
    while not list(out.glob(".pack/claims/*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    ranks[1].kill()
    ranks[0].join(30)
    assert ranks[0].exitcode == 0
    assert files_only(out) == serial


# ------------------------------------------------------------------------------------------------- two at once


def test_the_same_twice_at_once_is_help(start: Start, tmp_path: Path, serial: dict[str, bytes]) -> None:
    outputs = [finish(process)[0] for process in [start("--workers", "1", "--skip-bad") for _ in range(2)]]
    assert all(out.startswith("packed 10 subjects") for out in outputs)
    assert files(tmp_path / "out") == serial


def test_something_else_at_once_is_refused(
    source: Path, tmp_path: Path, stranger: Callable[..., Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it is heard; it may have died without a word."""
    out = tmp_path / "out"
    other = stranger(out / ".pack", beat_s=1e9)
    monkeypatch.setattr(packing.time, "sleep", lambda seconds: other.beat())
    refused = r"out: process 5 on n7 \(SLURM job 42\) is packing other subjects, files or"
    with pytest.warns(UserWarning, match="still packing something else"), pytest.raises(ClusterError, match=refused):
        pack(source, out, small(), skip_bad=True)
    monkeypatch.undo()
    monkeypatch.setattr(owner, "LEASE_S", 0.2)
    with pytest.warns(UserWarning, match="still packing something else"):
        assert pack(source, out, small(), skip_bad=True).num_written == 10
    assert not (out / ".pack").exists()


def test_an_array_task_leaves_the_end_to_others(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen, real = tmp_path / "out", list[PackReport](), share.prepare

    def prepare_while_a_second_task_runs(subject: Subject, config: DataConfig) -> Prepared:
        monkeypatch.setattr(share, "prepare", real)
        seen.append(pack(source, out, small(), skip_bad=True, team=Team("run", 1, 2, stays=False)))
        return real(subject, config)

    monkeypatch.setattr(share, "prepare", prepare_while_a_second_task_runs)
    report = pack(source, out, small(), skip_bad=True, team=Team("run", 0, 2, stays=False))
    assert [(entry.is_complete, entry.num_written) for entry in seen] == [(False, 9)]
    assert (report.is_complete, report.num_written, report.num_subjects) == (True, 1, 10)


# ------------------------------------------------------------------------------------------------- growth


def grow(folder: Path, number: int) -> Path:
    """More of the same phantoms; files that are there keep their times."""
    more = write_phantoms(folder.with_name("more"), number, SIZE)
    for path in sorted(more.rglob("*.nii.gz")):
        target = folder / path.relative_to(more)
        if not target.exists():
            shutil.copy2(path, target)
    return folder


def test_new_subjects_get_shards_of_their_own(tmp_path: Path) -> None:
    heads, out = write_phantoms(tmp_path / "heads", 5, SIZE), tmp_path / "out"
    pack(heads, out, small(val_fraction=0.3))
    before, known = files(out), voxels(out)
    for part in ("mask", "t1"):
        shutil.copy2(heads / part / "head_0003.nii.gz", heads / part / "a_first.nii.gz")
    report = pack(grow(heads, 9), out, small(val_fraction=0.3), num_workers=2)
    assert (report.num_written, report.num_subjects) == (5, 10)
    after, grown = files(out), voxels(out)
    assert sorted(set(after) - set(before)) == ["shard-00002.h5", "shard-00003.h5"]
    assert all(after[name] == before[name] for name in before if name != "index.json")
    assert {subject: grown[subject] for subject in known} == known
    assert [subject.id for subject in open_packed(out).subjects()] == ["a_first", *(f"head_000{i}" for i in range(9))]
    assert grown["a_first"][1:] == known["head_0003"][1:]
    assert pack(heads, out, small(val_fraction=0.3)).num_written == 0
    assert files(out) == after


def test_growing_never_moves_a_subject_to_another_split(tmp_path: Path) -> None:
    heads, out = write_phantoms(tmp_path / "heads", 2, SIZE), tmp_path / "out"
    splits: dict[str, str] = {}
    for number in range(2, 14, 3):
        pack(grow(heads, number), out, small(val_fraction=0.2))
        now = {subject.id: subject.split for subject in open_packed(out).subjects()}
        assert {subject: now[subject] for subject in splits} == splits
        splits = now
    assert set(splits.values()) == {"train", "val"}


def test_a_split_that_the_table_changes_is_refused(tmp_path: Path) -> None:
    heads, out, table = write_phantoms(tmp_path / "heads", 2, SIZE), tmp_path / "out", tmp_path / "table.csv"
    lines = [f"head_000{i},{heads}/mask/head_000{i}.nii.gz,{heads}/t1/head_000{i}.nii.gz" for i in range(2)]
    table.write_text("\n".join(["subject,mask,t1,split", lines[0] + ",train", lines[1] + ",val"]))
    pack(table, out, small())
    table.write_text("\n".join(["subject,mask,t1,split", lines[0] + ",test", lines[1] + ",val"]))
    with pytest.raises(DataFormatError, match=r"1 packed subject\(s\) in another split now \(head_0000\); pack into"):
        pack(table, out, small())
    assert pack(table, out, small(), overwrite=True).splits == {"val": 1, "test": 1}


def test_bad_new_subjects_leave_the_dataset_as_it_was(tmp_path: Path) -> None:
    heads, out = write_phantoms(tmp_path / "heads", 4, SIZE), tmp_path / "out"
    pack(heads, out, small())
    before = files(out)
    (grow(heads, 6) / "mask" / "head_0005.nii.gz").write_bytes(b"x")
    with pytest.raises(DataFormatError, match="1 of 6 subjects cannot be packed"):
        pack(heads, out, small())
    assert files_only(out) == before
    assert len(open_packed(out)) == 4
    assert pack(heads, out, small(), skip_bad=True).num_written == 0
    assert len(open_packed(out)) == 5


# ------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk(source: Path, small_disk: Path, serial: dict[str, bytes], num_workers: int) -> None:
    out = small_disk / "out"
    with pytest.raises(ClusterError, match=r"cannot write here \(No space left on device\); make room or") as caught:
        pack(source, out, small(), skip_bad=True, num_workers=num_workers)
    assert "\n" not in str(caught.value)
    published = files_only(out)
    assert all(serial[name] == data for name, data in published.items())
    assert "index.json" not in published
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    pack(source, out, small(), skip_bad=True, num_workers=num_workers)
    assert files(out) == serial


def test_a_disk_too_small_for_both_keeps_the_old_dataset(source: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    pack(source, out, small(), skip_bad=True)
    before = files(out)
    used = shutil.disk_usage(small_disk).used
    for more in (2**14, 2**16, used - 2**14):
        subprocess.run(["mount", "-o", f"remount,size={used + more}", str(small_disk)], check=True)
        with pytest.raises(ClusterError, match=r"cannot write here \(No space left on device\)"):
            pack(source, out, small(normalization="zscore"), skip_bad=True, overwrite=True)
        assert files_only(out) == before
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    pack(source, out, small(normalization="zscore"), skip_bad=True, overwrite=True)
    assert len(open_packed(out)) == 10
    assert files(out) != before


def test_a_file_size_limit_is_one_line_and_exit_code_2(start: Start) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        process = start("--workers", "1", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _, err = finish(process, code=2)
    assert err.count("\n") == 1
    assert "cannot write here (File too large); make room or choose another --out, then run the same" in err


def test_a_read_only_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "out", Path.mkdir

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        if self.is_relative_to(out):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ClusterError, match=r"out: cannot write here \(Read-only file system\)"):
        pack(source, out, small(), skip_bad=True)


def test_a_finished_dataset_is_recognised_without_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(source, tmp_path / "out", small(), skip_bad=True)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("nothing is to be made"))
    assert pack(source, tmp_path / "out", small(), skip_bad=True).num_written == 0
