"""Whether synthetic volumes are too close to real ones: the nearest neighbour of each in the training set.

Volumes are compared as block means of 32^3 by Pearson's correlation, as they are and with left and right exchanged.
The warning threshold is what real volumes show among themselves: the 95th percentile of the correlations between each
training volume and its nearest other one. Shape counts too, so a volume made from a subject's mask is always alike
that subject to some degree; `own` says how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import Config
from hpc_ddpm.data.check.similarity import shrink
from hpc_ddpm.data.nifti import Affine, axis_codes
from hpc_ddpm.data.shards import Packed, open_packed
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.sampling.folder import SampleFolder
from hpc_ddpm.sampling.read import read_generated, unit_range

SIDE = 32
PERCENTILE = 95

Vector = NDArray[np.float32]
"""A volume, shrunk, of mean 0 and length 1."""


@dataclass(frozen=True)
class Neighbour:
    """What a synthetic volume is closest to."""

    id: str
    subject: str
    """Whose mask it was made from."""
    nearest: str
    """Training subject."""
    correlation: float
    own: float
    """Correlation with the subject's real volume."""
    is_close: bool
    """Above the threshold."""


@dataclass(frozen=True)
class Closeness:
    """How close the volumes of a whole set are to the training volumes."""

    threshold: float
    num_training: int
    neighbours: tuple[Neighbour, ...]


def find_neighbours(
    folder: SampleFolder,
    item_ids: Sequence[str],
    packed_path: str,
    config: Config,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Closeness:
    """Compare generated volumes with the training split of the packed dataset that their masks came from.

    Args:
        folder: of the set.
        item_ids: of finished volumes.
        packed_path: of the dataset.
        config: of the model.
        progress: called with (real volumes read, all).

    Raises:
        ConfigError: the volumes are on another grid than the real ones.
        DataFormatError: fewer than three training volumes: no threshold can be told.
    """
    if config.sampling.output.original_grid:
        raise ConfigError("the nearest neighbours are searched on the model's grid: set output.original_grid=false")
    packed = open_packed(packed_path)
    everyone = {subject.id: subject for subject in packed.subjects()}
    training = [subject for subject in everyone.values() if subject.split == "train"]
    if len(training) < 3:
        raise DataFormatError(f"{packed_path}: {len(training)} training volumes, 3 at least expected to compare with")
    real, mirrored = np.empty((2, len(training), _length(config)), np.float32)
    for number, subject in enumerate(training):
        real[number], mirrored[number] = _real(packed, subject.index)
        progress(number + 1, len(training))
    among = np.maximum(real @ real.T, mirrored @ real.T)
    np.fill_diagonal(among, -1)
    threshold = float(np.percentile(among.max(axis=1), PERCENTILE))
    neighbours = []
    for item_id in item_ids:
        record = folder.record(item_id)
        made = read_generated(folder.path, record, config.data)
        vectors = _vectors(made.image, made.affine)
        alike = np.max([real @ vector for vector in vectors], axis=0)
        own = max(float(_real(packed, everyone[record["mask_id"]].index)[0] @ vector) for vector in vectors)
        best = int(alike.argmax())
        found = float(alike[best])
        neighbours.append(
            Neighbour(item_id, record["mask_id"], training[best].id, round(found, 4), round(own, 4), found > threshold)
        )
    return Closeness(round(threshold, 4), len(training), tuple(neighbours))


def _real(packed: Packed, index: int) -> tuple[Vector, Vector]:
    image, _ = packed.read(index)
    return _vectors(unit_range(image), packed.affine(index))


def _vectors(image: NDArray[np.float32], affine: Affine) -> tuple[Vector, Vector]:
    """Feature vectors of an image (C, D, H, W) and of its mirror image."""
    small = np.stack([shrink(channel, SIDE) for channel in np.clip(image, -1, 1)])
    left_right = 3 - next(axis for axis, code in enumerate(axis_codes(affine)) if code in "LR")
    return _normalise(small), _normalise(np.flip(small, left_right))


def _normalise(volume: NDArray[np.float32]) -> Vector:
    centred = volume.ravel() - volume.mean()
    return np.asarray(centred / max(float(np.linalg.norm(centred)), 1e-12), np.float32)


def _length(config: Config) -> int:
    return config.data.num_modalities * int(np.prod([min(side, SIDE) for side in config.data.size]))
