"""A packed dataset of phantoms, for benchmarks without data."""

from __future__ import annotations

from pathlib import Path

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms

NUM_SUBJECTS = 4


def pack_phantoms(config: DataConfig, folder: Path) -> Path:
    """Write phantoms of this size, modalities and labels, pack them for training, and return the dataset."""
    tree, packed = folder / "nifti", folder / "packed"
    write_phantoms(tree, NUM_SUBJECTS, config.size, modalities=config.modalities, labels=config.labels)
    pack(tree, packed, config.model_copy(update={"layout": "tree", "val_fraction": 0.0, "path": ""}))
    return packed
