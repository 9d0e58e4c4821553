"""Med-DDPM's BraTS loader, from a clone that the user gives."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import default_collate

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import MASK
from hpc_ddpm.errors import ConfigError

MODULE = "dataset_brats"
NUM_MODALITIES = 4
UNUSED = (
    *("sklearn", "sklearn.preprocessing", "torchvision", "torchvision.transforms", "torchio"),
    *("matplotlib", "matplotlib.pyplot"),
)
"""Packages that it imports and does not use for volumes that have the right size."""


def open_med_ddpm(clone: Path, tree: Path, config: DataConfig) -> Callable[[], Callable[[], tuple[Any, Any]]]:
    """What opens its dataset, as its training script does, to read image and label channels as a batch of one.

    Args:
        clone: of github mobaidoctor/med-ddpm.
        tree: one folder per role.
        config: of the sample.

    Raises:
        ConfigError: not a clone, or its loader cannot read this sample.
    """
    if not (clone / f"{MODULE}.py").is_file():
        raise ConfigError(f"--med-ddpm {clone}: no {MODULE}.py found; give a clone of github mobaidoctor/med-ddpm")
    x, y, z = config.size
    if config.num_modalities != NUM_MODALITIES or x != y:
        raise ConfigError(
            f"--med-ddpm: its loader reads {NUM_MODALITIES} modalities of N x N x D voxels, the sample has "
            f"{config.num_modalities} of {x} x {y} x {z}; choose --config brats_192"
        )

    def open_() -> Callable[[], tuple[Any, Any]]:
        with importable(clone, UNUSED):
            module = importlib.import_module(MODULE)
        folders = [str(tree / role) for role in (MASK, *config.modalities)]
        dataset = module.NiftiPairImageGenerator(
            *folders,
            input_size=x,
            depth_size=z,
            transform=_to_tensor,
            target_transform=_to_tensor,
            full_channel_mask=True,
        )

        def read() -> tuple[Any, Any]:
            batch = default_collate([dataset[0]])
            return batch["target"], batch["input"]

        return read

    return open_


def _to_tensor(array: Any) -> torch.Tensor:
    """(X, Y, Z, C) to (C, Z, Y, X) float32."""
    return torch.tensor(array).float().permute(3, 2, 1, 0)


@contextmanager
def importable(clone: Path, unused: Iterable[str]) -> Iterator[None]:
    """The clone's modules can be imported, with empty stand-ins for those of `unused` that are not installed."""
    stand_ins = []
    for name in unused:
        package = name.split(".")[0]
        if package in stand_ins or importlib.util.find_spec(package) is None:
            sys.modules[name] = _Anything(name)
            stand_ins.append(name)
    sys.path.insert(0, str(clone))
    try:
        yield
    finally:
        sys.path.remove(str(clone))
        for name in stand_ins:
            del sys.modules[name]


class _Anything(ModuleType):
    """A module whose every name is there, and None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__dict__[name] = None
