"""CHAOS: {CT,MR}/NUMBER/.../DICOM_anon beside Ground/, which holds the mask as PNG slices.

A pair of folders is a subject: CT_1, MR_1_T1DUAL (modalities t1_in and t1_out), MR_1_T2SPIR (t2).
"""

from __future__ import annotations

from pathlib import Path

from hpc_ddpm.data.layouts.base import MASK, Files, Layout, Roles, below

IMAGES, MASKS = "DICOM_anon", "Ground"
MODALITIES = {"ct": ("CT", ""), "t1_in": ("T1DUAL", "InPhase"), "t1_out": ("T1DUAL", "OutPhase"), "t2": ("T2SPIR", "")}
"""Modality -> kind of pair, and folder below DICOM_anon."""
OTHER_NAMES = {"t1": "t1_in", "t2spir": "t2"}
DEPTH = 5


def _pairs(source: Path) -> list[Path]:
    return [
        folder.parent for folder in below(source, DEPTH) if folder.name == MASKS and (folder.parent / IMAGES).is_dir()
    ]


def _fits(source: Path) -> bool:
    return bool(_pairs(source))


def _kind(pair: Path) -> tuple[str, str]:
    """CT, T1DUAL or T2SPIR; and the patient."""
    if pair.name in ("T1DUAL", "T2SPIR"):
        return pair.name, f"MR_{pair.parent.name}"
    return "CT", f"CT_{pair.name}"


def _read(source: Path, roles: Roles) -> Files:
    files = Files()
    wanted = {one: MODALITIES.get(OTHER_NAMES.get(one.lower(), one.lower()), ("", "")) for one in roles.modalities}
    kinds = {kind for kind, _ in wanted.values()}
    for pair in _pairs(source):
        kind, patient = _kind(pair)
        if kinds and kind not in kinds:
            continue
        subject = patient if kind == "CT" else f"{patient}_{kind}"
        files.patients[subject] = patient
        files.add(subject, MASK, pair / MASKS)
        for modality, (of, folder) in wanted.items():
            if of == kind and (pair / IMAGES / folder).is_dir():
                files.add(subject, modality, pair / IMAGES / folder)
    return files


def _modalities(source: Path) -> tuple[str, ...]:
    kinds = {_kind(pair)[0] for pair in _pairs(source)}
    first = next(kind for kind in ("CT", "T1DUAL", "T2SPIR") if kind in kinds)
    return tuple(modality for modality, (kind, _) in MODALITIES.items() if kind == first)


CHAOS = Layout("chaos", "DICOM_anon/ beside Ground/ (CHAOS)", _fits, _read, _modalities)
