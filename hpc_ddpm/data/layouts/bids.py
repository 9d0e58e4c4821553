"""BIDS: sub-*/[ses-*/]anat, masks there or in derivatives/; by names alone (BIDS 1.10, anatomy and derivatives)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpc_ddpm.data.formats import is_volume, is_volume_name, stem
from hpc_ddpm.data.layouts.base import ALIASES, MASK, Files, Layout, Roles, ending

SUFFIXES = {"t1": "t1w", "t1ce": "t1w", "t2": "t2w"}
"""Modality to BIDS suffix, both in lower case; for others the suffix is the modality, with or without `w`."""
CONTRAST = ("ce", "gd", "post", "contrast", "postcontrast", "postgd", "t1ce", "t1gd")
"""Values of acq- that make a T1w one with contrast agent, besides any ce-."""
RAW = (
    *("t1w", "t2w", "pdw", "t2starw", "flair", "inplanet1", "inplanet2", "pdt2", "angio", "unit1", "swi", "megre"),
    *("t1map", "t2map", "t2starmap", "r1map", "r2map", "r2starmap", "pdmap", "mtrmap", "mtsat", "defacemask", "ct"),
)
"""Suffixes of raw images that are passed over without a word where they are not asked for."""
MASK_LIKE = ("seg", "label", "labels", "lesion", "mask", "roi", "probseg", "dseg")
"""Suffixes that may be meant to be masks."""
NATIVE = ("orig", "T1w")
"""Values of space- that mean the subject's own images."""


@dataclass(frozen=True)
class Name:
    """A BIDS file name, taken apart."""

    entities: dict[str, str]
    suffix: str

    @property
    def subject(self) -> str:
        """sub-X[_ses-X][_run-X][_space-X]: sessions, runs and spaces are subjects of their own."""
        space = self.entities.get("space")
        parts = {**self.entities, "space": None if space in NATIVE else space}
        return "_".join(f"{key}-{parts[key]}" for key in ("sub", "ses", "run", "space") if parts.get(key))

    @property
    def mask_rank(self) -> int | None:
        """0 for `*_dseg` and `*_label-*_mask`, 1 for `*_roi`, 2 for `desc-*_mask`, 3 for other masks; None for none."""
        if self.suffix == "dseg" or (self.suffix == "mask" and "label" in self.entities):
            return 0
        if self.suffix == "roi":
            return 1
        return (2 if "desc" in self.entities else 3) if self.suffix == "mask" else None

    @property
    def kind(self) -> str:
        """What a mask marks, as far as its name says: `desc-lesion_mask`."""
        return f"desc-{self.entities['desc']}_{self.suffix}" if "desc" in self.entities else self.suffix

    def is_image(self, modality: str) -> bool:
        """Whether this is an image of the modality."""
        modality, suffix = modality.lower(), self.suffix.lower()
        if suffix not in (SUFFIXES.get(modality, modality), f"{modality}w"):
            return False
        has_contrast = "ce" in self.entities or self.entities.get("acq", "").lower() in CONTRAST
        return suffix != "t1w" or has_contrast == (modality == "t1ce")


def _anat(root: Path) -> list[Path]:
    """The anatomical folders of subjects; where there are none, those below one folder per site (ATLAS)."""
    for above in ("", "*/", "*/*/"):
        patterns = (f"{above}sub-*/anat", f"{above}sub-*/ses-*/anat")
        if found := [path for pattern in patterns for path in root.glob(pattern) if path.is_dir()]:
            return found
    return []


def _fits(source: Path) -> bool:
    return bool(_anat(source))


def _read(source: Path, roles: Roles) -> Files:
    """Raw images, and masks there and in `derivatives/`; what could be meant and is not used is named."""
    files, masks = Files(), list[tuple[Name, Path]]()
    for root in (source, *sorted(source.glob("derivatives/*"))):
        for path in sorted(path for folder in _anat(root) for path in folder.iterdir()):
            if is_volume(path) and not path.name.startswith("."):
                masks += _add(files, path, roles, is_raw=root == source)
    _add_masks(files, masks)
    return files


def _add_masks(files: Files, masks: list[tuple[Name, Path]]) -> None:
    """Masks of the best kind that the dataset has; of two equally good kinds none: they mark different things."""
    best = min((name.mask_rank or 0 for name, _ in masks), default=0)
    kinds = {name.kind for name, _ in masks if name.mask_rank == best}
    for name, path in masks:
        if (name.mask_rank or 0) > best:
            files.leave_out(path, "it is no mask where others are called dseg, label-*_mask or roi", "set-aside")
        elif best and len(kinds) > 1:
            files.leave_out(
                path, f"there are masks of several kinds: {', '.join(sorted(kinds))}; say which by data.names"
            )
        else:
            files.add(name.subject, MASK, path)


def _add(files: Files, path: Path, roles: Roles, is_raw: bool) -> list[tuple[Name, Path]]:
    """Add an image, or say why not; returns the file if it may be a mask."""
    name = parse_name(path)
    if name is None:
        files.leave_out(path, "its name is none of BIDS: sub-LABEL[_KEY-VALUE]..._SUFFIX")
        return []
    if MASK in roles.names and _own(path, roles, MASK) is not None:
        files.add(name.subject, MASK, path)
        return []
    if MASK not in roles.names and name.mask_rank is not None:
        return [(name, path)]
    taken = False
    for modality in roles.modalities if is_raw else ():
        is_image = _own(path, roles, modality) is not None if modality in roles.names else name.is_image(modality)
        if is_image:
            files.add(name.subject, modality, path)
            taken = True
    if not taken and (name.suffix in MASK_LIKE or (is_raw and name.suffix.lower() not in RAW)):
        files.leave_out(
            path, "it is neither a mask (dseg, mask, roi) nor an image that is asked for; see data.names", "set-aside"
        )
    return []


def _own(path: Path, roles: Roles, role: str) -> int | None:
    """0 where the name ends as `data.names` says."""
    return 0 if ending(stem(path), roles.words(role)) else None


def _modalities(source: Path) -> tuple[str, ...]:
    found = {role for _, role in _read(source, Roles(tuple(ALIASES))).found}
    return tuple(modality for modality in ALIASES if modality in found)


def parse_name(path: Path) -> Name | None:
    """The parts of the name, if it is a BIDS name of a NIfTI file."""
    if not is_volume_name(path) or not path.name.startswith("sub-"):
        return None
    *parts, suffix = stem(path).split("_")
    pairs = [part.partition("-") for part in parts]
    if not parts or any(not value for _, _, value in pairs):
        return None
    return Name({key: value for key, _, value in pairs}, suffix)


BIDS = Layout("bids", "sub-*/anat (BIDS)", _fits, _read, _modalities)
