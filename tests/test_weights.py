import json
import os
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import hpc_ddpm
from hpc_ddpm.checkpoint import MANIFEST, Piece, checkpoint_dir, publish, unfinished_dir, write_pieces
from hpc_ddpm.config import Config, CovariateConfig, load_config
from hpc_ddpm.diffusion import build_schedule
from hpc_ddpm.errors import CheckpointError, ClusterError, ConfigError
from hpc_ddpm.files import write_json
from hpc_ddpm.model import build_unet
from hpc_ddpm.weights import (
    export_med_ddpm,
    import_med_ddpm,
    load_model,
    load_weights,
    save_weights,
)
from tests.model.deterministic import fill, inputs

SMALL = ["model.base_channels=8", "model.num_groups=4", "model.channel_multipliers=[1,2]", "data.size=[8,8,8]"]


def small_network(*overrides: str) -> tuple[torch.nn.Module, Config]:
    config = load_config(None, [*SMALL, *overrides]).config
    network = build_unet(config)
    fill(network)
    return network.eval(), config


def med_ddpm_content(state_dict: dict[str, torch.Tensor], config: Config, step: int = 12) -> dict[str, Any]:
    wrapped = build_schedule(config.diffusion).med_ddpm_buffers()
    wrapped |= {f"denoise_fn.{key}": tensor for key, tensor in state_dict.items()}
    raw = {key: tensor + 1 if key.startswith("denoise_fn.") else tensor for key, tensor in wrapped.items()}
    return {"step": step, "model": raw, "ema": wrapped}


def save_checkpoint(run: Path, averages: dict[str, torch.Tensor], step: int) -> Path:
    folder = checkpoint_dir(run / "checkpoints", step)
    file = unfinished_dir(folder) / "pieces-00000-of-00001.safetensors"
    file.parent.mkdir(parents=True)
    pieces = [Piece("ema", key, tuple(value.shape), 0, value.flatten()) for key, value in averages.items()]
    publish(folder, {}, {file.name: write_pieces(file, pieces)})
    return folder / file.name


def weightless(preset: str) -> dict[str, torch.Tensor]:
    """All shapes of a preset in almost no bytes."""
    with torch.device("meta"):
        network = build_unet(load_config(preset).config)
    return {key: torch.zeros(1).expand(tensor.shape) for key, tensor in network.state_dict().items()}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    network, config = small_network()
    torch.save(med_ddpm_content(network.state_dict(), config), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ------------------------------------------------------------------------------------------ round trips


def test_import_save_load_export_and_back(published: Path, tmp_path: Path) -> None:
    network, config = small_network()
    imported = import_med_ddpm(published, config)
    assert same(imported.state_dict, network.state_dict())
    assert imported.provenance["source"] | {"sha256": ""} == {
        "file": "model.pt", "sha256": "", "step": 12, "which": "ema"
    }  # fmt: skip
    assert len(imported.provenance["source"]["sha256"]) == 64

    save_weights(tmp_path / "ours", *imported)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json", "provenance.json", "weights.safetensors"
    ]  # fmt: skip
    loaded = load_weights(tmp_path / "ours")
    assert same(loaded.state_dict, network.state_dict())
    assert loaded.config == config and loaded.provenance == imported.provenance

    export_med_ddpm(tmp_path / "ours", tmp_path / "back.pt")
    original, back = (torch.load(path, weights_only=True) for path in (published, tmp_path / "back.pt"))
    assert back["step"] == 12 and list(back["ema"]) == list(original["ema"])
    assert same(back["ema"], original["ema"]) and same(back["model"], original["ema"])


def test_covariates_cannot_be_exported(tmp_path: Path) -> None:
    _, config = small_network()
    covariates = {"age": CovariateConfig(mean=50, std=15)}
    config = config.model_copy(update={"data": config.data.model_copy(update={"covariates": covariates})})
    save_weights(tmp_path / "ours", build_unet(config).state_dict(), config, {})
    with pytest.raises(CheckpointError, match="has the covariates age, which Med-DDPM's network cannot take"):
        export_med_ddpm(tmp_path / "ours", tmp_path / "back.pt")


def test_raw_weights_on_request(published: Path) -> None:
    network, config = small_network()
    raw = import_med_ddpm(published, config, ema=False)
    assert all(torch.equal(raw.state_dict[key], tensor + 1) for key, tensor in network.state_dict().items())
    assert raw.provenance["source"]["which"] == "model"


@pytest.mark.parametrize("preset", ["whole_head_128", "brats_192"])
def test_files_shaped_like_the_published_ones_are_taken(preset: str, tmp_path: Path) -> None:
    config = load_config(preset).config
    torch.save(med_ddpm_content(weightless(preset), config), tmp_path / "model.pt")
    imported = import_med_ddpm(tmp_path / "model.pt", config)
    assert len(imported.state_dict) == {"whole_head_128": 246, "brats_192": 338}[preset]


# ------------------------------------------------------------------------------------------- load_model


def test_load_model_from_each_kind_of_source(published: Path, tmp_path: Path) -> None:
    network, config = small_network()
    arguments = inputs(1, 2, (8, 8, 8), timestep=5)
    expected = network(*arguments)
    save_weights(tmp_path / "ours", network.state_dict(), config, {})
    run = tmp_path / "run"
    for step, factor in ((10, 0.0), (20, 1.0), (30, 0.5)):  # the last one is incomplete
        tensors = {key: factor * value for key, value in network.state_dict().items()}
        save_checkpoint(run, tensors, step)
    (checkpoint_dir(run / "checkpoints", 30) / MANIFEST).unlink()
    write_json(run / "config.json", config.dump())
    (tmp_path / "small.yaml").write_text(json.dumps(config.dump()))

    models = [load_model(source) for source in (tmp_path / "ours", str(tmp_path / "ours" / "weights.safetensors"))]
    with pytest.warns(UserWarning, match=r"passed over: .*step_00000030"):
        models.append(load_model(run))
    models.append(hpc_ddpm.load_model(published, preset=str(tmp_path / "small.yaml")))
    for model in models:
        torch.testing.assert_close(model(*arguments), expected, rtol=1e-6, atol=1e-6)
        assert not model.training
        assert model.config == config
    assert models[2].provenance["source"]["checkpoint"] == "step_00000020"


def test_overrides_change_the_configuration(tmp_path: Path) -> None:
    network, config = small_network()
    save_weights(tmp_path / "ours", network.state_dict(), config, {})
    model = load_model(tmp_path / "ours", overrides=["sampling.num_steps=7", "model.channels_last=true"])
    assert model.config.sampling.num_steps == 7 and model.network.config.channels_last
    assert model.config.model_copy(update={"sampling": config.sampling, "model": config.model}) == config
    with pytest.raises(ConfigError, match=r"unknown setting 'model.chanels_last'.*channels_last"):
        load_model(tmp_path / "ours", overrides=["model.chanels_last=true"])
    with pytest.raises(CheckpointError, match=r"does not fit .* is \[32, 8\] there, \[64, 16\] in the network"):
        load_model(tmp_path / "ours", overrides=["model.base_channels=16"])


# ---------------------------------------------------------------------------------------------- errors


class Malice:
    """Runs on unpickling."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code ran')",)


class Shell:
    """Runs a command on unpickling; PyTorch words its refusal of some modules differently."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize("evil", [Malice(), Shell()])
def test_a_pickle_with_code_is_refused(tmp_path: Path, evil: object) -> None:
    _, config = small_network()
    torch.save({"step": 1, "model": evil, "ema": {}}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(evil, protocol=2))
    torch.save({"ema": evil}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "plain.pt", "legacy.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: refused, it holds more than tensors"):
            import_med_ddpm(tmp_path / name, config)


def test_damaged_and_foreign_files_are_named(published: Path, tmp_path: Path) -> None:
    network, config = small_network()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(published.read_bytes()[:5000])
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"<html>not found</html>")
    for path in (cut, garbage):
        with pytest.raises(CheckpointError, match=rf"{path.name}: not a readable PyTorch file"):
            import_med_ddpm(path, config)
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match=r"bare.pt: expected Med-DDPM's .* found \d+ entries: time_embed"):
        import_med_ddpm(tmp_path / "bare.pt", config)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"expected \{'step', 'model', 'ema'\}, found a list"):
        import_med_ddpm(tmp_path / "list.pt", config)
    with pytest.raises(CheckpointError, match=r"no file .*absent.pt"):
        import_med_ddpm(tmp_path / "absent.pt", config)


def test_the_wrong_preset_is_told_the_right_one(tmp_path: Path) -> None:
    brats = load_config("brats_192").config
    torch.save(med_ddpm_content(weightless("brats_192"), brats), tmp_path / "brats.pt")
    expected = (
        r"brats.pt does not fit 'whole_head_128': input_blocks.0.0.weight is \[64, 8, 3, 3, 3\] there, "
        r"\[64, 3, 3, 3, 3\] in the network; it fits the preset brats_192"
    )
    with pytest.raises(CheckpointError, match=expected):
        import_med_ddpm(tmp_path / "brats.pt", load_config("whole_head_128").config)


def test_a_network_that_fits_no_preset(published: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no preset fits: set model\.\* and data\.\* of 'brats_192'"):
        import_med_ddpm(published, load_config("brats_192").config)


def test_missing_and_surplus_tensors_are_named(published: Path, tmp_path: Path) -> None:
    _, config = small_network()
    for change, message in (("out.2.bias", "out.2.bias is absent there"), ("extra", r"extra is \[1\] there, absent")):
        content = torch.load(published, weights_only=True)
        content["ema"].pop(f"denoise_fn.{change}", None) if change != "extra" else None
        if change == "extra":
            content["ema"]["denoise_fn.extra"] = torch.zeros(1)
        torch.save(content, tmp_path / "changed.pt")
        with pytest.raises(CheckpointError, match=message):
            import_med_ddpm(tmp_path / "changed.pt", config)


def test_another_schedule_is_noticed(published: Path, tmp_path: Path) -> None:
    _, longer = small_network("diffusion.num_timesteps=1000")
    with pytest.raises(CheckpointError, match=r"'betas' has 250 timesteps there, 1000 here; set diffusion.schedule"):
        import_med_ddpm(published, longer)
    _, linear = small_network("diffusion.schedule=linear")
    with pytest.raises(CheckpointError, match=r"250 here with other values"):
        import_med_ddpm(published, linear)
    content = torch.load(published, weights_only=True)
    del content["ema"]["betas"]
    torch.save(content, tmp_path / "bufferless.pt")
    with pytest.raises(CheckpointError, match=r"schedule buffer 'betas' is missing"):
        import_med_ddpm(tmp_path / "bufferless.pt", small_network()[1])


def test_nothing_is_overwritten_and_nothing_half_written(published: Path, tmp_path: Path) -> None:
    network, config = small_network()
    save_weights(tmp_path / "ours", network.state_dict(), config, {})
    with pytest.raises(CheckpointError, match="ours exists already"):
        save_weights(tmp_path / "ours", network.state_dict(), config, {})
    with pytest.raises(CheckpointError, match=r"model\.pt exists already"):
        export_med_ddpm(tmp_path / "ours", published)
    with pytest.raises(CheckpointError, match=r"time_embed\.0\.weight is absent there"):
        save_weights(tmp_path / "empty", {}, config, {})
    assert not (tmp_path / "empty").exists() and not list(tmp_path.glob(".*.tmp"))


def test_sources_that_cannot_be_loaded(published: Path, tmp_path: Path) -> None:
    network, config = small_network()
    with pytest.raises(CheckpointError, match=r"no weights at .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no configuration in it; name a preset: .*brats_192"):
        load_model(published)
    with pytest.raises(CheckpointError, match=r"no .*weights.safetensors; a weights folder holds"):
        load_model(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_model(tmp_path / "run")

    save_weights(tmp_path / "ours", network.state_dict(), config, {})
    (tmp_path / "ours" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: .*found a list; copy it again"):
        load_model(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(No such file"):
        load_model(tmp_path / "ours")
    (tmp_path / "ours" / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: its SHA-256 is not the one in provenance\.json"):
        load_model(tmp_path / "ours")


@pytest.mark.parametrize("how", ["values", "torn"])
def test_damaged_weights_of_a_run_are_passed_over(tmp_path: Path, how: str) -> None:
    network, config = small_network()
    whole = {key: 0.5 * value for key, value in network.state_dict().items()}
    save_checkpoint(tmp_path, whole, 1)
    file = save_checkpoint(tmp_path, network.state_dict(), 2)
    write_json(tmp_path / "config.json", config.dump())
    content = file.read_bytes()
    file.write_bytes(content[:-8] if how == "torn" else content[:-8] + bytes(8))
    with pytest.warns(UserWarning, match=r"passed over: .*step_00000002"):
        model = load_model(tmp_path)
    assert model.provenance["source"]["checkpoint"] == "step_00000001"
    assert same(model.network.state_dict(), whole)


def test_a_file_with_a_wrong_crc_is_refused(published: Path) -> None:
    """PyTorch reads it without a word."""
    with zipfile.ZipFile(published) as archive:
        entry = max(archive.infolist(), key=lambda one: one.file_size)
    content = bytearray(published.read_bytes())
    content[entry.header_offset + 200] ^= 1
    published.write_bytes(content)
    torch.load(published, weights_only=True)
    with pytest.raises(
        CheckpointError, match=r"not a readable PyTorch file \(the CRC of .* is wrong\); download or copy"
    ):
        import_med_ddpm(published, small_network()[1])


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network, config = small_network()
    broken = {key: value.clone() for key, value in network.state_dict().items()}
    next(iter(broken.values())).flatten()[0] = torch.nan
    torch.save(med_ddpm_content(broken, config), tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"nan\.pt: '.*' has values that are NaN or infinite"):
        import_med_ddpm(tmp_path / "nan.pt", config)
    save_weights(tmp_path / "ours", broken, config, {})
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: '.*' has values that are NaN"):
        load_model(tmp_path / "ours")


def test_weights_without_checksums_are_read_and_called_old(tmp_path: Path) -> None:
    network, config = small_network()
    save_weights(tmp_path / "old", network.state_dict(), config, {})
    (tmp_path / "old" / "provenance.json").write_text("{}")
    with pytest.warns(UserWarning, match="written by an earlier version, without checksums"):
        assert same(load_model(tmp_path / "old").network.state_dict(), network.state_dict())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    network, config = small_network()
    save_weights(tmp_path / "source", network.state_dict(), config, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for write in (
            lambda: save_weights(tmp_path / "copy", network.state_dict(), config, {}),
            lambda: export_med_ddpm(tmp_path / "source", tmp_path / "copy.pt"),
        ):
            with pytest.raises(ClusterError, match=r"cannot write here \(File too large\)"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
