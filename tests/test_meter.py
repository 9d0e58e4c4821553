"""Time that is not training is not counted as training."""

from __future__ import annotations

import pytest
import torch

from hpc_ddpm.distributed import Ranks
from hpc_ddpm.training import meter


def test_what_is_apart_does_not_slow_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now)
    monkeypatch.setattr(meter, "all_reduce_mean", lambda values, device: values)
    measured = meter.Meter(4, Ranks(), torch.device("cpu"))
    for step in (1, 2):
        with measured.waiting():
            now += 1
        now += 3
        measured.add(step, torch.tensor(0.5))
    with measured.apart("validation_s"):
        now += 100
    first, (step, values) = measured.flush({"learning_rate": 0.1})
    assert first == (1, {"loss": 0.5})
    assert (step, values["validation_s"], values["step_time_s"], values["volumes_per_s"]) == (2, 100, 4, 1)
    assert values["data_wait_share"] == 0.25
    now += 2
    measured.add(3, torch.tensor(0.5))
    _, values = measured.flush({})[0]
    assert values["step_time_s"] == 2
    assert "validation_s" not in values
