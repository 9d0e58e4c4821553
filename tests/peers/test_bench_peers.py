"""The benchmark beside others: its arithmetic, and that each contestant that needs no clone does a step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hpc_ddpm.benchmark.record import environment, new_report
from tests.peers.bench_peers import figures, to_markdown
from tests.peers.contestants import SAMPLING, TRAINING, Size

SIZE = Size(16, 32, torch.device("cpu"))


def test_ratios_are_of_whole_volumes_turn_by_turn() -> None:
    def row(loop: str, name: str, seconds: list[float]) -> dict[str, Any]:
        turns = [{"wall_s": each, "cpu_s": each} for each in seconds]
        return {"loop": loop, "contestant": name, "parameters": 2_000_000, "peak_mib": 9.0} | figures(name, loop, turns)

    few = "hpc_ddpm, bf16, dpmpp_2m"
    rows = [row("training", "a", [2.0, 4.0, 2.0]), row("training", "b", [1.0, 1.0, 2.0])]
    rows += [row("sampling", "a", [1.0] * 3), row("sampling", few, [0.5] * 3)]
    settings = {"size": 64, "base_channels": 32, "rounds": 3, "device": "cpu"}
    page = to_markdown(new_report("peers", environment(), settings, rows))
    assert "| 2.00 (1.00 - 4.00) " in page
    assert "| 25.00 (25.00 - 25.00) " in page  # 250 evaluations in 1 s beside 20 in 0.5 s
    assert "| 360.0 " in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "name"),
    [
        *(("training", name) for name in ("plain PyTorch, fp32", "MONAI, autocast", "hpc_ddpm, fp32")),
        *(("sampling", name) for name in ("plain PyTorch, fp32", "MONAI, autocast", "hpc_ddpm, fp32")),
    ],
)
def test_contestants_do_their_steps(loop: str, name: str) -> None:
    build = (TRAINING if loop == "training" else SAMPLING)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's and DeepSpeed's
        with build(SIZE) as contestant:
            contestant.run(2)
            assert contestant.parameters > 10_000_000
