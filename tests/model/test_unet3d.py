import json
from pathlib import Path

import pytest
import torch

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.model import UNet3d, build_unet, offload
from tests.model.deterministic import fill, inputs

FIGURES = json.loads((Path(__file__).parent / "med_ddpm_figures.json").read_text())
PRESETS = ["whole_head_128", "brats_192"]


def tiny(*overrides: str) -> Config:
    settings = [
        "data.size=[8,8,8]",
        "model.base_channels=8",
        "model.num_groups=4",
        "model.channel_multipliers=[1,2]",
        "model.attention_factors=[2]",
    ]
    return load_config(None, [*settings, *overrides]).config


def tiny_network(*overrides: str) -> UNet3d:
    network = build_unet(tiny(*overrides))
    fill(network)
    return network


def gradients(network: UNet3d, batch: int = 2, seed: int | None = None) -> dict[str, torch.Tensor]:
    x_t, condition, timesteps = (torch.cat([part] * batch) for part in inputs(1, 2, (8, 8, 8), timestep=7))
    network.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    network(x_t, condition, timesteps).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


# ---------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_and_parameter_counts_are_med_ddpms(preset: str) -> None:
    with torch.device("meta"):
        network = build_unet(load_config(preset).config)
    assert list(network.state_dict()) == FIGURES[preset]["keys"]
    assert len(network.state_dict()) == {"whole_head_128": 246, "brats_192": 338}[preset]
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == {"whole_head_128": 40_226_433, "brats_192": 57_562_564}[preset] == FIGURES[preset]["parameters"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_output_is_med_ddpms(preset: str, channels_last: bool) -> None:
    expected = FIGURES[preset]
    config = load_config(preset, [f"model.channels_last={channels_last}"]).config
    network = build_unet(config)
    fill(network)
    with torch.no_grad():
        output = network(
            *inputs(
                config.data.num_modalities,
                config.data.num_labels,
                **{"size": expected["size"], "timestep": expected["timestep"]},
            )
        )
    tolerance = 1e-5 * max(abs(expected["min"]), expected["max"])
    values = output.flatten()
    for index, value in expected["voxels"].items():
        assert values[int(index)].item() == pytest.approx(value, rel=0, abs=tolerance)
    found = (values.double().mean(), values.double().std(), values.min(), values.max())
    for statistic, name in zip(found, ("mean", "std", "min", "max"), strict=True):
        assert statistic.item() == pytest.approx(expected[name], rel=0, abs=tolerance), name


def test_the_timestep_matters() -> None:
    network = tiny_network()
    x_t, condition, _ = inputs(1, 2, (8, 8, 8), timestep=0)
    early, late = (network(x_t, condition, torch.tensor([t])) for t in (10, 200))
    assert (early - late).abs().max() > 1e-3


def test_a_fresh_network_answers_zero() -> None:
    assert not build_unet(tiny())(*inputs(1, 2, (8, 8, 8), timestep=3)).any()


def test_volumes_of_a_batch_do_not_mix() -> None:
    network = tiny_network()
    generator = torch.Generator().manual_seed(0)
    x_t, condition = (torch.randn(2, channels, 8, 8, 8, generator=generator) for channels in (1, 2))
    timesteps = torch.tensor([3, 200])
    together = network(x_t, condition, timesteps)
    alone = torch.cat([network(x_t[i, None], condition[i, None], timesteps[i, None]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ any shape it can


@pytest.mark.parametrize("size", [(2, 2, 2), (4, 10, 6), (16, 2, 8)])
@pytest.mark.parametrize("labels", [1, 5])
def test_any_size_modalities_and_labels(size: tuple[int, int, int], labels: int) -> None:
    network = UNet3d(tiny().model, num_modalities=3, num_labels=labels)
    assert network(*inputs(3, labels, size, timestep=1)).shape == (1, 3, *size)


def test_several_heads_are_several_small_attentions() -> None:
    single, several = tiny_network(), tiny_network("model.head_channels=4")
    arguments = inputs(1, 2, (8, 8, 8), timestep=3)
    assert (single(*arguments) - several(*arguments)).abs().max() > 1e-6
    assert [block.head_channels for block in several.modules() if hasattr(block, "head_channels")] == [4] * 4


def test_attention_is_softmax_of_scaled_products_in_med_ddpms_order() -> None:
    block = tiny_network("model.head_channels=8").middle_block[1]
    x = torch.randn(2, 16, 2, 3, 2)
    qkv = block.qkv(block.norm(x).flatten(2).transpose(1, 2))
    heads = []
    for start in (0, 24):  # 2 heads of q, k, v with 8 channels each
        q, k, v = qkv[..., start : start + 24].split(8, dim=-1)
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v)
    expected = x + block.proj_out(torch.cat(heads, -1)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ memory, dtype, layout


@pytest.mark.parametrize("policy", ["norm", "block", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_checkpointing_gives_the_same_gradients(policy: str, dropout: float, channels_last: bool) -> None:
    settings = [f"model.dropout={dropout}", f"model.channels_last={channels_last}"]
    expected = gradients(tiny_network(*settings), seed=5)
    found = gradients(tiny_network(*settings, f"model.activation_checkpointing={policy}"), seed=5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("policy", ["block", "full"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_checkpoints_on_the_host_give_the_same_gradients(
    policy: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU all is on the host already: here it is copied as if it were not."""
    settings = [f"model.activation_checkpointing={policy}", f"model.channels_last={channels_last}"]
    expected = gradients(tiny_network(*settings))
    network, moved = tiny_network(*settings, "model.offload_activations=cpu"), []
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(network).items())
    monkeypatch.setattr(offload, "_stays", lambda x: moved.append(x.shape) or False)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(network).items())
    assert (2, 8, 8, 8, 8) in moved  # (B, C, D, H, W)


def test_only_checkpoints_can_be_on_the_host() -> None:
    with pytest.raises(ConfigError, match="offload_activations=cpu needs activation_checkpointing=block, full or auto"):
        tiny("model.offload_activations=cpu", "model.activation_checkpointing=norm")


def saved_bytes(policy: str) -> int:
    network = tiny_network(f"model.activation_checkpointing={policy}")
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = sum(parameter.untyped_storage().nbytes() for parameter in network.parameters())
    arguments = inputs(1, 2, (16, 16, 16), timestep=3)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = network(*arguments)
    held = sum(sizes.values())
    output.sum().backward()
    return held - parameters


def test_checkpointing_stores_less_the_more_it_recomputes() -> None:
    none, norm, block, full = (saved_bytes(policy) for policy in ("none", "norm", "block", "full"))
    assert none > norm > block >= full


def test_channels_last_has_the_same_gradients() -> None:
    expected, found = gradients(tiny_network()), gradients(tiny_network("model.channels_last=true"))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("channels_last", [False, True])
def test_bf16_weights_with_fp32_inputs(channels_last: bool) -> None:
    exact, rounded = tiny_network(), tiny_network(f"model.channels_last={channels_last}").bfloat16()
    arguments = inputs(1, 2, (8, 8, 8), timestep=3)
    expected, found = exact(*arguments), rounded(*arguments)
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 0.03
    expected_gradients, found_gradients = gradients(exact), gradients(rounded)
    for name, gradient in expected_gradients.items():
        error = (found_gradients[name].float() - gradient).norm() / gradient.norm()
        assert found_gradients[name].dtype == torch.bfloat16
        assert error < 0.1, name


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("volume", "condition", "timesteps", "message"),
    [
        ((1, 1, 8, 8), (1, 2, 8, 8, 8), 1, r"found volume \(1, 1, 8, 8\) .* expected \(B, 1, D, H, W\)"),
        ((1, 3, 8, 8, 8), (1, 2, 8, 8, 8), 1, r"volume has 3 channels, .* built for 1 modalities"),
        ((1, 1, 8, 8, 8), (1, 4, 8, 8, 8), 1, r"condition has 4 channels, .* built for 2 labels"),
        ((1, 1, 8, 8, 8), (1, 2, 8, 8, 6), 1, r"\(1, 1, 8, 8, 8\) and .* \(1, 2, 8, 8, 6\) differ"),
        ((2, 1, 8, 8, 8), (1, 2, 8, 8, 8), 2, r"differ in batch or size"),
        (
            (1, 1, 8, 7, 8),
            (1, 2, 8, 7, 8),
            1,
            r"\(8, 7, 8\) is not divisible by 2 \(2 levels\); .* \[8, 8, 8\]",
        ),
        ((2, 1, 8, 8, 8), (2, 2, 8, 8, 8), 1, r"timesteps have shape \(1,\), expected \(2,\)"),
    ],
)
def test_wrong_shapes_are_named(volume: tuple, condition: tuple, timesteps: int, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        build_unet(tiny())(torch.zeros(volume), torch.zeros(condition), torch.zeros(timesteps))


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ConfigError, match=r"head_channels=5 does not divide the 16 channels"):
        build_unet(tiny("model.head_channels=5"))
