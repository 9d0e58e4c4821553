"""Preflight of a source: every pair opened and judged, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.case import Case, open_case
from hpc_ddpm.data.check.case_checks import check_case
from hpc_ddpm.data.check.cohort_checks import Facts, check_cohort, check_pairing, check_patients
from hpc_ddpm.data.check.findings import Finding
from hpc_ddpm.data.check.pictures import picture
from hpc_ddpm.data.check.similarity import shrink
from hpc_ddpm.data.discover import MASK, Subject, discover
from hpc_ddpm.data.hooks import check_hooks
from hpc_ddpm.data.labels import count_labels
from hpc_ddpm.data.nifti import axis_codes, ras_voxel_size_mm, turn_to_ras, voxel_size_mm
from hpc_ddpm.data.parallel import ordered_map
from hpc_ddpm.data.settle import settle
from hpc_ddpm.errors import DataFormatError, refusing

SIGNATURE_SIDE = 16
THUMBNAIL_HEIGHT = 96

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What was found in a source."""

    source: Path
    layout: str
    config: DataConfig
    cases: tuple[Facts, ...]
    """Every complete subject, sorted by id."""
    findings: tuple[Finding, ...]
    """Findings about all subjects, and about the source as a whole."""
    coding: str = ""
    """What was decided about the values of the masks, in one line; empty where there was nothing to decide."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "source": str(self.source),
            "layout": self.layout,
            "coding": self.coding,
            "subjects": [case.to_json() for case in self.cases],
            "findings": [finding.to_json() for finding in self.findings],
        }


def check(
    source: str | Path,
    config: DataConfig,
    *,
    num_workers: int = 1,
    pictures: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Open and judge every subject of `source` as it would be packed; hooks are looked for and not run.

    Args:
        source: a folder or table, see `discover`.
        config: how it would be packed.
        num_workers: processes; 1 is this one.
        pictures: make a thumbnail of every subject.
        progress: called with (finished subjects, all subjects).

    Raises:
        DataFormatError: as `discover`: nothing there, or not one complete subject.
        ConfigError: a program of `config.hooks`, or the reader of DICOM files, is not installed.
    """
    check_hooks(config)
    found = discover(source, config)
    config = config.model_copy(update={"layout": found.layout, "hooks": ()})
    config, coding, unsettled = _settle(found.subjects, config, num_workers)
    judge = partial(judge_subject, config=config, pictures=pictures)
    cases = []
    for facts in ordered_map(judge, found.subjects, num_workers, preload=__name__):
        cases.append(facts)
        if progress:
            progress(len(cases), len(found.subjects))
    findings = [
        *check_pairing(found.unmatched),
        *check_patients(found.subjects),
        *(finding for case in cases for finding in case.findings),
        *check_cohort(cases, config),
        *unsettled,
    ]
    return CheckReport(Path(source), found.layout, config, tuple(cases), tuple(findings), coding)


def _settle(subjects: Sequence[Subject], config: DataConfig, num_workers: int) -> tuple[DataConfig, str, list[Finding]]:
    """With the coding of the masks, what was decided in one line, and why nothing could be."""
    try:
        settled = settle(subjects, config, num_workers)
    except DataFormatError as error:
        return config, "", [Finding(error.kind, str(error))]
    return settled.config, settled.note, []


def judge_subject(subject: Subject, config: DataConfig, pictures: bool) -> Facts:
    """Findings and facts of one subject; a function of its files."""
    try:
        with refusing(subject.id):
            return _judge(subject, config, pictures)
    except DataFormatError as error:
        return Facts(subject.id, (Finding(error.kind, str(error), (subject.id,)),))


def _judge(subject: Subject, config: DataConfig, pictures: bool) -> Facts:
    case = open_case(subject, config)
    findings = tuple(check_case(case))
    drawn = _draw(case) if pictures else None
    if case.mask is None:
        return Facts(subject.id, findings, picture=drawn)
    labels = case.labels if isinstance(case.labels, np.ndarray) else None
    first = case.small.get(config.modalities[0])
    return Facts(
        subject.id,
        findings,
        shape=case.mask.file_shape,
        voxel_size_mm=voxel_size_mm(case.mask.file_affine),
        orientation=axis_codes(case.mask.file_affine),
        label_voxels=None if labels is None else tuple(count_labels(labels, case.config.labels).tolist()),
        labelled_share=_labelled_share(case),
        intensities={role: (float(v.data.min()), float(v.data.max())) for role, v in case.on_grid.items()},
        signature=None if first is None else shrink(first, SIGNATURE_SIDE),
        picture=drawn,
    )


def _labelled_share(case: Case) -> float | None:
    if case.inside is None or case.small_labels is None or not case.inside.any():
        return None
    return float((case.small_labels[case.inside] > 0).mean())


def _draw(case: Case) -> bytes | None:
    """The images that lie on the mask's grid, else the first one that could be read; None where there is none."""
    fitting = [image for image in case.images.values() if case.fits_mask(image)]
    shown = fitting or list(case.images.values())[:1]
    if not shown:
        return None
    outlined = case.labels if fitting and isinstance(case.labels, np.ndarray) else None
    affine = shown[0].affine
    turned = [turn_to_ras(image.data, image.affine) for image in shown]
    mask = None if outlined is None else turn_to_ras(outlined, case.volumes[MASK].affine)
    return picture(turned, mask, ras_voxel_size_mm(affine), case.config.labels, THUMBNAIL_HEIGHT)
