"""Generated volumes as a packed dataset, for the next model to train on.

Each worker writes rows, packed/rows/<id>.h5; when all volumes are finished, one worker puts them into shards and
publishes the index. A set that grows gets more shards. Every subject is in `train`: replicas of a mask are alike, so
who is held out is for the user to say (`hpc-ddpm data split`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.covariates import to_numbers
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.plan import Row, chunks, digest_of
from hpc_ddpm.data.preprocess import Prepared
from hpc_ddpm.data.shard_writer import describe_shard, encode, write_row, write_shard
from hpc_ddpm.data.shards import INDEX, crcs, read_index, to_hex, write_index
from hpc_ddpm.files import fsync
from hpc_ddpm.sampling.masks import Mask
from hpc_ddpm.sampling.plan import Item
from hpc_ddpm.workers.claims import Writer

PACKED, ROWS = "packed", "rows"


def row_path(out: Path, item_id: str) -> Path:
    """Where a generated volume is until a shard holds it."""
    return out / PACKED / ROWS / f"{item_id}.h5"


def write_packed_row(
    out: Path, item: Item, volume: NDArray[np.float32], mask: Mask, data: DataConfig, scratch: Path
) -> dict[str, str]:
    """Write one volume (C, D, H, W), clipped to [-1, 1], and its mask as a shard of one row; returns its checksums."""
    image = np.clip(volume, -1, 1)
    stored = encode(image, data.storage_dtype)
    checksums = {"crc32_image": to_hex(crcs(stored)), "crc32_mask": to_hex([zlib.crc32(mask.labels.data)])}
    intensity = np.tile(np.array([-1, 1], np.float32), (data.num_modalities, 1))
    prepared = Prepared(image, mask.labels, mask.geometry.affine, mask.geometry, intensity)
    path = row_path(out, item.id)
    write_row(path, _row(item, checksums, data), prepared, data, scratch)
    fsync(path)
    return checksums


def assemble(out: Path, items: Iterable[Item], packed_records: Mapping[str, Any], data: DataConfig, w: Writer) -> None:
    """Publish the rows that are in no shard.

    Args:
        out: folder of the set.
        items: all planned volumes.
        packed_records: checksums of the finished ones, by id.
        data: of the model.
        w: this worker.
    """
    folder = out / PACKED
    entries = list(read_index(folder).shards) if (folder / INDEX).exists() else []
    published = {subject for entry in entries for subject in entry["id"]}
    rows = [
        _row(item, packed_records[item.id], data)
        for item in sorted(items, key=lambda item: item.id)
        if item.id in packed_records and item.id not in published
    ]
    data = data.model_copy(update={"path": "", "val_fraction": 0.0, "hooks": ()})
    for shard in chunks(data, rows, len(entries)):
        files = {number: row_path(out, row.subject.id) for number, row in enumerate(shard.rows)}
        write_shard(folder / shard.name, shard, files, data, w.scratch)
        entries.append(describe_shard(folder / shard.name, shard, {}))
    if rows:
        write_index(folder, data.model_dump(mode="json"), entries, w.scratch)
    for entry in entries:
        for subject in entry["id"]:
            row_path(out, subject).unlink(missing_ok=True)


def _row(item: Item, checksums: Mapping[str, str], data: DataConfig) -> Row:
    key = digest_of([item.id, checksums["crc32_image"], checksums["crc32_mask"]])
    covariates = to_numbers(item.covariates, data.covariates, item.id)
    return Row(Subject(item.id, Path(item.mask), {}, covariates=covariates), key[:16], 0, key)
