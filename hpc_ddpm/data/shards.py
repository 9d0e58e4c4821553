"""The schema of a packed dataset, and reading it back with every voxel checked.

A packed dataset is a folder: index.json (written last) and shard-NNNNN.h5. In a shard, N rows, C modalities,
K labels; volumes are C Z Y X, shapes and affines X Y Z:

    image           int16 (x32767) or float32 (N, C, Z, Y, X), one volume per chunk, LZ4 + fletcher32
    mask            uint8 (N, Z, Y, X), one volume per chunk, Zstandard + fletcher32
    id, source      UTF-8 (N,), fixed length: subject; hash of its files' sizes and times when packed
    affine          float64 (N, 4, 4), packed voxels to mm;     original_affine: of the file
    original_shape  int32 (N, 3), of the file
    intensity       float32 (N, C, 2): intensities that became -1 and 1
    label_voxels    int64 (N, K), in the order of the label scheme
    crc32_image     uint32 (N, C), crc32_mask (N,): of the decoded bytes
    done            uint8 (N,): 1 where the row is complete; others were left out and are not in the index
"""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (registers the filters)
import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.nifti import Affine
from hpc_ddpm.data.preprocess import Geometry
from hpc_ddpm.errors import DataFormatError

FORMAT, VERSION = "hpc_ddpm packed dataset", 1
INDEX = "index.json"
INT16_SCALE = 32767
MAX_OPEN_SHARDS = 32

Array = NDArray[Any]


def shard_name(number: int) -> str:
    """shard-00000.h5, shard-00001.h5, ..."""
    return f"shard-{number:05d}.h5"


def config_digest(config: DataConfig) -> str:
    """Hash of the settings that decide what is packed (first 12 hexadecimal digits of SHA-256)."""
    content = config.model_dump(mode="json", exclude={"path", "num_workers"})
    return sha256(json.dumps(content).encode()).hexdigest()[:12]


def crcs(image: Array) -> list[int]:
    """CRC-32 of each channel of (C, D, H, W)."""
    return [zlib.crc32(channel.data) for channel in image]


def open_reader(path: Path) -> h5py.File:
    """A shard for reading, without the file locks that network file systems refuse.

    Raises:
        DataFormatError: missing, damaged, or of another format version.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise DataFormatError(f"{path}: this shard is missing; copy it again or pack again") from None
    except OSError as error:
        raise DataFormatError(f"{path}: damaged shard ({error}); copy it again or pack again") from None
    found = file.attrs.get("format"), file.attrs.get("version")
    if found != (FORMAT, VERSION):
        file.close()
        raise DataFormatError(f"{path}: format {found[0]!r} version {found[1]} found, {_expected()}; pack again")
    return file


def _expected() -> str:
    return f"{FORMAT!r} version {VERSION} expected"


@dataclass(frozen=True, slots=True)
class PackedSubject:
    """One row of the index."""

    index: int
    """In the packed dataset: what `Packed.read` takes."""
    id: str
    split: str
    """train, val or test."""


@dataclass(frozen=True)
class Index:
    """The content of index.json; one entry per subject in each tuple, sorted by subject id."""

    data: dict[str, Any]
    digest: str
    shards: list[dict[str, Any]]
    """file, size_bytes, sha256."""
    id: list[str]
    shard: list[int]
    row: list[int]
    split: list[str]
    crc32_image: list[list[int]]
    crc32_mask: list[int]
    failures: list[str]
    """Why subjects were left out."""

    def to_json(self) -> dict[str, Any]:
        """As written to index.json."""
        return {"format": FORMAT, "version": VERSION, **vars(self)}


class Packed:
    """A packed dataset, open for reading. Shards are opened when needed, in each process for itself."""

    def __init__(self, path: Path, index: Index, data: DataConfig) -> None:
        self.path = path
        self.data = data
        self._index = index
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._index.id)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": OrderedDict()}

    def subjects(self, split: str | None = None) -> list[PackedSubject]:
        """Subjects of a split, or all, sorted by id."""
        rows = zip(self._index.id, self._index.split, strict=True)
        return [PackedSubject(i, name, part) for i, (name, part) in enumerate(rows) if split in (None, part)]

    def read(self, index: int, image: Array | None = None, mask: Array | None = None) -> tuple[Array, Array]:
        """Image (C, D, H, W) int16 or float32 as stored, and mask (D, H, W) uint8, checked against their CRC.

        Args:
            index: of the subject.
            image: C-contiguous buffer of this shape and dtype to fill; None allocates.
            mask: the same, for the mask.

        Raises:
            DataFormatError: damaged; names shard and subject.
        """
        if image is None:
            shape = (self.data.num_modalities, *self.data.spatial_shape)
            image = np.empty(shape, self.data.storage_dtype)
        self._fill("image", index, image)
        if crcs(image) != self._index.crc32_image[index]:
            raise self._damaged(index, "the image differs from what was packed")
        return image, self.read_mask(index, mask)

    def read_mask(self, index: int, mask: Array | None = None) -> Array:
        """Mask (D, H, W) uint8, checked; `mask` as in `read`."""
        if mask is None:
            mask = np.empty(self.data.spatial_shape, np.uint8)
        self._fill("mask", index, mask)
        if zlib.crc32(mask.data) != self._index.crc32_mask[index]:
            raise self._damaged(index, "the mask differs from what was packed")
        return mask

    def affine(self, index: int) -> Affine:
        """(4, 4), X, Y, Z packed voxels to mm."""
        return self._value("affine", index)

    def intensity(self, index: int) -> Array:
        """(C, 2): the intensities that became -1 and 1."""
        return self._value("intensity", index)

    def label_voxels(self, index: int) -> Array:
        """(K,): voxels of each label, in the order of the label scheme."""
        return self._value("label_voxels", index)

    def geometry(self, index: int) -> Geometry:
        """What `restore` needs to put a volume back on the subject's own grid."""
        x, y, z = (int(side) for side in self._value("original_shape", index))
        rows = tuple(tuple(float(value) for value in row) for row in self._value("original_affine", index))
        return Geometry((x, y, z), rows, self.data.orientation, self.data.fit, self.data.size)

    def _fill(self, name: str, index: int, out: Array) -> None:
        try:
            self._file(self._index.shard[index])[name].read_direct(out, np.s_[self._index.row[index]])
        except (OSError, KeyError):
            raise self._damaged(index, f"the {name} cannot be decoded") from None

    def _value(self, name: str, index: int) -> Array:
        try:
            return np.asarray(self._file(self._index.shard[index])[name][self._index.row[index]])
        except (OSError, KeyError):
            raise self._damaged(index, f"{name} cannot be read") from None

    def _file(self, shard: int) -> h5py.File:
        """The open shard; handles of a parent process are left to it, the least recently used is closed."""
        if self._process != os.getpid():
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = open_reader(self.path / self._index.shards[shard]["file"])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _damaged(self, index: int, what: str) -> DataFormatError:
        shard = self._index.shards[self._index.shard[index]]["file"]
        return DataFormatError(
            f"{self.path / shard}: damaged at subject {self._index.id[index]}: {what}; copy it again or pack again"
        )


def open_packed(path: str | Path) -> Packed:
    """Open a packed dataset; checks that every shard is there with its full size.

    Raises:
        DataFormatError: missing, not packed, of another version, or shards missing or cut off.
    """
    path = Path(path)
    index = read_index(path)
    for shard in index.shards:
        file = path / shard["file"]
        if not file.is_file():
            raise DataFormatError(f"{file}: this shard is missing; copy it again or pack again")
        if file.stat().st_size != shard["size_bytes"]:
            raise DataFormatError(
                f"{file}: {file.stat().st_size} bytes found, {shard['size_bytes']} expected; "
                "copy it again or pack again"
            )
    data = DataConfig.model_validate(index.data)
    return Packed(path, index, data.model_copy(update={"path": str(path)}))


def read_index(path: Path) -> Index:
    """The index of a packed dataset.

    Raises:
        DataFormatError: as `open_packed`, except for shards.
    """
    if not path.is_dir():
        raise DataFormatError(f"{path}: no such packed dataset; run `hpc-ddpm pack` or set data.path")
    file = path / INDEX
    if not file.is_file():
        raise DataFormatError(f"{path}: no {INDEX}, so packing has not finished here; run `hpc-ddpm pack` (again)")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content.pop("format", None), content.pop("version", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataFormatError(f"{file}: not a readable index ({error}); pack again") from None
    if found != (FORMAT, VERSION):
        raise DataFormatError(f"{file}: format {found[0]!r} version {found[1]} found, {_expected()}; pack again")
    return Index(**content)
