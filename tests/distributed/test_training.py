"""Real DeepSpeed on real gloo ranks: the loss curve and the resume do not depend on ranks or ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpc_ddpm.checkpoint import PieceReader, latest_checkpoint, step_dirs
from hpc_ddpm.config import list_presets, load_config
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.runlog import read_metrics
from tests.conftest import TINY, rank_environment

RUNS = Path(__file__).with_name("runs.py")
STAGES = (0, 1, 2, 3)
ROUNDING = 2e-6
"""Relative, fp32: sums over ranks are taken in another order."""

Torchrun = Callable[..., subprocess.CompletedProcess[str]]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def run_all(torchrun: Torchrun, num_ranks: int, jobs: dict[Path, list[str]], packed: Path) -> None:
    """Train every job at one world size."""
    plan = next(iter(jobs)).parent / f"plan-{num_ranks}-{time.monotonic_ns()}.json"
    plan.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"run": str(run), "overrides": [*TINY, f"data.path={packed}", *overrides]} for run, overrides in jobs.items()
    ]
    plan.write_text(json.dumps(rows))
    done = torchrun(num_ranks, RUNS, plan)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def curves(torchrun: Torchrun, tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps at 1, 2 and 4 ranks and all ZeRO stages, and the first three of them: ranks-stage/ and -half/."""
    root = tmp_path_factory.mktemp("curves")
    for num_ranks in (1, 2, 4):
        jobs = {root / f"{num_ranks}-{stage}": [f"training.zero_stage={stage}"] for stage in STAGES}
        jobs |= {
            root / f"{num_ranks}-{stage}-half": [f"training.zero_stage={stage}", "training.num_steps=3"]
            for stage in STAGES
        }
        run_all(torchrun, num_ranks, jobs, tiny_packed)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_curve_is_the_same_at_any_world_size_and_stage(curves: Path, num_ranks: int, stage: int) -> None:
    reference = losses(curves / "1-0")
    assert len(reference) == 6
    assert reference[0] != reference[-1]
    assert losses(curves / f"{num_ranks}-{stage}") == pytest.approx(reference, rel=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_checkpoint_is_the_same_at_any_world_size_and_stage(curves: Path, num_ranks: int, stage: int) -> None:
    def tensors(run: str, kind: str) -> torch.Tensor:
        folder = latest_checkpoint(curves / run / "checkpoints")
        assert folder is not None
        full = PieceReader(folder).full(kind)
        return torch.cat([full[name].flatten() for name in sorted(full)])

    for kind in ("master", "ema", "exp_avg", "exp_avg_sq"):
        ours, reference = tensors(f"{num_ranks}-{stage}", kind), tensors("1-0", kind)
        assert (ours - reference).norm() <= 1e-4 * reference.norm(), kind


@pytest.mark.slow
def test_resume_is_bitwise_at_the_same_world_size(curves: Path, torchrun: Torchrun, tiny_packed: Path) -> None:
    jobs = {}
    for stage in STAGES:
        run = curves / f"resume-same-{stage}"
        shutil.copytree(curves / f"2-{stage}-half", run)
        jobs[run] = [f"training.zero_stage={stage}"]
    run_all(torchrun, 2, jobs, tiny_packed)
    for stage in STAGES:
        assert losses(curves / f"resume-same-{stage}") == losses(curves / f"2-{stage}")


@pytest.mark.slow
def test_resume_at_another_world_size_and_stage(curves: Path, torchrun: Torchrun, tiny_packed: Path) -> None:
    """1 -> 4, 4 -> 2, 2 -> 1 ranks, each into every stage from another one."""
    for before, after in ((1, 4), (4, 2), (2, 1)):
        jobs = {}
        for stage in STAGES:
            run = curves / f"resume-{before}-{after}-{stage}"
            shutil.copytree(curves / f"{before}-{(stage + 1) % 4}-half", run)
            jobs[run] = [f"training.zero_stage={stage}"]
        run_all(torchrun, after, jobs, tiny_packed)
        for stage in STAGES:
            resumed = losses(curves / f"resume-{before}-{after}-{stage}")
            assert resumed == pytest.approx(losses(curves / "1-0"), rel=ROUNDING), (before, after, stage)


@pytest.mark.slow
def test_bf16_trains_with_fp32_masters(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    gentle = "training.learning_rate=1e-3"  # Adam's first steps are all sign, and bf16 flips signs of small gradients
    jobs = {
        tmp_path / f"bf16-{stage}": [f"training.zero_stage={stage}", "training.precision=bf16", gentle]
        for stage in STAGES
    }
    jobs[tmp_path / "fp32"] = [gentle]
    run_all(torchrun, 2, jobs, tiny_packed)
    for stage in STAGES:
        assert losses(tmp_path / f"bf16-{stage}") == pytest.approx(losses(tmp_path / "fp32"), rel=0.03)
        folder = latest_checkpoint(tmp_path / f"bf16-{stage}" / "checkpoints")
        assert folder is not None
        weights = PieceReader(folder).full("master")["input_blocks.0.0.weight"]
        assert (weights != weights.bfloat16().float()).any(), "the masters were rounded to bf16"


@pytest.mark.slow
def test_every_preset_packs_and_trains(torchrun: Torchrun, tmp_path: Path) -> None:
    """Other organs, label counts, modalities and proportions: each preset, with a narrow network on a small grid."""
    jobs = []
    for preset in list_presets():
        wide = load_config(preset).config
        factor = wide.model.downsampling_factor
        size = [max(factor, round(side / 6 / factor) * factor) for side in wide.data.size]
        small = [
            f"data.size={size}",
            "data.fit=resize",
            "data.voxel_size_mm=null",
            "data.num_workers=0",
            "data.val_fraction=0",
        ]
        small += ["model.base_channels=8", "model.num_groups=8", "model.head_channels=null", "training.num_steps=1"]
        config = load_config(preset, small).config
        folder = tmp_path / preset
        write_phantoms(folder / "source", 2, config.data.size, 0, config.data.modalities, config.data.labels)
        pack(folder / "source", folder / "packed", config.data)
        overrides = [*small, f"data.path={folder / 'packed'}", f"training.global_batch={wide.training.global_batch}"]
        jobs.append({"run": str(folder / "run"), "preset": preset, "overrides": overrides})
    (tmp_path / "plan.json").write_text(json.dumps(jobs))
    done = torchrun(2, RUNS, tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr[-3000:]
    for preset in list_presets():
        assert len(losses(tmp_path / preset / "run")) == 1, preset


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(cli: Callable, tiny_packed: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "training.num_steps=120", "training.checkpoint_every_steps=1000"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["--data", str(tiny_packed), "-q", *overrides]
    assert cli("train", "--out", whole, *arguments).returncode == 0
    command = [sys.executable, "-m", "launch.cli", "train", "--out", str(stopped), *arguments]
    process = subprocess.Popen(command, env=rank_environment(), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(read_metrics(stopped))) >= 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in output
    assert 0 < len(losses(stopped)) < 120
    assert cli("train", "--out", stopped, *arguments).returncode == 0
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
def test_sigkill_leaves_a_run_that_resumes(cli: Callable, tiny_packed: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "training.num_steps=30", "training.checkpoint_every_steps=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["--data", str(tiny_packed), "-q", *overrides]
    assert cli("train", "--out", whole, *arguments).returncode == 0
    for attempt in range(3):
        command = [sys.executable, "-m", "launch.cli", "train", "--out", str(killed), *arguments]
        process = subprocess.Popen(command, env=rank_environment())
        wait_for(lambda: len(list(read_metrics(killed))) >= 7 * (attempt + 1))  # noqa: B023
        process.kill()
        process.wait()
    assert cli("train", "--out", killed, *arguments).returncode == 0
    assert losses(killed) == losses(whole)
    assert len(step_dirs(killed / "checkpoints")) == 3


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.mark.mpi
@pytest.mark.slow
def test_the_same_command_under_mpirun(tiny_packed: Path, tmp_path: Path, cli: Callable) -> None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("mpirun is not there: pip install 'hpc_ddpm[mpi]'")
    arguments = ["--data", str(tiny_packed), "-q", *TINY]
    assert cli("train", "--out", tmp_path / "alone", *arguments).returncode == 0
    environment = rank_environment() | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [mpirun, "-n", "2", "--oversubscribe", sys.executable, "-m", "launch.cli", "train"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "mpi"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "mpi") == pytest.approx(losses(tmp_path / "alone"), rel=ROUNDING)
    assert json.loads((tmp_path / "mpi" / "provenance.json").read_text())["world_size"] == 2
