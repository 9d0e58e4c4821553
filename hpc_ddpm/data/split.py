"""Who is held out: a function of the subject id, so that it stays when subjects are added; a patient is never torn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.patients import first_subjects


def split_subjects(
    subjects: Sequence[Subject], val_fraction: float, known: Mapping[str, tuple[str, str]] | None = None
) -> list[str]:
    """train, val or test for each subject: the known one, else its own, else that of its patient, else by a hash.

    The hash is that of the first subject of the patient. Of two or more patients without a split, at least one is in
    val (if val_fraction > 0) and one in train; once splits are known, the hash alone decides.

    Args:
        subjects: with their patients.
        val_fraction: share of the patients.
        known: subject -> (patient, split), also of others than `subjects`.
    """
    known = known or {}
    settled = {patient: split for patient, split in reversed(list(known.values()))}
    patients = [subject.patient or subject.id for subject in subjects]
    splits = [known[subject.id][1] if subject.id in known else subject.split for subject in subjects]
    for patient, split in zip(patients, splits, strict=True):
        if split:
            settled.setdefault(patient, split)
    first = first_subjects({subject.id: patient for subject, patient in zip(subjects, patients, strict=True)})
    free = {first[subject.id]: patient for subject, patient in zip(subjects, patients, strict=True)}
    order = sorted((one for one, patient in free.items() if patient not in settled), key=_fraction)
    held_out = sum(_fraction(one) < val_fraction for one in order)
    if not known and len(order) > 1 and val_fraction > 0:
        held_out = min(max(held_out, 0 if "val" in splits else 1), len(order) - 1)
    elif not known and len(order) == 1:
        held_out = 0
    settled |= {free[one]: "val" if rank < held_out else "train" for rank, one in enumerate(order)}
    return [split or settled[patient] for patient, split in zip(patients, splits, strict=True)]


def _fraction(subject: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(sha256(subject.encode()).digest()[:8], "big") / 2**64
