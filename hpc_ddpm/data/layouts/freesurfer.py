"""FreeSurfer's SUBJECTS_DIR: SUBJECT/mri/*.mgz. The mask is aseg, or what `data.names` says (aparc+aseg, wmparc)."""

from __future__ import annotations

from pathlib import Path

from hpc_ddpm.data.formats import stem
from hpc_ddpm.data.layouts.base import MASK, Files, Layout, Roles, folders, volumes

SEGMENTATION, TEMPLATE, LONGITUDINAL = "aseg", "fsaverage", ".long."
IMAGES = ("t1", "brain", "norm", "orig", "nu", "t2", "flair")


def _fits(source: Path) -> bool:
    return any(_files(subject, (SEGMENTATION, "t1", "orig")) for subject in folders(source))


def _files(subject: Path, names: tuple[str, ...]) -> list[Path]:
    mri = subject / "mri"
    return [path for path in volumes(mri) if stem(path).lower() in names] if mri.is_dir() else []


def _read(source: Path, roles: Roles) -> Files:
    files = Files()
    masks = roles.tiers(MASK)[0] if MASK in roles.names else (SEGMENTATION,)
    subjects = [folder for folder in folders(source) if (folder / "mri").is_dir()]
    for subject in subjects:
        if subject.name.startswith(TEMPLATE):
            files.leave_out(subject, "it is FreeSurfer's template and no subject")
            continue
        for role, names in {MASK: masks, **{one: roles.words(one) for one in roles.modalities}}.items():
            for path in _files(subject, names):
                files.add(subject.name, role, path)
    for subject in subjects:
        point, is_long, base = subject.name.partition(LONGITUDINAL)
        if is_long:  # the time point, its longitudinal version and the base are of one person
            files.patients |= dict.fromkeys((point, subject.name, base), base)
    return files


def _modalities(source: Path) -> tuple[str, ...]:
    names = {stem(path).lower() for subject in folders(source) for path in _files(subject, IMAGES)}
    return tuple(name for name in IMAGES if name in names)[:1]


FREESURFER = Layout("freesurfer", "SUBJECT/mri/aseg.mgz (FreeSurfer)", _fits, _read, _modalities)
