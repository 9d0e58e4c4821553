"""The doctor says what is wrong, in one line, and what to do."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
