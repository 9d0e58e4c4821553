"""Writing shards. The schema is in `shards`. C D H W.

HDF5 cannot be appended to safely: a kill tears its metadata. So each row is first written as a shard of its own,
which is complete once it has its name, and a shard is put together from these in one go.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.files import atomic_path
from hpc_ddpm.data.labels import count_labels
from hpc_ddpm.data.preprocess import Prepared
from hpc_ddpm.data.shards import FORMAT, INT16_SCALE, VERSION, config_digest, crcs, open_reader
from hpc_ddpm.errors import DataFormatError

Array = NDArray[Any]
Row = tuple[str, str]
"""Subject id and source."""


def write_row(path: Path, row: Row, prepared: Prepared, config: DataConfig, digest: str) -> None:
    """Write one subject as a shard of one row.

    Args:
        path: complete when it exists; after a power cut, `is_row_written` tells.
        row: subject and source.
        prepared: its volumes.
        config: of the dataset.
        digest: of config and subjects, kept as an attribute to recognise the file by.
    """
    image = encode(prepared.image, config.storage_dtype)
    values = {
        "image": image,
        "mask": prepared.mask,
        "affine": prepared.affine,
        "original_affine": prepared.geometry.file_affine,
        "original_shape": prepared.geometry.original_shape,
        "intensity": prepared.intensity,
        "label_voxels": count_labels(prepared.mask, config.labels),
        "crc32_image": crcs(image),
        "crc32_mask": zlib.crc32(prepared.mask.data),
        "done": 1,
    }
    with atomic_path(path, durable=False) as temporary, _create(temporary, [row], config, digest) as file:
        for name, value in values.items():
            file[name][0] = value


def write_shard(path: Path, rows: Sequence[Row], files: Mapping[int, Path], config: DataConfig, digest: str) -> None:
    """Put a shard together.

    Args:
        path: complete when it exists.
        rows: subject and source of every row.
        files: from `write_row`, by row; rows without one stay empty (`done` 0).
        config: of the dataset.
        digest: as in `write_row`.
    """
    with atomic_path(path) as temporary, _create(temporary, rows, config, digest) as shard:
        for row, source in files.items():
            with open_reader(source) as file:
                for name in file.keys() - {"id", "source"}:
                    shard[name][row] = file[name][0]


def is_row_written(path: Path, row: Row, digest: str) -> bool:
    """Whether `write_row` left this subject, with these files, at `path`, and it decodes to what was written."""
    try:
        with open_reader(path) as file:
            found = file.attrs["digest"], file["id"].asstr()[0], file["source"].asstr()[0]
            if found != (digest, *row):
                return False
            image, mask = file["image"][0], file["mask"][0]
            return crcs(image) == file["crc32_image"][0].tolist() and zlib.crc32(mask.data) == file["crc32_mask"][0]
    except (DataFormatError, OSError):
        return False


def encode(image: NDArray[np.float32], storage_dtype: str) -> Array:
    """[-1, 1] to what is stored: int16 (largest error 1.5e-5) or float32."""
    if storage_dtype == "float32":
        return image
    return np.rint(image * np.float32(INT16_SCALE)).astype(np.int16)


@contextmanager
def _create(path: Path, rows: Sequence[Row], config: DataConfig, digest: str) -> Iterator[h5py.File]:
    """An empty shard, open for writing."""
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
        yield file


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
