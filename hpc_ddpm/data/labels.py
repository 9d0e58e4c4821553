"""Label schemes: from the integers in a mask file to K condition channels on the device; 0 is background."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.coding import (
    BRATS_BRAIN,
    BRATS_ENHANCING,
    BRATS_ENHANCING_ON_DISK,
    become,
    brain_label,
    describe,
    merged,
    speaks_brats,
)
from hpc_ddpm.errors import ConfigError, DataFormatError

if TYPE_CHECKING:
    import torch

OUTER_NAMES = ("head", "brain")
MAX_TUMOUR = 0.5
"""Share of the brain that one part of a tumour may fill."""
MAX_ROUNDING = 0.01
"""Distance of a label from a whole number; scale factors of stored integers leave up to 0.008 (BraTS in uint8)."""


def remap_labels(mask: NDArray[Any], labels: LabelsConfig, path: Path) -> NDArray[np.uint8]:
    """Mask values as on disk to the scheme's, as uint8; -1 counts as background (some BraTS files carry it).

    Args:
        mask: any shape, any number type; whole values, up to what scale factors leave.
        labels: `remap` is applied once, to all values at the same time.
        path: of the mask, for messages.

    Raises:
        DataFormatError: fractional values, NaN, or values that are neither 0 nor in `labels.names`.
    """
    if mask.dtype.kind == "f":
        mask = _rounded(mask, path)
    present = {value: become(value, labels) for value in _distinct(mask)}
    unexpected = sorted(value for value, label in present.items() if label != 0 and label not in labels.names)
    if unexpected:
        raise DataFormatError(
            f"{path}: unexpected labels {_some([describe(value, labels.coding) for value in unexpected])} found, "
            f"expected 0 and {_named(labels)}; map them with data.labels.remap or name them in data.labels.names",
            "unexpected-labels",
        )
    if pair := merged(present, labels):
        raise DataFormatError(
            f"{path}: labels {pair[0]} and {pair[1]} would both become {pair[0]} ({labels.names[pair[0]]}), which "
            f"data.labels.remap={{{pair[1]}: {pair[0]}}} does not say of {pair[0]}; list both there if it is meant, "
            "or give data.labels.coding",
            "labels-merged",
        )
    remapped = np.zeros(mask.shape, np.uint8)
    for value, label in present.items():
        if label:
            remapped[mask == value] = label
    return remapped


def values_of(mask: NDArray[Any], path: Path) -> list[int]:
    """The values of a mask, sorted.

    Raises:
        DataFormatError: fractional values or NaN.
    """
    return _distinct(_rounded(mask, path) if mask.dtype.kind == "f" else mask)


def _distinct(mask: NDArray[Any]) -> list[int]:
    """Sorted; by a table where that is enough, which takes no sorting of voxels."""
    if mask.dtype == np.uint8:
        return np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()
    return [int(value) for value in np.unique(mask)]


def _rounded(mask: NDArray[Any], path: Path) -> NDArray[Any]:
    if not np.isfinite(mask).all():
        raise DataFormatError(
            f"{path}: NaN or infinite labels found, whole numbers expected; replace them by 0", "not-finite"
        )
    rounded = np.rint(mask)
    fractional = mask[np.abs(mask - rounded) > MAX_ROUNDING]
    if fractional.size:
        raise DataFormatError(
            f"{path}: fractional label {fractional.min():g} found, whole numbers expected; "
            "the mask was resampled with interpolation: resample it with nearest neighbour",
            "fractional-labels",
        )
    return rounded


def add_foreground(mask: NDArray[np.uint8], inside: NDArray[np.bool_], labels: LabelsConfig, path: Path) -> None:
    """Give `labels.foreground_label`, if set, to the unlabelled voxels among `inside`; changes `mask`.

    Args:
        mask: (D, H, W), without that label.
        inside: (D, H, W), the brain.
        labels: the scheme, with the rules of its coding.
        path: of the mask, for messages.

    Raises:
        DataFormatError: a part of a tumour fills the brain, so its value on disk is the brain's.
    """
    if labels.foreground_label is None:
        return
    if labels.remap and speaks_brats(labels):
        shares = count_labels(mask[inside], labels) / max(int(np.count_nonzero(inside)), 1)
        label = list(labels.names)[int(shares.argmax())]
        if shares.max() > MAX_TUMOUR and label != labels.foreground_label:
            coding = "raw BraTS" if labels.coding == "auto" else labels.coding
            raise DataFormatError(
                f"{path}: label {label} ({labels.names[label]}) would fill {shares.max():.0%} of the brain: the mask "
                f"is not coded as {coding} but holds the brain; use data.labels.coding=as_named for it",
                "coding-unclear",
            )
    mask[(mask == 0) & inside] = labels.foreground_label


def to_brats_raw(mask: NDArray[np.uint8], labels: LabelsConfig) -> NDArray[np.uint8]:
    """Mask values of a BraTS scheme to those of raw BraTS files: enhancing tumour is 4, the rest of the brain 0.

    Raises:
        ConfigError: the scheme has other labels than BraTS.
    """
    if set(labels.names) != {1, 2, BRATS_ENHANCING, BRATS_BRAIN}:
        raise ConfigError(
            f"sampling.output.mask_coding=brats_raw needs labels 1, 2, 3 and 4 = brain, found {_named(labels)}; "
            "use mask_coding=packed"
        )
    raw = mask.copy()
    raw[mask == BRATS_BRAIN] = 0
    raw[mask == BRATS_ENHANCING] = BRATS_ENHANCING_ON_DISK
    return raw


def written_names(labels: LabelsConfig, mask_coding: str) -> dict[int, str]:
    """Value -> name in masks that are written in this coding: packed, or brats_raw as by `to_brats_raw`."""
    if mask_coding != "brats_raw":
        return dict(labels.names)
    to_raw = {BRATS_ENHANCING: BRATS_ENHANCING_ON_DISK}
    return {to_raw.get(label, label): name for label, name in labels.names.items() if label != BRATS_BRAIN}


def covers_foreground(labels: LabelsConfig) -> bool:
    """Whether the mask is, by its definition, all that is above background (skull-stripped brains)."""
    return labels.foreground_label is not None or "brain" in labels.names.values()


def outer_label(labels: LabelsConfig) -> int | None:
    """The label that surrounds the others, without which a network draws noise: foreground, head or brain."""
    if labels.foreground_label is not None:
        return labels.foreground_label
    return next((value for value, name in labels.names.items() if name in OUTER_NAMES), None)


def needs_a_look(labels: LabelsConfig) -> bool:
    """Whether a mask of the scheme may be raw BraTS, where another label has the value of its brain."""
    is_taken_as_is = labels.foreground_label is None and not labels.remap
    return is_taken_as_is and brain_label(labels) == BRATS_BRAIN and BRATS_ENHANCING in labels.names


def check_present(mask: NDArray[np.uint8], labels: LabelsConfig, path: Path, is_brain: bool | None = None) -> None:
    """Refuse a mask that is empty, lacks the outer label, or has raw BraTS values where the scheme has brain.

    Args:
        mask: (D, H, W).
        labels: the scheme.
        path: of the mask, for messages.
        is_brain: whether the image shows that label 4 is the brain; None is unknown.

    Raises:
        DataFormatError: names the file and the labels.
    """
    counts = dict(zip(labels.names, count_labels(mask, labels).tolist(), strict=True))
    found = [label for label, count in counts.items() if count]
    if not found:
        raise DataFormatError(
            f"{path}: the mask is empty, expected some of {_named(labels)}; leave the subject out", "empty-mask"
        )
    outer = outer_label(labels)
    if outer is not None and outer not in found:
        raise DataFormatError(
            f"{path}: label {outer} ({labels.names[outer]}) is missing, found {found}; give a mask "
            "that has it (a raw BraTS mask gets it from its images, by data.labels.coding)",
            "missing-outer-label",
        )
    if not needs_a_look(labels):
        return
    is_small = counts[BRATS_BRAIN] < sum(counts.values()) / 2 and BRATS_ENHANCING not in found
    if is_brain is False or (is_brain is None and is_small):
        found_so = "covers little of the brain" if is_brain is False else "is smaller than the labels inside it"
        absent = "" if BRATS_ENHANCING in found else " and 3 is absent"
        raise DataFormatError(
            f"{path}: label 4 ({labels.names[4]}) {found_so}{absent}: this is raw BraTS coding (4 = enhancing tumour "
            "until 2021, resection cavity in 2024); pack with data.labels.coding=brats2021 or brats2024",
            "raw-brats-coding",
        )


def count_labels(mask: NDArray[np.uint8], labels: LabelsConfig) -> NDArray[np.int64]:
    """Voxels of each label, (K,), in the order of `labels.names`."""
    return np.bincount(mask.ravel(), minlength=256)[list(labels.names)].astype(np.int64)


def one_hot(
    mask: torch.Tensor, labels: LabelsConfig, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Integer labels to condition channels, on the device of the mask.

    Args:
        mask: (B, D, H, W) uint8.
        labels: one channel per entry of `names`, in that order; `off_value` outside, `on_value` inside.
        dtype: of the result; None is float32.
        out: tensor to fill, used if it has this shape; None allocates.

    Returns:
        (B, K, D, H, W).
    """
    import torch  # here, as packing does without

    from hpc_ddpm.data.buffers import empty

    shape = mask.shape[0], len(labels.names), *mask.shape[1:]
    if out is None or out.shape != shape:
        out = empty(shape, dtype or torch.float32, mask.device)
    for channel, label in enumerate(labels.names):
        torch.eq(mask, label, out=out[:, channel])
    if (labels.off_value, labels.on_value) != (0.0, 1.0):
        out.mul_(labels.on_value - labels.off_value).add_(labels.off_value)
    return out


def _named(labels: LabelsConfig) -> str:
    return ", ".join(f"{value} ({name})" for value, name in labels.names.items())


def _some(values: list[str], limit: int = 10) -> str:
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return f"[{', '.join(values[:limit])}]{more}"
