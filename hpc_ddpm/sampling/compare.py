"""Samplers side by side: what fewer network evaluations cost, on fixed masks and seeds.

    OUT/comparison.json    what is compared
    OUT/cells/<cell>.json  one sampler, number of steps and spacing; written last, so a cell that exists is finished
    OUT/cells/<cell>.npy   a picture: the middle plane of the first volume
    OUT/reference/         volumes and seconds of the two reference chains
    OUT/table.json, table.md, figure.png

Shapes: N masks, C modalities, D H W = Z Y X voxels.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_ddpm.config import Config, SamplingConfig
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import atomic_path, write_json, write_text
from hpc_ddpm.sampling.compare_figure import write_figure
from hpc_ddpm.sampling.generate import generate
from hpc_ddpm.sampling.plan import volume_seed
from hpc_ddpm.sealed import read_json

ANOTHER = "choose another --out or delete it"
Volumes = NDArray[np.float32]
"""(N, C, D, H, W)."""
Masks = Mapping[str, NDArray[np.uint8]]
"""Id -> (D, H, W) labels."""


@dataclass(frozen=True)
class Cell:
    """One way of sampling."""

    sampler: str
    num_steps: int
    spacing: str = "quadratic"
    replica: int = 0
    """Which noise; all cells but the scale of the distances share replica 0."""

    @property
    def id(self) -> str:
        """Its name in the file system."""
        return f"{self.sampler}-{self.num_steps}-{self.spacing}" + (f"-r{self.replica}" if self.replica else "")


def grid(samplers: Sequence[str], num_steps: Sequence[int | str], spacings: Sequence[str]) -> list[Cell]:
    """Every combination.

    Raises:
        ConfigError: an unknown sampler or spacing, or steps that are no positive integer.
    """
    known = {name: get_args(SamplingConfig.model_fields[name].annotation) for name in ("sampler", "spacing")}
    for kind, names in (("sampler", samplers), ("spacing", spacings)):
        unknown = [name for name in names if name not in known[kind]]
        if unknown:
            raise ConfigError(f"--{kind}s has {', '.join(unknown)}: choose from {', '.join(known[kind])}")
    wrong = [steps for steps in num_steps if not str(steps).isdecimal() or int(steps) < 1]
    if wrong:
        raise ConfigError(f"--steps has {', '.join(map(str, wrong))}: give positive integers, such as 5,10,20")
    return [Cell(*choice) for choice in product(samplers, map(int, num_steps), spacings)]


@dataclass(frozen=True)
class References:
    """What all cells are measured against, every timestep visited."""

    chain: Cell
    """The ddpm chain of the model."""
    ode: Cell
    """The deterministic limit that ddim, dpmpp_2m, unipc, deis, ipndm and heun share."""
    other_noise: Cell
    """The chain from other noise: its distance to `chain` is the scale for all distances to it."""

    @classmethod
    def of(cls, num_timesteps: int) -> References:
        """Those of a model with T timesteps."""
        return cls(Cell("ddpm", num_timesteps), Cell("dpmpp_2m", num_timesteps), Cell("ddpm", num_timesteps, replica=1))


def compare(
    model: torch.nn.Module,
    masks: Masks,
    out: Path,
    cells: Sequence[Cell],
    on_cell: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[dict[str, Any]]:
    """Generate one volume per mask with every cell and measure it; finished cells are kept.

    Args:
        model: from `load_model`, on its device and in its precision.
        masks: id -> (D, H, W) labels.
        out: folder for cells, table and figure.
        cells: what to compare, besides the references.
        on_cell: called with (cells done, cells in all, name of the next).

    Returns:
        The table: one row per cell, references first.

    Raises:
        ConfigError: more steps than timesteps, or `out` compares something else.
    """
    config: Config = model.config  # type: ignore[assignment]
    references = References.of(config.diffusion.num_timesteps)
    longest = max((cell.num_steps for cell in cells), default=1)
    if longest > config.diffusion.num_timesteps:
        raise ConfigError(f"--steps {longest}: this model has diffusion.num_timesteps={config.diffusion.num_timesteps}")
    _claim(out, model, masks)
    todo = list(dict.fromkeys([references.chain, references.ode, references.other_noise, *cells]))
    rows = []
    for index, cell in enumerate(todo):
        on_cell(index, len(todo), cell.id)
        path = out / "cells" / f"{cell.id}.json"
        if not path.exists():
            made = {end: _make(model, masks, out, end, keep=True) for end in (references.chain, references.ode)}
            volumes, seconds = made.get(cell) or _make(model, masks, out, cell)
            _save_array(path.with_suffix(".npy"), volumes[0, 0, volumes.shape[2] // 2])
            row = asdict(cell) | _measure(volumes, masks, made[references.chain][0], made[references.ode][0])
            write_json(path, row | {"seconds_per_volume": seconds}, indent=2)
        rows.append(read_json(path, dict[str, Any], "delete it to measure again"))
    on_cell(len(todo), len(todo), "")
    write_json(out / "table.json", rows, indent=2)
    write_text(out / "table.md", markdown_table(rows))
    write_figure(out / "figure.png", rows, {cell.id: np.load(out / "cells" / f"{cell.id}.npy") for cell in todo})
    return rows


def _claim(out: Path, model: torch.nn.Module, masks: Masks) -> None:
    """Keep cells of different models, masks or settings apart."""
    config: Config = model.config  # type: ignore[assignment]
    parameter = next(model.parameters())
    compared = {
        "weights": model.provenance,
        "masks": {mask_id: hashlib.sha256(labels.tobytes()).hexdigest()[:12] for mask_id, labels in masks.items()},
        "seed": config.seed,
        "sampling": config.sampling.model_dump(
            mode="json", include={"eta", "guidance_scale", "guidance_interval", "clip_x_start", "batch_size"}
        ),
        "precision": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }
    path = out / "comparison.json"
    compared = json.loads(json.dumps(compared))
    found = read_json(path, dict[str, Any], ANOTHER, ConfigError) if path.exists() else compared
    if found != compared:
        differing = ", ".join(key for key in compared if found.get(key) != compared[key])
        raise ConfigError(f"{out} compares samplers with another {differing}; {ANOTHER}")
    write_json(path, compared, indent=2)


def _make(model: torch.nn.Module, masks: Masks, out: Path, cell: Cell, *, keep: bool = False) -> tuple[Volumes, float]:
    """The volumes of a cell and the seconds of one; what is to be kept is made once."""
    kept = out / "reference" / f"{cell.id}.npy"
    times = kept.with_suffix(".json")
    if keep and times.exists():
        return np.load(kept), read_json(times, float, "delete it to measure again", is_sealed=False)
    config: Config = model.config  # type: ignore[assignment]
    settings: dict[str, Any] = {"sampler": cell.sampler, "num_steps": cell.num_steps, "spacing": cell.spacing}
    ids, batch = list(masks), config.sampling.batch_size
    parts, began = [], time.perf_counter()
    for some in (ids[first : first + batch] for first in range(0, len(ids), batch)):
        seeds = [volume_seed(config.seed, mask_id, cell.replica) for mask_id in some]
        labels = np.stack([masks[mask_id] for mask_id in some])
        parts.append(generate(model, labels, seed=seeds, **settings).cpu().numpy())
    volumes, seconds = np.concatenate(parts), (time.perf_counter() - began) / len(ids)
    if keep:
        _save_array(kept, volumes)
        write_json(times, seconds)
    return volumes, seconds


def _save_array(path: Path, array: NDArray[np.float32]) -> None:
    """By way of memory: of a full disk, NumPy's own writing does not say that it is full."""
    content = io.BytesIO()
    np.save(content, array)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


# --------------------------------------------------------------------------------------------- measures


def _measure(volumes: Volumes, masks: Masks, chain: Volumes, ode: Volumes) -> dict[str, float]:
    fits = [mask_fit(volume, labels) for volume, labels in zip(volumes, masks.values(), strict=True)]
    return {
        "rms_to_ddpm": rms(volumes - chain),
        "rms_to_ode": rms(volumes - ode),
        "mask_fit": float(np.mean(fits)),
        "sharpness": gradient_rms(volumes) / gradient_rms(chain),
    }


def rms(values: NDArray[np.float32]) -> float:
    """Root of the mean square, in the volumes' unit: [-1, 1] spans 2."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def gradient_rms(volumes: Volumes) -> float:
    """Root mean square difference of neighbouring voxels: blur lowers it, grain raises it."""
    return float(np.sqrt(np.mean([rms(np.diff(volumes, axis=axis)) ** 2 for axis in (-3, -2, -1)])))


def mask_fit(volume: NDArray[np.float32], labels: NDArray[np.uint8]) -> float:
    """Share of the intensity variance that the labels explain, averaged over modalities: 0 none, 1 all.

    The correlation ratio (Roche et al. 1998) of volume (C, D, H, W) and mask (D, H, W), background included.
    """
    flat = volume.reshape(len(volume), -1).astype(np.float64)
    inside = np.zeros(len(flat))
    for value in np.unique(labels):
        values = flat[:, labels.ravel() == value]
        inside += values.var(axis=1) * values.shape[1]
    return float(np.mean(1 - inside / np.maximum(flat.var(axis=1) * flat.shape[1], 1e-12)))


# ------------------------------------------------------------------------------------------------ table

_COLUMNS = {
    "sampler": "{}",
    "num_steps": "{}",
    "spacing": "{}",
    "rms_to_ddpm": "{:.4f}",
    "rms_to_ode": "{:.4f}",
    "mask_fit": "{:.3f}",
    "sharpness": "{:.3f}",
    "seconds_per_volume": "{:.2f}",
}


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(_COLUMNS).replace("_", " ") + " |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        shown = {**row, "sampler": row["sampler"] + (" (other noise)" if row["replica"] else "")}
        lines.append("| " + " | ".join(form.format(shown[name]) for name, form in _COLUMNS.items()) + " |")
    return "\n".join(lines) + "\n"
