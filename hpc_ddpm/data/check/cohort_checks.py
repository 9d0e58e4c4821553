"""The checks of a whole source: what only a comparison of subjects shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.findings import Finding
from hpc_ddpm.data.discover import Subject, Unmatched
from hpc_ddpm.data.nifti import Shape3
from hpc_ddpm.data.patients import torn_patients

MAX_VOXEL_DEVIATION = 0.1
"""Relative deviation of a voxel side from the cohort's median."""
MIN_LABELLED_SHARE = 0.2
"""Share of what is not background that masks must label in the median subject."""
DUPLICATE_DISTANCE, DUPLICATE_SHARE, DUPLICATE_ALONE = 0.005, 0.15, 0.002
"""1 - correlation of signatures: at most, also as a share of the median of all pairs; and of two subjects alone."""
BLOCK = 1024

Findings = Iterator[Finding]


@dataclass(frozen=True, eq=False)
class Facts:
    """What is kept of a subject once its files are closed."""

    id: str
    findings: tuple[Finding, ...]
    shape: Shape3 | None = None
    """(X, Y, Z) of the mask's file; None where it could not be read."""
    voxel_size_mm: tuple[float, float, float] | None = None
    """(x, y, z)."""
    orientation: str = ""
    """Axis codes of the mask's file."""
    label_voxels: tuple[int, ...] | None = None
    """Voxels of each label, in the order of the scheme; None where the mask cannot be used."""
    labelled_share: float | None = None
    """Share of what is not background in the first image that the mask labels."""
    intensities: dict[str, tuple[float, float]] | None = None
    """Smallest and largest value of each image."""
    signature: NDArray[np.float32] | None = None
    """A rough version of the first image, (16, 16, 16) or smaller, RAS+."""
    picture: bytes | None = None
    """PNG, if asked for."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, without pictures."""
        hidden = ("signature", "picture", "findings")
        return {name: value for name, value in vars(self).items() if name not in hidden}


def check_pairing(unmatched: Sequence[Unmatched]) -> Findings:
    """Files that are not used, by reason."""
    for entry in unmatched:
        yield Finding(entry.kind, entry.reason, file=str(entry.path))


def check_patients(subjects: Sequence[Subject]) -> Findings:
    """Patients whom the source itself puts into two splits."""
    torn = torn_patients((subject.id, subject.patient, subject.split) for subject in subjects)
    for patient, ids in torn.items():
        yield Finding("patient-in-two-splits", f"the table puts patient {patient} into two splits", tuple(ids))


def check_cohort(cases: Sequence[Facts], config: DataConfig) -> list[Finding]:
    """What only a comparison of subjects shows."""
    return [
        *_mixed_orientations(cases, config),
        *(_voxel_size_outliers(cases) if config.voxel_size_mm is None else ()),
        *_mixed_sizes(cases),
        *_labels_never_found(cases, config),
        *_mostly_unlabelled(cases),
        *_near_duplicates(cases),
    ]


def _mixed_orientations(cases: Sequence[Facts], config: DataConfig) -> Findings:
    groups = _groups((case.orientation, case.id) for case in cases if case.orientation)
    if config.orientation == "native" and len(groups) > 1:
        most, *others = groups
        for codes in others:
            yield Finding("orientation-mixed", f"stored {codes}, most are {most}", groups[codes])


def _voxel_size_outliers(cases: Sequence[Facts]) -> Findings:
    sized = [case for case in cases if case.voxel_size_mm]
    if len(sized) < 3:
        return
    sizes = np.sort([case.voxel_size_mm or () for case in sized], axis=1)
    median = np.median(sizes, axis=0)
    for case, size in zip(sized, sizes, strict=True):
        if (np.abs(size / median - 1) > MAX_VOXEL_DEVIATION).any():
            found = f"voxels of {_by(case.voxel_size_mm)} mm, the median is {_by(median)}"
            yield Finding("voxel-size-outlier", found, (case.id,))


def _mixed_sizes(cases: Sequence[Facts]) -> Findings:
    groups = _groups((_by(case.shape), case.id) for case in cases if case.shape)
    if len(groups) > 1:
        shown = ", ".join(f"{len(ids)} of {shape}" for shape, ids in list(groups.items())[:5])
        yield Finding("size-mixed", f"{len(groups)} sizes in voxels: {shown}")


def _labels_never_found(cases: Sequence[Facts], config: DataConfig) -> Findings:
    counts = [case.label_voxels for case in cases if case.label_voxels]
    if counts:
        for (label, name), total in zip(config.labels.names.items(), np.sum(counts, axis=0), strict=True):
            if not total:
                yield Finding("label-never-found", f"no mask has {label} ({name})")


def _mostly_unlabelled(cases: Sequence[Facts]) -> Findings:
    shares = [case.labelled_share for case in cases if case.labelled_share is not None]
    if shares and (share := float(np.median(shares))) < MIN_LABELLED_SHARE:
        yield Finding("mostly-unlabelled", f"masks cover {share:.0%} of what is not background (median)")


def _near_duplicates(cases: Sequence[Facts]) -> Findings:
    """Pairs whose first images are almost the same, by correlation and against all other pairs."""
    signed = [(case.id, case.signature) for case in cases if case.signature is not None]
    for shape in {signature.shape for _, signature in signed}:
        group = [subject for subject, signature in signed if signature.shape == shape]
        unit = _standardised(np.stack([signature for _, signature in signed if signature.shape == shape]))
        limit = _duplicate_limit(unit)
        for start in range(0, len(group), BLOCK):
            close = 1 - unit[start : start + BLOCK] @ unit.T < limit
            for one, other in np.argwhere(close).tolist():
                if start + one < other:
                    pair = group[start + one], group[other]
                    alike = float(unit[start + one] @ unit[other])
                    yield Finding("near-duplicate", f"{pair[0]} and {pair[1]} correlate at {alike:.4f}", pair)


def _standardised(signatures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of mean 0 and length 1, so that a product of two is their correlation."""
    rows = signatures.reshape(len(signatures), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _duplicate_limit(unit: NDArray[np.float32]) -> float:
    """Distances below this are no chance; the median is taken over the first block."""
    if len(unit) < 3:
        return DUPLICATE_ALONE
    some = unit[:BLOCK]
    distances = 1 - (some @ some.T)[np.triu_indices(len(some), 1)]
    return min(DUPLICATE_DISTANCE, DUPLICATE_SHARE * float(np.median(distances)))


def _groups(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Ids by value, the most frequent value first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for value, subject in pairs:
        groups[value].append(subject)
    return {value: tuple(groups[value]) for value in sorted(groups, key=lambda value: -len(groups[value]))}


def _by(numbers: Any) -> str:
    return "x".join(f"{number:g}" for number in np.asarray(numbers).tolist())
