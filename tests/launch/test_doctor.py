"""The doctor says what is wrong, in one line, and what to do."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_ddpm.errors import ClusterError
from launch import doctor, slurm
from launch.profiles import load_profile

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_this_machine_is_sound(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--path", tmp_path, "--json")
    assert done.returncode == 0, done.stdout
    found = {finding["check"]: finding["status"] for finding in json.loads(done.stdout)}
    for check in ("python", "conv3d", "deepspeed", "ranks", "hdf5"):
        assert found[check] == "pass"
    assert not any(tmp_path.iterdir())


def test_a_wrong_convolution_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.conv3d
    monkeypatch.setattr(
        "torch.nn.functional.conv3d", lambda x, w, **k: right(x, w, **k) * (1 + (x.element_size() == 2))
    )
    (finding,) = doctor._conv3d()
    assert (finding.status, finding.found[:11]) == ("fail", "bf16 is off")


def test_a_path_that_is_not_there_fails(tmp_path: Path) -> None:
    (finding,) = doctor._hdf5(tmp_path / "nowhere")
    assert finding.status == "fail"
    assert list(doctor._space(tmp_path / "nowhere")) == []


def test_no_slurm_fails_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert [finding.status for finding in doctor._slurm(load_profile("local"))] == ["warn"]
    assert [finding.status for finding in doctor._slurm(load_profile("devcluster"))] == ["fail"]


def test_tasks_that_have_not_started_are_counted() -> None:
    assert slurm.expand_tasks("7_[0-2,5%4]") == ["7_0", "7_1", "7_2", "7_5"]
    assert slurm.expand_tasks("7_3") == ["7_3"]


def test_a_probe_that_hangs_or_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The disk and SLURM are looked at all the same."""

    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    for check in ("_python", "_gpu", "_conv3d"):
        monkeypatch.setattr(doctor, check, lambda: iter(()))
    monkeypatch.setattr(subprocess, "run", hang)
    found = {finding.check: finding for finding in doctor.examine(load_profile("local"), tmp_path)}
    assert [found[name].status for name in ("deepspeed", "ranks", "mpi", "hdf5")] == ["fail", "fail", "warn", "fail"]
    assert "nothing within 120 s" in found["hdf5"].found
    assert "space" in found and "slurm" in found
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, -7, "", ""))
    (finding,) = doctor._hdf5(tmp_path)
    assert finding.found.endswith("exit code -7")


def test_slurm_that_stops_answering_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*command: str) -> str:
        if command[0] == "sinfo":
            raise ClusterError("`sinfo` did not answer within 60 s; try again later")
        return "MaxArraySize = 1001"

    monkeypatch.setattr(slurm, "ask", ask)
    found = {finding.found: finding.status for finding in doctor._slurm(None)}
    assert found["`sinfo` did not answer within 60 s; try again later"] == "fail"
    assert found["1001 tasks at most (MaxArraySize)"] == "pass"


def test_every_partition_of_a_list_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "gpu|gpu:a100:4|2|1-00:00:00|up\ncpu|(null)|2|1-00:00:00|up\n"
    monkeypatch.setattr(slurm, "ask", lambda *command: rows)
    profile = load_profile("devcluster").model_copy(
        update={"partition": "gpu,gpu-long", "cpu_partition": "cpu", "gpus_per_node": 4}
    )
    _, *found = doctor._partitions(profile)
    assert [(finding.status, finding.found) for finding in found] == [
        ("pass", "partition gpu is up, 4 GPUs per node"),
        ("fail", "no partition gpu-long"),
        ("pass", "partition cpu is up, 0 GPUs per node"),
    ]
