"""One folder per case, which names the subject; files are told apart by the ends of their names.

`brats_raw`: some file ends as masks do (BraTS 2018-2024, UCSF-PDGM, TCGA-GBM and -LGG). `cases`: masks are called
`.seg.nrrd` and the image like the case (AVT), or `data.names` says how the files end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hpc_ddpm.data.formats import stem
from hpc_ddpm.data.layouts.base import ALIASES, MASK, Files, Layout, Roles, below, ending, folders, volumes

NOISE = re.compile(r"(UCSF-PDGM-.+)_nifti")
"""A folder whose name says more than the subject's."""
SEGMENTATION = ".seg.nrrd"
LESS = 10
"""Rank of names that are the word alone, or end in it after a dot: other names come first."""


def _cases(source: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Folders with volumes, at most two levels down (BraTS 2018 has HGG/ and LGG/); only if there are none, three."""
    folders(source)  # says where there is none
    for depth in (2, 3):
        is_empty = True
        for folder in below(source, depth):
            if files := volumes(folder):
                is_empty = False
                yield folder, files
        if not is_empty:
            return


def _masks(files: list[Path], roles: Roles) -> list[Path]:
    files = [path for path in files if not path.name.lower().endswith(SEGMENTATION)]
    return [path for path in files if (_role(path, roles) or ("", 0))[0] == MASK]


def _is_brats_raw(source: Path) -> bool:
    roles = Roles(())
    return any(len(_masks(files, roles)) == 1 or _has_modalities(files) for _, files in _cases(source))


def _has_modalities(files: list[Path]) -> bool:
    """Whether a case with several masks has images too: else it is a folder of masks."""
    found = {role for role, _ in (_role(path, Roles(tuple(ALIASES))) or ("", 0) for path in files)}
    return MASK in found and len(found - {"", MASK}) > 0


def _is_nrrd_cases(source: Path) -> bool:
    return any(path.name.lower().endswith(SEGMENTATION) for _, files in _cases(source) for path in files)


def _role(path: Path, roles: Roles) -> tuple[str, int] | None:
    """Role and rank of a file by its name; None where it tells none."""
    name, words = stem(path), roles.endings()
    if path.name.lower().endswith(SEGMENTATION):
        return MASK, 0
    if end := ending(name, words):
        return words[end]
    if end := name.lower() if name.lower() in words else ending(name, words, (".",)):
        role, rank = words[end]
        return role, rank + LESS
    return None


def _read(source: Path, roles: Roles) -> Files:
    files = Files()
    for case, paths in _cases(source):
        noisy = NOISE.fullmatch(case.name)
        subject = noisy.group(1) if noisy else case.name
        told = {path: _role(path, roles) for path in paths}
        nameless = [path for path, role in told.items() if role is None]
        has_mask = any(role and role[0] == MASK for role in told.values())
        has_image = any(role and role[0] != MASK for role in told.values())
        if len(roles.modalities) == 1 and len(nameless) == 1 and has_mask and not has_image:
            told[nameless[0]] = roles.modalities[0], 0
        for path, found in told.items():
            if found is None:
                files.leave_out(path, f"its name ends in none of {', '.join(sorted(roles.endings()))}")
            elif found[0] == MASK or found[0] in roles.modalities:
                files.add(subject, found[0], path, found[1])
    return files


def _modalities(source: Path) -> tuple[str, ...]:
    return tuple(ALIASES)


BRATS_RAW = Layout("brats_raw", "one folder per case with a *_seg file", _is_brats_raw, _read, _modalities)
CASES = Layout("cases", "or *.seg.nrrd", _is_nrrd_cases, _read, lambda _: ("ct",))
