"""Find masks by themselves, wherever `pack` finds subjects: masks and never an image, with the images beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpc_ddpm.data.discover import find_layout, table_advice
from hpc_ddpm.data.formats import is_volume
from hpc_ddpm.data.layouts import FLAT, LAYOUTS
from hpc_ddpm.data.layouts.base import (
    ALIASES,
    IMAGE_FOLDERS,
    MASK,
    MASK_ENDINGS,
    MASK_FOLDERS,
    MORE_IMAGE_FOLDERS,
    MORE_MASK_FOLDERS,
    Files,
    Roles,
    fault,
    folders,
    printable,
    subject_id,
    volumes,
)
from hpc_ddpm.data.layouts.flat import pick_masks
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import reading_from

NO_ROLES = Roles(())


@dataclass(frozen=True, order=True)
class FoundMask:
    """A mask, and the images of the same subject as far as they are there."""

    id: str
    file: Path
    images: tuple[Path, ...] = field(default=(), compare=False)
    """One for each modality that was looked for, in order; none where one is missing or not clear."""


def find_masks(path: str | Path) -> list[tuple[str, Path]]:
    """(subject, mask) of `find_mask_subjects`."""
    return [(mask.id, mask.file) for mask in find_mask_subjects(path)]


def find_mask_subjects(path: str | Path, roles: Roles = NO_ROLES) -> list[FoundMask]:
    """The masks of one volume, a folder of masks, or any layout, sorted by subject.

    Raises:
        DataFormatError: no mask there, a folder of images, a name that will not do, or one id twice.
    """
    path = Path(path)
    with reading_from(path):
        masks = list(_masks(path, roles))
    for mask in masks:
        if reason := fault(mask.id, mask.file):
            raise DataFormatError(f"{printable(mask.file)}: {reason}")
    twice = [subject for subject, count in Counter(mask.id for mask in masks).items() if count > 1]
    if twice:
        raise DataFormatError(f"{path}: more than one mask for {', '.join(sorted(twice)[:5])}; keep one of each")
    if not masks:
        raise DataFormatError(
            f"{path}: no masks found; expected label volumes, such as .nii.gz, or a table: {table_advice(path)}"
        )
    return sorted(masks)


def _masks(path: Path, roles: Roles) -> Iterator[FoundMask]:
    if path.exists() and is_volume(path):
        yield FoundMask(subject_id(path, MASK_ENDINGS), path)
    elif path.is_dir() and (files := volumes(path)):
        _refuse_images(path)
        yield from _of_folder(path, files, roles)
    else:
        found = _read(path, roles)
        for subject in found.subjects:
            images = _images(found, subject, roles)
            yield from (FoundMask(subject, file, images) for file in found.best(subject, MASK))


def _read(path: Path, roles: Roles) -> Files:
    """With the images, if the source has those that are looked for."""
    layout = LAYOUTS[find_layout(path)]
    try:
        return layout.read(path, roles)
    except DataFormatError:
        return layout.read(path, Roles((), {role: words for role, words in roles.names.items() if role == MASK}))


def _of_folder(path: Path, files: list[Path], roles: Roles) -> Iterator[FoundMask]:
    picked, beside = pick_masks(files, roles), FLAT.read(path, roles)
    if not picked and path.name.lower() in (*MASK_FOLDERS, *MORE_MASK_FOLDERS):
        picked = [("", file) for file in files]
    if len(picked) == len(files):
        picked = [(subject_id(file, MASK_ENDINGS), file) for _, file in picked]
    for subject, file in picked:
        yield FoundMask(subject, file, _images(beside, subject, roles))


def _images(found: Files, subject: str, roles: Roles) -> tuple[Path, ...]:
    images = [found.best(subject, modality) for modality in roles.modalities]
    return tuple(paths[0] for paths in images) if all(len(paths) == 1 for paths in images) else ()


def _refuse_images(path: Path) -> None:
    """Raises DataFormatError for the folder of a modality in a tree."""
    images = {*IMAGE_FOLDERS, *MORE_IMAGE_FOLDERS, *ALIASES, *(name for names in ALIASES.values() for name in names)}
    masks = [one.name for one in folders(path.absolute().parent) if one.name.lower() in MASK_FOLDERS]
    if path.name.lower() in images and masks:
        raise DataFormatError(f"{path}: a folder of images found, masks expected; give {path.parent / masks[0]}")
