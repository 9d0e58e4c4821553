"""Integrity of a packed dataset: every flipped bit, missing shard and wrong entry, and whom it hits. C D H W."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.findings import Finding
from hpc_ddpm.data.labels import count_labels
from hpc_ddpm.data.parallel import ordered_map, process_pool
from hpc_ddpm.data.patients import torn_patients
from hpc_ddpm.data.shards import (
    INDEX,
    INT16_SCALE,
    SPLITS,
    Index,
    ShardEntry,
    config_digest,
    crcs,
    open_reader,
    read_index,
    to_hex,
)
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import reading_from

Findings = Iterator[Finding]
Progress = Callable[[int, int], None]
CRC_DIGITS = 8

LOOK_S, SLOW_BYTES_S = 30.0, 1e7
"""What a look into a damaged shard may take of the processor."""


@dataclass(frozen=True)
class _Shard:
    """One shard as the index describes it."""

    path: Path
    entry: ShardEntry
    data: DataConfig
    settings: str
    """Hash of those in the index."""

    @property
    def rows(self) -> dict[int, str]:
        """Row number -> subject, of those that are packed."""
        left_out = {int(row) for row in self.entry["left_out"]}
        return {row: subject for row, subject in enumerate(self.entry["id"]) if row not in left_out}

    def finding(self, kind: str, found: str, subjects: Any = None) -> Finding:
        """About these subjects, or all of the shard."""
        return Finding(kind, found, tuple(self.rows.values() if subjects is None else subjects), str(self.path))

    def crc32(self, column: str, row: int) -> str:
        """As the index has it."""
        text = self.entry["crc32_image"] if column == "image" else self.entry["crc32_mask"]
        width = CRC_DIGITS * (self.data.num_modalities if column == "image" else 1)
        return text[row * width : (row + 1) * width]


def verify(
    path: str | Path, *, deep: bool = False, num_workers: int = 1, progress: Progress | None = None
) -> list[Finding]:
    """Compare a packed dataset with its checksums; empty if nothing is wrong.

    Every byte of every shard is covered by the SHA-256 of the index; the rows of a shard that differs are decoded
    to name the subjects that are hit.

    Args:
        path: of the packed dataset.
        deep: also decode every row of every shard, and compare voxels with checksums, range and label counts:
            finds what was wrong before the SHA-256 was taken, and filters that do not work here.
        num_workers: processes; each takes whole shards.
        progress: called with (finished shards, all shards).

    Raises:
        DataFormatError: there is no packed dataset at `path`.
    """
    path = Path(path)
    try:
        index = read_index(path)
    except DataFormatError as error:
        with reading_from(path):
            if not (path / INDEX).is_file():
                raise
        return [Finding("index-damaged", str(error).splitlines()[0].removeprefix(f"{path / INDEX}: "))]
    settings = config_digest(index.config)
    shards = [_Shard(path / entry["file"], entry, index.config, settings) for entry in index.shards]
    findings = [*_check_index(index), *_check_patients(index), *_check_folder(path, index)]
    judge = partial(_check_shard, deep=deep)
    for number, found in enumerate(ordered_map(judge, shards, num_workers, preload=__name__), start=1):
        findings += found
        if progress:
            progress(number, len(shards))
    return findings


# ------------------------------------------------------------------------------------------------- index


def _check_index(index: Index) -> Findings:
    """Entries that contradict each other."""
    twice = [subject for subject, count in Counter(index.id).items() if count > 1]
    if twice:
        yield Finding("index-mismatch", f"{len(twice)} subjects are in the index twice", tuple(twice), INDEX)
    files = [entry["file"] for entry in index.shards]
    for file, count in Counter(files).items():
        if count > 1:
            yield Finding("index-mismatch", f"shard {file} is named {count} times, once expected", (), INDEX)


def _check_patients(index: Index) -> Findings:
    """Patients whose subjects are in two splits."""
    try:
        patients = index.patients
    except DataFormatError as error:
        yield Finding("index-mismatch", str(error), (), INDEX)
        return
    splits = (SPLITS[code] for code in index.split.tolist())
    rows = ((subject, patients[subject], split) for subject, split in zip(index.id, splits, strict=True))
    for patient, subjects in torn_patients(rows).items():
        yield Finding("leaking-patient", f"subjects of patient {patient} are in two splits", tuple(subjects), INDEX)


def _check_folder(path: Path, index: Index) -> Findings:
    known = {entry["file"] for entry in index.shards}
    for file in sorted(path.glob("shard-*.h5")):
        if file.name not in known:
            yield Finding("extra-shard", f"{file.name} is not in the index", file=str(file))


def _check_entry(shard: _Shard) -> Findings:
    """Columns of one shard in the index whose lengths or values cannot be."""
    entry, num_rows = shard.entry, len(shard.entry["id"])
    lengths = {"crc32_image": CRC_DIGITS * shard.data.num_modalities * num_rows, "crc32_mask": CRC_DIGITS * num_rows}
    for name, length in lengths.items():
        if len(entry[name]) != length:  # type: ignore[literal-required]
            found = f"{name} has {len(entry[name])} digits, {length} expected"  # type: ignore[literal-required]
            yield shard.finding("index-mismatch", found)
    rows = [*entry["val"], *entry["test"], *(int(row) for row in entry["left_out"])]
    wrong = sorted({row for row, count in Counter(rows).items() if count > 1 or not 0 <= row < num_rows})
    if wrong:
        named = [entry["id"][row] for row in wrong if 0 <= row < num_rows]
        yield shard.finding("index-mismatch", f"rows {wrong[:5]} are in two lists, or do not exist", named)


# ------------------------------------------------------------------------------------------------ shards


def _check_shard(shard: _Shard, deep: bool) -> list[Finding]:
    """Everything about one shard."""
    entry = list(_check_entry(shard))
    if not shard.path.is_file():
        return [*entry, shard.finding("missing-shard", f"{shard.path.name} is not there")]
    size = shard.path.stat().st_size
    if size != shard.entry["size_bytes"]:
        found = f"{shard.path.name} has {size} bytes, {shard.entry['size_bytes']} expected"
        return [*entry, shard.finding("wrong-size", found, ()), *_look_apart(shard)]
    try:
        digest = _sha256(shard.path)
    except OSError as error:
        return [*entry, shard.finding("unreadable-shard", f"{shard.path.name} cannot be read: {error.strerror}")]
    if digest != shard.entry["sha256"]:
        found = f"SHA-256 of {shard.path.name} differs from the index"
        return [*entry, shard.finding("wrong-checksum", found, ()), *_look_apart(shard)]
    return [*entry, *_look_inside(shard, deep)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _look_apart(shard: _Shard) -> list[Finding]:
    """`_look_inside` a damaged shard, in a process that may crash or hang over it; says so if no voxel is hit."""
    try:
        with process_pool(1, preload=__name__) as executor:
            findings = executor.submit(_list_inside, shard).result()
    except BrokenProcessPool:
        return [shard.finding("unreadable-shard", f"HDF5 crashes or never ends on {shard.path.name}")]
    if findings:
        return findings
    found = (
        f"the voxels of all {len(shard.rows)} subjects are as packed: the damage is in columns, metadata or the index"
    )
    return [shard.finding("wrong-content", found)]


def _list_inside(shard: _Shard) -> list[Finding]:
    signal.setitimer(signal.ITIMER_PROF, LOOK_S + shard.entry["size_bytes"] / SLOW_BYTES_S)  # damage may be endless
    return list(_look_inside(shard, deep=True))


def _look_inside(shard: _Shard, deep: bool) -> Findings:
    """Columns against the index and, if deep, every voxel."""
    try:
        with open_reader(shard.path) as file:
            yield from _check_columns(shard, file)
            if deep:
                yield from _check_rows(shard, file)
    except Exception as error:  # damaged metadata makes HDF5 and h5py raise anything
        reason = (str(error).splitlines() or [""])[0].removeprefix(f"{shard.path}: ")
        yield shard.finding("unreadable-shard", f"{shard.path.name}: {reason or type(error).__name__}")


def _check_columns(shard: _Shard, file: h5py.File) -> Findings:
    entry, num_rows = shard.entry, len(shard.entry["id"])
    if (file.attrs["digest"], file.attrs["config_digest"]) != (entry["digest"], shard.settings):
        yield shard.finding("index-mismatch", f"{shard.path.name} is of other settings or files than the index says")
    if file["id"].shape != (num_rows,):
        yield shard.finding("index-mismatch", f"{file['id'].shape[0]} rows in the shard, {num_rows} in the index")
        return
    ids, done = file["id"].asstr()[:].tolist(), file["done"][:]
    wrong = [row for row, subject in shard.rows.items() if ids[row] != subject or not done[row]]
    if wrong:
        found = f"rows {wrong[:5]} hold {[ids[row] for row in wrong[:5]]}, another subject or nothing"
        yield shard.finding("index-mismatch", found, [entry["id"][row] for row in wrong])
    for name in ("image", "mask"):
        stored = [to_hex(row) for row in file[f"crc32_{name}"][:].reshape(num_rows, -1)]
        wrong = [row for row in shard.rows if stored[row] != shard.crc32(name, row)]
        if wrong:
            found = f"checksums of the {name} in the shard differ from those in the index"
            yield shard.finding("index-mismatch", found, [entry["id"][row] for row in wrong])


def _check_rows(shard: _Shard, file: h5py.File) -> Findings:
    """Decode every row."""
    data, num_rows = shard.data, len(shard.entry["id"])
    wanted = {
        "image": ((num_rows, data.num_modalities, *data.spatial_shape), data.storage_dtype),
        "mask": ((num_rows, *data.spatial_shape), "uint8"),
    }
    for name, (shape, dtype) in wanted.items():
        if (file[name].shape, file[name].dtype) != (shape, np.dtype(dtype)):
            found = f"{name} is {file[name].dtype} {file[name].shape}, {dtype} {shape} expected"
            yield shard.finding("unreadable-shard", found)
            return
    for row, subject in shard.rows.items():
        image, mask = _decode(file, "image", row), _decode(file, "mask", row)
        for name, volume in (("image", image), ("mask", mask)):
            if volume is None:
                yield shard.finding("damaged-voxels", f"the {name} of {subject} cannot be decoded", (subject,))
            elif to_hex(crcs(volume if name == "image" else volume[None])) != shard.crc32(name, row):
                yield shard.finding("damaged-voxels", f"the {name} of {subject} differs from its checksum", (subject,))
        if image is not None and mask is not None:
            yield from _check_content(shard, file, row, image, mask)


def _decode(file: h5py.File, name: str, row: int) -> NDArray[Any] | None:
    try:
        return np.asarray(file[name][row])
    except (OSError, ValueError, RuntimeError):
        return None


def _check_content(shard: _Shard, file: h5py.File, row: int, image: NDArray[Any], mask: NDArray[Any]) -> Findings:
    """Voxels that do not fit to the scale, the label scheme and the row's own columns."""
    subject, labels = shard.entry["id"][row], shard.data.labels
    limit = INT16_SCALE if image.dtype == np.int16 else 1.0
    if not (np.abs(image.astype(np.float32)) <= limit).all():
        yield shard.finding("wrong-content", f"the image of {subject} has values outside [-1, 1]", (subject,))
    unexpected = sorted(set(np.unique(mask).tolist()) - {0, *labels.names})
    if unexpected:
        yield shard.finding("wrong-content", f"the mask of {subject} has labels {unexpected[:5]}", (subject,))
    elif count_labels(mask, labels).tolist() != file["label_voxels"][row].tolist():
        yield shard.finding("wrong-content", f"label_voxels of {subject} is not what its mask holds", (subject,))
    for column in ("affine", "original_affine", "intensity"):
        if not np.isfinite(file[column][row]).all():
            yield shard.finding("wrong-content", f"{column} of {subject} is not finite", (subject,))
