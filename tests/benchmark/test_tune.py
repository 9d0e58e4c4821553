"""`hpc-ddpm bench tune`: near the best of an exhaustive search; running out of memory is a result."""

from __future__ import annotations

import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_ddpm.benchmark.tune import Candidate, Space, search_space, tune
from hpc_ddpm.config import load_config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.planner import GIB, POLICIES, USABLE, Planner, plan_states
from launch.cli import main
from launch.trials import Trial, run_trial
from tests.conftest import TINY

CONFIG = load_config(None, [*TINY, "training.global_batch=16"]).config
RANKS = 2


@cache
def planner() -> Planner:
    return Planner(CONFIG, RANKS, "fp32", "gpu")


@cache
def space() -> Space:
    return search_space(CONFIG, RANKS, 4, is_gpu=True)


def seconds(candidate: Candidate) -> float:
    """Seconds per volume. The layout helps only with compile; recompute costs time; batches make ZeRO cheaper."""
    step = 1.0 + 0.08 * POLICIES.index(candidate.activation_checkpointing)
    step *= {(False, False): 1.0, (True, False): 1.04, (False, True): 0.9, (True, True): 0.75}[
        candidate.channels_last, candidate.compile
    ]
    step += (0.05 + 0.03 * candidate.zero_stage) / candidate.micro_batch
    return max(step, 2.0 / max(1, candidate.num_workers))


def bytes_needed(candidate: Candidate) -> int:
    training = CONFIG.training.model_copy(update={"zero_stage": candidate.zero_stage})
    states = plan_states(planner().parameters, training, RANKS, "fp32")
    held = states.weights + states.masters + states.moments + states.ema + states.gradients
    trace = planner().trace(candidate.activation_checkpointing)
    return held + candidate.micro_batch * (trace.peak_bytes + trace.workspace_bytes)


def test_it_is_near_the_best_of_an_exhaustive_search_with_far_fewer_trials() -> None:
    random = np.random.default_rng(0)
    everything = [
        Candidate(stage, policy, size, layout, compiled, workers)
        for workers, layout, compiled, size, policy, stage in product(*space().values())
    ]
    for limit in (10 * GIB, bytes_needed(Candidate(1, "block", 8, True, True, 4))):

        def measure(candidate: Candidate, limit: int = limit) -> dict[str, Any]:
            if bytes_needed(candidate) > limit:
                return {"error": "out of memory"}
            return {"samples_s": [seconds(candidate) * float(random.lognormal(0, 0.01)) for _ in range(3)]}

        best, rows = tune(CONFIG, planner(), RANKS, space(), 10 * GIB, measure)
        truth = min(seconds(each) for each in everything if bytes_needed(each) <= limit)
        assert seconds(best) <= 1.05 * truth
        assert len(rows) < len(everything) / 10
        assert bytes_needed(best) <= limit
        if limit < 10 * GIB:
            assert "out of memory" in {row.get("error") for row in rows}


def test_exhaustive_tries_everything_once() -> None:
    small = space() | {"num_workers": (0, 4), "zero_stage": (0, 1), "activation_checkpointing": ("none", "full")}
    tried: list[Candidate] = []

    def measure(candidate: Candidate) -> dict[str, Any]:
        tried.append(candidate)
        return {"samples_s": [seconds(candidate)]}

    best, rows = tune(CONFIG, planner(), RANKS, small, 10 * GIB, measure, is_exhaustive=True)
    assert len(rows) == len(set(tried)) == np.prod([len(values) for values in small.values()])
    assert seconds(best) == min(map(seconds, tried))


def test_what_the_planner_refuses_is_not_tried() -> None:
    budget = int(planner().plan("norm", 2).total / USABLE) + 1
    tried: list[Candidate] = []

    def measure(candidate: Candidate) -> dict[str, Any]:
        tried.append(candidate)
        return {"samples_s": [seconds(candidate)]}

    _, rows = tune(CONFIG, planner(), RANKS, space(), budget, measure)
    refused = [row for row in rows if row.get("error", "").startswith("needs more than 90% of")]
    assert refused
    assert len(tried) >= len(rows) - len(refused)  # finalists more than once
    assert not {(row["activation_checkpointing"], row["micro_batch"], row["zero_stage"]) for row in refused} & {
        (each.activation_checkpointing, each.micro_batch, each.zero_stage) for each in tried
    }
    with pytest.raises(ConfigError, match=r"none of \d+ settings runs on this device: needs more than 90%"):
        tune(CONFIG, planner(), RANKS, space(), GIB // 8, measure)


def test_only_what_the_configuration_allows_is_searched() -> None:
    offloaded = load_config(None, [*TINY, "training.offload_optimizer=cpu"]).config
    assert search_space(offloaded, 2, 1, is_gpu=False) == {
        "channels_last": (False, True),
        "compile": (False,),
        "micro_batch": [1, 2],
        "activation_checkpointing": POLICIES,
        "zero_stage": [1, 2, 3],
        "num_workers": [0, 1],
    }
    assert search_space(offloaded, 1, 1, is_gpu=False)["zero_stage"] == [1]


@pytest.mark.slow
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")
    arguments = [*TINY, "training.global_batch=1", "--only", "zero_stage", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "bench", "tune", *arguments, "--out", str(tmp_path / "best.yaml")])
    with pytest.raises(SystemExit) as caught:
        main()
    output = capsys.readouterr()
    assert caught.value.code in (0, None), output.err
    assert output.err.count("s per volume") == 1  # one rank: one stage
    found = load_config(tmp_path / "best.yaml").config
    assert f"model.channels_last={found.model.channels_last}" in output.out
    assert found.data == load_config(None, TINY).config.data


@pytest.mark.slow
def test_a_trial_that_cannot_run_says_why_in_a_line(tmp_path: Path) -> None:
    trial = Trial("train", (*TINY, "training.micro_batch=3"))
    found = run_trial(trial, tmp_path / "a.json", "cpu")
    assert found["error"].startswith("training.global_batch=4 is not a multiple")
