"""Writing shards. The schema is in `shards`. C D H W.

HDF5 cannot be appended to safely: a kill tears its metadata. So each row is first written as a shard of its own,
which is complete once it has its name, and a shard is put together from these in one go.

Nor can HDF5 be closed when the disk is full: the process would crash later. So it writes to a `_Sink`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import file_digest
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.chunks import VOLUMES, crc32
from hpc_ddpm.data.labels import count_labels
from hpc_ddpm.data.plan import Row, Shard
from hpc_ddpm.data.preprocess import Prepared
from hpc_ddpm.data.shards import FORMAT, INT16_SCALE, VERSION, ShardEntry, config_digest, crcs, open_reader, to_hex
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import atomic_path

Array = NDArray[Any]


def write_row(path: Path, row: Row, prepared: Prepared, config: DataConfig, scratch: Path) -> None:
    """Write one subject as a shard of one row.

    Args:
        path: complete when it exists; after a power cut, `is_row_written` tells.
        row: of the plan.
        prepared: its volumes.
        config: of the dataset.
        scratch: folder for the unfinished file.
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
        "crc32_mask": crc32(prepared.mask),
        "done": 1,
    }
    if config.covariates:
        values["covariates"] = row.subject.covariates
    with (
        atomic_path(path, durable=False, scratch=scratch) as temporary,
        _create(temporary, [row], config, row.key) as file,
    ):
        for name, value in values.items():
            file[name][0] = value


def write_shard(path: Path, shard: Shard, files: Mapping[int, Path], config: DataConfig, scratch: Path) -> None:
    """Put a shard together.

    Args:
        path: complete when it exists.
        shard: of the plan.
        files: from `write_row`, by row number; rows without one stay empty (`done` 0).
        config: of the dataset.
        scratch: folder for the unfinished file.
    """
    with (
        atomic_path(path, scratch=scratch) as temporary,
        _create(temporary, shard.rows, config, shard.digest) as target,
    ):
        for row, source in files.items():
            with open_reader(source) as file:
                for name in file.keys() - {"id", "source", *VOLUMES}:
                    target[name][row] = file[name][0]
                for name in VOLUMES:
                    _copy_chunks(file[name], target[name], row)


def is_row_written(path: Path, row: Row) -> bool:
    """Whether `write_row` left this row at `path`, and it decodes to what was written."""
    try:
        with open_reader(path) as file:
            image, mask = file["image"][0], file["mask"][0]
            is_whole = crcs(image) == file["crc32_image"][0].tolist() and crc32(mask) == file["crc32_mask"][0]
            return bool(is_whole and file.attrs["digest"] == row.key)
    except (DataFormatError, OSError, KeyError):
        return False


def is_shard_written(path: Path, shard: Shard) -> bool:
    """Whether `write_shard` left this shard at `path`, with no row empty."""
    try:
        with open_reader(path) as file:
            return bool(file.attrs["digest"] == shard.digest and file["done"][:].all())
    except (DataFormatError, OSError, KeyError):
        return False


def describe_shard(path: Path, shard: Shard, left_out: Mapping[int, str]) -> ShardEntry:
    """The entry of a shard in the index, with no subject held out.

    Args:
        path: of its file.
        shard: of the plan.
        left_out: why rows are empty, by number.
    """
    with open_reader(path) as file:
        image, mask = (to_hex(file[f"crc32_{name}"][:]) for name in VOLUMES)
    with path.open("rb") as raw:
        digest = file_digest(raw, "sha256").hexdigest()
    return ShardEntry(
        file=shard.name,
        size_bytes=path.stat().st_size,
        sha256=digest,
        digest=shard.digest,
        id=[row.subject.id for row in shard.rows],
        val=[],
        test=[],
        left_out={str(row): why for row, why in left_out.items()},
        crc32_image=image,
        crc32_mask=mask,
    )


def encode(image: NDArray[np.float32], storage_dtype: str) -> Array:
    """[-1, 1] to what is stored: int16 (largest error 1.5e-5) or float32."""
    if storage_dtype == "float32":
        return image
    return np.rint(image * np.float32(INT16_SCALE)).astype(np.int16)


def _copy_chunks(source: h5py.Dataset, target: h5py.Dataset, row: int) -> None:
    """The only row of `source` to a row of `target`, as compressed."""
    for number in range(source.id.get_num_chunks()):
        _, *offset = source.id.get_chunk_info(number).chunk_offset
        filter_mask, data = source.id.read_direct_chunk((0, *offset))
        target.id.write_direct_chunk((row, *offset), data, filter_mask)


class _Sink:
    """A file for HDF5 that reports every write as done; `error` holds the first error, which HDF5 would hide."""

    def __init__(self, file: FileIO) -> None:
        self.error: OSError | None = None
        self.seek, self.tell, self.read, self.readinto = file.seek, file.tell, file.read, file.readinto
        self._file = file

    def write(self, data: memoryview) -> int:
        """Write all of `data`; keep the first error in `error`, and tell HDF5 that all was written."""
        rest = data
        try:
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return len(data)

    def truncate(self, size: int) -> int:
        """Cut or extend the file to `size` bytes."""
        try:
            self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
        return size

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


@contextmanager
def _create(path: Path, rows: Sequence[Row], config: DataConfig, digest: str) -> Iterator[h5py.File]:
    """An empty shard, open for writing."""
    with path.open("w+b", buffering=0) as raw:
        sink = _Sink(raw)
        try:
            with h5py.File(sink, "w", libver=("v108", "v110")) as file:
                file.attrs.update(_attributes(config, digest))
                _create_datasets(file, rows, config)
                yield file
        finally:
            if sink.error:
                raise sink.error


def _create_datasets(file: h5py.File, rows: Sequence[Row], config: DataConfig) -> None:
    volume, channels, num_rows = config.spatial_shape, config.num_modalities, len(rows)
    is_compressed = config.compression == "lz4"
    chunk = (config.chunk_size or config.size)[::-1]
    file.create_dataset(
        "image",
        (num_rows, channels, *volume),
        config.storage_dtype,
        chunks=(1, 1, *chunk),
        fletcher32=True,
        compression=hdf5plugin.LZ4() if is_compressed else None,
    )
    file.create_dataset(
        "mask",
        (num_rows, *volume),
        "uint8",
        chunks=(1, *chunk),
        fletcher32=True,
        compression=hdf5plugin.Zstd(clevel=3) if is_compressed else None,
    )
    names = {"id": [row.subject.id for row in rows], "source": [row.source for row in rows]}
    for name, values in names.items():
        encoded = [value.encode() for value in values]
        kind = h5py.string_dtype("utf-8", max(map(len, encoded)))
        file.create_dataset(name, data=encoded, dtype=kind, chunks=(num_rows,), fletcher32=True)
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
    if config.covariates:
        columns["covariates"] = ((len(config.covariates),), "f8")
    for name, (shape, dtype) in columns.items():
        whole = (num_rows, *shape)
        file.create_dataset(name, data=np.zeros(whole, dtype), chunks=whole, fletcher32=True)


def _attributes(config: DataConfig, digest: str) -> dict[str, Any]:
    covariates = {name: covariate.model_dump() for name, covariate in config.covariates.items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "axes": "CZYX",
        "modalities": json.dumps(config.modalities),
        "labels": config.labels.model_dump_json(),
        **({"covariates": json.dumps(covariates)} if covariates else {}),
        "image_scale": 1 / INT16_SCALE if config.storage_dtype == "int16" else 1.0,
        "config": config.model_dump_json(),
        "config_digest": config_digest(config),
        "digest": digest,
    }
