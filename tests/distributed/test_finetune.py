"""Frozen parameters at every stage: they stay, they cost no optimizer state, and a run with them resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.test_guards import state
from tests.distributed.test_training import ROUNDING, Torchrun, copy_without_last, losses, run_all

FROZEN = ("time_embed.", "input_blocks.0.", "input_blocks.1.")


@pytest.mark.slow
def test_frozen_parameters_stay_and_the_run_resumes(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    source, settings = (
        tmp_path / "source",
        ["training.freeze=[time_embed,'input_blocks.[01]']", "training.learning_rate=1e-3"],
    )
    run_all(torchrun, 1, {source: ["training.num_steps=2"]}, tiny_packed)
    settings += [f"training.init_from={source}", "training.checkpoint_every_steps=3"]
    jobs = {tmp_path / str(stage): [*settings, f"training.zero_stage={stage}"] for stage in (0, 1, 2, 3)}
    jobs[tmp_path / "bf16"] = [*settings, "training.precision=bf16", "training.zero_stage=3"]
    run_all(torchrun, 2, jobs, tiny_packed)
    begun = state(source, 2)
    for run in jobs:
        ended = state(run, 6)
        for name in [key.removeprefix("ema/") for key in begun if key.startswith("ema/")]:
            is_frozen = name.startswith(FROZEN)
            expected = begun[f"ema/{name}"].bfloat16().float() if run.name == "bf16" else begun[f"ema/{name}"]
            for kind in ("master", "ema"):
                assert torch.equal(ended[f"{kind}/{name}"], expected) == is_frozen, (run.name, name)
            assert (f"exp_avg/{name}" in ended) != is_frozen
        if run.name != "bf16":
            assert losses(run) == pytest.approx(losses(tmp_path / "0"), rel=ROUNDING)
        report = json.loads((run / "start.json").read_text())
        assert 0 < report["frozen_parameters"] < report["parameters"]
    half = [tmp_path / "half-1", tmp_path / "half-3"]
    for run in half:
        copy_without_last(tmp_path / run.name[5:], run)
    run_all(torchrun, 2, {run: jobs[tmp_path / run.name[5:]] for run in half}, tiny_packed)
    for run in half:
        assert losses(run) == losses(tmp_path / run.name[5:])
    run_all(torchrun, 1, {tmp_path / "half-3": [*jobs[tmp_path / "1"], "training.num_steps=8"]}, tiny_packed)
    assert len(losses(tmp_path / "half-3")) == 8
