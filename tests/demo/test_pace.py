"""The demo trains as many steps as the machine computes in a few minutes, the same number when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_ddpm.config import load_config
from hpc_ddpm.demo import pace
from hpc_ddpm.demo.run import _write_config


@pytest.mark.parametrize(("step_s", "steps"), [(0.01, 350), (1.0, 190), (60.0, 100)])
def test_steps_follow_the_measured_step(monkeypatch: pytest.MonkeyPatch, step_s: float, steps: int) -> None:
    monkeypatch.setattr(pace, "measure_step_s", lambda config: step_s)
    assert pace.fitting_steps(load_config("demo", ["training.num_steps=350"]).config) == steps


def test_a_short_run_stays_as_short_as_it_was_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "measure_step_s", lambda config: 60.0)
    assert pace.fitting_steps(load_config("demo", ["training.num_steps=5"]).config) == 5


def test_a_step_is_measured_on_the_real_network() -> None:
    assert 0 < pace.measure_step_s(load_config("demo", ["data.size=[16,16,16]", "training.precision=fp32"]).config) < 60


def test_a_later_start_keeps_the_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("demo").config
    monkeypatch.setattr(pace, "measure_step_s", lambda config: 1.0)
    assert pace.choose_steps(tmp_path / "demo.yaml", config) == 190
    preset = _write_config(tmp_path / "demo.yaml", load_config("demo", ["training.num_steps=123"]).config)
    assert pace.choose_steps(preset, config) == 123
