"""`hpc-ddpm bench tune`: the best of what fits; running out of memory is a result."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_ddpm.benchmark.tune import Candidate, tune
from hpc_ddpm.config import Config, load_config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.planner import GIB, POLICIES, Planner
from launch.cli import main
from tests.conftest import TINY

CONFIG = load_config(None, TINY).config
CPU = torch.device("cpu")


def seconds(config: Config) -> float:
    """Of a volume: `block` in channels_last at micro batch 2 is the fastest."""
    model = config.model
    per_volume = 2.0 + POLICIES.index(model.activation_checkpointing) * (0.1 if model.channels_last else 0.4)
    per_volume -= 1.2 * (model.activation_checkpointing == "block" and model.channels_last)
    return per_volume * {1: 1.5, 2: 1.0, 4: 1.3}[config.training.micro_batch]


def test_it_finds_the_best_of_an_exhaustive_search_in_noise() -> None:
    random = np.random.default_rng(0)

    def measure(config: Config) -> list[float]:
        volumes = config.training.micro_batch
        return [volumes * seconds(config) * float(random.lognormal(0, 0.05)) for _ in range(3)]

    best, rows = tune(CONFIG, CPU, "fp32", 1, 16 * GIB, measure=measure)
    assert best == Candidate("block", True, 2)
    assert len(rows) == len(POLICIES) * 2 * 3  # micro batches 1, 2, 4 of a global batch of 4
    truth = min(seconds(Candidate(*each).apply(CONFIG)) for each in product(POLICIES, (False, True), (1, 2, 4)))
    fastest = max(row["volumes_per_s"] for row in rows)
    assert fastest == pytest.approx(1 / truth, rel=0.05)


def test_what_does_not_fit_is_a_result() -> None:
    tried: list[str] = []

    def measure(config: Config) -> list[float]:
        tried.append(config.model.activation_checkpointing)
        if config.model.activation_checkpointing != "full":
            raise torch.OutOfMemoryError("80 GiB")
        return [seconds(config) * config.training.micro_batch]

    planner = Planner(CONFIG, 2, "fp32", "cpu")
    budget = int(planner.plan("norm", 1).total / 0.9) + 1
    best, rows = tune(CONFIG, CPU, "fp32", 2, budget, measure=measure)
    assert best.activation_checkpointing == "full"
    errors = {
        row["activation_checkpointing"]: row["error"] for row in rows if row["micro_batch"] == 1 and "error" in row
    }
    assert errors["none"].startswith("needs more than 90% of")
    assert "none" not in tried
    assert errors["block"] == "out of memory"
    with pytest.raises(ConfigError, match="none of 16 settings runs on this device: needs more than 90%"):
        tune(CONFIG, CPU, "fp32", 2, GIB // 8, measure=measure)


@pytest.mark.slow
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")
    monkeypatch.setattr("hpc_ddpm.benchmark.tune.POLICIES", ("none", "full"))
    monkeypatch.setattr("hpc_ddpm.benchmark.tune.ROUNDS", 1)
    arguments = [*TINY, "training.global_batch=1", "--out", str(tmp_path / "best.yaml"), "-q"]
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "bench", "tune", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None)
    assert "fastest: model.activation_checkpointing=" in capsys.readouterr().out
    found = load_config(tmp_path / "best.yaml").config
    assert found.training.micro_batch == 1
    assert found.data == CONFIG.data
