"""Cluster profiles: shipped ones, a user's own, and mistakes in them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from hpc_ddpm.config import presets_dir
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.text import has_control
from launch.profiles import Profile, list_profiles, load_profile
from tests.conftest import REPOSITORY


def test_shipped_profiles() -> None:
    assert {name: load_profile(name).executor for name in list_profiles()} == {
        "debug": "debug",
        "devcluster": "slurm",
        "example_dgx": "slurm",
        "example_university": "slurm",
        "local": "local",
    }
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["configs"] == "hpc_ddpm/configs"
    assert presets_dir() / "cluster" / "local.yaml" == list_profiles()["local"]


def test_a_users_own_profile_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config" / "hpc_ddpm" / "cluster"
    folder.mkdir(parents=True)
    (folder / "devcluster.yaml").write_text("partition: mine\ntime: 2-12:00:00\n")
    profile = load_profile("devcluster", {"nodes": 3, "account": None})
    assert (profile.partition, profile.hours, profile.nodes) == ("mine", 60, 3)
    assert load_profile("example_university").partition == "gpu-preempt"


def test_a_time_is_taken_as_written(tmp_path: Path) -> None:
    """YAML 1.1 reads it as 30600, a number of base 60."""
    path = tmp_path / "profile.yaml"
    path.write_text("nodes: 2\ntime: 8:30:00  # of the night\n")
    profile = load_profile(str(path))
    assert (profile.time, profile.limit_s) == ("8:30:00", 30600)
    assert Profile.model_validate(profile.model_dump(mode="json")) == profile


@pytest.mark.parametrize(
    ("text", "changes", "part"),
    [
        ("partition: a\npartitoin: b", {}, r"profile.yaml:2: unknown setting 'partitoin'; did you mean 'partition'"),
        ("nodes: 1\ntime: 24h", {}, r"profile.yaml:2: '24h' is no time; expected HOURS:MINUTES:SECONDS"),
        ("nodes: 1\ntime: 1440", {}, r"profile.yaml:2: '1440' is no time; .*such as 24:00:00 or 1-00:00:00"),
        ("time: 90:00", {}, r"profile.yaml:1: '90:00' is no time"),
        ("nodes: 1", {"time": "0:05:00"}, "time=0:05:00 is no longer than the warning before its end"),
        ("memory_per_gpu: 5 GB", {}, r"profile.yaml:1: memory_per_gpu='5 GB'"),
        ("sbatch: {gres: 'gpu:a100:4'}", {}, "sbatch: gres=gpu:a100:4 asks for GPUs a second time"),
        ("sbatch: {gpus_per_task: 1}", {}, "sbatch: gpus_per_task=1 asks for GPUs .*set gpus_per_node and gpu_type"),
        ("gpu_option: gpus", {}, "gpu_option='gpus': input should be 'gpus-per-node' or 'gres'"),
        ("executor: local\nnodes: 2", {}, "executor local has one node, found nodes=2"),
        ("1: 2", {}, r"profile.yaml:1: unknown setting '1'; a profile has: executor"),
        ("<<: {partitoin: a}", {}, r"profile.yaml:1: unknown setting 'partitoin'; did you mean 'partition'"),
        ("<<: {time: 1}", {}, r"'1' is no time"),
        ("time: [1]", {}, r"'\[1\]' is no time"),
        ("a: &a [*a]", {}, "refers to itself by an alias"),
        ("memory_per_gpu: " + "9" * 5000 + "G", {}, "memory_per_gpu='999"),
        ("nodes: " + "9" * 5000, {}, "is too large a number"),
        ("partition: a", {"nodes": 0}, "--nodes: nodes=0: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_in_a_profile(tmp_path: Path, text: str, changes: dict[str, int], part: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        load_profile(str(path), changes)
    assert not has_control(str(caught.value))
    assert len(str(caught.value)) < 1000


def test_no_such_profile() -> None:
    with pytest.raises(ConfigError, match=r"called 'devcluser'; did you mean 'devcluster'"):
        load_profile("devcluser")
