"""Generate what a plan asks for: this rank's share, in batches, finished volumes skipped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_ddpm.config import Config, SamplingConfig
from hpc_ddpm.data.discover import find_layout, find_masks
from hpc_ddpm.data.preprocess import prepare_mask
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import write_json
from hpc_ddpm.runlog import package_versions
from hpc_ddpm.sampling.generate import generate
from hpc_ddpm.sampling.plan import Item, build_plan, share
from hpc_ddpm.sampling.write import sidecar_path, write_generated

Mask = tuple[NDArray[np.uint8], NDArray[np.float64]]
"""Labels (D, H, W) and their affine."""


Masks = dict[str, Callable[[], Mask]]
"""Masks by id, loaded when called."""


def masks_from_files(path: Path, config: Config) -> Masks:
    """Mask files of a folder, tree, table or single file, brought to the model's grid.

    Raises:
        DataFormatError: nothing found.
    """

    data = config.data.model_copy(update={"layout": _layout(path)})

    def loader(file: Path) -> Callable[[], Mask]:
        return lambda: prepare_mask(file, data)[:2]

    return {mask_id: loader(file) for mask_id, file in find_masks(path)}


def _layout(path: Path) -> str:
    """How the masks are coded follows from where they lie, not from what the model was trained on."""
    try:
        return find_layout(path)
    except DataFormatError:  # a file or a plain folder of masks
        return "tree"


def masks_from_packed(path: str, split: str) -> Masks:
    """Masks of one split of a packed dataset.

    Raises:
        ConfigError: no packed dataset is named.
        DataFormatError: nobody is in the split.
    """
    if not path:
        raise ConfigError("no masks: give --masks PATH, or data.path=PACKED to take them from a packed dataset")
    packed = open_packed(path)
    subjects = packed.subjects(split)
    if not subjects:
        there = sorted({subject.split for subject in packed.subjects()})
        raise DataFormatError(
            f"{path}: no subject in split '{split}', found {', '.join(there)}; choose one with --split"
        )

    def loader(index: int) -> Callable[[], Mask]:
        return lambda: (packed.read_mask(index), packed.affine(index))

    return {subject.id: loader(subject.index) for subject in subjects}


@dataclass(frozen=True)
class SampleReport:
    """What one rank did."""

    planned: int
    skipped: int
    generated: int
    seconds: float


def run_sampling(
    model: torch.nn.Module,
    masks: Masks,
    out: Path,
    ranks: Ranks,
    weights_record: dict[str, Any],
    on_volume: Callable[[int, int], None] = lambda done, total: None,
) -> SampleReport:
    """Generate this rank's share of masks x replicas into `out`.

    Args:
        model: from `load_model`, on its device and in its precision; its `config.sampling` and seed are used.
        masks: to condition on.
        out: folder for the volumes.
        ranks: as detected; the ranks need no process group.
        weights_record: what identifies the weights, for the sidecars.
        on_volume: called with (volumes done, volumes of this rank).

    Raises:
        ConfigError: `out` holds volumes of other weights or settings.
        DataFormatError: a mask that cannot be used, or a volume that came out with NaN.
    """
    config: Config = model.config  # type: ignore[assignment]
    sampling = config.sampling
    _claim(out, {"seed": config.seed, "weights": weights_record, "sampling": _identity(sampling)})
    mine = share(build_plan(masks, sampling.replicas, config.seed), ranks)
    todo = [item for item in mine if not sidecar_path(out, item.id).exists()]
    started = time.perf_counter()
    on_volume(len(mine) - len(todo), len(mine))
    for first in range(0, len(todo), sampling.batch_size):
        batch = todo[first : first + sampling.batch_size]
        _generate_batch(model, config, [masks[item.mask_id]() for item in batch], batch, out, weights_record)
        on_volume(len(mine) - len(todo) + first + len(batch), len(mine))
    return SampleReport(len(mine), len(mine) - len(todo), len(todo), time.perf_counter() - started)


def _identity(sampling: SamplingConfig) -> dict[str, Any]:
    """The settings that change a volume."""
    return sampling.model_dump(mode="json", exclude={"batch_size", "replicas"})


def _claim(out: Path, made_with: dict[str, Any]) -> None:
    """Keep volumes of different origin out of one folder."""
    path = out / "sampling.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != made_with:
            differing = ", ".join(key for key in made_with if found.get(key) != made_with[key])
            raise ConfigError(f"{out} holds volumes made with another {differing}; choose another --out or delete it")
    else:
        write_json(path, made_with, indent=2)


def _generate_batch(
    model: torch.nn.Module,
    config: Config,
    masks: list[Mask],
    batch: list[Item],
    out: Path,
    weights_record: dict[str, Any],
) -> None:
    began = time.perf_counter()
    labels = np.stack([mask for mask, _ in masks])
    volumes = generate(model, labels, seed=[item.seed for item in batch]).cpu().numpy()
    seconds = (time.perf_counter() - began) / len(batch)
    parameter = next(model.parameters())
    for item, volume, (mask, affine) in zip(batch, volumes, masks, strict=True):
        record = {
            **asdict(item),
            "weights": weights_record,
            "sampling": config.sampling.model_dump(mode="json"),
            "precision": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
            "versions": package_versions(),
            "seconds": round(seconds, 3),
        }
        write_generated(out, item.id, volume, mask, affine, config.data.modalities, record)
