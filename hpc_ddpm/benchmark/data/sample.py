"""The subject that all contestants read: packed, and as NIfTI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.coding import resolve_labels
from hpc_ddpm.data.discover import MASK, discover
from hpc_ddpm.data.nifti import read_nifti, write_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.series import split_series
from hpc_ddpm.data.settle import settle
from hpc_ddpm.data.shards import INT16_SCALE, Packed, open_packed


@dataclass(frozen=True)
class Sample:
    """One subject."""

    origin: str
    """What it is, in words."""
    packed: Path
    """Our dataset with this subject as the first one for training."""
    uncompressed: Path
    """The same, packed with data.compression=none."""
    tree: Path
    """NIfTI: mask/ and one folder per modality, one file in each."""
    image: NDArray[Any]
    """(C, D, H, W), as stored."""
    mask: NDArray[np.uint8]
    """(D, H, W)."""
    config: DataConfig

    @property
    def nifti(self) -> dict[str, Path]:
        """The file of every role."""
        return {role: next((self.tree / role).iterdir()) for role in (*self.config.modalities, MASK)}

    @property
    def num_bytes(self) -> int:
        """Size of the decoded voxels, in the dtype in which they are stored."""
        return self.image.nbytes + self.mask.nbytes


def make_sample(config: DataConfig, folder: Path, data: Path | None, source: Path | None) -> Sample:
    """Prepare the subject in `folder`.

    Args:
        config: how `source`, or else a phantom, is packed.
        folder: empty; of the file system to be measured.
        data: packed dataset whose first subject to take; its own settings count.
        source: NIfTI to take the first subject of.

    Raises:
        DataFormatError: `data` or `source` is not usable.
    """
    tree = folder / "nifti"
    if source is not None:
        config, origin = _link_first(source, config, tree), f"first subject of {source.name}"
    elif data is None:
        origin = "synthetic head"
        write_phantoms(tree, 1, config.size, modalities=config.modalities, labels=config.labels)
    if data is not None:
        dataset, origin = open_packed(data), f"first subject of {data.name}"
        config, packed = dataset.data, data
        if source is None:
            config = _write_first(dataset, tree)
    else:
        packed = folder / "lz4"
        pack(tree, packed, config)
    uncompressed = folder / "uncompressed"
    pack(tree, uncompressed, config.model_copy(update={"compression": "none"}))
    dataset = open_packed(packed)
    image, mask = dataset.read(dataset.subjects("train")[0].index)
    return Sample(origin, packed, uncompressed, tree, image, mask, dataset.data)


def _link_first(source: Path, config: DataConfig, tree: Path) -> DataConfig:
    """A tree with links to the first subject, and the settings to pack it."""
    found = discover(source, config)
    subject = found.subjects[0]
    for role, path in {MASK: subject.mask, **subject.images}.items():
        file, number = split_series(path)
        ending = ".nii.gz" if file.name.endswith(".nii.gz") else file.suffix
        (tree / role).mkdir(parents=True)
        if number is None:
            (tree / role / f"{subject.id}{ending}").symlink_to(file.resolve())
        else:
            volume = read_nifti(path)
            write_nifti(tree / role / f"{subject.id}.nii.gz", volume.data, volume.affine)
    settled = settle([subject], config.model_copy(update={"layout": found.layout})).config
    return config.model_copy(update={"layout": "tree", "labels": resolve_labels(settled.labels, found.layout)})


def _write_first(dataset: Packed, tree: Path) -> DataConfig:
    """The first subject as NIfTI, and the settings that pack it to the same voxels."""
    index = dataset.subjects("train")[0].index
    image, mask = dataset.read(index)
    affine, name = dataset.affine(index), "subject.nii.gz"
    unit = image / np.float32(INT16_SCALE) if image.dtype == np.int16 else image
    for modality, volume in zip(dataset.data.modalities, unit, strict=True):
        write_nifti(tree / modality / name, volume, affine)
    write_nifti(tree / MASK / name, mask, affine)
    labels = dataset.data.labels.model_copy(update={"remap": {}, "foreground_label": None})
    return dataset.data.model_copy(update={"normalization": "none", "layout": "tree", "labels": labels})
