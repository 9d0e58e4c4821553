"""The embedding of covariates: nothing at first, learnt later, and a place for what is not known."""

import math

import pytest
import torch

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.model import UNet3d, build_unet
from hpc_ddpm.model.covariates import covariate_features, feature_names
from hpc_ddpm.model.initial import initial_tensors
from hpc_ddpm.model.trace import count_parameters, trace_step
from tests.model.deterministic import fill, inputs

COVARIATES = "data.covariates={age: {mean: 50, std: 10}, sex: {values: [F, M]}}"
NAN = math.nan


def config(*overrides: str) -> Config:
    settings = ["data.size=[8,8,8]", "model.base_channels=8", "model.num_groups=4", "model.channel_multipliers=[1,2]"]
    return load_config(None, [*settings, *overrides]).config


def plain_and_new() -> tuple[UNet3d, UNet3d]:
    """A network that answers something, and the same with a fresh embedding of covariates."""
    plain, with_covariates = build_unet(config()), build_unet(config(COVARIATES))
    fill(plain)
    fresh = {name: tensor for name, tensor in initial_tensors(config(COVARIATES)) if name.startswith("covariate_embed")}
    with_covariates.load_state_dict({**plain.state_dict(), **fresh})
    return plain, with_covariates


def test_features_are_standardised_one_hot_and_unknown() -> None:
    covariates = config(COVARIATES).data.covariates
    assert feature_names(covariates) == ["age", "age unknown", "sex=F", "sex=M", "sex unknown"]
    found = covariate_features(torch.tensor([[65.0, 1.0], [NAN, 0.0], [50.0, NAN]]), covariates)
    assert found.tolist() == [[1.5, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_without_any_effect(dtype: torch.dtype) -> None:
    plain, new = (network.to(dtype) for network in plain_and_new())
    arguments = inputs(1, 2, (8, 8, 8), timestep=7)
    for row in ([63.0, 1.0], [NAN, NAN]):
        assert torch.equal(new(*arguments, torch.tensor([row])), plain(*arguments))


def test_training_learns_values_and_unknown_apart() -> None:
    _, network = plain_and_new()
    x_t, condition, timesteps = (torch.cat([part] * 3) for part in inputs(1, 2, (8, 8, 8), timestep=7))
    rows = torch.tensor([[35.0, 0.0], [65.0, 1.0], [NAN, NAN]])
    optimizer = torch.optim.Adam(network.covariate_embed.parameters(), lr=1e-2)
    targets = torch.tensor([-1.0, 1.0, 0.0]).view(3, 1, 1, 1, 1)
    for _ in range(3):
        optimizer.zero_grad()
        (network(x_t, condition, timesteps, rows) - targets).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in network.covariate_embed.parameters())
    with torch.no_grad():
        young_f, old_m, unknown = network(x_t, condition, timesteps, rows)
        assert len({float(answer.mean()) for answer in (young_f, old_m, unknown)}) == 3
        torch.testing.assert_close(network(x_t[:1], condition[:1], timesteps[:1])[0], unknown)
        alone = network(x_t[:1], condition[:1], timesteps[:1], rows[1:2])[0]
    torch.testing.assert_close(alone, old_m)


def test_parameters_are_counted_and_traced() -> None:
    width, features = 32, 5
    added = (features + 1) * width + (width + 1) * width
    assert count_parameters(config(COVARIATES)) - count_parameters(config()) == added
    assert trace_step(config(COVARIATES), torch.bfloat16).flops > trace_step(config(), torch.bfloat16).flops


@pytest.mark.parametrize("settings", [[], [COVARIATES]])
def test_other_shapes_are_refused(settings: list[str]) -> None:
    network = build_unet(config(*settings))
    with pytest.raises(DataFormatError, match=r"covariates have shape \(1, 3\), expected \(1, [02]\)"):
        network(*inputs(1, 2, (8, 8, 8), timestep=7), torch.zeros(1, 3))
