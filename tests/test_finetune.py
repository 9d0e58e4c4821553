"""Fine-tuning: weights meet a network with other labels and modalities, and parameters that stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.errors import CheckpointError, ConfigError
from hpc_ddpm.model.unet3d import UNet3d, build_unet
from hpc_ddpm.training.finetune import freeze, start_from, start_line
from hpc_ddpm.weights import save_weights
from tests.conftest import TINY

OLD = [*TINY, "data.modalities=[t1,flair]", "data.labels.names={1: head, 2: tumour}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights folder of a network whose last convolution is not zero."""
    folder = tmp_path_factory.mktemp("trained") / "weights"
    torch.manual_seed(0)
    config = load_config(None, OLD).config
    network = build_unet(config)
    state = {name: torch.randn(tensor.shape) * 0.1 for name, tensor in network.state_dict().items()}
    save_weights(folder, state, config, {})
    return folder


def started(trained: Path, *overrides: str) -> tuple[UNet3d, Config, dict]:
    config = load_config(None, [*OLD, f"training.init_from={trained}", *overrides]).config
    start = start_from(config)
    network = build_unet(config).eval()
    network.load_state_dict(start.tensors)
    return network, config, start.report


def test_other_channels_begin_as_the_old_network(trained: Path) -> None:
    old, _, same = started(trained)
    new, _, report = started(
        trained, "data.modalities=[flair,t2,t1]", "data.labels.names={1: tumour, 2: edema, 3: ventricle}"
    )
    torch.manual_seed(1)
    t1, flair, t2, head, tumour, edema, ventricle = torch.randn(7, 1, 1, 16, 16, 16)
    at = torch.tensor([3])
    with torch.no_grad():
        before = old(torch.cat([t1, flair], 1), torch.cat([torch.zeros_like(head), tumour], 1), at)
        after = new(torch.cat([flair, t2, t1], 1), torch.cat([tumour, edema, ventricle], 1), at)
    torch.testing.assert_close(after[:, [2, 0]], before, rtol=1e-5, atol=1e-5)
    assert not after[:, 1].any(), "the new modality does not start at zero"
    assert report["modalities"] == {"kept": ["flair", "t1"], "new": ["t2"], "dropped": []}
    assert report["labels"] == {"kept": ["tumour"], "new": ["edema", "ventricle"], "dropped": ["head"]}
    assert (len(same["adapted_tensors"]), len(report["adapted_tensors"])) == (0, 3)
    line = start_line({**report, "parameters": 10, "frozen_parameters": 4})
    assert "modalities kept flair, t1; modalities new t2; labels kept tumour; labels new edema, ventricle" in line
    assert line.endswith("frozen: 4 of 10 parameters")


def test_new_covariates_begin_without_effect(trained: Path, tmp_path: Path) -> None:
    old, _, _ = started(trained)
    age, sex = "age: {mean: 50, std: 10}", "sex: {values: [F, M]}"
    with_age, config, report = started(trained, f"data.covariates={{{age}}}")
    assert report["covariates"] == {"kept": [], "new": ["age"], "dropped": []} and not report["adapted_tensors"]
    assert "covariates new age" in start_line({**report, "frozen_parameters": 0})
    x, condition, at = torch.randn(1, 2, 16, 16, 16), torch.randn(1, 2, 16, 16, 16), torch.tensor([3])
    with torch.no_grad():
        before = old(x, condition, at)
        assert torch.equal(with_age(x, condition, at, torch.tensor([[70.0]])), before)
        assert with_age.covariate_embed[0].weight.any(), "nothing could be learnt from zeros in both layers"
        for parameter in with_age.covariate_embed.parameters():
            parameter.normal_()
        save_weights(tmp_path / "age", with_age.state_dict(), config, {})
        with_sex, _, report = started(tmp_path / "age", f"data.covariates={{{sex}, {age}}}")
        for values in (70.0, torch.nan):
            known = with_age(x, condition, at, torch.tensor([[values]]))
            assert not torch.equal(known, before)
            torch.testing.assert_close(with_sex(x, condition, at, torch.tensor([[1.0, values]])), known)
    assert report["covariates"] == {"kept": ["age"], "new": ["sex"], "dropped": []}
    assert report["adapted_tensors"] == ["covariate_embed.0.weight"]
    _, _, report = started(tmp_path / "age")
    assert report["covariates"]["dropped"] == ["age"]
    with pytest.raises(CheckpointError, match=r"knows age by mean 50 and std 10, data.covariates says 40 and 10"):
        started(tmp_path / "age", "data.covariates={age: {mean: 40, std: 10}}")


def test_as_many_unknown_names_keep_their_order(trained: Path) -> None:
    old, _, _ = started(trained)
    new, _, report = started(trained, "data.modalities=[ct,pet]")
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())
    assert report["modalities"]["kept"] == ["ct (was t1)", "pet (was flair)"]


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("model.base_channels=16", r"'time_embed\.0\.weight' is \[32, 8\] there, \[64, 16\] in this network"),
        ("model.num_groups=8", r"model\.num_groups 4 -> 8; keep those it was trained with"),
        ("model.head_channels=4", r"model\.head_channels None -> 4"),
        ("model.time_max_period=10000", r"model\.time_max_period 1000\.0 -> 10000\.0"),
        ("diffusion.schedule=linear", "diffusion.schedule cosine -> linear"),
        ("diffusion.num_timesteps=100", "diffusion.num_timesteps 50 -> 100"),
        ("diffusion.prediction_type=v", "diffusion.prediction_type epsilon -> v"),
        ("training.init_from=med_ddpm.pt", "hpc-ddpm weights import med_ddpm.pt --preset NAME"),
        ("training.init_from=nowhere", "no weights at nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(trained: Path, setting: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as error:
        started(trained, setting)
    assert "\n" not in str(error.value)


def test_freeze_by_pattern() -> None:
    network = build_unet(load_config(None, TINY).config)
    freeze(network, ["time_embed", "input_blocks.[0-1].*", "out.2.bias"])
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    parts = ("time_embed.", "input_blocks.0.", "input_blocks.1.", "out.2.bias")
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith(parts)}
    with pytest.raises(
        ConfigError, match=r"training\.freeze: 'encoder' matches no parameter; modules are input_blocks"
    ):
        freeze(network, ["encoder"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze(network, ["*"])
