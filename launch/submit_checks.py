"""What would fail in a job fails when it is submitted: settings, data and batch arithmetic of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_ddpm.config import Config, load_config, with_overrides
from hpc_ddpm.errors import ConfigError

SEGMENTER = "sampling.fidelity.segmenter"
Given = dict[str, Any]
"""Parameters of the stage's own command."""


def check_packing(given: Given) -> Config:
    """The settings of `pack`.

    Raises:
        ConfigError: they are wrong, or there is no such source.
    """
    config = load_config(given["config"], given["overrides"] or []).config
    _exists(given["source"], "give a folder of volumes or a table")
    return config


def check_training(given: Given, world_size: int, *, with_memory: bool) -> float | None:
    """The estimated peak of `train` in GiB, where it is asked for.

    Raises:
        ConfigError: wrong settings, a batch that cannot be divided, another experiment in the run, no data, or data
            that were packed otherwise.
        DataFormatError: packed data that are damaged.
    """
    from hpc_ddpm.data.agreement import agree_with_packed
    from hpc_ddpm.data.shards import INDEX
    from launch.stages import resume_config, training_settings

    source, settings = training_settings(given["config"], given["overrides"], given["data"], given["init_from"])
    config = resume_config(given["out"], source, settings)
    config.training.accumulation(world_size)
    _is_packed(config, "--data PACKED, a folder made by `hpc-ddpm pack`")
    if (Path(config.data.path) / INDEX).is_file():  # or a job still packs it
        agree_with_packed(config.data)
    if config.training.init_from and not (given["out"] / "checkpoints").is_dir():
        _exists(Path(config.training.init_from), "give --from a run or imported weights")
    if not with_memory:
        return None
    from launch.estimate import peak_gib

    return peak_gib(config, world_size)


def check_sampling(given: Given) -> None:
    """Check what `sample run` needs, before it is submitted.

    Raises:
        ConfigError: wrong settings, or no such run, masks or packed data.
    """
    from hpc_ddpm.sampling.plan import read_manifest
    from hpc_ddpm.training.resume import stored_config
    from launch.sample_commands import as_settings

    _exists(given["source"], "give a run directory or imported weights")
    settings = as_settings(given["overrides"], given["replicas"], given["reject_below"], given["max_tries"])
    stored = stored_config(given["source"])
    config = with_overrides(stored, settings) if stored else load_config(None, settings).config
    check_segmenter(config, settings, given["source"])
    if given["masks"]:
        _exists(given["masks"], "give --masks a mask, a folder of masks or a table")
    elif stored and (given["split"] or not read_manifest(given["out"])):
        _is_packed(config, "--masks, or data.path=PACKED")


def check_segmenter(config: Config, settings: Sequence[str], source: Path) -> None:
    """TorchScript runs code, so only a user names it: on this command line, or when the run was trained.

    Args:
        config: to sample with.
        settings: of this command line.
        source: run, weights or generated set that the rest of `config` is from.

    Raises:
        ConfigError: only a folder that may be someone else's names it.
    """
    fidelity, is_run = config.sampling.fidelity, (source / "checkpoints").is_dir()
    is_named = any(setting.partition("=")[0].strip() == SEGMENTER for setting in settings)
    if fidelity.segmenter and fidelity.method in ("auto", "segmenter") and not is_named and not is_run:
        raise ConfigError(
            f"{source} names a segmenter, whose code would run here; if you trust that file, name it yourself: "
            f"{SEGMENTER}={fidelity.segmenter}"
        )


def check_benchmark(name: str, given: Given, world_size: int) -> None:
    """Check what `bench NAME` needs, before it is submitted.

    Raises:
        ConfigError: wrong settings, a batch that cannot be divided, or no such data.
    """
    if "config" in given:
        config = load_config(given["config"], given["overrides"] or []).config
        if name == "train":
            config.training.accumulation(world_size)
    for key in ("packed", "source", "med_ddpm"):
        if given.get(key):
            _exists(given[key], "give an existing folder")


def _is_packed(config: Config, advice: str) -> None:
    if not config.data.path or not Path(config.data.path).is_dir():
        found = f"{config.data.path} is no folder" if config.data.path else "no data"
        raise ConfigError(f"{found}: give {advice}")


def _exists(path: Path, advice: str) -> None:
    if not path.exists():
        raise ConfigError(f"{path}: nothing there; {advice}")
