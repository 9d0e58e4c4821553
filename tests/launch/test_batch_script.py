"""What becomes lines of a batch script, and what a job loads: nothing there is someone else's to choose."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shlex
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hpc_ddpm.errors import ClusterError, ConfigError
from launch.executor import Request, batch_script, submit
from launch.jobs import StageJob
from launch.profiles import Profile, load_profile
from launch.records import read_submissions
from launch.snapshot import take_snapshot

SLURM = load_profile("devcluster")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that take every job."""
    (tmp_path / "bin").mkdir()
    for name, line in {"sbatch": "echo Submitted batch job 7", "squeue": "true"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


@pytest.fixture
def open_umask() -> Iterator[None]:
    """As sites set it where groups share folders."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.parametrize("name", ["a\ntouch X #", "a\rb", "a\x1b[2Jb", "a%jb", "a%tb", "a%A", "a%ab", "a\\b"])
def test_a_folder_that_a_script_would_read_otherwise(sbatch: Path, tmp_path: Path, name: str) -> None:
    """In what is shown as in what is started; also where only the working directory is called so."""
    (tmp_path / name).mkdir()
    for run_dir in (tmp_path / name, tmp_path / name / "run"):
        request = Request("report", ("report",), run_dir, SLURM)
        for function in (batch_script, submit):
            with pytest.raises(ConfigError, match="rename the folder") as caught:
                function(request)
            assert str(caught.value).isprintable()
    assert list((tmp_path / name).iterdir()) == []


@pytest.mark.parametrize(("num_tasks", "pattern"), [(0, "%j"), (3, "%A_%a")])
def test_slurm_fills_in_no_part_of_a_folders_name(tmp_path: Path, num_tasks: int, pattern: str) -> None:
    folder = tmp_path / "50%uncut's $(x)" / "jobs"
    script = batch_script(Request("sample", ("sample",), folder.parent, SLURM, num_tasks))
    escaped = str(folder).replace("%", "%%")
    wanted = shlex.quote(f"{escaped}/{pattern}_0_log.out")
    assert [line for line in script.splitlines() if "SBATCH --output" in line] == [f"#SBATCH --output={wanted}"]
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("srun")))
    outputs = [word for before, word in itertools.pairwise(words) if before == "--output"]
    assert outputs[-1] == f"{escaped}/{pattern}_%t_log.out"
    assert words[-1] == str(folder)
    subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"partition": "a\nb"}, "partition: "),
        ({"account": "a\n#SBATCH --uid=0"}, "account: "),
        ({"gpu_type": "a\x00"}, "has a control character"),
        ({"python": "python\ntouch X"}, "python: "),
        ({"container": "x\r"}, "has a control character"),
        ({"modules": ["a", "b\nc"]}, "modules: "),
        ({"setup": ["a\x1bb"]}, "has a control character"),
        ({"environment": {"A": "1\n2"}}, "environment: "),
        ({"environment": {"A=1;touch x": "2"}}, "environment"),
        ({"environment": {"A\n": "2"}}, "environment"),
        ({"sbatch": {"comment": "a\nb"}}, "sbatch: "),
        ({"sbatch": {"comment=a\ntouch X": "b"}}, "sbatch"),
        ({"sbatch": {"--wrap": "b"}}, "sbatch"),
        ({"scratch": '/x"; touch X; "'}, "scratch: "),
        ({"scratch": "$(touch X)"}, "scratch: "),
        ({"time": "1" * 5000 + ":00:00"}, "is no time"),
        ({"memory_per_gpu": "9" * 5000 + "G"}, "memory_per_gpu"),
    ],
)
def test_a_profile_of_other_lines(tmp_path: Path, values: dict[str, object], part: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=rf"profile\.yaml.*({part})") as caught:
        load_profile(str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2500


def test_what_a_profile_may_hold(tmp_path: Path) -> None:
    """Shell of several lines, and values that need quotes."""
    values = {"setup": ["if true; then\n\ttrue\nfi"], "environment": {"A_1": "it's $HOME; x"}, "scratch": "${X:-/tmp}"}
    profile = Profile.model_validate(SLURM.model_dump() | values | {"sbatch": {"mail-type": "END,FAIL"}})
    script = batch_script(Request("train", ("train",), tmp_path, profile))
    assert "export A_1='it'\"'\"'s $HOME; x'" in script
    assert "#SBATCH --mail-type=END,FAIL" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.usefixtures("open_umask", "sbatch")
def test_what_a_job_loads_is_not_for_the_group_to_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    submit(Request("report", ("report",), run, SLURM))
    assert os.umask(0o002) == 0o002
    jobs = run / "jobs"
    assert jobs.stat().st_mode & stat.S_ISVTX  # others may add jobs, not replace these
    there = [path for path in jobs.rglob("*") if path.name != ".lock"]
    assert {".pkl", ".sh", ".json", ".py"} <= {path.suffix for path in there}
    assert [str(path) for path in there if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)] == []
    job = pickle.loads(next(jobs.glob("*.pkl")).read_bytes()).function
    assert isinstance(job, StageJob)
    assert job.umask == 0o002


@pytest.mark.usefixtures("open_umask")
def test_planted_code_is_not_run(tmp_path: Path) -> None:
    """Someone of the group made the folder first, under the name that the copy will have."""
    name = take_snapshot(tmp_path / "mine").name
    for planted in (tmp_path / "a" / name, tmp_path / "b" / "elsewhere"):
        planted.mkdir(parents=True)
        (planted / "launch.py").write_text("evil")
    (tmp_path / "a" / name).chmod(0o775)
    (tmp_path / "b" / name).symlink_to(tmp_path / "b" / "elsewhere")
    for folder in (tmp_path / "a", tmp_path / "b"):
        code = take_snapshot(folder)
        assert code.name.startswith(f"{name}-")
        assert not (code / "launch.py").exists()
        assert take_snapshot(folder) == code
        assert len(list(folder.glob(".code-*"))) == 0


@pytest.mark.parametrize("number", ["-1", "--user=root", "../7", "7 8", "7\n", ""])
def test_the_number_of_a_job_is_a_number(sbatch: Path, tmp_path: Path, number: str) -> None:
    """It becomes a word of `scancel`, and the number of a process."""
    record = submit(Request("report", ("report",), tmp_path, SLURM)).folder / "7.json"
    content = {name: value for name, value in json.loads(record.read_text()).items() if "sum" not in name}
    record.write_text(json.dumps(content | {"job_id": number}))  # as older versions wrote it, without a checksum
    with pytest.raises(ClusterError, match=r"7\.json: .*no record of a job"):
        read_submissions(tmp_path)
