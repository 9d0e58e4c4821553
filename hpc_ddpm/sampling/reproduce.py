"""Make a volume again from its sidecar, and say by how much it differs from what is there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_ddpm.config import Config
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.sampling.folder import SampleFolder, find_folder
from hpc_ddpm.sampling.generate import generate
from hpc_ddpm.sampling.masks import load_mask
from hpc_ddpm.sampling.plan import item_of, read_manifest
from hpc_ddpm.sampling.run import exact_kernels
from hpc_ddpm.sampling.write import voxels_sha256, write_outputs


@dataclass(frozen=True)
class Reproduction:
    """What came out."""

    id: str
    is_identical: bool
    """All voxels as generated have the same checksum."""
    max_difference: float
    """Largest of any voxel of the files."""
    files: dict[str, float]
    """Each file's own; NaN where it is missing or damaged."""


def find_record(path: Path) -> tuple[SampleFolder, dict[str, Any]]:
    """The set and the sidecar of a file of it: a sidecar, or any of the files that one names.

    Raises:
        DataFormatError: the file belongs to no volume of a generated set.
    """
    folder = find_folder(path.parent)
    if path.suffix == ".json" and path.parent.name == "sidecar":
        return folder, folder.record(path.stem)
    name = path.resolve().relative_to(folder.path.resolve()).as_posix()
    item_id = path.name.removesuffix(".nii.gz")
    if folder.sidecar(item_id).exists() and name in (record := folder.record(item_id)).get("files", {}):
        return folder, record
    for record in folder.records():
        if name in record.get("files", {}):
            return folder, record
    raise DataFormatError(f"{path}: no sidecar in {folder.path}/sidecar names this file; give a generated one")


def reproduce(
    folder: SampleFolder,
    record: dict[str, Any],
    model: torch.nn.Module,
    weights_sha256: str,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Reproduction:
    """Generate the volume of a sidecar anew and compare.

    Args:
        folder: of the set.
        record: the sidecar.
        model: on a device, in the sidecar's precision, with the configuration of the set.
        weights_sha256: of the model.
        on_step: called with (steps done, steps in all).

    Raises:
        DataFormatError: the mask is gone or has changed, or these are other weights.
    """
    config: Config = model.config  # type: ignore[assignment]
    if weights_sha256 != record["weights"]["sha256"]:
        raise DataFormatError(
            f"{record['id']}: made with weights {record['weights']['sha256'][:12]}, given {weights_sha256[:12]}; "
            "give the weights it was made with by --weights"
        )
    item = next((item for item in read_manifest(folder.path) if item.id == record["id"]), item_of(record))
    item = replace(item, seed=record["seed"])
    mask = load_mask(item.source, config)
    if mask.sha256 != record["mask_sha256"]:
        raise DataFormatError(f"{item.mask}: the mask {item.mask_id} has changed since {item.id} was made; restore it")
    device = next(model.parameters()).device
    if device.type == "cpu":
        torch.set_num_threads(record["threads"])
    with exact_kernels(config, device):
        volumes = generate(model, mask.labels[None], seed=[item.seed], covariates=item.covariates, on_step=on_step)
        volume = volumes[0].float().cpu().numpy()
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch)
        made = write_outputs(again, item, volume, mask, config, again / ".scratch")
        images = [name for name in record.get("files", {}) if name.endswith(".nii.gz")]
        files = {name: _difference(folder.path / name, again / name) for name in images}
    if "packed" in record:
        files["packed"] = 0.0 if made["packed"] == record["packed"] else float("nan")
    is_identical = voxels_sha256(volume) == record["voxels_sha256"]
    return Reproduction(item.id, is_identical, float(np.max(list(files.values()))), files)


def _difference(one: Path, other: Path) -> float:
    try:
        found = read_nifti(one).data
    except DataFormatError:
        return float("nan")
    return float(np.abs(found - read_nifti(other).data).max())
