"""`hpc-ddpm bench train|sample`: the arithmetic of the figures, and the real loops on tiny networks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpc_ddpm.benchmark.figures import figures_table, make_row, verdict, warm_up_length
from hpc_ddpm.benchmark.floor import fused_floor_s, list_operations
from hpc_ddpm.benchmark.record import read_report
from hpc_ddpm.benchmark.train import choose_counted
from hpc_ddpm.config import load_config
from hpc_ddpm.model.planner import with_policy
from hpc_ddpm.model.trace import trace_step
from tests.conftest import TINY

CEILINGS = {"matmul_flops": 1e12, "copy_bytes_per_s": 1e11}
CONFIG = load_config(None, TINY).config
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_warm_up_is_what_is_slower_than_the_rest() -> None:
    assert warm_up_length([9.0, 4.0, 2.2, 2.0, 2.1, 2.3, 1.9, 2.0, 2.2, 2.1]) == 2
    assert warm_up_length([2.0, 2.1, 2.0, 2.1]) == 0
    assert warm_up_length([9.0, 8.0, 7.0, 1.0, 1.0, 1.0]) == 3
    assert warm_up_length([5.0]) == 0


def test_the_spread_is_said_in_words() -> None:
    assert verdict([1.0, 1.01, 1.0, 0.99, 1.0, 1.0]).endswith("repeats lie within 1.0%")
    assert "a smaller difference may be noise" in verdict([1.0, 1.5, 1.0, 1.4, 0.9, 1.0])
    assert verdict([1.0, 1.0]) == "2 repeats are too few to compare"


def test_repeats_with_a_checkpoint_in_the_way_do_not_count() -> None:
    logs = [
        {"step_time_s": time, "checkpoint_stall_s": stall}
        for time, stall in zip([9, 8, 1, 1, 7, 1, 1], [0, 0, 0, 0, 2, 0, 0], strict=True)
    ]
    counted, excluded = choose_counted(logs, 1)
    assert [values["step_time_s"] for values in counted] == [1, 1, 1, 1]
    assert excluded == 2
    always = [values | {"checkpoint_stall_s": 1.0} for values in logs]
    assert len(choose_counted(always, 1)[0]) == 5


def test_the_floor_has_all_flops_and_the_bytes_of_their_operands() -> None:
    forward, both = (list_operations(CONFIG, torch.bfloat16, backward=backward) for backward in (False, True))
    trace = trace_step(CONFIG, torch.bfloat16)
    assert sum(each.flops for each in forward) == trace.forward_flops
    assert sum(each.flops for each in both) == trace.flops
    assert list_operations(with_policy(CONFIG, "block"), torch.bfloat16, backward=True) == both
    endless = CEILINGS | {"copy_bytes_per_s": float("inf")}
    assert fused_floor_s(both, endless) == pytest.approx(trace.flops / 1e12)
    first = forward[2]  # after the two layers of the time embedding: 3 -> 8 channels at 16^3, kernel 3^3 and bias
    assert first.num_bytes == 2 * (3 * 16**3 + 8 * 3 * 27 + 8 + 8 * 16**3)
    assert first.flops == 2 * 27 * 3 * 8 * 16**3


def test_figures_follow_from_seconds_flops_and_peak() -> None:
    samples = [0.5, 0.5, 0.4, 0.6, 0.5]
    facts = {"excluded": 3, "price": 2.0, "joules_per_volume": 100.0}
    row = make_row("train", CONFIG, "bf16", samples, CEILINGS, 2e12, policy="block", **facts)
    flops = trace_step(CONFIG, torch.bfloat16).flops
    assert row["volumes_per_s_per_gpu"] == 2
    assert row["voxels_per_s_per_gpu"] == 2 * 16**3
    assert row["volumes_per_gpu_hour"] == 7200
    assert row["mfu"] == pytest.approx(flops / 0.5 / 2e12)
    assert row["hfu"] > row["mfu"]
    assert row["of_matmul_ceiling"] == pytest.approx(2 * row["mfu"])
    assert row["of_fused_floor"] >= row["of_matmul_ceiling"]
    assert row["cost_per_1000_volumes"] == pytest.approx(1000 * 0.5 * 2 / 3600)
    sampled = make_row("sample", CONFIG, "bf16", samples, CEILINGS, None, **facts)
    assert sampled["mfu"] is None
    assert (
        sampled["tflop_per_volume"] * 1e12
        == CONFIG.sampling.num_steps * trace_step(CONFIG, torch.bfloat16).forward_flops
    )
    page = figures_table([row, sampled], ["a", "b"])
    assert "| figure " in page
    assert "samples" not in page


@pytest.mark.slow
def test_the_training_loop(cli: Run, tmp_path: Path) -> None:
    done = cli("bench", "train", *TINY, "--repeats", "6", "--price", "2", "-q", "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "a.json")
    (row,) = report["rows"]
    assert report["benchmark"] == "train"
    assert any("conv" in name for name in report["environment"]["conv_kernels"])
    assert 3 <= len(row["samples_s"]) + row["warm_up_excluded"] - 2 <= 6
    assert row["volumes_per_s_per_gpu"] == pytest.approx(1 / row["seconds_per_volume"]["median"])
    assert 0 <= row["data_wait_share"] < 1
    assert 0 <= row["host_overhead_share"] < 1
    assert 0 <= row["communication_share"] < sum(row["step_shares"].values())
    assert row["step_shares"]["conv"] > 0
    assert row["checkpoint_stall_s"] > 0
    assert 0 < row["peak_memory_gib"] < 10
    assert row["cost_per_1000_volumes"] > 0
    assert "seconds per volume" in done.stdout


@pytest.mark.slow
def test_both_loops_on_two_ranks(real_torchrun: Run, torchrun: Run, tiny_packed: Path, tmp_path: Path) -> None:
    for what, start in (("train", real_torchrun), ("sample", torchrun)):
        path = tmp_path / f"{what}.json"
        options = ["--repeats", "3", "--data", tiny_packed, "-q", "--json", path, "--work", tmp_path / "work"]
        done = start(2, "-m", "launch.cli", "bench", what, *TINY, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        (row,) = json.loads(path.read_text())["rows"]
        assert row["world_size"] == 2
        assert len(row["samples_s"]) >= 1
        assert row["seconds_per_volume"]["median"] > 0
        assert done.stdout.count("seconds per volume") == 1  # rank 0 alone reports
    assert not list((tmp_path / "work").iterdir())
