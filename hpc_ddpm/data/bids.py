"""BIDS: what the names of anatomical images and of derived masks say (BIDS 1.10, anatomy and derivatives)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_ddpm.data.formats import is_volume_name, stem

MASK = "mask"
SUFFIXES = {"t1": "t1w", "t1ce": "t1w", "t2": "t2w"}
"""Modality to BIDS suffix, both in lower case; for others the suffix is the modality, with or without `w`."""
CONTRAST = ("ce", "gd", "post", "contrast", "postcontrast", "postgd", "t1ce", "t1gd")
"""Values of acq- that make a T1w one with contrast agent, besides any ce-."""
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
    def is_mask(self) -> bool:
        """`*_dseg`, or `*_label-*_mask`."""
        return self.suffix == "dseg" or (self.suffix == "mask" and "label" in self.entities)

    def is_image(self, modality: str) -> bool:
        """Whether this is an image of the modality."""
        modality, suffix = modality.lower(), self.suffix.lower()
        if suffix not in (SUFFIXES.get(modality, modality), f"{modality}w"):
            return False
        has_contrast = "ce" in self.entities or self.entities.get("acq", "").lower() in CONTRAST
        return suffix != "t1w" or has_contrast == (modality == "t1ce")


def is_bids(source: Path) -> bool:
    """Whether a folder has `sub-*/anat` or `sub-*/ses-*/anat`."""
    return any(path.is_dir() for pattern in ("sub-*/anat", "sub-*/ses-*/anat") for path in source.glob(pattern))


def read_bids(source: Path, modalities: tuple[str, ...]) -> Iterator[tuple[str, str, Path]]:
    """(subject, role, file) of the raw images, and of masks there and in `derivatives/`; other files are passed over.

    A role is `mask` or a modality.
    """
    for root in (source, *sorted(source.glob("derivatives/*"))):
        for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*"):
            for path in sorted(root.glob(pattern)):
                name = parse_name(path)
                if name is None:
                    continue
                if name.is_mask:
                    yield name.subject, MASK, path
                elif root == source:
                    for modality in filter(name.is_image, modalities):
                        yield name.subject, modality, path


def parse_name(path: Path) -> Name | None:
    """The parts of the name, if it is a BIDS name of a NIfTI file."""
    if not is_volume_name(path) or not path.name.startswith("sub-"):
        return None
    *parts, suffix = stem(path).split("_")
    pairs = [part.partition("-") for part in parts]
    if not parts or any(not value for _, _, value in pairs):
        return None
    return Name({key: value for key, _, value in pairs}, suffix)
