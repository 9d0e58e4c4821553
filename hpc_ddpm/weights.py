"""Weights in and out: Med-DDPM's `.pt` files, our folders, and runs.

A weights folder holds `weights.safetensors` (the network's float32 tensors), `config.json` (the whole
configuration) and `provenance.json` (where they come from, and the SHA-256 of the tensors' file).
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, cast

import torch
from pydantic import ConfigDict, with_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from typing_extensions import TypedDict

from hpc_ddpm.checkpoint import FileFacts, PieceReader, latest_checkpoint
from hpc_ddpm.config import Config, list_presets, load_config
from hpc_ddpm.diffusion.schedules import build_schedule
from hpc_ddpm.errors import CheckpointError
from hpc_ddpm.files import atomic_folder, atomic_path, write_json, writing_to
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.runlog import provenance
from hpc_ddpm.sealed import LONGEST, read_json, say_old

WEIGHTS, CONFIG, PROVENANCE = "weights.safetensors", "config.json", "provenance.json"
NEEDED = "copy it again: weights need it to know their network"
PREFIX = "denoise_fn."
MOMENTS = ("exp_avg", "exp_avg_sq")
BUFFER_TOLERANCE = 1e-5  # relative; between schedules, floats differ by far more


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes and float32 values, sorted by name, as hexadecimal digits."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        tensor = state_dict[key].detach().float().cpu().contiguous()
        digest.update(f"{key} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@with_config(ConfigDict(extra="allow"))
class Provenance(TypedDict):
    """provenance.json; without `files`, an earlier version wrote it."""

    files: NotRequired[dict[str, FileFacts]]


class Weights(NamedTuple):
    """A network's tensors and everything needed to use them."""

    state_dict: dict[str, Tensor]
    config: Config
    provenance: dict[str, Any]


class Model(nn.Module):
    """A network together with the configuration that it was trained with."""

    def __init__(self, network: nn.Module, config: Config, provenance: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.config, self.provenance = network, config, provenance

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights, see `weights_sha256`; ask before the network changes its precision."""
        return weights_sha256(self.network.state_dict())

    def forward(self, x_t: Tensor, condition: Tensor, timesteps: Tensor, *covariates: Tensor) -> Tensor:
        """(B, C, D, H, W), (B, K, D, H, W), (B,), perhaps (B, V) -> (B, C, D, H, W) float32; see `UNet3d.forward`."""
        prediction: Tensor = self.network(x_t, condition, timesteps, *covariates)
        return prediction


def load_model(source: str | Path, preset: str | None = None, overrides: Iterable[str] = ()) -> Model:
    """A network ready to use, in eval mode, float32, on the CPU.

    Args:
        source: a Med-DDPM `.pt` file, a weights folder or its `.safetensors` file, or a run folder (newest
            whole checkpoint, the weights that `sampling.weights` names).
        preset: for a `.pt` file, which carries no configuration: a preset or YAML file that fits it.
        overrides: `section.key=value` strings applied to the configuration.

    Raises:
        CheckpointError: missing, damaged or misfitting file.
        ConfigError: unknown preset or setting.
    """
    weights = read_weights(source, preset, overrides)
    _check_shapes(weights.state_dict, weights.config, Path(source))
    with torch.device("meta"):
        network = build_unet(weights.config)
    tensors = {key: tensor.float() for key, tensor in weights.state_dict.items()}
    network.load_state_dict(tensors, assign=True)
    return Model(network, weights.config, weights.provenance).eval()


def read_weights(source: str | Path, preset: str | None = None, overrides: Iterable[str] = ()) -> Weights:
    """Tensors, configuration and provenance of anything `load_model` takes; same arguments and errors."""
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"no weights at {path}; give a Med-DDPM .pt file, a weights folder or a run")
    if path.suffix in {".pt", ".pth"}:
        if preset is None:
            raise CheckpointError(f"{path} has no configuration in it; name a preset: {', '.join(list_presets())}")
        return import_med_ddpm(path, load_config(preset, overrides).config)
    if (path / "checkpoints").is_dir():
        return find_run_weights(path, overrides)
    return load_weights(path, overrides)


# --------------------------------------------------------------------------------------- our own format


def save_weights(folder: Path, state_dict: Mapping[str, Tensor], config: Config, provenance: Mapping[str, Any]) -> None:
    """Write a weights folder: complete, or not there at all.

    Raises:
        CheckpointError: something is in the way, or the tensors do not fit the configuration.
        ClusterError: it cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; remove it or choose another folder")
    _check_shapes(state_dict, config, folder)
    content = save({key: tensor.detach().float().contiguous() for key, tensor in state_dict.items()})
    facts = {WEIGHTS: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    with writing_to(folder), atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(content)
        write_json(temporary / CONFIG, config.dump(), indent=2)
        write_json(temporary / PROVENANCE, {**provenance, "files": facts}, indent=2)


def load_weights(path: Path, overrides: Iterable[str] = ()) -> Weights:
    """Read a weights folder, or the folder around its `.safetensors` file; overrides change its settings.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    file = path if path.suffix == ".safetensors" else path / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"no {file}; a weights folder holds {WEIGHTS}, {CONFIG} and {PROVENANCE}")
    provenance = cast("dict[str, Any]", read_json(file.parent / PROVENANCE, Provenance, NEEDED, CheckpointError))
    facts = provenance.pop("files", {}).get(file.name)
    if facts is None:
        say_old(file.parent)
    return Weights(_read_tensors(file, facts), _read_config(file.parent, overrides), provenance)


def find_run_weights(run_dir: Path, overrides: Iterable[str] = (), checkpoint: Path | None = None) -> Weights:
    """Weights of a run's newest whole checkpoint, or of one that is verified: those that `sampling.weights` names.

    Every file of the newest checkpoint is read and hashed; damaged ones are reported and passed over.

    Raises:
        CheckpointError: the run has no whole checkpoint, none of these weights, or lacks its configuration.
    """
    checkpoint = checkpoint or latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no whole checkpoint; let it train to its next one")
    config = _read_config(run_dir, overrides)
    which = config.sampling.weights
    tensors = read_checkpoint_weights(checkpoint, which)
    _check_values(tensors, checkpoint)
    origin = {"run": run_dir.resolve().name, "checkpoint": checkpoint.name, "which": which}
    return Weights(tensors, config, {"source": origin})


def read_checkpoint_weights(checkpoint: Path, which: str) -> dict[str, Tensor]:
    """Whole float32 tensors of one average of a checkpoint, or of `master`.

    Raises:
        CheckpointError: names the weights that are there.
    """
    reader = PieceReader(checkpoint)
    there = [kind for kind in reader.kinds if kind not in MOMENTS]
    if which not in there:
        raise CheckpointError(f"{checkpoint} has no weights '{which}', it has {', '.join(there)}; choose one of them")
    return reader.full(which)


def _read_tensors(file: Path, facts: FileFacts | None) -> dict[str, Tensor]:
    try:
        if facts and _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file}: its SHA-256 is not the one in {PROVENANCE}: damaged; copy it again")
        tensors = load_file(file)
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); copy it again") from error
    _check_values(tensors, file)
    return tensors


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_config(folder: Path, overrides: Iterable[str]) -> Config:
    read_json(folder / CONFIG, dict[str, Any], NEEDED, CheckpointError)
    return load_config(folder / CONFIG, overrides).config  # JSON is YAML


# -------------------------------------------------------------------------------------------- Med-DDPM


def import_med_ddpm(path: Path, config: Config, *, ema: bool = True) -> Weights:
    """Read a Med-DDPM training file, `{'step', 'model', 'ema'}`, without running any code in it.

    Args:
        path: the `.pt` file.
        config: the network and schedule that it should hold.
        ema: take the averaged weights (as Med-DDPM samples with), else the raw ones.

    Raises:
        CheckpointError: not such a file, holds code, or does not fit `config` (names the preset that fits).
    """
    content = _load_tensors_only(path)
    which = "ema" if ema else "model"
    wrapped = content.get(which)
    if not isinstance(wrapped, dict) or not any(str(key).startswith(PREFIX) for key in wrapped):
        raise CheckpointError(
            f"{path}: expected Med-DDPM's {{'step', 'model', 'ema'}} with '{PREFIX}...' tensors under "
            f"'{which}', found {_describe(content)}; give the file that its trainer saved"
        )
    tensors = {str(key): value for key, value in wrapped.items() if isinstance(value, Tensor)}
    state_dict = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    _check_shapes(state_dict, config, path)
    _check_buffers(tensors, config, path)
    _check_values(state_dict, path)
    source = {"file": path.name, "sha256": _sha256(path), "step": _step(content), "which": which}
    return Weights(state_dict, config, {**provenance(), "source": source})


def export_med_ddpm(source: Path, out: Path) -> None:
    """Write a weights folder or a run as a file that Med-DDPM's sampler loads; `model` and `ema` hold the same.

    Raises:
        CheckpointError: the source is damaged, or has covariates, or `out` exists.
        ClusterError: `out` cannot be written.
    """
    weights = read_weights(source)
    if weights.config.data.covariates:
        raise CheckpointError(
            f"{source} has the covariates {', '.join(weights.config.data.covariates)}, which Med-DDPM's network cannot "
            "take; only weights without data.covariates can be exported"
        )
    if out.exists():
        raise CheckpointError(f"{out} exists already; remove it or choose another name")
    wrapped = build_schedule(weights.config.diffusion).med_ddpm_buffers()
    template = _expected_shapes(weights.config)  # Med-DDPM's order of keys
    wrapped |= {f"{PREFIX}{key}": weights.state_dict[key].float() for key in template}
    origin = weights.provenance.get("source")
    step = _step(origin if isinstance(origin, dict) else {})
    content = io.BytesIO()  # of a full disk, torch.save itself would say that a file was not written as it should be
    torch.save({"step": step, "model": wrapped, "ema": wrapped}, content)
    with writing_to(out.parent), atomic_path(out) as temporary:
        temporary.write_bytes(content.getbuffer())


def _load_tensors_only(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no file {path}; give the .pt file that Med-DDPM's trainer saved")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols of foreign files
            _check_zip(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes PyTorch's reader raise whatever comes
        if "unsupported global" in str(error).lower():
            raise CheckpointError(
                f"{path}: refused, it holds more than tensors and could run code when loaded; "
                "ask its author for a file with only {'step', 'model', 'ema'} state dicts"
            ) from error
        why = str(error).splitlines()[0][:LONGEST] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable PyTorch file ({why}); download or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected {{'step', 'model', 'ema'}}, found a {type(content).__name__}")
    return content


def _step(content: Mapping[str, Any]) -> int:
    step = content.get("step", 0)
    return int(step) if isinstance(step, int | float | Tensor) else 0


def _check_zip(path: Path) -> None:
    """Against its CRCs, at which PyTorch does not look; files from before PyTorch 1.6 are no zip files and have none.

    Raises:
        ValueError: names the damaged part.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the CRC of {damaged} is wrong")


def _describe(content: Mapping[Any, Any]) -> str:
    keys = [str(key) for key in content]
    return f"{len(keys)} entries: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" if keys else "nothing"


# ------------------------------------------------------------------------------------------ does it fit


def _expected_shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in build_unet(config).state_dict().items()}


def _check_shapes(state_dict: Mapping[str, Tensor], config: Config, where: Path) -> None:
    found = {key: tensor.shape for key, tensor in state_dict.items()}
    expected = _expected_shapes(config)
    if found == expected:
        return
    wrong = [key for key in expected if found.get(key) != expected[key]]
    wrong += [key for key in found if key not in expected]
    key = next((key for key in wrong if key in found and key in expected), wrong[0])
    raise CheckpointError(
        f"{where} does not fit '{config.name}': {key} is {_shape(found, key)} there, {_shape(expected, key)} "
        f"in the network; {_advice(found, config.name)}"
    )


def _check_values(state_dict: Mapping[str, Tensor], where: Path) -> None:
    for key, tensor in state_dict.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{where}: '{key}' has values that are NaN or infinite; use weights from before the training diverged"
            )


def _shape(shapes: Mapping[str, torch.Size], key: str) -> str:
    return str(list(shapes[key])) if key in shapes else "absent"


def _advice(found: Mapping[str, torch.Size], tried: str) -> str:
    fitting = [name for name in list_presets() if _expected_shapes(load_config(name).config) == found]
    if fitting:
        return f"it fits the preset {' or '.join(fitting)}"
    return f"no preset fits: set model.* and data.* of '{tried}' to the values it was trained with"


def _check_buffers(buffers: Mapping[str, Tensor], config: Config, where: Path) -> None:
    for name, expected in build_schedule(config.diffusion).med_ddpm_buffers().items():
        found = buffers.get(name)
        if found is None:
            raise CheckpointError(f"{where}: the schedule buffer '{name}' is missing; the file is not Med-DDPM's")
        same_length = found.shape == expected.shape
        if not same_length or not torch.allclose(found.float(), expected, rtol=BUFFER_TOLERANCE, atol=1e-12):
            raise CheckpointError(
                f"{where} was trained with another schedule: '{name}' has {found.numel()} timesteps there, "
                f"{len(expected)} here{' with other values' if same_length else ''}; "
                "set diffusion.schedule and diffusion.num_timesteps"
            )
