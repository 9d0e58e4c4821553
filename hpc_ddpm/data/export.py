"""A packed dataset back to NIfTI: a tree that can be packed again. C D H W."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from hpc_ddpm.data.covariates import write_participants
from hpc_ddpm.data.discover import MASK
from hpc_ddpm.data.geometry import restore
from hpc_ddpm.data.intensity import background
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.nnunet_export import consecutive, describe, files_of
from hpc_ddpm.data.parallel import ordered_map
from hpc_ddpm.data.plan import digest_of
from hpc_ddpm.data.shards import (
    INT16_SCALE,
    Packed,
    PackedSubject,
    config_digest,
    open_packed,
    read_column,
    read_index,
)
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import FileName, is_file_name, write_json, writing_to
from hpc_ddpm.sealed import read_json

NOTE = "export.json"


@with_config(ConfigDict(extra="allow"))
class Note(TypedDict):
    """What `export.json` says: the way of the export, and of each subject what it was made of."""

    subjects: dict[FileName, str]


Progress = Callable[[int, int], None]
INTENSITIES = ("unit", "original")


def export(
    path: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    original_grid: bool = False,
    intensities: str = "unit",
    layout: str = "tree",
    num_workers: int = 1,
    progress: Progress | None = None,
) -> int:
    """Write `mask/<id>.nii.gz` (uint8) and `<modality>/<id>.nii.gz` (float32), or nnU-Net's; what is there is kept.

    The covariates of all subjects, where there are any, become `participants.tsv`.

    Args:
        path: of the packed dataset.
        out: created where missing; `export.json` in it says how it was made, and of what.
        split: only these subjects.
        original_grid: put volumes back on the grid of the subject's file; outside what was packed is background.
        intensities: [-1, 1] as packed, or the file's own by the range stored with the subject. What was clipped
            when it was packed stays clipped.
        layout: `tree`, or `nnunet`: its raw data, see `nnunet_export`.
        num_workers: processes.
        progress: called with (finished subjects, all subjects).

    Returns:
        Subjects in `out`.

    Raises:
        DataFormatError: not a packed dataset, or damaged.
        ConfigError: `out` holds another export, or subjects that were packed anew since; or the original intensities
            are not known.
    """
    if intensities not in INTENSITIES:
        raise ConfigError(f"intensities {intensities!r} found, expected one of {', '.join(INTENSITIES)}")
    packed, out = open_packed(path), Path(out)
    if intensities == "original" and packed.data.normalization == "med_ddpm_whole_head":
        raise ConfigError(
            f"{path}: data.normalization=med_ddpm_whole_head scaled every slice by itself, which cannot be undone; "
            "export with --intensities unit"
        )
    if unfit := [modality for modality in packed.data.modalities if not is_file_name(modality)]:
        raise ConfigError(f"{path}: modality {unfit[0]!r} cannot name a folder; pack again under another name")
    subjects = packed.subjects(split)
    with writing_to(out):
        keys, wanted = _keys(packed), {subject.id for subject in subjects}
        way = {"original_grid": original_grid, "intensities": intensities}
        _claim(out, way | ({} if layout == "tree" else {"layout": layout}), keys, wanted)
        if covariates := packed.data.covariates:
            ids = [subject.id for subject in packed.subjects()]
            numbers = packed.covariates(covariates).tolist()
            write_participants(out, dict(zip(ids, numbers, strict=True)), covariates)
        write = partial(_export_subject, packed, out, original_grid, intensities, layout)
        for number, _ in enumerate(ordered_map(write, subjects, num_workers, preload=__name__), start=1):
            if progress:
                progress(number, len(subjects))
        if layout == "nnunet":
            describe(out, packed.data, subjects)
    return len(subjects)


def _keys(packed: Packed) -> dict[str, str]:
    """Hash of each subject: of the settings, its files when it was packed, and its voxels."""
    index, settings = read_index(packed.path), config_digest(packed.data)
    sources = [source.decode() for source in read_column(packed.path, index, "source").tolist()]
    return {
        subject: digest_of([settings, source, index.crc32("image", i), index.crc32("mask", i)])
        for i, (subject, source) in enumerate(zip(index.id, sources, strict=True))
    }


def _claim(out: Path, way: dict[str, Any], keys: Mapping[str, str], wanted: set[str]) -> None:
    """Say in `export.json` what the folder holds, or will; refuse if it says otherwise."""
    shown = ", ".join(f"{name}={value}" for name, value in way.items())
    there, exported = way, {}
    if (out / NOTE).exists():
        there = dict(read_json(out / NOTE, Note, "choose another --out or empty it", ConfigError))
        exported = there.pop("subjects")
    elif out.is_dir() and any(out.iterdir()):
        raise _refusal(out, f"holds other files, asked for an export with {shown}")
    if there != way:
        raise _refusal(out, f"holds another export, asked for one with {shown}")
    if changed := [subject for subject, key in exported.items() if keys.get(subject) != key]:
        some = ", ".join(changed[:5])
        raise _refusal(out, f"holds {len(changed)} subjects that are not there any more or were packed anew ({some})")
    write_json(out / NOTE, {**way, "subjects": {subject: keys[subject] for subject in sorted(wanted | set(exported))}})


def _refusal(out: Path, found: str) -> ConfigError:
    return ConfigError(f"{out}: {found}; choose another --out or empty it")


def _export_subject(
    packed: Packed, out: Path, original_grid: bool, intensities: str, layout: str, subject: PackedSubject
) -> None:
    roles, is_tree = (*packed.data.modalities, MASK), layout == "tree"
    files = {role: out / role / f"{subject.id}.nii.gz" for role in roles} if is_tree else files_of(out, roles, subject)
    if all(file.exists() for file in files.values()):
        return
    image, mask = packed.read(subject.index)
    geometry = packed.geometry(subject.index)
    affine = geometry.file_affine if original_grid else packed.affine(subject.index)
    unit = image / np.float32(INT16_SCALE) if image.dtype == np.int16 else image
    ranges = packed.intensity(subject.index)
    for modality, volume, (low, high) in zip(packed.data.modalities, unit, ranges, strict=True):
        volume = restore(volume, geometry, background(volume, packed.data)) if original_grid else volume
        write_nifti(files[modality], _scaled(volume, low, high) if intensities == "original" else volume, affine)
    mask = mask if is_tree else consecutive(mask, packed.data.labels)
    write_nifti(files[MASK], restore(mask, geometry) if original_grid else mask, affine)


def _scaled(volume: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """[-1, 1] to [low, high]."""
    return ((volume + 1) / 2 * np.float32(high - low) + np.float32(low)).astype(np.float32)
