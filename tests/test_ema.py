"""The averages' arithmetic; that they do not depend on ranks is in tests/distributed."""

from __future__ import annotations

import pytest

from hpc_ddpm.config import TrainingConfig, load_config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.training.ema import ema_decays, power_decay, power_gamma


def test_power_average_weighs_the_past_by_a_power_of_time() -> None:
    """Karras et al. 2024, equation 2: weight of step t proportional to t^gamma."""
    gamma, decay = power_gamma(0.1), power_decay(0.1)
    weights = [1.0]
    for n in range(1, 400):
        weights = [weight * decay(n) for weight in weights] + [1 - decay(n)]
    assert decay(0) == 0
    assert sum(weights) == pytest.approx(1)
    assert weights[399] / weights[199] == pytest.approx(2**gamma, rel=0.02)


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_widths_of_the_paper(sigma: float, gamma: float) -> None:
    assert power_gamma(sigma) == pytest.approx(gamma, abs=0.01)


def test_each_average_has_a_name() -> None:
    training = TrainingConfig(ema_decay=0.9, ema_extra_decays=(0.99,), ema_power_sigmas=(0.05,), ema_warmup=False)
    decays = ema_decays(training)
    assert list(decays) == ["ema", "ema_0.99", "ema_power_0.05"]
    assert [decays["ema"](100), decays["ema_0.99"](100)] == [0.9, 0.99]
    with pytest.raises(ConfigError, match="same name"):
        load_config(None, ["training.ema_extra_decays=[0.9,0.9]"])
