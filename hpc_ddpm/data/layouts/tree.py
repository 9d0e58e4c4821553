"""mask/ beside one folder per modality; a single one may be called image/. BCV, Kaggle's LiTS, Med-DDPM's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc_ddpm.data.formats import stem
from hpc_ddpm.data.layouts.base import (
    ALIASES,
    IMAGE_FOLDERS,
    MASK,
    MASK_FOLDERS,
    MORE_IMAGE_FOLDERS,
    MORE_MASK_FOLDERS,
    Files,
    Layout,
    Roles,
    beginning,
    folders,
    subject_id,
    volumes,
)
from hpc_ddpm.errors import DataFormatError


def _fits(source: Path) -> bool:
    names = {folder.name.lower(): folder for folder in folders(source)}
    if any(name in names for name in MASK_FOLDERS):
        return True
    rarely = [folder for name, folder in names.items() if name in MORE_MASK_FOLDERS]
    beside = [folder for name, folder in names.items() if name in (*IMAGE_FOLDERS, *MORE_IMAGE_FOLDERS, *ALIASES)]
    return any(volumes(folder) for folder in rarely) and any(volumes(folder) for folder in beside)


def _read(source: Path, roles: Roles) -> Files:
    """Subjects by the ends of names; where that pairs nobody, by their beginnings (img0001, label0001)."""
    single = len(roles.modalities) == 1
    where = {MASK: _folder(source, roles, MASK, "masks", [MASK_FOLDERS, MORE_MASK_FOLDERS])}
    for modality in roles.modalities:
        others = [IMAGE_FOLDERS, MORE_IMAGE_FOLDERS] if single else []
        where[modality] = _folder(source, roles, modality, f"modality {modality}", others)
    listed = {role: volumes(folder) for role, folder in where.items()}
    files = Files()
    for role, paths in listed.items():
        words = (*roles.tiers(role)[0], *(() if role == MASK else IMAGE_FOLDERS))
        for path in paths:
            files.add(subject_id(path, words), role, path)
    if any(all(files.best(subject, role) for role in where) for subject in files.subjects):
        return files
    other = Files()
    for role, paths in listed.items():
        for path in paths:
            other.add(_bare(path, _all_words(role, roles)), role, path)
    return other if any(all(other.best(one, role) for role in where) for one in other.subjects) else files


def _folder(source: Path, roles: Roles, role: str, what: str, others: Sequence[tuple[str, ...]]) -> Path:
    """The folder of a role: by its own words, else by these."""
    own = roles.tiers(role)[0] if role in roles.names or role != MASK else ()
    own = (*own, role.lower()) if role in roles.names else own
    if not others:
        return one_folder(source, own, what)
    first, last = ((*own, *others[0]), others[1])
    there = {folder.name.lower() for folder in folders(source)}
    return one_folder(source, first if there & set(first) or not there & set(last) else last, what)


def one_folder(source: Path, names: Sequence[str], what: str) -> Path:
    """The folder of `source` with one of these names, in any case."""
    matches = [folder for folder in folders(source) if folder.name.lower() in names]
    if len(matches) == 1:
        return matches[0]
    there = ", ".join(folder.name for folder in matches or folders(source)) or "no folders"
    raise DataFormatError(
        f"{source}: found {there} where one folder of {what} is expected, called {' or '.join(names)}"
    )


def _all_words(role: str, roles: Roles) -> tuple[str, ...]:
    more = (*MASK_FOLDERS, *MORE_MASK_FOLDERS) if role == MASK else (*IMAGE_FOLDERS, *MORE_IMAGE_FOLDERS)
    return (*roles.words(role), *more)


def _bare(path: Path, words: tuple[str, ...]) -> str:
    """The name without one of these words at its beginning or end."""
    name = subject_id(path, words)
    start = beginning(name, words)
    return name[len(start) :].lstrip("_-.") if start and name == stem(path) else name


def _modalities(source: Path) -> tuple[str, ...]:
    named = [folder.name for folder in folders(source) if volumes(folder)]
    masks = MASK_FOLDERS if any(name.lower() in MASK_FOLDERS for name in named) else MORE_MASK_FOLDERS
    names = tuple(name for name in named if name.lower() not in masks)
    is_any = len(names) == 1 and names[0].lower() in (*IMAGE_FOLDERS, *MORE_IMAGE_FOLDERS)
    return ("t1",) if is_any else names


TREE = Layout("tree", f"a folder called {', '.join(MASK_FOLDERS)} beside one per modality", _fits, _read, _modalities)
