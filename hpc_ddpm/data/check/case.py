"""One subject's files, opened as far as they can be, with what the checks share. D H W."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.findings import Finding
from hpc_ddpm.data.check.similarity import shrink, subsample
from hpc_ddpm.data.coding import resolve_labels
from hpc_ddpm.data.discover import MASK, Subject
from hpc_ddpm.data.foreground import above_background, brain, foreground
from hpc_ddpm.data.formats import Header
from hpc_ddpm.data.labels import add_foreground, remap_labels
from hpc_ddpm.data.nifti import Volume, read_header, read_nifti, turn_to_ras
from hpc_ddpm.data.preprocess import Prepared, grid_distance, prepare
from hpc_ddpm.errors import DataFormatError

SMALL_SIDE = 48
GRID_TOLERANCE = 0.1
"""In voxels, as `prepare` has it."""


@dataclass(frozen=True, eq=False)
class Case:
    """A subject with the volumes that could be read; missing ones have a finding."""

    subject: Subject
    config: DataConfig
    """With the label scheme that the layout implies."""
    headers: dict[str, Header] = field(default_factory=dict)
    """By role: `mask` or a modality."""
    volumes: dict[str, Volume] = field(default_factory=dict)
    """By role, brought to data.orientation; images float32, the mask as stored."""
    findings: list[Finding] = field(default_factory=list)
    """Why files could not be read."""

    def finding(self, kind: str, found: str, role: str | None = None) -> Finding:
        """A finding about this subject, and one of its files."""
        return Finding(kind, found, (self.subject.id,), str(self.path(role)) if role else "")

    def refusal(self, error: DataFormatError) -> Finding:
        """What the packing code refuses, as a finding about the file that its message begins with."""
        message = str(error)
        roles = (MASK, *self.config.modalities)
        role = next((role for role in roles if message.startswith(f"{self.path(role)}: ")), None)
        found = message.removeprefix(f"{self.path(role)}: ") if role else message
        if not error.kind:
            return self.finding("unreadable", found, role)
        return self.finding(error.kind, found.rpartition("; ")[0] or found, role)

    def path(self, role: str) -> Path:
        """The file of a role."""
        return self.subject.mask if role == MASK else self.subject.images[role]

    @property
    def mask(self) -> Volume | None:
        """The mask, if it could be read."""
        return self.volumes.get(MASK)

    @property
    def images(self) -> dict[str, Volume]:
        """The images that could be read."""
        return {role: volume for role, volume in self.volumes.items() if role != MASK}

    @property
    def is_complete(self) -> bool:
        """Whether all files could be read."""
        return len(self.volumes) == 1 + self.config.num_modalities

    def fits_mask(self, image: Volume) -> bool:
        """Whether an image lies on the grid of the mask."""
        mask = self.mask
        if mask is None or image.data.shape != mask.data.shape:
            return False
        return grid_distance(image, mask) <= GRID_TOLERANCE

    @cached_property
    def on_grid(self) -> dict[str, Volume]:
        """The images that lie on the grid of the mask and are finite."""
        images = self.images.items()
        return {role: image for role, image in images if self.fits_mask(image) and np.isfinite(image.data).all()}

    @cached_property
    def labels(self) -> NDArray[np.uint8] | DataFormatError | None:
        """The mask in the values of the scheme, with the foreground label where the scheme has one."""
        if self.mask is None:
            return None
        try:
            labels = remap_labels(self.mask.data, self.config.labels, self.subject.mask)
            if self.on_grid and self.config.labels.foreground_label is not None:
                roles = [role for role in self.config.modalities if role in self.on_grid]
                shown = [above_background(self.on_grid[role].data) for role in roles]
                add_foreground(labels, brain(shown, self.path(roles[0])), self.config.labels, self.subject.mask)
            return labels
        except DataFormatError as error:
            return error

    @cached_property
    def prepared(self) -> Prepared | DataFormatError | None:
        """What would be packed, or why nothing; None where a file could not be read."""
        if not self.is_complete:
            return None
        try:
            return prepare(self.subject, self.config)
        except DataFormatError as error:
            return error

    @cached_property
    def small(self) -> dict[str, NDArray[np.float32]]:
        """Rough versions, RAS+, of the images on the mask's grid."""
        return {role: shrink(turn_to_ras(v.data, v.affine), SMALL_SIDE) for role, v in self.on_grid.items()}

    @cached_property
    def small_labels(self) -> NDArray[np.uint8] | None:
        """The mask on the grid of `small`."""
        if self.mask is None or not isinstance(self.labels, np.ndarray):
            return None
        return subsample(turn_to_ras(self.labels, self.mask.affine), SMALL_SIDE)

    @cached_property
    def inside(self) -> NDArray[np.bool_] | None:
        """Where the first image is not background, on the grid of `small`."""
        first = self.small.get(self.config.modalities[0])
        return None if first is None else foreground(first)


def open_case(subject: Subject, config: DataConfig) -> Case:
    """Read what can be read of a subject.

    Args:
        subject: its files.
        config: with the layout of the source, not `auto`.
    """
    config = config.model_copy(update={"labels": resolve_labels(config.labels, config.layout)})
    case = Case(subject, config)
    for role in (MASK, *config.modalities):
        try:
            case.headers[role] = header = read_header(case.path(role))
            if len(header.shape) > 3 and header.shape[3] > 1:
                found = f"{header.shape[3]} volumes in one file, one 3-D volume expected"
                case.findings.append(case.finding("series", found, role))
                continue
            dtype = None if role == MASK else np.float32
            beside = case.path(config.modalities[0])
            case.volumes[role] = read_nifti(case.path(role), config.orientation, dtype, beside=beside)
        except DataFormatError as error:
            case.findings.append(case.refusal(error))
    return case
