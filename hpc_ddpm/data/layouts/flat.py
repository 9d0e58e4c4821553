"""Masks and images side by side in one folder, or in a few: volume-0 and segmentation-0 (LiTS), x and x_seg."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hpc_ddpm.data.formats import stem
from hpc_ddpm.data.layouts.base import (
    ALIASES,
    IMAGE_FOLDERS,
    MASK,
    MORE_IMAGE_FOLDERS,
    MORE_MASK_FOLDERS,
    SEPARATORS,
    Files,
    Layout,
    Roles,
    beginning,
    below,
    ending,
    volumes,
)

TELLS_NOTHING = 100
"""Rank of a name without a word for a role."""
IMAGE = "image"
"""Role of a file that is an image of no named modality."""


def _words(roles: Roles) -> dict[str, tuple[str, int]]:
    """Word -> (role, rank), at the beginning or the end of names."""
    general = dict.fromkeys((*IMAGE_FOLDERS, *MORE_IMAGE_FOLDERS), (IMAGE, 0))
    masks = dict.fromkeys(MORE_MASK_FOLDERS, (MASK, 1)) if MASK not in roles.names else {}
    return general | masks | roles.endings()


def parse(path: Path, roles: Roles) -> tuple[str, str | None, int]:
    """(subject, role or None where the name tells none, rank) of a file."""
    name, words = stem(path), _words(roles)
    if path.name.lower().endswith(".seg.nrrd"):
        return name, MASK, 0
    if end := ending(name, words, SEPARATORS):
        return name[: -len(end) - 1], *words[end]
    if start := beginning(name, words):
        return name[len(start) :].lstrip("_-."), *words[start]
    return name, None, 0


def pick_masks(paths: Iterable[Path], roles: Roles) -> list[tuple[str, Path]]:
    """(subject, file) of the masks among files, never of an image.

    Of a subject, the file that is called a mask counts; where none is, the one whose name tells nothing.
    """
    ranked: dict[str, dict[int, list[Path]]] = {}
    for path in paths:
        subject, role, rank = parse(path, roles)
        if role in (MASK, None):
            ranked.setdefault(subject, {}).setdefault(rank if role else TELLS_NOTHING, []).append(path)
    return [(subject, path) for subject, ranks in sorted(ranked.items()) for path in ranks[min(ranks)]]


def _folders(source: Path) -> list[Path]:
    return [folder for folder in (source, *below(source, 2)) if volumes(folder)]


def _fits(source: Path) -> bool:
    roles = Roles(tuple(ALIASES))
    found = [parse(path, roles) for folder in _folders(source) for path in volumes(folder)]
    images = {subject for subject, role, _ in found if role != MASK}
    return any(role == MASK and subject in images for subject, role, _ in found)


def _read(source: Path, roles: Roles) -> Files:
    files = Files()
    for folder in _folders(source):
        for path in volumes(folder):
            subject, role, rank = parse(path, roles)
            if role in (IMAGE, None) and len(roles.modalities) == 1:
                role, rank = roles.modalities[0], 0 if role else 1
            if role is None or role == IMAGE:
                files.leave_out(path, "its name tells no modality; say which with data.names")
            elif role == MASK or role in roles.modalities:
                files.add(subject, role, path, rank)
    return files


def _modalities(source: Path) -> tuple[str, ...]:
    roles = Roles(tuple(ALIASES))
    found = {parse(path, roles)[1] for folder in _folders(source) for path in volumes(folder)}
    return tuple(modality for modality in ALIASES if modality in found) or ("t1",)


FLAT = Layout("flat", "x_seg or segmentation-x beside its image in one folder", _fits, _read, _modalities)
