"""Real DeepSpeed on real gloo ranks: the loss curve and the resume do not depend on ranks or ZeRO stage."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_ddpm.checkpoint import PieceReader, latest_checkpoint, read_manifest, step_dirs
from hpc_ddpm.config import list_presets, load_config
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.device import has_native_bf16
from hpc_ddpm.runlog import read_metrics
from tests.conftest import TINY, rank_environment

RUNS = Path(__file__).with_name("runs.py")
STAGES = (0, 1, 2, 3)
WAYS = {str(stage): [f"training.zero_stage={stage}"] for stage in STAGES} | {
    "1-offload": ["training.zero_stage=1", "training.offload_optimizer=cpu"],
    "3-offload": [
        "training.zero_stage=3",
        "training.offload_optimizer=cpu",
        "training.offload_parameters=cpu",
        "training.max_live_parameters=2000",  # several optimizer passes
    ],
}
"""Every ZeRO stage, and what can be offloaded."""
KINDS = ("master", "ema", "ema_0.2", "ema_power_0.1", "exp_avg", "exp_avg_sq")
AVERAGES = ["training.ema_extra_decays=[0.2]", "training.ema_power_sigmas=[0.1]"]
FP16 = ["training.precision=fp16", "training.global_batch=2", "model.base_channels=4", "model.num_groups=2"]
"""Smaller: CPUs convolve it slowly."""
BF16_CROPS = [] if has_native_bf16() else ["data.patch_size=[8,8,8]"]
"""Smaller where bf16 is emulated: a step of it takes a second there."""
LARGE_CHANNELS = int(os.environ.get("HPC_DDPM_LARGE_CHANNELS", "96"))
"""224 is the preset itself."""
GIVE_BACK_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
SMOOTH = ["diffusion.loss=l2", "training.learning_rate=1e-4"]
"""A run that leaves rounding as small as it is, on any CPU.

The gradient of l1 jumps where a voxel's error changes its sign. Adam moves a weight whose gradient is almost zero by
the whole learning rate, up or down as rounding has it: one such weight is below the bounds here. With TINY's learning
rate each step overshoots, and makes every difference several times as large.
"""
ROUNDING = 2e-6
"""Relative, of losses and gradient norms in fp32; honest runs differ by 2e-7, as ranks add in another order."""
STATE_ROUNDING = 1e-4
"""Relative, of all weights or moments together; honest runs differ by 1e-7, one weight moved the wrong way by 1e-5."""

Torchrun = Callable[..., subprocess.CompletedProcess[str]]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def norms(run: Path) -> list[float]:
    return [row["gradient_norm"] for row in read_metrics(run)]


def run_all(
    torchrun: Torchrun,
    num_ranks: int,
    jobs: dict[Path, list[str]],
    packed: Path,
    harms: dict[Path, dict[str, Any]] | None = None,
) -> None:
    """Train every job at one world size, smoothly; some of them with harm done (`runs.py`)."""
    plan = next(iter(jobs)).parent / f"plan-{num_ranks}-{time.monotonic_ns()}.json"
    plan.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "run": str(run),
            "overrides": [*TINY, *SMOOTH, f"data.path={packed}", *overrides],
            "harm": (harms or {}).get(run),
        }
        for run, overrides in jobs.items()
    ]
    plan.write_text(json.dumps(rows))
    done = torchrun(num_ranks, RUNS, plan)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def curves(torchrun: Torchrun, tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps at 1, 2 and 4 ranks in all ways, with a checkpoint after three: ranks-way/."""
    root, extra = tmp_path_factory.mktemp("curves"), [*AVERAGES, "training.checkpoint_every_steps=3"]
    for num_ranks in (1, 2, 4):
        jobs = {root / f"{num_ranks}-{way}": [*settings, *extra] for way, settings in WAYS.items()}
        run_all(torchrun, num_ranks, jobs, tiny_packed)
    return root


def copy_without_last(run: Path, copy: Path) -> None:
    """The run as it stood at its last but one checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(step_dirs(copy / "checkpoints")[-1])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_curve_is_the_same_at_any_world_size_and_stage(curves: Path, num_ranks: int, way: str) -> None:
    run, reference = curves / f"{num_ranks}-{way}", curves / "1-0"
    assert len(losses(reference)) == 6
    assert losses(run) == pytest.approx(losses(reference), rel=ROUNDING)
    assert norms(run) == pytest.approx(norms(reference), rel=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_checkpoint_is_the_same_at_any_world_size_and_stage(curves: Path, num_ranks: int, way: str) -> None:
    for kind in KINDS:
        assert difference(curves / f"{num_ranks}-{way}", curves / "1-0", kind) <= STATE_ROUNDING, kind
    assert len({last_tensors(curves / "1-0", kind).norm().item() for kind in KINDS}) == len(KINDS)


@pytest.mark.slow
def test_wrong_gradients_are_no_rounding(curves: Path, torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    """One step of rank 1 goes wrong: one of its two micro steps is lost, it weighs too much, or has other noise."""
    kinds: dict[str, dict[str, Any]] = {"lost": {"micro_step": 0}, "weight": {}, "noise": {}}
    jobs, harms = {}, {}
    for kind, way in itertools.product(kinds, ("0", "3")):
        jobs[run := tmp_path / f"{kind}-{way}"] = WAYS[way]
        harms[run] = {"kind": kind, "rank": 1, "steps": [3], **kinds[kind]}
    run_all(torchrun, 2, jobs, tiny_packed, harms)
    reference = curves / "1-0"
    for run in jobs:
        assert losses(run)[:2] == pytest.approx(losses(reference)[:2], rel=ROUNDING), run.name
        assert norms(run)[2] != pytest.approx(norms(reference)[2], rel=10 * ROUNDING), run.name
        for kind in ("exp_avg", "exp_avg_sq"):
            assert difference(run, reference, kind) > 10 * STATE_ROUNDING, (run.name, kind)


def difference(run: Path, reference: Path, kind: str) -> float:
    """Relative, between the newest checkpoints."""
    expected = last_tensors(reference, kind)
    return float((last_tensors(run, kind) - expected).norm() / expected.norm())


@functools.cache
def last_tensors(run: Path, kind: str) -> torch.Tensor:
    """All of a kind in the newest checkpoint, flat."""
    folder = latest_checkpoint(run / "checkpoints")
    assert folder is not None
    full = PieceReader(folder).full(kind)
    return torch.cat([full[name].flatten() for name in sorted(full)])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_deepspeed_takes_every_setting_as_it_was_given(curves: Path, way: str) -> None:
    settings = json.loads((curves / f"2-{way}" / "deepspeed.json").read_text())
    assert settings["resolved"] == settings["given"]


@pytest.mark.slow
def test_resume_is_bitwise_at_the_same_world_size(curves: Path, torchrun: Torchrun, tiny_packed: Path) -> None:
    jobs = {}
    for way in WAYS:
        run = curves / f"resume-same-{way}"
        copy_without_last(curves / f"2-{way}", run)
        jobs[run] = [*WAYS[way], *AVERAGES]
    run_all(torchrun, 2, jobs, tiny_packed)
    for way in WAYS:
        assert losses(curves / f"resume-same-{way}") == losses(curves / f"2-{way}")


@pytest.mark.slow
def test_resume_at_another_world_size_and_stage(curves: Path, torchrun: Torchrun, tiny_packed: Path) -> None:
    """1 -> 4, 4 -> 2, 2 -> 1 ranks, from other ways: into half of them at 4, the other half at 2, all at one rank."""
    others = dict(zip(WAYS, [*WAYS][1:] + [*WAYS][:1], strict=True))
    for before, after, ways in ((1, 4, [*WAYS][::2]), (4, 2, [*WAYS][1::2]), (2, 1, [*WAYS])):
        jobs = {}
        for way in ways:
            run = curves / f"resume-{before}-{after}-{way}"
            copy_without_last(curves / f"{before}-{others[way]}", run)
            jobs[run] = [*WAYS[way], *AVERAGES]
        run_all(torchrun, after, jobs, tiny_packed)
        for way in ways:
            resumed = curves / f"resume-{before}-{after}-{way}"
            for values in (losses, norms):
                assert values(resumed) == pytest.approx(values(curves / "1-0"), rel=ROUNDING), (before, after, way)


@pytest.mark.slow
def test_a_chain_of_resumes_follows_the_undisturbed_curve(
    torchrun: Torchrun, tiny_packed: Path, tmp_path: Path
) -> None:
    batch = "training.global_batch=12"
    run_all(torchrun, 1, {tmp_path / "whole": [batch, "training.num_steps=8"]}, tiny_packed)
    for num_ranks, stage, steps in ((1, 1, 2), (2, 3, 4), (4, 2, 6), (3, 1, 8)):
        settings = [batch, f"training.zero_stage={stage}", f"training.num_steps={steps}"]
        run_all(torchrun, num_ranks, {tmp_path / "chain": settings}, tiny_packed)
    for values in (losses, norms):
        assert values(tmp_path / "chain") == pytest.approx(values(tmp_path / "whole"), rel=ROUNDING)


@pytest.mark.slow
def test_fp16_resumes_with_its_loss_scale(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    """The scale falls in the first steps, where gradients overflow; a resume must not start at the top again."""

    def settings(stage: int, steps: int) -> list[str]:
        return [*FP16, f"training.zero_stage={stage}", f"training.num_steps={steps}"]

    whole = {tmp_path / f"whole-{stage}": settings(stage, 8) for stage in (1, 3)}
    parts = {tmp_path / f"parts-{stage}": settings(stage, 4) for stage in (1, 3)}
    run_all(torchrun, 2, whole | parts, tiny_packed)
    run_all(torchrun, 2, {tmp_path / f"parts-{stage}": settings(stage, 8) for stage in (1, 3)}, tiny_packed)
    for stage in (1, 3):
        facts = [read_manifest(tmp_path / f"{name}-{stage}/checkpoints/step_00000008") for name in ("whole", "parts")]
        assert facts[0]["loss_scaler"] == facts[1]["loss_scaler"]
        assert facts[0]["loss_scaler"]["cur_scale"] < 2**20, "no overflow: the test shows nothing"
        assert facts[0]["optimizer_step"] == facts[1]["optimizer_step"] < 8
        assert losses(tmp_path / f"parts-{stage}") == losses(tmp_path / f"whole-{stage}")


@pytest.mark.slow
def test_zero3_holds_less_than_zero1(real_torchrun: Torchrun, tmp_path: Path) -> None:
    """The large preset, narrower: peak memory of each rank over construction, a step and the save."""
    settings = ["data.size=[16,16,16]", "data.fit=resize", "data.num_workers=0", "data.val_fraction=0"]
    settings += [f"model.base_channels={LARGE_CHANNELS}", "training.num_steps=1", "training.global_batch=2"]
    settings += ["training.precision=fp32"]
    data = load_config("brats_192_large", settings).config.data
    write_phantoms(tmp_path / "source", 2, data.size, 0, data.modalities, data.labels)
    pack(tmp_path / "source", tmp_path / "packed", data)
    peaks = {}
    for stage in (1, 3):
        run = tmp_path / str(stage)
        overrides = [*settings, f"data.path={tmp_path / 'packed'}", f"training.zero_stage={stage}"]
        job = {"run": str(run), "preset": "brats_192_large", "overrides": overrides}
        (tmp_path / "plan.json").write_text(json.dumps([job]))
        done = real_torchrun(2, RUNS, tmp_path / "plan.json", **GIVE_BACK_WHAT_IS_FREED)
        assert done.returncode == 0, done.stderr[-3000:]
        peaks[stage] = [float((run / f"peak-{rank}.txt").read_text()) for rank in range(2)]
        shutil.rmtree(run / "checkpoints")
    print(f"peak GiB per rank, {LARGE_CHANNELS} channels: ZeRO-1 {peaks[1]}, ZeRO-3 {peaks[3]}")
    assert max(peaks[3]) < min(peaks[1])


@pytest.mark.slow
def test_bf16_trains_with_fp32_masters(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    gentle = ["training.learning_rate=1e-3", *BF16_CROPS]  # more, and bf16 flips signs of too many small gradients
    jobs = {
        tmp_path / f"bf16-{stage}": [f"training.zero_stage={stage}", "training.precision=bf16", *gentle]
        for stage in STAGES
    }
    jobs[tmp_path / "fp32"] = gentle
    run_all(torchrun, 2, jobs, tiny_packed)
    for stage in STAGES:
        assert losses(tmp_path / f"bf16-{stage}") == pytest.approx(losses(tmp_path / "fp32"), rel=0.03)
        folder = latest_checkpoint(tmp_path / f"bf16-{stage}" / "checkpoints")
        assert folder is not None
        weights = PieceReader(folder).full("master")["input_blocks.0.0.weight"]
        assert (weights != weights.bfloat16().float()).any(), "the masters were rounded to bf16"


@pytest.mark.slow
def test_bf16_curve_stays_near_that_of_fp32(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    """300 steps, means over 50."""
    settings = ["training.num_steps=300", "training.learning_rate=1e-3", "diffusion.loss=l1", *BF16_CROPS]
    settings += ["training.global_batch=2", "training.micro_batch=2"]
    jobs = {tmp_path / precision: [*settings, f"training.precision={precision}"] for precision in ("fp32", "bf16")}
    run_all(torchrun, 1, jobs, tiny_packed)
    means = [torch.tensor(losses(run)).unflatten(0, (-1, 50)).mean(1) for run in jobs]
    assert (means[1] / means[0] - 1).abs().max() < 0.06


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
            "data.crop_center=volume",
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
def test_sigterm_saves_and_the_same_command_goes_on(
    cli: Callable, fork: Callable, tiny_packed: Path, tmp_path: Path
) -> None:
    overrides = [*TINY, "training.num_steps=60", "training.checkpoint_every_steps=1000"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["--data", str(tiny_packed), "-q", *overrides]
    assert cli("train", "--out", whole, *arguments).returncode == 0
    command = ["-m", "launch.cli", "train", "--out", str(stopped), *arguments]
    with (tmp_path / "output.txt").open("w+") as output:
        process = fork(command, rank_environment(), output, output)
        wait_for(lambda: len(list(read_metrics(stopped))) >= 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in (tmp_path / "output.txt").read_text()
    assert 0 < len(losses(stopped)) < 60
    assert cli("train", "--out", stopped, *arguments).returncode == 0
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
def test_sigkill_leaves_a_run_that_resumes(cli: Callable, fork: Callable, tiny_packed: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "training.num_steps=30", "training.checkpoint_every_steps=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["--data", str(tiny_packed), "-q", *overrides]
    assert cli("train", "--out", whole, *arguments).returncode == 0
    for attempt in range(3):
        command = ["-m", "launch.cli", "train", "--out", str(killed), *arguments]
        process = fork(command, rank_environment())
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
    arguments = ["--data", str(tiny_packed), "-q", *TINY, *SMOOTH]
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
