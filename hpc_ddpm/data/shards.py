"""The schema of a packed dataset, and reading it back with every voxel checked.

A packed dataset is a folder: index.json (written last) and shard-NNNNN.h5. In a shard, N rows, C modalities,
K labels; volumes are C Z Y X, shapes and affines X Y Z:

    image           int16 (x32767) or float32 (N, C, Z, Y, X), LZ4 or nothing + fletcher32
    mask            uint8 (N, Z, Y, X), Zstandard or nothing + fletcher32; a chunk is a volume, or data.chunk_size of it
    id, source      UTF-8 (N,), fixed length: subject; hash of its files' sizes and times, and covariates, when packed
    affine          float64 (N, 4, 4), packed voxels to mm;     original_affine: of the file
    original_shape  int32 (N, 3), of the file
    intensity       float32 (N, C, 2): intensities that became -1 and 1
    label_voxels    int64 (N, K), in the order of the label scheme
    crc32_image     uint32 (N, C), crc32_mask (N,): of the decoded bytes
    covariates      float64 (N, V), only where there are any: number, position among `values`, or NaN
    done            uint8 (N,): 1 where the row is complete; the others were left out

index.json has one entry per shard, see `ShardEntry`; more shards may be added later.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NotRequired

import h5py
import hdf5plugin  # noqa: F401  (registers the filters)
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, ValidationError, with_config
from typing_extensions import TypedDict

from hpc_ddpm.config import READING_SETTINGS, CovariateConfig, DataConfig
from hpc_ddpm.data.chunks import UNDECODABLE, VOLUMES, OpenShard, crc32
from hpc_ddpm.data.geometry import Geometry
from hpc_ddpm.data.nifti import Affine
from hpc_ddpm.data.patients import patient_by_name
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import first_unfit, reading_from, write_json
from hpc_ddpm.sealed import Count, parse, say_old

FORMAT, VERSION = "hpc_ddpm packed dataset", 2
INDEX = "index.json"
INT16_SCALE = 32767
MAX_OPEN_SHARDS = 32
COPY_OR_PACK = "copy it again, to another name that then replaces it (mv), or delete it and pack again"
"""What to do about a damaged shard; one that is overwritten in place kills who reads it, see `chunks`."""
SPLITS = ("train", "val", "test")

Array = NDArray[Any]
Window = tuple[slice, slice, slice]
"""Slices along D, H and W, each with start and stop."""


def shard_name(number: int) -> str:
    """shard-00000.h5, shard-00001.h5, ..."""
    return f"shard-{number:05d}.h5"


def config_digest(config: DataConfig) -> str:
    """Hash of the settings that decide what is packed, as far as they are not defaults (12 hexadecimal digits).

    So a new setting changes no digest where it is not used.
    """
    content = config.model_dump(mode="json", exclude={*READING_SETTINGS}, exclude_defaults=True)
    return sha256(json.dumps(content).encode()).hexdigest()[:12]


def crcs(image: Array) -> list[int]:
    """CRC-32 of each channel of (C, D, H, W)."""
    return [crc32(channel) for channel in image]


def to_hex(checksums: Array | list[int]) -> str:
    """CRC-32s as in the index: 8 hexadecimal digits each, one after another."""
    return np.asarray(checksums, ">u4").tobytes().hex()


def open_reader(path: Path) -> h5py.File:
    """A shard for reading, without the file locks that network file systems refuse.

    Raises:
        DataFormatError: missing, damaged, or of another format version.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise DataFormatError(f"{path}: this shard is missing; copy it again or pack again") from None
    except PermissionError:
        raise DataFormatError(f"{path}: cannot be read (Permission denied); mend its permissions") from None
    except OSError as error:
        raise DataFormatError(f"{path}: damaged shard ({error}); {COPY_OR_PACK}") from None
    try:
        found = file.attrs.get("format"), file.attrs.get("version")
    except UNDECODABLE as error:
        file.close()
        raise DataFormatError(f"{path}: damaged shard ({error}); {COPY_OR_PACK}") from None
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


@with_config(ConfigDict(extra="allow"))
class ShardEntry(TypedDict):
    """One shard in index.json. Row numbers count from 0; those in none of val, test and left_out are train."""

    file: str
    size_bytes: Count
    sha256: str
    digest: str
    """Hash of the settings, the subjects, and the sizes and times of their files."""
    id: list[str]
    """Subject ids, one per row."""
    val: list[Count]
    test: list[Count]
    left_out: dict[str, str]
    """Row number to why it is empty."""
    crc32_image: str
    """`to_hex` of the shard's column, row by row."""
    crc32_mask: str
    patients: NotRequired[dict[str, str]]
    """Row number to the first subject of its patient; only where names do not tell the patient, see `patients.py`."""


def with_patients(entry: ShardEntry, patients: Mapping[str, str]) -> ShardEntry:
    """The entry with these patients (subject -> first subject of its patient) instead of its own."""
    rows = {str(row): patients[subject] for row, subject in enumerate(entry["id"]) if subject in patients}
    bare = entry.copy()
    bare.pop("patients", None)
    return {**bare, "patients": rows} if rows else bare


class Kind(TypedDict):
    """The fields that identify a version of index.json."""

    format: str
    version: int


class Stored(Kind):
    """The content of index.json."""

    data: dict[str, Any]
    shards: list[ShardEntry]


@dataclass(frozen=True)
class Index:
    """The content of index.json: the shards, and all subjects in the order of their ids."""

    data: dict[str, Any]
    """Settings, as they are in the file."""
    config: DataConfig
    shards: list[ShardEntry]
    id: list[str]
    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    split: NDArray[np.uint8]
    """Index into SPLITS."""

    def crc32(self, name: str, index: int) -> str:
        """`to_hex` of crc32_image or crc32_mask of a subject."""
        entry = self.shards[self.shard[index]]
        text = entry["crc32_image"] if name == "image" else entry["crc32_mask"]
        width, row = len(text) // len(entry["id"]), self.row[index]
        return text[row * width : (row + 1) * width]

    @property
    def patients(self) -> dict[str, str]:
        """Patient of each packed subject.

        Raises:
            DataFormatError: a pattern of data.group does not match.
        """
        try:
            rows = (
                (entry["id"], row, first) for entry in self.shards for row, first in entry.get("patients", {}).items()
            )
            told = {ids[int(row)]: str(first) for ids, row, first in rows}
        except (AttributeError, ValueError, LookupError, TypeError) as error:
            raise DataFormatError(f"{INDEX}: not readable: patients ({error}); copy it again or pack again") from None
        group = self.config.group
        return {subject: told.get(subject) or patient_by_name(subject, group) for subject in self.id}

    @property
    def left_out(self) -> dict[str, str]:
        """Subjects that are in no shard, and why."""
        packed = set(self.id)
        entries = ((entry["id"][int(row)], why) for entry in self.shards for row, why in entry["left_out"].items())
        return {subject: why for subject, why in entries if subject not in packed}


def build_index(data: dict[str, Any], shards: list[ShardEntry]) -> Index:
    """The index of these shards.

    Args:
        data: settings of the dataset.
        shards: in the order of their numbers.

    Raises:
        ValueError: settings that are none, a subject, file or hash that cannot name a file, or rows that contradict.
    """
    config = _validated(data)
    for entry in shards:
        _check_rows(entry)
    ids = list(chain.from_iterable(entry["id"] for entry in shards))
    unfit = first_unfit([*ids, *chain.from_iterable((entry["file"], entry["sha256"]) for entry in shards)])
    if unfit is not None:
        raise ValueError(f"{unfit!r} found, a name without slashes or leading dot expected")
    lengths = [len(entry["id"]) for entry in shards]
    shard = np.repeat(np.arange(len(shards)), lengths)
    begin = np.cumsum([0, *lengths])
    row = np.arange(len(ids)) - begin[shard]
    split = np.zeros(len(ids), np.uint8)
    empty = []
    for entry, offset in zip(shards, begin.tolist(), strict=False):
        for code, rows in enumerate((entry["val"], entry["test"]), 1):
            split[[offset + number for number in rows]] = code
        empty += [offset + int(number) for number in entry["left_out"]]
    if empty or ids != sorted(ids):
        order = sorted(set(range(len(ids))).difference(empty), key=ids.__getitem__)
        ids, shard, row, split = [ids[i] for i in order], shard[order], row[order], split[order]
    return Index(data, config, shards, ids, shard, row, split)


def _check_rows(entry: ShardEntry) -> None:
    count = len(entry["id"])
    numbers = [*entry["val"], *entry["test"], *map(int, entry["left_out"])]
    if numbers and not 0 <= min(numbers) <= max(numbers) < count:
        raise ValueError(f"{entry['file']}: rows {min(numbers)} to {max(numbers)} found, {count} there are")


def _validated(data: dict[str, Any]) -> DataConfig:
    try:
        return DataConfig.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(map(str, ("data", *problem["loc"])))
        raise ValueError(f"{name}: {problem['msg']}: packed by a newer version? then update this one") from None


class Packed:
    """A packed dataset, open for reading by any number of threads. Each process opens shards when it needs them."""

    def __init__(self, path: Path, index: Index, data: DataConfig) -> None:
        self.path = path
        self.data = data
        self._index = index
        self._forget_shards()

    def _forget_shards(self) -> None:
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._index.id)

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self.path, self._index, self.data)

    def subjects(self, split: str | None = None) -> list[PackedSubject]:
        """Subjects of a split, or all, sorted by id."""
        rows = enumerate(zip(self._index.id, self._index.split.tolist(), strict=True))
        wanted = {code for code, name in enumerate(SPLITS) if split in (None, name)}
        return [PackedSubject(i, name, SPLITS[code]) for i, (name, code) in rows if code in wanted]

    def digest(self, split: str) -> str:
        """SHA-256 of ids and checksums of a split: the same volumes in the same order, however they are stored."""
        parts = ((one.id, *(self._index.crc32(name, one.index) for name in VOLUMES)) for one in self.subjects(split))
        return sha256("\n".join(map(" ".join, parts)).encode()).hexdigest()

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
        return image, self.read_mask(index, mask)

    def read_mask(self, index: int, mask: Array | None = None) -> Array:
        """Mask (D, H, W) uint8, checked; `mask` as in `read`."""
        if mask is None:
            mask = np.empty(self.data.spatial_shape, np.uint8)
        self._fill("mask", index, mask)
        return mask

    def read_window(
        self, index: int, window: Window, image: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """As `read`, of a part: reads the chunks that it touches, and checks each by its own checksum.

        Where a chunk is the whole volume, that is read and checked by its CRC.
        """
        shape = [part.stop - part.start for part in window]
        if image is None:
            image = np.empty((self.data.num_modalities, *shape), self.data.storage_dtype)
        if mask is None:
            mask = np.empty(shape, np.uint8)
        if self.data.chunk_size is None:
            whole_image, whole_mask = self.read(index)
            np.copyto(image, whole_image[:, *window])
            np.copyto(mask, whole_mask[window])
            return image, mask
        row, shard = int(self._index.row[index]), self._shard(index)
        for name, out, part in (("image", image, np.s_[row, :, *window]), ("mask", mask, np.s_[row, *window])):
            try:
                shard.file[name].read_direct(out, part)
            except UNDECODABLE:
                raise self._damaged(index, f"the {name} cannot be decoded") from None
        return image, mask

    def affine(self, index: int) -> Affine:
        """(4, 4), X, Y, Z packed voxels to mm."""
        return self._value("affine", index)

    def intensity(self, index: int) -> Array:
        """(C, 2): the intensities that became -1 and 1."""
        return self._value("intensity", index)

    def label_voxels(self, index: int) -> Array:
        """(K,): voxels of each label, in the order of the label scheme."""
        return self._value("label_voxels", index)

    def check_covariates(self, wanted: Mapping[str, CovariateConfig]) -> None:
        """Raises ConfigError where one of these was not packed, or with other values."""
        there = self.data.covariates
        for name, covariate in wanted.items():
            if name not in there:
                raise ConfigError(
                    f"data.covariates asks for {name}, {self.path} was packed with {', '.join(there) or 'none'}; "
                    "leave it out, or pack again with it"
                )
            if there[name].values != covariate.values:
                found, asked = (list(one.values) or "a number" for one in (there[name], covariate))
                raise ConfigError(
                    f"data.covariates: {name} is {asked}, {self.path} was packed with {found}; use the same values"
                )

    def covariates(self, wanted: Mapping[str, CovariateConfig]) -> NDArray[np.float64]:
        """(N, V) of all subjects, in the order of `wanted`: numbers, positions among `values`, NaN where unknown.

        Raises:
            ConfigError: as `check_covariates`.
        """
        self.check_covariates(wanted)
        if not wanted:
            return np.empty((len(self), 0))
        packed, names = read_column(self.path, self._index, "covariates"), list(self.data.covariates)
        return np.asarray(packed[:, [names.index(name) for name in wanted]])

    def geometry(self, index: int) -> Geometry:
        """What `restore` needs to put a volume back on the subject's own grid.

        Raises:
            DataFormatError: the numbers in the shard are not those of any place.
        """
        try:
            with np.errstate(all="ignore"):
                return self._geometry(index)
        except (ValueError, ArithmeticError) as error:
            raise self._damaged(index, f"its place cannot be told ({error})") from None

    def _geometry(self, index: int) -> Geometry:
        x, y, z = (int(side) for side in self._value("original_shape", index))
        rows = tuple(tuple(float(value) for value in row) for row in self._value("original_affine", index))
        data = self.data
        geometry = Geometry((x, y, z), rows, data.orientation, data.fit, data.size, data.voxel_size_mm)
        return geometry.placed(self.affine(index))

    def _fill(self, name: str, index: int, out: Array) -> None:
        try:
            checksums = self._shard(index).read(name, int(self._index.row[index]), out)
        except UNDECODABLE:
            raise self._damaged(index, f"the {name} cannot be decoded") from None
        if to_hex(checksums) != self._index.crc32(name, index):
            raise self._damaged(index, f"the {name} differs from what was packed")

    def _value(self, name: str, index: int) -> Array:
        try:
            return np.asarray(self._shard(index).file[name][int(self._index.row[index])])
        except UNDECODABLE:
            raise self._damaged(index, f"{name} cannot be read") from None

    def _shard(self, index: int) -> OpenShard:
        """The open shard of a subject. A parent process keeps its own; the least recently used one is released."""
        if self._process != os.getpid():
            self._forget_shards()
        number = int(self._index.shard[index])
        with self._lock:
            if number not in self._shards:
                if len(self._shards) >= MAX_OPEN_SHARDS:
                    self._shards.popitem(last=False)  # it closes when the last thread has read what it is reading
                self._shards[number] = OpenShard(open_reader(self.path / self._index.shards[number]["file"]))
            self._shards.move_to_end(number)
            return self._shards[number]

    def _damaged(self, index: int, what: str) -> DataFormatError:
        shard = self._index.shards[self._index.shard[index]]["file"]
        return DataFormatError(
            f"{self.path / shard}: damaged at subject {self._index.id[index]}: {what}; {COPY_OR_PACK}"
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
        with reading_from(file):
            size = file.stat().st_size if file.is_file() else None
        if size is None:
            raise DataFormatError(f"{file}: this shard is missing; copy it again or pack again")
        if size != shard["size_bytes"]:
            raise DataFormatError(f"{file}: {size} bytes found, {shard['size_bytes']} expected; {COPY_OR_PACK}")
    return Packed(path, index, index.config.model_copy(update={"path": str(path)}))


def read_index(path: Path) -> Index:
    """The index of a packed dataset.

    Raises:
        DataFormatError: as `open_packed`, except for shards.
    """
    file = path / INDEX
    with reading_from(file):
        if not path.is_dir():
            raise DataFormatError(f"{path}: no such packed dataset; run `hpc-ddpm pack` or set data.path")
        if not file.is_file():
            raise DataFormatError(f"{path}: no {INDEX}, so packing has not finished here; run `hpc-ddpm pack` (again)")
        text = file.read_bytes()
    try:
        kind, is_sealed = parse(text, Kind)
        found = kind["format"], kind["version"]
        if found != (FORMAT, VERSION):
            raise DataFormatError(f"{file}: format {found[0]!r} version {found[1]} found, {_expected()}; pack again")
        content, _ = parse(text, Stored)
        index = build_index(content["data"], content["shards"])
    except ValueError as error:
        raise DataFormatError(f"{file}: not a readable index ({error}); pack again") from None
    if not is_sealed:
        say_old(path)
    return index


def read_column(path: Path, index: Index, name: str) -> Array:
    """A small dataset of all subjects, (N, ...), in the order of the index.

    Raises:
        DataFormatError: a shard is missing or damaged.
    """
    columns = [_read_column(path / entry["file"], name, len(entry["id"])) for entry in index.shards]
    lengths = np.cumsum([0, *(len(column) for column in columns)])
    return np.asarray(np.concatenate(columns)[lengths[index.shard] + index.row])


def _read_column(path: Path, name: str, num_rows: int) -> Array:
    with open_reader(path) as file:
        try:
            column = np.asarray(file[name][:])
        except UNDECODABLE as error:
            raise DataFormatError(f"{path}: damaged: {name} cannot be read ({error}); {COPY_OR_PACK}") from None
    if len(column) != num_rows:
        raise DataFormatError(f"{path}: {len(column)} rows of {name} found, {num_rows} expected; {COPY_OR_PACK}")
    return column


def write_index(path: Path, data: dict[str, Any], shards: list[ShardEntry], scratch: Path | None = None) -> None:
    """Publish a packed dataset: index.json in the folder `path`, at once; `scratch` as in `atomic_path`."""
    write_json(path / INDEX, {"format": FORMAT, "version": VERSION, "data": data, "shards": shards}, scratch=scratch)
