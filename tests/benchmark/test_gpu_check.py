"""`hpc-ddpm bench gpu-check` with the device set to CPU and tiny networks; broken parts cost only themselves."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from hpc_ddpm.benchmark.device import device_name, measure_ceilings, time_calls
from hpc_ddpm.benchmark.gpu_check.parts import PARTS, run_part
from hpc_ddpm.benchmark.gpu_check.run import gpu_check, run_limited
from hpc_ddpm.benchmark.gpu_check.setup import Row, Setup, attempt, check, relative_error
from hpc_ddpm.benchmark.step import PlainStep
from hpc_ddpm.config import load_config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.gpus import peak_flops
from hpc_ddpm.sealed import seal
from tests.conftest import TINY

SETUP = Setup(torch.device("cpu"), is_full=False)
STARTED = ["environment", "zero1"]


def test_a_wrong_value_never_passes() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.05]), expected) == pytest.approx(0.01, rel=1e-5)
    assert check("near", 0.01, 0.02)["is_ok"]
    assert not check("far", 0.03, 0.02)["is_ok"]
    assert not check("nan", relative_error(expected * math.nan, expected), 1.0)["is_ok"]


def test_running_out_of_memory_is_a_result() -> None:
    def too_much() -> Row:
        raise torch.OutOfMemoryError("80 GiB")

    assert attempt({"policy": "none"}, too_much) == {"policy": "none", "error": "out of memory"}


def test_any_other_error_fails_its_part(tmp_path: Path) -> None:
    def broken() -> Row:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    row = attempt({"policy": "none"}, broken)
    assert row == {"policy": "none", "error": "RuntimeError: CUDA error: an illegal memory access", "is_ok": False}
    assert run_part(lambda setup: iter([{"name": "figure"}, row]), SETUP, tmp_path / "part.json") == "failed"


def test_what_a_part_found_before_it_failed_is_kept(tmp_path: Path) -> None:
    def part(setup: Setup) -> Iterator[Row]:
        yield {"name": "first"}
        raise RuntimeError("no kernel image")

    assert run_part(part, SETUP, tmp_path / "part.json") == "error"
    found = json.loads((tmp_path / "part.json").read_text())
    assert found["rows"] == [{"name": "first"}]
    assert found["error"] == "RuntimeError: no kernel image"
    assert run_part(lambda setup: iter([check("far", 3.0, 2.0)]), SETUP, tmp_path / "part.json") == "failed"


def test_a_part_that_hangs_or_crashes_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    part = seal('{"status": "unfinished", "rows": [1]}')
    write = f"import time, os; open({str(path)!r}, 'w').write({part!r}); "
    began = time.monotonic()
    hung = run_limited([sys.executable, "-c", f"{write}time.sleep(60)"], path, 1.0)
    assert time.monotonic() - began < 30
    assert (hung["status"], hung["rows"]) == ("timeout", [1])
    crashed = run_limited([sys.executable, "-c", f"{write}print('last words', flush=True); os.abort()"], path, 30.0)
    assert (crashed["status"], crashed["rows"], crashed["error"]) == ("crashed", [1], "exit code -6")
    assert "last words" in crashed["log"]


def test_plain_steps_follow_the_gradient() -> None:
    config = load_config(None, [*TINY, "training.micro_batch=2", "training.learning_rate=1e-3"]).config
    for precision in ("fp32", "bf16"):
        step, losses = PlainStep(config, SETUP.device, precision), []
        for _ in range(8):
            step._count = count()  # the same samples again
            losses.append(float(step()))
        assert losses[-1] < 0.99 * losses[0]
        assert step.optimizer.masters[0].dtype == torch.float32


def test_the_peak_is_the_data_sheets() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA GeForce RTX 4090", "fp32") == 82.6e12
    for slower in ("H100 PCIe", "H100 NVL", "A100-SXM4-80GB MIG 1g.10gb", "GeForce RTX 4090 Laptop GPU"):
        assert peak_flops(f"NVIDIA {slower}", "bf16") is None
    assert peak_flops(device_name(SETUP.device), "bf16") is None


def test_the_ruler_measures_a_known_product() -> None:
    """MFU of a loop of matrix products against the measured ceiling is about 1, of half the work about a half."""
    ceiling = measure_ceilings(SETUP.device, torch.float32, budget_s=0.2)["matmul_flops"]
    left, right = (torch.randn(1024, 1024) for _ in range(2))
    times = time_calls(lambda: torch.mm(left, right), SETUP.device, budget_s=0.2)
    mfu = 2 * 1024**3 / sorted(times)[len(times) // 10] / ceiling
    assert 0.4 < mfu < 2.5  # shared cores; a wrong factor of FLOPs, bytes or seconds is far outside


def test_unknown_parts_and_missing_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no part conv4d; choose among environment, conv3d"):
        gpu_check(tmp_path, device="cpu", only=["conv4d"])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"no CUDA device .* use --device cpu --size small"):
            gpu_check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARTS if not name.endswith("brats_192") and name not in STARTED])
def test_every_part_runs_on_a_cpu(name: str, tmp_path: Path) -> None:
    """Those of the other preset are the same functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a part does in its own process
        assert run_part(PARTS[name].run, SETUP, tmp_path / "part.json") == "passed"
    rows = json.loads((tmp_path / "part.json").read_text())["rows"]
    assert {row["error"] for row in rows if isinstance(row.get("error"), str)} <= {"needs CUDA"}


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own(tmp_path: Path) -> None:
    results = gpu_check(tmp_path, device="cpu", size="small", only=STARTED)
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(STARTED, "passed")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["part"] for row in summary["rows"]] == STARTED
    page = (tmp_path / "summary.md").read_text()
    assert all(f"## {name}\n" in page for name in STARTED)


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path: Path) -> None:
    results = gpu_check(tmp_path, device="cpu", size="small", minutes=0.01, only=["environment"])
    assert results["environment"]["status"] == "skipped"
    assert "| environment | skipped |" in (tmp_path / "summary.md").read_text()
