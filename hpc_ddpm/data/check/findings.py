"""What can be wrong with data: every kind of finding, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """One kind of finding."""

    severity: Severity
    """error: do not pack or train with it; warning: look; note: a fact that is often no problem."""
    advice: str
    """What to do, in one line."""


SOURCE_KINDS: dict[str, Kind] = {
    # ------------------------------------------------------------------------------------------ files
    "missing-file": Kind("error", "correct the path in the table, or fetch what the link leads to"),
    "duplicate-subject": Kind("error", "keep one file of each kind per subject; the subject is left out until then"),
    "patient-in-two-splits": Kind(
        "error", "give all subjects of a patient one split in the table, or set data.group=subject if they differ"
    ),
    "unmatched-file": Kind("warning", "give it the partner it lacks under the same name, or remove it; it is left out"),
    "set-aside": Kind("note", "nothing, if it is not needed; data.names says which files play which role"),
    "truncated": Kind("error", "copy the file again: it ends too early"),
    "unreadable": Kind("error", "copy or convert the file again"),
    "bad-affine": Kind("error", "repair the header: set a valid sform, for example from the original scan"),
    "dicom-series": Kind("error", "copy the series again: one series a folder, every slice once, none missing"),
    "series": Kind("error", "split the 4-D file and keep one volume, or give one file per modality"),
    "scaled-integers": Kind("note", "nothing: slope and intercept are applied"),
    "misnamed": Kind("note", "rename it (.nii.gz where it is gzipped, else .nii): other programs may refuse it"),
    "identifying-text": Kind(
        "warning", "clear these fields before you pass the files on; packed and generated volumes do not have them"
    ),
    # --------------------------------------------------------------------------------------- geometry
    "grid-shape": Kind("error", "resample one onto the other (mask: nearest neighbour)"),
    "grid-affine": Kind("error", "copy the affine if the voxels do match (look at them), else resample the mask"),
    "no-affine": Kind(
        "warning", "find out left and right, and write an sform; without one x is taken to run from right to left"
    ),
    "sform-qform": Kind("note", "look which of the two is right, and write it into both: programs differ"),
    "orientation-differs": Kind("note", "nothing: it is brought to data.orientation"),
    "orientation-mixed": Kind("error", "set data.orientation=RAS: with `native` some subjects lie on their side"),
    "anisotropic": Kind("warning", "set data.voxel_size_mm, or choose data.size in these proportions"),
    "voxel-size-outlier": Kind("warning", "set data.voxel_size_mm, or leave it out"),
    "size-mixed": Kind("note", "nothing: data.fit brings all to data.size"),
    "size-mismatch": Kind("error", "use data.fit=crop_pad or data.fit=resize, or another data.size"),
    "labels-cut": Kind(
        "warning", "raise data.size, or use data.crop_center=head or data.fit=resize, so that they lie inside"
    ),
    "label-vanishes": Kind("warning", "raise data.size: after resampling nothing of the label is left"),
    "flipped": Kind("warning", "compare them in a viewer; flip the voxels, or the affine, of the wrong one"),
    "mask-off-image": Kind("error", "check that mask and image are of one subject and one space"),
    # ----------------------------------------------------------------------------------------- labels
    "fractional-labels": Kind("error", "resample the mask again with nearest neighbour"),
    "unexpected-labels": Kind("error", "map them with data.labels.remap, or name them in data.labels.names"),
    "empty-mask": Kind("error", "leave the subject out, or give it its mask"),
    "missing-outer-label": Kind(
        "error",
        "add the head or brain to the mask (data.labels.coding or data.labels.foreground_label does, from the images)",
    ),
    "brain-unclear": Kind(
        "error", "give images without skull in a wider field of view, or masks in which the brain has its label"
    ),
    "raw-brats-coding": Kind(
        "error", "give data.labels.coding=brats2021 (4 is enhancing tumour) or brats2024 (4 is resection cavity)"
    ),
    "labels-merged": Kind(
        "error", "list both values in data.labels.remap if they are one label, or give data.labels.coding"
    ),
    "label-names-differ": Kind(
        "error", "bring data.labels.names into the order of dataset.json, or say in data.labels.remap what is what"
    ),
    "coding-unclear": Kind("error", "give data.labels.coding, or data.labels.remap for every value"),
    "label-absent": Kind("note", "nothing, if the subject has none"),
    "label-never-found": Kind("warning", "check data.labels: the network cannot learn a label that no mask has"),
    "mostly-unlabelled": Kind(
        "warning", "label the whole head or brain (data.labels.foreground_label): elsewhere the network draws blindly"
    ),
    "label-fragments": Kind("note", "remove specks of a few voxels if they are segmentation noise"),
    # ------------------------------------------------------------------------------------ intensities
    "not-finite": Kind("error", "replace NaN and infinite voxels by the background"),
    "constant": Kind("error", "leave the subject out: there is no image"),
    "out-of-range": Kind("error", "use data.normalization=percentile (or window for CT): `none` expects [-1, 1]"),
    "window-misses": Kind("error", "set data.low and data.high to the tissue's range in the units of the file"),
    "squeezed": Kind("warning", "use data.normalization=percentile: single bright voxels take up the whole range"),
    "looks-like-ct": Kind("warning", "use data.normalization=window with data.low and data.high in Hounsfield units"),
    "identical-modalities": Kind("warning", "put the right file in place: two modalities hold the same image"),
    "near-duplicate": Kind("warning", "keep one, or put them into one split: held-out data would leak into training"),
    "cannot-pack": Kind(
        "error", "raise data.size or use data.fit=resize, mend the file, or leave the subject out with --skip-bad"
    ),
}
"""`hpc-ddpm data check`."""

COPY = "copy the shard again, to another name that then replaces it (mv)"
"""What overwrites a shard in place kills who reads it, see `chunks`."""

PACKED_KINDS: dict[str, Kind] = {
    "index-damaged": Kind("error", "copy index.json again, or pack again"),
    "index-mismatch": Kind("error", "copy index.json and the shard again from one place, or pack again"),
    "missing-shard": Kind("error", "copy the shard again, or run the same `hpc-ddpm pack` again"),
    "wrong-size": Kind("error", f"{COPY}: it is cut off or another file"),
    "wrong-checksum": Kind("error", f"{COPY}: its bytes are not those that were packed"),
    "unreadable-shard": Kind("error", f"{COPY}, or delete it and run the same `hpc-ddpm pack` again"),
    "damaged-voxels": Kind("error", f"{COPY}, or delete it and run the same `hpc-ddpm pack` again"),
    "wrong-content": Kind("error", "pack again: the shard was written wrongly or edited"),
    "leaking-patient": Kind(
        "error", "divide anew with `hpc-ddpm data split` (only the index is written); --group subject if they differ"
    ),
    "extra-shard": Kind("warning", "delete it, if nothing else uses it: index.json does not name it"),
}
"""`hpc-ddpm data verify`."""

KINDS = SOURCE_KINDS | PACKED_KINDS


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    kind: str
    """A key of `KINDS`."""
    found: str
    """What, with its numbers."""
    subjects: tuple[str, ...] = ()
    """Whom it concerns; empty: the whole dataset."""
    file: str = ""

    @property
    def severity(self) -> Severity:
        """error, warning or note."""
        return KINDS[self.kind].severity

    @property
    def advice(self) -> str:
        """What to do."""
        return KINDS[self.kind].advice

    def to_json(self) -> dict[str, Any]:
        """Plain values, with severity and advice."""
        return {"severity": self.severity, "do": self.advice, **vars(self)}


def exit_code(findings: Sequence[Finding], *, strict: bool = False) -> int:
    """2 if there is an error (or, if strict, a warning), else 0."""
    bad = ("error", "warning") if strict else ("error",)
    return 2 if any(finding.severity in bad for finding in findings) else 0


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings of each kind, the worst kinds first, else in the order of `KINDS`."""
    order = sorted(KINDS, key=lambda kind: SEVERITIES.index(KINDS[kind].severity))
    groups = {kind: [finding for finding in findings if finding.kind == kind] for kind in order}
    return {kind: group for kind, group in groups.items() if group}
