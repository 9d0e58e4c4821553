"""What goes wrong in a step: it is skipped by all ranks, the run rolls back, or all ranks end with one line."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hpc_ddpm.checkpoint import PieceReader, read_manifest, step_dirs, step_of
from hpc_ddpm.config import load_config
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.distributed import Ranks, process_group
from hpc_ddpm.runlog import read_metrics
from hpc_ddpm.training import loop
from hpc_ddpm.training.engine import Engine
from hpc_ddpm.training.guards import SPIKE_SCORE, SpikeDetector
from tests.conftest import TINY
from tests.distributed.test_kills import finish, start, stderr_of
from tests.distributed.test_training import BF16_CROPS, FP16, RUNS, Torchrun, losses
from tests.forks import Fork

PRECISIONS = {"fp32": ["training.precision=fp32"], "bf16": ["training.precision=bf16", *BF16_CROPS], "fp16": FP16}
WAYS = {
    f"{precision}-{stage}": [*settings, f"training.zero_stage={stage}"]
    for precision, settings in PRECISIONS.items()
    for stage in ((1, 2, 3) if precision == "fp16" else (0, 1, 2, 3))
}
CLIP = "training.gradient_clip=1"
OFFLOAD = "training.offload_optimizer=cpu"
WAYS |= {f"{way}-clip": [*WAYS[way], CLIP] for way in ("fp32-0", "bf16-0", "bf16-1", "fp32-3")}
WAYS |= {f"{way}-offload": [*WAYS[way], OFFLOAD] for way in ("fp32-1", "bf16-2", "fp32-3")}


def run_spoilt(torchrun: Torchrun, packed: Path, jobs: dict[Path, tuple[list[str], dict[str, Any]]]) -> str:
    """Train on two ranks, with harm done to some steps; what was said on standard error."""
    rows = [
        {"run": str(run), "overrides": [*TINY, f"data.path={packed}", *overrides], "harm": harm}
        for run, (overrides, harm) in jobs.items()
    ]
    plan = next(iter(jobs)).parent / "plan.json"
    plan.write_text(json.dumps(rows))
    done = torchrun(2, RUNS, plan)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, averages, moments."""
    reader = PieceReader(run / f"checkpoints/step_{step:08d}")
    keys = [key.split("/", 1) for key in reader._where]
    return {
        f"{kind}/{name}": reader.read(kind, name, 0, math.prod(reader.shapes[name])).reshape(reader.shapes[name])
        for kind, name in keys
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_moves_nothing(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path, kind: str) -> None:
    """The last step is spoilt on rank 1 alone, by its loss, or by a gradient under a finite loss."""
    jobs, lasts = {}, {}
    for way, settings in WAYS.items():
        if kind == "gradient" and way.endswith(("clip", "offload")):
            continue
        last = lasts[tmp_path / way] = 5 if "fp16" in way else 3  # fp16 looks for its loss scale first
        steps = [f"training.num_steps={last}", f"training.checkpoint_every_steps={last - 1}"]
        jobs[tmp_path / way] = [*settings, *steps], {"kind": kind, "rank": 1, "steps": [last]}
    run_spoilt(torchrun, tiny_packed, jobs)
    for run, last in lasts.items():
        before, after = state(run, last - 1), state(run, last)
        assert all(torch.equal(after[key], before[key]) for key in before), run.name
        assert any(tensor.any() for key, tensor in before.items() if key.startswith("exp_avg/")), run.name
        facts = [read_manifest(run / f"checkpoints/step_{step:08d}") for step in (last - 1, last)]
        for fact in ("optimizer_step", "ema_updates"):
            assert 0 < facts[1][fact] == facts[0][fact], (run.name, fact)
        rows = list(read_metrics(run))
        assert math.isfinite(rows[-1]["loss"]) == (kind == "gradient"), run.name
        assert rows[-1]["skipped_steps"] == (0 if "fp16" in run.name else 1), run.name


@pytest.mark.slow
@pytest.mark.parametrize("micro_step", [0, 1])
def test_one_micro_step_of_one_rank_spoils_the_step_on_all(
    torchrun: Torchrun, tiny_packed: Path, tmp_path: Path, micro_step: int
) -> None:
    """The step is skipped, whichever of its two micro steps it was, and the next one counts."""
    ways = ["fp32-0", "fp32-1", "fp32-2", "fp32-3"]
    harm = {"kind": "gradient", "rank": 1, "steps": [3], "micro_step": micro_step}
    steps = ["training.num_steps=4", "training.checkpoint_every_steps=1", "training.keep_checkpoints=4"]
    run_spoilt(torchrun, tiny_packed, {tmp_path / way: ([*WAYS[way], *steps], harm) for way in ways})
    for run in (tmp_path / way for way in ways):
        saved = [read_manifest(run / f"checkpoints/step_{step:08d}")["optimizer_step"] for step in (2, 4)]
        assert saved == [2, 3], run.name
        assert [row["skipped_steps"] for row in read_metrics(run)] == [0, 0, 1, 0], run.name
        assert all(tensor.isfinite().all() for tensor in state(run, 4).values()), run.name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_roll_back_gives_the_engine_back_first(
    tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """A GPU that one fills has no room for two."""
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    training_loss, engines, losses_left = loop.training_loss, [], [1.0, 1.0, 1.0, 1.0, math.nan]

    def build(*arguments: Any) -> Engine:
        assert all(before() is None for before in engines)
        engine = Engine(*arguments)
        engines.append(weakref.ref(engine.partition.flats[0]))
        return engine

    def spoil(*arguments: Any) -> torch.Tensor:
        return training_loss(*arguments) * (losses_left.pop(0) if losses_left else 1)

    monkeypatch.setattr(loop, "Engine", build)
    monkeypatch.setattr(loop, "training_loss", spoil)
    settings = [*TINY, f"data.path={tiny_packed}", f"training.zero_stage={stage}", "training.max_bad_steps=1"]
    settings += ["training.num_steps=2", "training.checkpoint_every_steps=1"]
    with process_group(Ranks()) as device, pytest.warns(UserWarning, match="skipped on all ranks|back from step"):
        assert loop.train(load_config(None, settings).config, tmp_path / "run", Ranks(), device).step == 2
    assert len(engines) == 2


@pytest.mark.slow
def test_bad_steps_in_a_row_roll_back(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    """Checkpoints at 2, 4, 6, ...; steps 5 and 6 are spoilt: no good step proves 4, so it goes back to 2."""
    settings = ["training.num_steps=8", "training.checkpoint_every_steps=2", "training.keep_checkpoints=9"]
    guarded = [*settings, "training.max_bad_steps=2", "training.max_rollbacks=1"]
    harm = {"kind": "loss", "rank": 1, "steps": [5, 6]}
    again = {"kind": "loss", "rank": 1, "steps": [5, 6, 9, 10]}  # 3 and 4 after the roll-back are executed 7th and 8th
    jobs = {
        tmp_path / "plain": (settings, {"rank": -1}),
        tmp_path / "once": (guarded, harm),
        tmp_path / "half": ([*guarded, "training.num_steps=4"], {**harm, "steps": [3, 4]}),
        tmp_path / "twice": (guarded, again),
    }
    said = run_spoilt(torchrun, tiny_packed, jobs)
    plain, once = losses(tmp_path / "plain"), losses(tmp_path / "once")
    assert once[:2] == plain[:2]
    assert len(once) == 8
    assert all(new != old and math.isfinite(new) for new, old in zip(once[2:], plain[2:], strict=True))
    assert json.loads((tmp_path / "once/rollbacks.json").read_text())["rollbacks"] == [
        {"diverged_at": 6, "last_good_step": 4}
    ]
    assert (tmp_path / "once/checkpoints/step_00000004.diverged-1").is_dir()
    assert [step_of(path) for path in step_dirs(tmp_path / "once/checkpoints")] == [2, 4, 6, 8]
    assert "back from step 6 to 2 with another data order (roll-back 1 of 1)" in said
    errors = [(tmp_path / f"twice/error-{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("TrainingError: ")
    assert "2 steps up to 6 had no finite loss or gradient, after 1 roll-backs" in errors[0]

    shutil.copytree(tmp_path / "half", tmp_path / "resumed")
    run_spoilt(torchrun, tiny_packed, {tmp_path / "resumed": (guarded, {"rank": -1})})
    assert losses(tmp_path / "half")[:2] != plain[:2], "rolled back to the start, with another order"
    assert losses(tmp_path / "resumed")[:4] == losses(tmp_path / "half")
    assert not set(losses(tmp_path / "resumed")) & set(plain), "the resume forgot the roll-back"


@pytest.mark.slow
def test_a_damaged_volume_ends_all_ranks_with_one_line(
    fork: Callable[..., Fork], tiny_packed: Path, tmp_path: Path
) -> None:
    """No launcher is there to end the other rank, which has nothing damaged to read."""
    packed = tmp_path / "packed"
    shutil.copytree(tiny_packed, packed)
    subject = open_packed(packed).subjects("train")[3]
    shard = packed / "shard-00000.h5"
    with h5py.File(shard) as file:
        chunk = file["image"].id.get_chunk_info_by_coord((subject.index, 0, 0, 0, 0))
    with shard.open("r+b") as stream:
        stream.seek(chunk.byte_offset)
        stream.write(b"\xff" * 16)
    run = tmp_path / "run"
    assert finish(run, start(fork, run, packed)) == [2, 2]
    lines = [stderr_of(run, rank).read_text().splitlines() for rank in (0, 1)]
    told = [line for line in lines[0] if "warning" not in line]
    assert len(told) == 1
    assert subject.id in told[0]
    assert "shard-00000.h5" in told[0]
    assert not lines[1]


def test_a_spike_stands_out_and_a_noisy_loss_does_not() -> None:
    detector = SpikeDetector()
    chance = np.random.default_rng(0)
    noisy = [float(loss) for loss in chance.lognormal(-2, 0.5, 300)]
    scores = [detector.score(loss) for loss in noisy]
    assert max(scores) < SPIKE_SCORE
    with pytest.warns(UserWarning, match="step 301: loss 5 is"):
        assert detector.watch(301, 5.0)["loss_spike"] > SPIKE_SCORE
    assert detector.watch(302, 0.1) == {}
    assert detector.watch(303, math.nan) == {}
