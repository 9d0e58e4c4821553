"""nnU-Net's raw data: imagesTr/ID_0000.nii.gz, labelsTr/ID.nii.gz, dataset.json; the test split in imagesTs, labelsTs.

nnU-Net wants labels without gaps: they are numbered 1, 2, ... in the order of the scheme, and dataset.json names them.
`splits_final.json` keeps train and val as they were packed; nnU-Net reads it from its folder of preprocessed data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.shards import PackedSubject
from hpc_ddpm.files import write_json

ENDING = ".nii.gz"


def files_of(out: Path, roles: Sequence[str], subject: PackedSubject) -> dict[str, Path]:
    """Role -> file; `roles` are the modalities in their order, and the mask at the end."""
    part = "Ts" if subject.split == "test" else "Tr"
    *modalities, mask = roles
    images = {name: out / f"images{part}" / f"{subject.id}_{i:04d}{ENDING}" for i, name in enumerate(modalities)}
    return images | {mask: out / f"labels{part}" / f"{subject.id}{ENDING}"}


def consecutive(mask: NDArray[np.uint8], labels: LabelsConfig) -> NDArray[np.uint8]:
    """(D, H, W) with the labels numbered 1, 2, ... in the order of the scheme."""
    table = np.zeros(256, np.uint8)
    table[list(labels.names)] = np.arange(1, len(labels.names) + 1)
    return table[mask]


def describe(out: Path, data: DataConfig, subjects: Sequence[PackedSubject]) -> None:
    """Write dataset.json and, where there is a val split, splits_final.json."""
    ids = {split: [one.id for one in subjects if one.split == split] for split in ("train", "val")}
    names = {name: number for number, name in enumerate(data.labels.names.values(), start=1)}
    content = {
        "channel_names": {str(number): name for number, name in enumerate(data.modalities)},
        "labels": {"background": 0, **names},
        "numTraining": len(ids["train"]) + len(ids["val"]),
        "file_ending": ENDING,
    }
    write_json(out / "dataset.json", content, indent=2)
    if ids["val"]:
        write_json(out / "splits_final.json", [ids], indent=2)
