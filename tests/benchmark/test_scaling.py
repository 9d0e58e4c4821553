"""`hpc-ddpm bench scaling|comm|all`: the arithmetic of curves and predictions, and real ranks on tiny networks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc_ddpm.benchmark.comm import OPERATIONS, Ring, fit_ring, gradient_bytes, message_sizes
from hpc_ddpm.benchmark.device import _cpu_joules
from hpc_ddpm.benchmark.page import to_page
from hpc_ddpm.benchmark.record import environment, new_report, read_report
from hpc_ddpm.benchmark.scaling.curve import config_at, measured_rows, sentences
from hpc_ddpm.benchmark.scaling.model import collectives_s, predict
from hpc_ddpm.config import Config, load_config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.unet3d import build_unet
from launch import bench_all
from launch.scaling_stages import _notes, read_points
from tests.conftest import TINY

WEAK = load_config(None, [*TINY, "training.global_batch=2"]).config
STRONG = load_config(None, [*TINY, "training.global_batch=8"]).config
RING = Ring(latency_s=2e-5, bytes_per_s=5e9)
CEILINGS = {"matmul_flops": 1e12, "copy_bytes_per_s": 1e11}
SHARES = {"conv": 0.6, "norm": 0.1, "attention": 0.0, "up/down": 0.0, "optimizer": 0.1, "data": 0.0, "other": 0.1}
Run = Callable[..., subprocess.CompletedProcess[str]]


def results(seconds: Callable[[str, int], float], gpus: Sequence[int], config: Config, mode: str) -> dict[int, Any]:
    """As the ranks give them, from the seconds of a step of each engine; the rounds run at other speeds."""

    def point(count: int, slowness: float) -> dict[str, Any]:
        rows = []
        for name in ("ddp", "zero1"):
            step_s = seconds(name, count) * slowness
            communication = 1 - seconds(name, 1) * (1 if mode == "weak" else 1 / count) / seconds(name, count)
            shares = {part: share * (1 - communication) for part, share in SHARES.items()}
            shares["communication"] = communication + 0.1 * (1 - communication)
            found = {"step_s": [step_s, step_s, step_s], "data_wait_share": [0.0] * 3, "shares": shares, "read_s": 1e-3}
            found |= {} if name == "ddp" else {"checkpoint_stall_s": 0.5, "checkpoint_gib": 1.0}
            rows.append({"contestant": name, **found})
        return {"rows": rows, "device": "GPU", "precision": "fp32", "ceilings": CEILINGS}

    for count in gpus:
        config_at(config, count, mode)
    return {count: [point(count, slowness) for slowness in (1.0, 3.0, 2.0)] for count in gpus}


def test_a_ring_is_found_in_its_own_times() -> None:
    rows = [
        {
            "operation": operation,
            "ranks": ranks,
            "bytes": size,
            "seconds": {"median": RING.seconds(operation, size, ranks)},
        }
        for operation in OPERATIONS
        for ranks in (2, 4)
        for size in (1024, 2**20, 2**26)
    ]
    found = fit_ring(rows)
    assert found.latency_s == pytest.approx(2e-5)
    assert found.bytes_per_s == pytest.approx(5e9)
    assert RING.seconds("all_reduce", 2**20, 4) == pytest.approx(6 * 2e-5 + 1.5 * 2**20 / 5e9)


def test_messages_are_the_networks_own() -> None:
    total = 4 * sum(parameter.numel() for parameter in build_unet(WEAK).parameters())
    assert gradient_bytes(WEAK) == total
    small = WEAK.training.model_copy(update={"reduce_bucket_size": 1000})
    sizes = message_sizes(WEAK.model_copy(update={"training": small}))
    assert sizes[-1] == total
    assert {1024, 4000} <= set(sizes)
    assert message_sizes(WEAK)[-1] == total  # a bucket holds all of it


def test_a_loaded_machine_does_not_bend_a_curve() -> None:
    """Rounds are 1, 3 and 2 times as slow: efficiency and ratios pair what was measured together."""
    found = results(
        lambda name, count: {1: 1.0, 2: 1.25}[count] * (1.1 if name == "zero1" else 1.0), (1, 2), WEAK, "weak"
    )
    rows = measured_rows(found, WEAK, "weak", per_node=1, price=3.6)
    by = {(row["contestant"], row["gpus"]): row for row in rows}
    assert by["ddp", 2]["efficiency"] == pytest.approx({"median": 0.8, "p10": 0.8, "p90": 0.8})
    assert by["zero1", 2]["times_ddp"]["p90"] == pytest.approx(1.1)
    assert by["zero1", 2]["efficiency_of_node"]["median"] == pytest.approx(0.8)
    assert by["ddp", 1]["efficiency_of_node"] is None
    assert by["ddp", 2]["global_batch"] == 4
    row = by["ddp", 2]
    assert row["seconds_per_volume"]["median"] == pytest.approx(2 * 1.25 / 2)  # the middle round
    assert row["volumes_per_s"] == pytest.approx(2 / 1.25)
    assert row["cost_per_1000_volumes"] == pytest.approx(1.25)
    parts = {part: seconds for part, seconds in row["parts_s"].items() if part != "checkpoint"}
    assert sum(parts.values()) == pytest.approx(1.25)
    assert (
        "ddp on 2 GPUs keeps 80% of the speed per GPU of 1; the added time is communication 100%" in sentences(rows)[0]
    )


def test_strong_scaling_divides_the_batch() -> None:
    found = results(lambda name, count: 8.0 / count, (1, 2, 4), STRONG, "strong")
    rows = measured_rows(found, STRONG, "strong", per_node=4, price=None)
    assert {row["global_batch"] for row in rows} == {8}
    assert all(row["efficiency"]["median"] == pytest.approx(1) for row in rows)
    with pytest.raises(ConfigError, match="not a multiple of micro_batch x ranks"):
        config_at(STRONG, 3, "strong")
    changing = load_config(None, [*TINY, "model.activation_checkpointing=auto"]).config
    with pytest.raises(ConfigError, match="a curve has one setting for all points"):
        config_at(changing, 1, "weak")


@pytest.mark.parametrize(("config", "mode"), [(WEAK, "weak"), (STRONG, "strong")])
def test_the_model_follows_the_law_that_made_its_points(config: Config, mode: str) -> None:
    ring = Ring(1e-3, 1e6)

    def seconds(name: str, count: int) -> float:
        at = config_at(config, count, mode)
        return 0.5 * at.training.global_batch / count + 0.7 * collectives_s(name, at, "fp32", ring, count)

    rows = measured_rows(results(seconds, (1, 2, 4), config, mode), config, mode, per_node=2, price=None)
    slowed = Ring(2 * ring.latency_s, ring.bytes_per_s / 2)  # the middle round is twice as slow
    predicted = predict(rows, config, mode, "fp32", slowed, per_node=2)
    assert all(abs(row["prediction_error"]) < 1e-6 for row in rows if row["gpus"] > 1)
    assert all(abs(row["held_out_error"]) < 1e-6 for row in rows if row["gpus"] == 4)
    eight = next(row for row in predicted if (row["gpus"], row["contestant"]) == (8, "ddp"))
    per_volume = 2 * seconds("ddp", 8) / (config_at(config, 8, mode).training.global_batch / 8)
    assert 1 / eight["volumes_per_s_per_gpu"] == pytest.approx(per_volume)
    assert eight["nodes"] == 4
    assert {row["gpus"] for row in predicted} == ({8, 16, 32, 64} if mode == "weak" else {8})
    report = new_report("scaling", environment(), _settings(config, mode), [*rows, *predicted])
    html, markdown = to_page({"scaling.json": report})
    assert html.count("<svg") == 2
    assert "stroke-dasharray" in html
    assert "ddp (prediction)" in markdown
    assert "fitted without the largest point, by at most 0.0% on it" in markdown


def _settings(config: Config, mode: str) -> dict[str, Any]:
    facts = {"mode": mode, "rounds": 3, "repeats": 3, "notes": [], "errors": {}, "device": "GPU"}
    return facts | {"config": config.dump()}


def test_what_would_mislead_is_said() -> None:
    said = _notes(64, 64, ["here"], is_cpu=True, has_prediction=True)
    assert said[1].startswith("OVERSUBSCRIBED: up to 64 ranks share the ")
    assert "no measured point spans nodes" in said[2]
    assert _notes(4, 2, ["a", "a", "b", "b"], is_cpu=False, has_prediction=True) == []


def test_points_are_read_or_refused() -> None:
    assert read_points("4,1,2", "ddp,1") == ([1, 2, 4], ["ddp", "zero1"])
    with pytest.raises(ConfigError, match="--gpus 1,x: numbers such as"):
        read_points("1,x", "ddp")
    with pytest.raises(ConfigError, match="--engines 4: ddp and ZeRO stages"):
        read_points("1", "4")


def test_energy_of_the_cpus_is_shared_by_their_ranks(tmp_path: Path) -> None:
    for zone, energy in (("intel-rapl:0", 6_000_000), ("intel-rapl:1", 2_000_000), ("intel-rapl:0:0", 1)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{energy}\n")
    assert _cpu_joules(4, tmp_path) == 2.0
    assert _cpu_joules(1, tmp_path / "none") is None


def test_a_failing_part_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_limited(command: Sequence[str], path: Path, limit_s: float, device: str) -> dict[str, Any]:
        if "sample" in command:
            return {"error": "exit code 1", "log": "…\nno kernel image", "seconds": 1.0}
        report = new_report("peers", environment(), {}, [{"contestant": path.stem}])
        path.write_text(json.dumps(report))
        return {**report, "seconds": 1.0}

    monkeypatch.setattr(bench_all, "run_limited", run_limited)
    monkeypatch.setattr(bench_all, "num_cores", lambda: 4)
    assert bench_all.bench_all(tmp_path, ["--config", "demo"], 1, None, 5, None) == 2
    summary = (tmp_path / "summary.md").read_text()
    assert [line.split()[1] for line in summary.splitlines()[2:]] == ["train", "sample", "comm", "data", "scaling"]
    assert "exit code 1: no kernel image" in capsys.readouterr().out
    assert "scaling" in (tmp_path / "report.html").read_text()
    assert bench_all.bench_all(tmp_path, [], 1, None, 0.1, None) == 2
    assert "no time left" in capsys.readouterr().out


@pytest.mark.slow
def test_engines_race_on_real_ranks(cli: Run, tmp_path: Path) -> None:
    words = ["--gpus", "1,2", "--engines", "ddp,0,1,3", "--rounds", "1", "--repeats", "2", "-q"]
    settings = ["training.global_batch=2", "training.learning_rate=1e-4"]
    done = cli("bench", "scaling", *TINY, *settings, *words, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "scaling.json")
    rows = [row for row in report["rows"] if row["kind"] == "measured"]
    assert [(row["gpus"], row["contestant"]) for row in rows] == [
        (count, name) for count in (1, 2) for name in ("ddp", "zero0", "zero1", "zero3")
    ]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4) for row in rows[:4])
    assert all(row["loss"] == pytest.approx(rows[4]["loss"], rel=1e-4) for row in rows[4:])
    assert all(row["communication_share"] > 0 for row in rows[4:])
    assert all(min(row["parts_s"].values()) >= 0 for row in rows)  # what hides communication leaves 0 of it
    assert all(row["checkpoint_gib"] > 0 for row in rows if row["contestant"] != "ddp")
    assert {row["operation"] for row in report["rows"] if row["kind"] == "collective"} == set(OPERATIONS)
    assert report["settings"]["ring_gb_per_s"] > 0
    assert "| engine" in done.stdout
    assert not list(tmp_path.glob("hpc_ddpm-bench-*"))


@pytest.mark.slow
def test_a_point_that_fails_is_named(cli: Run, tmp_path: Path) -> None:
    done = cli("bench", "scaling", *TINY, "training.precision=fp16", "--gpus", "1", "-q", "--out", tmp_path)
    assert done.returncode == 2
    assert "no point could be measured: hpc-ddpm: precision=fp16 needs a GPU" in done.stderr


@pytest.mark.slow
def test_collectives_on_new_ranks(cli: Run, tmp_path: Path) -> None:
    done = cli("bench", "comm", *TINY, "--ranks", "2", "-q", "--json", tmp_path / "comm.json")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "comm.json")
    assert {row["ranks"] for row in report["rows"]} == {2}
    assert all(row["bus_gb_per_s"] > 0 for row in report["rows"])
    assert report["environment"]["command"][1:3] == ["bench", "comm"]
