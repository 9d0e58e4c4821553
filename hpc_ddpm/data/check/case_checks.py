"""The checks of one subject: each looks at an opened case and yields what it finds. D H W."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_ddpm.data.check.case import Case
from hpc_ddpm.data.check.findings import Finding
from hpc_ddpm.data.check.similarity import correlation, mirrored_axis
from hpc_ddpm.data.discover import MASK
from hpc_ddpm.data.geometry import resample
from hpc_ddpm.data.intensity import normalize
from hpc_ddpm.data.labels import check_present, count_labels, outer_label
from hpc_ddpm.data.nifti import axis_codes, voxel_size_mm
from hpc_ddpm.data.preprocess import Prepared, shows_brain
from hpc_ddpm.errors import DataFormatError

MAX_ANISOTROPY = 2.0
MAX_CUT_SHARE = 0.005
"""Share of a label's voxels that may lie outside data.size."""
MIN_OVERLAP = 0.25
"""Share of the mask that must lie on what is not background."""
MAX_CLIPPED_SHARE, MIN_SPREAD = 0.98, 0.02
"""Share of voxels that may lie outside a window; share of the window that the inner 99 % of voxels must take up."""
SQUEEZED_BELOW = 0.2
"""Share of the range: an image is squeezed if 99.5 % of its voxels take up less."""
AIR_HU = -900
FRAGMENT_VOXELS, MAX_FRAGMENTS = 5, 10
AXES = ("up and down", "front and back", "left and right")

Findings = Iterator[Finding]

# ------------------------------------------------------------------------------------ files and geometry


def check_headers(case: Case) -> Findings:
    """Scale factors, text about people, and headers that do not say where the voxels are, or say it twice."""
    for role, header in case.headers.items():
        if header.is_scaled:
            yield case.finding("scaled-integers", "numbers with a slope or intercept", role)
        if not header.has_affine:
            yield case.finding("no-affine", "neither sform nor qform (of DICOM: orientation or spacing) is set", role)
        if header.texts:
            yield case.finding("identifying-text", f"{', '.join(header.texts)} may identify a person", role)
        if header.is_misnamed:
            yield case.finding("misnamed", "gzipped without saying so in its name, or the other way round", role)
        if role in case.volumes and header.two_places_mm > 0.1 * min(voxel_size_mm(case.volumes[role].file_affine)):
            found = f"sform and qform are {header.two_places_mm:.3g} mm apart at a corner; the sform is used"
            yield case.finding("sform-qform", found, role)


def check_grids(case: Case) -> Findings:
    """Images on another grid than the mask."""
    if case.mask is None:
        return
    for role, image in case.images.items():
        if image.data.shape != case.mask.data.shape:
            shapes = [_by(volume.data.shape[::-1]) for volume in (image, case.mask)]
            yield case.finding("grid-shape", f"{role} has {shapes[0]} voxels, its mask {shapes[1]}", role)
        elif not case.fits_mask(image):
            codes = [axis_codes(volume.file_affine) for volume in (image, case.mask)]
            corners = [_by(volume.file_affine[:3, 3], " ") for volume in (image, case.mask)]
            found = f"{role} lies at {corners[0]} ({codes[0]}), its mask at {corners[1]} ({codes[1]})"
            yield case.finding("grid-affine", found, role)


def check_voxel_size(case: Case) -> Findings:
    """Voxels far from cubic that stay so."""
    if case.mask is not None and case.config.voxel_size_mm is None:
        sides = voxel_size_mm(case.mask.file_affine)
        if max(sides) > MAX_ANISOTROPY * min(sides):
            yield case.finding("anisotropic", f"voxels of {_by(sides)} mm", MASK)


def check_orientation(case: Case) -> Findings:
    """Files stored in another orientation than data.orientation."""
    wanted = case.config.orientation
    found = {role: axis_codes(volume.file_affine) for role, volume in case.volumes.items()}
    if wanted != "native" and any(codes != wanted for codes in found.values()):
        codes = ", ".join(sorted(set(found.values())))
        yield case.finding("orientation-differs", f"stored {codes}, data.orientation={wanted}")


def check_size(case: Case) -> Findings:
    """Labels that the fit to data.size cuts off or loses."""
    if not isinstance(case.prepared, Prepared) or not isinstance(case.labels, np.ndarray):
        return
    scheme = case.config.labels
    before = count_labels(resample(case.labels, case.prepared.geometry), scheme).tolist()
    after = count_labels(case.prepared.mask, scheme).tolist()
    for (label, name), whole, kept in zip(scheme.names.items(), before, after, strict=True):
        if whole and not kept and label != scheme.foreground_label:
            yield case.finding("label-vanishes", f"{whole} voxels of {label} ({name}), none after the fit", MASK)
        elif case.config.fit == "crop_pad" and whole - kept > MAX_CUT_SHARE * whole:
            share = f"{(whole - kept) / whole:.1%} of {label} ({name})"
            yield case.finding("labels-cut", f"{share} lies outside data.size={_by(case.config.size)}", MASK)


def check_place(case: Case) -> Findings:
    """A mask that is not where the image is."""
    if case.inside is None or case.small_labels is None or not case.small_labels.any():
        return
    overlap = float(case.inside[case.small_labels > 0].mean())
    if overlap < MIN_OVERLAP:
        yield case.finding("mask-off-image", f"{overlap:.0%} of the mask lies on the image", MASK)


def check_flips(case: Case) -> Findings:
    """Volumes that fit the first image better when mirrored."""
    roles = [role for role in case.config.modalities if role in case.small]
    volumes: dict[str, NDArray[Any]] = {role: case.small[role] for role in roles}
    if case.small_labels is not None and case.small_labels.any():
        volumes[MASK] = case.small_labels
    for role in list(volumes)[1:] if roles else ():
        if mirrored := mirrored_axis(volumes[roles[0]], volumes[role]):
            axis, better, plain = mirrored
            found = f"{role} fits {roles[0]} better mirrored {AXES[axis]} ({better:.2f} against {plain:.2f})"
            yield case.finding("flipped", found, role)


# ------------------------------------------------------------------------------------------------ labels


def check_labels(case: Case) -> Findings:
    """Values that the label scheme does not have, and labels that are not there."""
    if isinstance(case.labels, DataFormatError):
        yield case.refusal(case.labels)
    elif case.labels is not None:
        try:
            first = case.on_grid.get(case.config.modalities[0])
            is_brain = None if first is None else shows_brain(case.labels, first.data, case.config)
            check_present(case.labels, case.config.labels, case.subject.mask, is_brain)
        except DataFormatError as error:
            yield case.refusal(error)
            return
        counts = count_labels(case.labels, case.config.labels).tolist()
        for (label, name), count in zip(case.config.labels.names.items(), counts, strict=True):
            if not count:
                yield case.finding("label-absent", f"no voxel of {label} ({name})", MASK)


def check_fragments(case: Case) -> Findings:
    """Labels in many specks of a few voxels."""
    if not isinstance(case.labels, np.ndarray):
        return
    specks = {}
    for label, box in enumerate(ndimage.find_objects(case.labels), start=1):
        if box and label in case.config.labels.names and label != outer_label(case.config.labels):
            pieces, _ = ndimage.label(case.labels[box] == label)
            specks[label] = int((np.bincount(pieces.ravel())[1:] < FRAGMENT_VOXELS).sum())
    if max(specks.values(), default=0) > MAX_FRAGMENTS:
        shown = ", ".join(
            f"{count} of {label} ({case.config.labels.names[label]})" for label, count in specks.items() if count
        )
        yield case.finding("label-fragments", f"pieces of less than {FRAGMENT_VOXELS} voxels: {shown}", MASK)


# ------------------------------------------------------------------------------------------- intensities


def check_finite(case: Case) -> Findings:
    """NaN and infinite voxels."""
    for role, image in case.images.items():
        bad = image.data.size - int(np.isfinite(image.data).sum())
        if bad:
            yield case.finding("not-finite", f"{bad} voxels are NaN or infinite", role)


def check_intensities(case: Case) -> Findings:
    """Images with one value, and values that the normalisation does not take."""
    if isinstance(case.prepared, Prepared):
        return
    for role, image in case.on_grid.items():
        try:
            normalize(image.data, case.config, case.path(role))
        except DataFormatError as error:
            yield case.refusal(error)


def check_range(case: Case) -> Findings:
    """Intensities that the normalisation turns into next to nothing."""
    if not isinstance(case.prepared, Prepared):
        return
    mode = case.config.normalization
    for role, volume in zip(case.config.modalities, case.prepared.image, strict=True):
        some = volume[::2, ::2, ::2]
        low, high = np.percentile(some, [0.5, 99.5])
        clipped = float((np.abs(some) > 1 - 1e-6).mean())
        if mode == "window" and (clipped > MAX_CLIPPED_SHARE or high - low < 2 * MIN_SPREAD):
            lowest, highest = (f"{value:g}" for value in (case.images[role].data.min(), case.images[role].data.max()))
            window = f"{case.config.low:g} to {case.config.high:g}"
            yield case.finding("window-misses", f"values from {lowest} to {highest}, window {window}", role)
        elif mode == "med_ddpm_brats" and high + 1 < 2 * SQUEEZED_BELOW:
            yield case.finding("squeezed", f"99.5 % of voxels take up {(high + 1) / 2:.0%} of the range", role)
        if mode not in ("window", "none") and case.images[role].data.min() <= AIR_HU:
            found = f"values down to {case.images[role].data.min():g}, data.normalization={mode}"
            yield case.finding("looks-like-ct", found, role)


def check_identical(case: Case) -> Findings:
    """One image in the place of two modalities."""
    for (one, first), (other, second) in combinations(case.small.items(), 2):
        if first.shape == second.shape and correlation(first, second) > 0.9999:
            yield case.finding("identical-modalities", f"{other} is {one}", other)


# ------------------------------------------------------------------------------------------------- all


def check_packable(case: Case) -> Findings:
    """What `hpc-ddpm pack` refuses although the files themselves are sound: the fit to data.size is to blame."""
    if isinstance(case.prepared, DataFormatError):
        finding = case.refusal(case.prepared)
        is_size = finding.kind == "size-mismatch"
        yield finding if is_size else replace(finding, kind="cannot-pack", found=f"after the fit, {finding.found}")


CHECKS: tuple[Callable[[Case], Findings], ...] = (
    check_headers,
    check_grids,
    check_voxel_size,
    check_orientation,
    check_labels,
    check_finite,
    check_intensities,
    check_size,
    check_range,
    check_place,
    check_flips,
    check_identical,
    check_fragments,
)


def check_case(case: Case) -> list[Finding]:
    """All findings of a case; a refusal of the packing code is added where nothing else explains it."""
    findings = [*case.findings, *(finding for check in CHECKS for finding in check(case))]
    if not any(finding.severity == "error" for finding in findings):
        findings += check_packable(case)
    return findings


def _by(numbers: object, between: str = "x") -> str:
    return between.join(f"{number:g}" for number in np.asarray(numbers).tolist())
