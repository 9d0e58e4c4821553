"""Writing shards: a row that was written survives a killed process. The schema is in `shards`. C D H W."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.labels import count_labels
from hpc_ddpm.data.preprocess import Prepared
from hpc_ddpm.data.shards import FORMAT, INT16_SCALE, VERSION, config_digest, crcs
from hpc_ddpm.errors import DataFormatError

Array = NDArray[Any]


def create_shard(path: Path, rows: Sequence[tuple[str, str]], config: DataConfig, digest: str) -> None:
    """Create a shard without volumes.

    Every small column is written in full and has a fixed size, so that `write_row` changes its own bytes and
    the chunk index only: variable-length strings live in a heap that a kill can tear.

    Args:
        path: does not matter yet to readers; publish it when all rows are written.
        rows: subject and source of each.
        config: of the dataset.
        digest: of config and subjects, kept as an attribute to recognise the shard by.
    """
    volume, channels, num_rows = config.spatial_shape, config.num_modalities, len(rows)
    with h5py.File(path, "w", libver=("v108", "v110")) as file:
        file.attrs.update(_attributes(config, digest))
        file.create_dataset(
            "image",
            (num_rows, channels, *volume),
            config.storage_dtype,
            chunks=(1, 1, *volume),
            fletcher32=True,
            compression=hdf5plugin.LZ4(),
        )
        file.create_dataset(
            "mask",
            (num_rows, *volume),
            "uint8",
            chunks=(1, *volume),
            fletcher32=True,
            compression=hdf5plugin.Zstd(clevel=3),
        )
        for name, values in zip(("id", "source"), zip(*rows, strict=True), strict=True):
            encoded = [value.encode() for value in values]
            file.create_dataset(name, data=encoded, dtype=h5py.string_dtype("utf-8", max(map(len, encoded))))
        columns: dict[str, tuple[tuple[int, ...], str]] = {
            "affine": ((4, 4), "f8"),
            "original_affine": ((4, 4), "f8"),
            "original_shape": ((3,), "i4"),
            "intensity": ((channels, 2), "f4"),
            "label_voxels": ((config.num_labels,), "i8"),
            "crc32_image": ((channels,), "u4"),
            "crc32_mask": ((), "u4"),
            "done": ((), "u1"),
        }
        for name, (shape, dtype) in columns.items():
            file.create_dataset(name, data=np.zeros((num_rows, *shape), dtype))


def _attributes(config: DataConfig, digest: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "axes": "CZYX",
        "modalities": json.dumps(config.modalities),
        "labels": config.labels.model_dump_json(),
        "image_scale": 1 / INT16_SCALE if config.storage_dtype == "int16" else 1.0,
        "config": config.model_dump_json(),
        "config_digest": config_digest(config),
        "digest": digest,
    }


@contextmanager
def open_writer(path: Path) -> Iterator[h5py.File]:
    """An existing shard, to write rows into; refuses to share it with another writer.

    Raises:
        DataFormatError: another process writes it.
        OSError: damaged.
    """
    try:
        file = h5py.File(path, "r+", libver=("v108", "v110"), locking="best-effort")
    except BlockingIOError:
        raise DataFormatError(f"{path}: another process is packing into it; wait for it or use another --out") from None
    with file:
        yield file


def write_row(file: h5py.File, row: int, source: str, prepared: Prepared, config: DataConfig) -> None:
    """Write one subject; when it returns, the row survives a killed process."""
    image = encode(prepared.image, config.storage_dtype)
    file["image"][row] = image
    file["mask"][row] = prepared.mask
    geometry = prepared.geometry
    values = {
        "source": source,
        "affine": prepared.affine,
        "original_affine": geometry.file_affine,
        "original_shape": geometry.original_shape,
        "intensity": prepared.intensity,
        "label_voxels": count_labels(prepared.mask, config.labels),
        "crc32_image": crcs(image),
        "crc32_mask": zlib.crc32(prepared.mask.data),
    }
    for name, value in values.items():
        file[name][row] = value
    file.flush()
    file["done"][row] = 1
    file.flush()


def mark_missing(file: h5py.File, row: int, source: str) -> None:
    """Note that the subject of a row, with its files as they are now, is left out."""
    file["done"][row] = 0
    file["source"][row] = source
    file.flush()


def encode(image: NDArray[np.float32], storage_dtype: str) -> Array:
    """[-1, 1] to what is stored: int16 (largest error 1.5e-5) or float32."""
    if storage_dtype == "float32":
        return image
    return np.rint(image * np.float32(INT16_SCALE)).astype(np.int16)


def is_row_intact(file: h5py.File, row: int, subject: str, source: str) -> bool:
    """Whether a row is complete, belongs to this subject and these files, and decodes to what was written."""
    try:
        if not file["done"][row] or (file["id"].asstr()[row], file["source"].asstr()[row]) != (
            subject,
            source,
        ):
            return False
        image, mask = file["image"][row], file["mask"][row]
        return crcs(image) == file["crc32_image"][row].tolist() and zlib.crc32(mask.data) == file["crc32_mask"][row]
    except OSError:
        return False
