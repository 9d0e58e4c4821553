"""Masks to condition on: where they are, and each as the network sees it, with what had to change for that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import Config, DataConfig
from hpc_ddpm.data.covariates import (
    NO_COVARIATES,
    Covariates,
    find_row,
    find_table,
    known_values,
    to_numbers,
    to_values,
)
from hpc_ddpm.data.discover import Subject, find_layout, roles_of
from hpc_ddpm.data.find_masks import NO_ROLES, FoundMask, find_mask_subjects
from hpc_ddpm.data.geometry import Geometry
from hpc_ddpm.data.labels import count_labels, covers_foreground
from hpc_ddpm.data.nifti import axis_codes, voxel_size_mm
from hpc_ddpm.data.preprocess import prepare_mask
from hpc_ddpm.data.settle import settle
from hpc_ddpm.data.shards import Packed, open_packed
from hpc_ddpm.data.table import read_columns
from hpc_ddpm.errors import ConfigError, DataFormatError

PACKED = "packed"


@dataclass(frozen=True)
class MaskSource:
    """Where a mask is."""

    id: str
    path: str
    """Path of the mask's file, or of the packed dataset in which `id` is the subject."""
    layout: str
    """`packed`, or how the file is coded: see `DataConfig.layout`."""
    covariates: Mapping[str, float | str] = field(default_factory=dict)
    """Those that are known of the subject."""
    coding: str = "auto"
    """What its values mean, see `data.labels.coding`; auto is what the layout implies."""
    root: str = ""
    """Folder that was given for it."""
    images: tuple[str, ...] = ()
    """Files of the model's modalities beside the mask, in order; none where one is missing or no label needs them."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask as the network sees it."""

    labels: NDArray[np.uint8]
    """(D, H, W), values of the label scheme."""
    geometry: Geometry
    file: Path | None
    """The NIfTI file it came from; None for a packed subject."""
    changes: tuple[str, ...]
    """What was done to make it fit."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the labels in C order, as hexadecimal digits."""
        return hashlib.sha256(np.ascontiguousarray(self.labels).data).hexdigest()


def find_mask_files(
    path: Path, covariates: Covariates = NO_COVARIATES, data: DataConfig | None = None
) -> list[MaskSource]:
    """Mask files of a folder, any layout, table or single file, with those of the covariates that a table there holds.

    Args:
        path: a source as `pack` takes it, a folder of masks, or a mask.
        covariates: of the model.
        data: of the model: its modalities are looked for beside the masks, by its `names`.

    Raises:
        DataFormatError: nothing found, or a covariate's cell is wrong.
    """
    try:
        layout = find_layout(path)
    except DataFormatError:  # a file or a plain folder of masks
        layout = "tree"
    table = find_table(path) if covariates else None
    rows = read_columns(table, covariates) if table else {}

    def of(mask: FoundMask) -> MaskSource:
        known = known_values(find_row(rows, mask.id) or {}, covariates, f"{table}, {mask.id}")
        images = tuple(str(image.absolute()) for image in mask.images if data and covers_foreground(data.labels))
        return MaskSource(mask.id, str(mask.file.resolve()), layout, known, images=images)

    root = str((path if path.is_dir() else path.parent).resolve())
    return [replace(of(mask), root=root) for mask in find_mask_subjects(path, roles_of(data) if data else NO_ROLES)]


def find_packed_masks(
    path: str, split: str | None = None, subjects: Sequence[str] = (), covariates: Covariates = NO_COVARIATES
) -> list[MaskSource]:
    """Masks of a packed dataset: of one split, or of the subjects named; with those of the covariates packed there.

    Raises:
        ConfigError: no packed dataset is named, or a covariate was packed with other values.
        DataFormatError: nobody is in the split, or a subject is not in the dataset.
    """
    if not path:
        raise ConfigError("no masks: give --masks PATH, or data.path=PACKED to take them from a packed dataset")
    packed = open_packed(path)
    everyone = packed.subjects()
    chosen = {subject.id: subject.index for subject in everyone if split in (None, subject.split)}
    if not chosen:
        there = ", ".join(sorted({subject.split for subject in everyone}))
        raise DataFormatError(f"{path}: no subject in split '{split}', found {there}; choose one with --split")
    unknown = sorted(set(subjects) - set(chosen))
    if unknown:
        raise DataFormatError(
            f"{path}: no subject {', '.join(unknown[:5])} among its {len(chosen)}; `hpc-ddpm data ls {path}` lists them"
        )
    shared = {name: covariate for name, covariate in covariates.items() if name in packed.data.covariates}
    numbers, where = packed.covariates(shared).tolist(), str(Path(path).resolve())
    return [
        MaskSource(subject, where, PACKED, to_values(numbers[chosen[subject]], shared), root=str(Path(where).parent))
        for subject in subjects or chosen
    ]


def with_coding(masks: Sequence[MaskSource], data: DataConfig) -> tuple[list[MaskSource], str]:
    """The masks of one source with their coding, and what was decided, in one line; packed ones have none.

    Raises:
        DataFormatError: as `settle`.
    """
    if not masks or masks[0].layout == PACKED:
        return list(masks), ""
    subjects = [
        Subject(mask.id, Path(mask.path), dict(zip(data.modalities, map(Path, mask.images), strict=False)))
        for mask in masks
    ]
    settled = settle(subjects, data.model_copy(update={"layout": masks[0].layout}))
    return [replace(mask, coding=settled.config.labels.coding) for mask in masks], settled.note


def with_covariates(masks: Sequence[MaskSource], given: Sequence[str], covariates: Covariates) -> list[MaskSource]:
    """The masks with `NAME=VALUE` instead of what is known of their subjects; n/a is unknown.

    Raises:
        ConfigError: not of this form.
        DataFormatError: a name or a value that the model has not.
    """
    pairs = [text.partition("=") for text in given]
    if not all(name and separator for name, separator, _ in pairs):
        raise ConfigError(f"--covariate {' '.join(given)}: expected NAME=VALUE, such as age=63")
    values = {name: value for name, _, value in pairs}
    to_numbers(values, covariates, "--covariate")
    return [
        replace(mask, covariates=known_values({**mask.covariates, **values}, covariates, "--covariate"))
        for mask in masks
    ]


def load_mask(source: MaskSource, config: Config) -> Mask:
    """The mask, on the model's grid.

    Raises:
        DataFormatError: missing, damaged, of other labels, or it does not fit and `sampling.mask_fit` says refuse.
    """
    if source.layout == PACKED:
        return _load_packed(source, config)
    labels = config.data.labels.model_copy(update={"coding": source.coding})
    path, data = Path(source.path), config.data.model_copy(update={"layout": source.layout, "labels": labels})
    may_change = config.sampling.mask_fit == "resample"
    if data.fit == "exact" and may_change:
        data = data.model_copy(update={"fit": "crop_pad"})
    mask, _, geometry = prepare_mask(path, data, [Path(image) for image in source.images])
    changes = _changes(mask, geometry, data)
    if changes and not may_change:
        raise DataFormatError(
            f"{path}: does not fit the model ({'; '.join(changes)}); mend it, or set sampling.mask_fit=resample"
        )
    return Mask(mask, geometry, path, changes)


def _changes(labels: NDArray[np.uint8], geometry: Geometry, data: DataConfig) -> tuple[str, ...]:
    """What differs between the file and what the network sees, for people."""
    found, wanted = axis_codes(geometry.file_affine), axis_codes(geometry.affine)
    (shape, affine), changes = geometry.oriented, []
    if found != wanted:
        changes.append(f"turned from {found} to {wanted}")
    if voxel_size_mm(affine) != voxel_size_mm(geometry.affine):
        changes.append(f"voxels of {_sides(voxel_size_mm(affine))} mm to {_sides(voxel_size_mm(geometry.affine))} mm")
    if shape != geometry.size:
        changes.append(f"size {_sides(shape)} to {_sides(geometry.size)} by {geometry.fit}")
    voxels = count_labels(labels, data.labels).tolist()
    absent = [name for name, count in zip(data.labels.names.values(), voxels, strict=True) if not count]
    if absent:
        changes.append(f"no {', '.join(absent)} in it")
    return tuple(changes)


def _load_packed(source: MaskSource, config: Config) -> Mask:
    packed, index = _open(source.path)
    given, wanted = packed.data, config.data
    for name in ("size", "orientation"):
        if getattr(given, name) != getattr(wanted, name):
            raise DataFormatError(
                f"{source.path}: packed with data.{name}={getattr(given, name)}, the model has "
                f"{getattr(wanted, name)}; pack the masks for this model, or give their files with --masks"
            )
    if given.labels.names != wanted.labels.names:
        raise DataFormatError(
            f"{source.path}: packed with labels {dict(given.labels.names)}, the model has "
            f"{dict(wanted.labels.names)}; pack the masks for this model"
        )
    if source.id not in index:
        raise DataFormatError(f"{source.path}: no subject {source.id}; it was there when this was planned")
    number = index[source.id]
    return Mask(packed.read_mask(number), packed.geometry(number), None, ())


@lru_cache(maxsize=4)
def _open(path: str) -> tuple[Packed, dict[str, int]]:
    packed = open_packed(path)
    return packed, {subject.id: subject.index for subject in packed.subjects()}


def _sides(values: Sequence[float]) -> str:
    return "x".join(f"{value:g}" for value in values)
