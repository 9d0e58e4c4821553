"""Rank facts from the environments that launchers leave behind."""

from __future__ import annotations

import os
import signal
import socket

import pytest
import torch

from hpc_ddpm.benchmark.device import exact_fp32
from hpc_ddpm.device import has_native_bf16, local_device, resolve_precision
from hpc_ddpm.distributed import (
    LAUNCHED,
    PORTS,
    RANK_VARIABLES,
    Ranks,
    StopFlag,
    _export,
    detect_ranks,
    first_host,
    free_port,
    process_group,
)
from hpc_ddpm.errors import ClusterError, ConfigError, LostRankError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1", "MASTER_PORT": "1234",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-12,20],n1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def test_alone() -> None:
    assert detect_ranks({}) == Ranks(0, 1, 0, 1, "alone")
    batch_script = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert detect_ranks(batch_script).world_size == 1


def test_torchrun() -> None:
    assert detect_ranks(TORCHRUN) == Ranks(3, 4, 1, 2, "torchrun", "n1", 1234)


def test_srun() -> None:
    ranks = detect_ranks(SRUN)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (2, 4, 0, 2)
    assert (ranks.started_by, ranks.master_addr) == ("srun", "gpu07")
    assert 20_000 <= ranks.master_port < 32_768  # from there on, systems give ports to whoever connects


def test_srun_ports_differ_between_jobs_steps_and_requeues() -> None:
    ports = {
        detect_ranks(SRUN | change).master_port
        for change in ({}, {"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"})
    }
    assert len(ports) == 4


def test_mpirun_wins_inside_a_slurm_job() -> None:
    assert detect_ranks(OPENMPI | SRUN).started_by == "mpirun"
    assert detect_ranks(OPENMPI).rank == 1
    mpich = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}
    assert detect_ranks(mpich) == Ranks(1, 3, 1, 3, "mpirun")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-12,20],n1", "gpu07"),
        ("a[3]", "a3"),
        ("n[1-2]-ib", "n1-ib"),
        ("r[2-3]n[01,04],x", "r2n01"),
        ("r2n[07]b[1-3]-ib", "r2n07b1-ib"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x' is not a number"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], part: str) -> None:
    with pytest.raises(ClusterError, match=part):
        detect_ranks(environment)


EXPORTED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("exported", "part"),
    [
        (EXPORTED, "RANK=0 and WORLD_SIZE=1 set, but srun started this as rank 2 of 4; `unset RANK WORLD_SIZE LOCAL"),
        ({"WORLD_SIZE": "1"}, "^WORLD_SIZE=1 set, but srun"),
        ({"RANK": "0"}, "^RANK=0 set, but srun"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "^RANK=x set, but srun"),
    ],
)
def test_what_a_shell_exports_does_not_beat_the_scheduler(exported: dict[str, str], part: str) -> None:
    """Or every task would take itself for rank 0 of 1, and all would write the same run."""
    with pytest.raises(ClusterError, match=part):
        detect_ranks(SRUN | exported)


def test_what_a_shell_exports_does_not_beat_mpirun() -> None:
    with pytest.raises(ClusterError, match="but mpirun started this as rank 1 of 2"):
        detect_ranks(OPENMPI | EXPORTED)


def test_launchers_inside_a_step_start_ranks_of_their_own() -> None:
    for mark in ({"TORCHELASTIC_RUN_ID": "none"}, {LAUNCHED: "1"}):
        assert detect_ranks(SRUN | TORCHRUN | mark) == Ranks(3, 4, 1, 2, "torchrun", "n1", 1234)
    agreed = detect_ranks(SRUN | {"RANK": "2", "WORLD_SIZE": "4", "MASTER_PORT": "21000"})
    assert (agreed.started_by, agreed.rank, agreed.master_addr, agreed.master_port) == ("srun", 2, "gpu07", 21000)
    assert detect_ranks(SRUN | TORCHRUN | {"RANK": "2"}).started_by == "torchrun"


def test_ranks_of_several_nodes_do_not_meet_on_each_of_them() -> None:
    nodes = SRUN | {"SLURM_STEP_NUM_NODES": "2"}
    with pytest.raises(ClusterError, match=r"MASTER_ADDR=127\.0\.0\.1 set, but srun started ranks on 2 nodes"):
        detect_ranks(nodes | {"MASTER_ADDR": "127.0.0.1"})
    assert detect_ranks(nodes | {"MASTER_ADDR": "ib-n1"}).master_addr == "ib-n1"


def test_a_meeting_point_of_another_job_is_refused() -> None:
    """A name that is left over from somewhere; the ranks would wait there for half an hour."""
    ranks = Ranks(0, 2, 0, 1, "srun", "192.0.2.1", 21_000)  # an address that no machine has
    with (
        pytest.raises(ClusterError, match=r"MASTER_ADDR=192\.0\.2\.1 is not .*, where rank 0 runs"),
        process_group(ranks),
    ):
        pass


def test_a_port_that_is_taken_passes() -> None:
    """The job comes back with another one."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ranks = Ranks(0, 2, 0, 2, "srun", "127.0.0.1", taken.getsockname()[1])
        met = pytest.raises(LostRankError, match=r"rank 0 of 2 did not meet the others at 127\.0\.0\.1:")
        with met as caught, process_group(ranks):
            pass
    assert caught.value.exit_code == 75
    assert "\n" not in str(caught.value)


def test_a_rank_that_does_not_come_passes() -> None:
    ranks = Ranks(0, 2, 0, 2, "srun", "127.0.0.1", free_port())
    with pytest.raises(LostRankError, match="did not meet the others"), process_group(ranks, timeout_s=1):
        pass


def test_free_ports() -> None:
    found = {free_port() for _ in range(20)}
    assert len(found) > 10 and found <= set(PORTS)
    assert PORTS[-1] < 32_768


def test_precision_follows_the_device() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("auto", cpu) in {"bf16", "fp32"}
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_precision("fp16", cpu)


def test_known_bad_cudnn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90_900)
    with pytest.raises(ConfigError, match=r"cuDNN 90900 .* 9\.15"):
        resolve_precision("bf16", torch.device("cuda", 0))
    assert resolve_precision("auto", torch.device("cuda", 0)) == "fp32"


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_DDPM_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ClusterError, match="4 ranks on this node but 2 visible"):
        local_device(Ranks(3, 4, 3, 4))


def test_a_rank_that_sees_one_of_several_gpus_warns_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL cannot use NVLink then, and says nothing; one rank of a node speaks, and nothing is refused."""
    monkeypatch.delenv("HPC_DDPM_DEVICE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with exact_fp32():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.warns(UserWarning, match=r"rank 4 sees one GPU, .* 4 ranks.* NVLink .*--gpus-per-node=4"):
            assert local_device(Ranks(4, 8, 0, 4)) == torch.device("cuda", 0)
        silent = [Ranks(5, 8, 1, 4), Ranks(0, 2, 0, 1)]  # another rank of the node, one rank on each of two nodes
        for ranks in silent:
            local_device(ranks)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
        local_device(Ranks(0, 4, 0, 4))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert local_device(Ranks(1, 4, 1, 4)) == torch.device("cuda", 1)


def test_deepspeed_is_told_the_index_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `srun --gpus-per-task=1` every task sees one, whatever its local rank."""
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device, told in ((torch.device("cuda", 0), "0"), (torch.device("cpu"), "3")):
        _export(Ranks(3, 4, 3, 4), device, "n1", 1)
        assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == told
    for name in RANK_VARIABLES:
        os.environ.pop(name)


def test_fp32_on_a_gpu_is_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_DDPM_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with exact_fp32():  # puts back what was set
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        assert local_device(Ranks()) == torch.device("cuda", 0)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_signals_only_set_a_flag() -> None:
    cpu = torch.device("cpu")
    with process_group(Ranks()) as device, StopFlag() as stop:
        assert device == cpu
        assert stop.agreed(cpu) == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed(cpu) == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(cpu) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_environment_is_as_before_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a process that is started later would take itself for a rank."""
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.delenv("RANK", raising=False)
    before = dict(os.environ)
    with process_group(Ranks()):
        assert os.environ["RANK"] == "0"
    assert dict(os.environ) == before


def test_bf16_is_not_used_where_cpus_compute_it_wrongly() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu, [8, 4, 2]) == resolve_precision("fp32", cpu, [8, 4, 2]) == "fp32"
    assert resolve_precision("bf16", cpu, [8, 4, 1]) == "bf16"
    with pytest.raises(ConfigError, match=r"2 voxels deep .*set training\.precision=fp32"):
        resolve_precision("bf16", cpu, [8, 4, 2])


def test_bf16_follows_what_one_dnn_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for limit, expected in (("", True), ("avx512_core_bf16", True), ("AVX2", False), ("avx512_core", False)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert has_native_bf16() is expected
        assert resolve_precision("auto", cpu) == ("bf16" if expected else "fp32")
