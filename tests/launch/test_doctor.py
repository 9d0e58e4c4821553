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
from launch import doctor, doctor_slurm, slurm
from launch.doctor_slurm import look_at_slurm
from launch.profiles import Profile, load_profile

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
    assert [finding.status for finding in look_at_slurm(load_profile("local"))] == ["warn"]
    assert [finding.status for finding in look_at_slurm(load_profile("devcluster"))] == ["fail"]


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
    found = {finding.found: finding.status for finding in look_at_slurm(None)}
    assert found["`sinfo` did not answer within 60 s; try again later"] == "fail"
    assert found["1001 tasks at most (MaxArraySize)"] == "pass"


def test_every_partition_of_a_list_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "gpu|gpu:a100:4|2|1-00:00:00|up\ncpu|(null)|2|1-00:00:00|up\n"
    monkeypatch.setattr(slurm, "ask", lambda *command: rows if "%R|%G|%D|%l|%a" in command else "")
    profile = load_profile("devcluster").model_copy(
        update={"partition": "gpu,gpu-long", "cpu_partition": "cpu", "gpus_per_node": 4}
    )
    _, *found = doctor_slurm._partitions(profile)
    assert [(finding.status, finding.found) for finding in found] == [
        ("pass", "partition gpu is up, 4 GPUs per node"),
        ("fail", "no partition gpu-long"),
        ("pass", "partition cpu is up, 0 GPUs per node"),
    ]


SAID = {
    "show config": "MaxArraySize = 1001\nAccountingStorageEnforce = associations,limits,qos\n",
    "sinfo -h -o %R": "gpu|gpu:a100:4(S:0-1)|2|1-00:00:00|up\ngpu|gpu:v100:8|6|1-00:00:00|up\n",
    "sinfo -h -o %P": "cpu\ngpu*\n",
    "sinfo -h -N": "64|512000\n64|512000\n",
    "show partition": "AllowAccounts=lab,course DenyQos=big MaxNodes=4 MinNodes=0 MaxTime=1-00:00:00 QoS=part",
    "show assoc": "lab||normal,big|normal|||||\n",
    "show qos": "normal|12:00:00||gres/gpu=8||2|3\nbig||||||\npart||gres/gpu:a100=6||||\n",
}
"""Answers of SLURM 22.05 and 24.05, shortened."""


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"gpus_per_node": 8}, "gpu has 4 GPUs per node, 8 asked"),
        ({"gpu_type": "h100"}, "gpu has no GPU of type h100, it has a100, v100"),
        ({"gpu_type": ""}, None),
        ({"nodes": 3}, "gpu has 2 nodes with 4 such GPUs, 3 asked"),
        ({"nodes": 5, "gpus_per_node": 1}, "partition gpu takes jobs of 4 nodes at most, 5 asked"),
        ({"time": "2-00:00:00"}, "partition gpu ends jobs after 1-00:00:00, 2-00:00:00 asked"),
        ({"time": "13:00:00"}, "QOS normal ends jobs after 12:00:00, 13:00:00 asked"),
        ({"account": "other"}, "partition gpu is not open to account other"),
        ({"account": "course"}, "somebody has no account course"),
        ({"qos": "big"}, "partition gpu is not open to QOS big"),
        ({"qos": "small"}, "QOS small is not open to account lab"),
        ({"cpus_per_gpu": 20}, "partition gpu has 64 cores per node, 80 asked"),
        ({"memory_per_gpu": "200G"}, "partition gpu has 512000 MB per node, 819200 MB asked"),
        ({"nodes": 2}, "QOS part allows gres/gpu:a100=6 (MaxTRESPerJob), 8 asked"),
        ({"gpu_type": "v100", "nodes": 3}, "QOS normal allows gres/gpu=8 (MaxTRESPerUser), 12 asked"),
        ({"array_parallelism": 2}, "QOS normal takes 3 jobs and array tasks of a user at a time (MaxSubmitJobs)"),
        ({"array_parallelism": 3}, "QOS normal runs 2 jobs of a user at a time (MaxJobs), array_parallelism=3"),
    ],
)
def test_what_the_cluster_would_not_run_is_said_before(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], found: str | None
) -> None:
    """Type and number of GPUs, limits of the partition (here the default one), of the account and of the QOS."""

    def ask(*command: str) -> str:
        return next((text for words, text in SAID.items() if words in " ".join(command)), "")

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    base = {"gpu_type": "a100", "gpus_per_node": 4, "cpus_per_gpu": 8, "time": "8:00:00", "array_parallelism": 1}
    findings = list(look_at_slurm(Profile.model_validate(base | changes)))
    said = [finding.found for finding in findings if finding.status != "pass"]
    if found is None:
        assert not [finding for finding in findings if finding.status == "fail"]
    else:
        assert found in said, said


@pytest.mark.parametrize(
    ("visible", "on_node", "apart", "status", "found"),
    [
        (4, 4, set(), "pass", "all 4 GPUs reach each other directly"),
        (4, 4, {(0, 2), (1, 3)}, "warn", "2 of 6 pairs of GPUs do not reach each other directly: 0-2, 1-3"),
        (1, 4, set(), "warn", "1 of the 4 GPUs of this node is visible here"),
    ],
)
def test_gpus_that_do_not_see_each_other_are_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    visible: int,
    on_node: int,
    apart: set[Any],
    status: str,
    found: str,
) -> None:
    for name in range(on_node):
        (tmp_path / str(name)).mkdir()
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: pair not in apart)
    (finding,) = doctor._peers()
    assert (finding.status, finding.found) == (status, found)


def test_a_node_without_gpus_has_no_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    assert list(doctor._peers()) == []
