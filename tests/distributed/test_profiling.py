"""The page that says where a step's time goes: complete, and the same kind of page at every stage and policy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hpc_ddpm.training.profiling import PARTS
from tests.distributed.test_training import Torchrun, losses, run_all


@pytest.mark.slow
def test_the_parts_are_found_and_add_up(torchrun: Torchrun, tiny_packed: Path, tmp_path: Path) -> None:
    profiled = ["training.num_steps=4", "training.profile_steps=[2,3]"]
    jobs = {
        "zero1": [],
        "zero3": ["training.zero_stage=3"],
        "full": ["model.activation_checkpointing=full"],
        "late": ["training.profile_steps=[4,9]"],  # the run ends before
    }
    run_all(torchrun, 2, {tmp_path / name: [*profiled, *settings] for name, settings in jobs.items()}, tiny_packed)
    run_all(torchrun, 2, {tmp_path / "plain": ["training.num_steps=4"]}, tiny_packed)
    for name in jobs:
        run = tmp_path / name
        head, _, _, *rows = (run / "profile/where.txt").read_text().splitlines()
        assert head.startswith(f"{1 if name == 'late' else 2} steps on rank 0 (cpu), ")
        parts = {row.split()[0]: float(row.split()[1]) for row in rows[: len(PARTS)]}
        assert tuple(parts) == PARTS
        assert all(seconds > 0 for part, seconds in parts.items() if part != "other"), (name, parts)
        step_s = float(head.split()[-3])
        beside = parts["communication"] if parts["other"] == 0 else 0
        assert sum(parts.values()) - beside <= step_s + 0.001, (name, parts)
        trace = json.loads(gzip.decompress((run / "profile/trace.json.gz").read_bytes()))
        marks = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("hpc_ddpm::")}
        assert {"hpc_ddpm::step", "hpc_ddpm::conv", "hpc_ddpm::optimizer"} <= marks
    assert losses(tmp_path / "zero1") == losses(tmp_path / "plain")
