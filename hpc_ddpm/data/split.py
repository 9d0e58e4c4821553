"""Who is held out: a function of the subject id, so that it stays when subjects are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

from hpc_ddpm.data.discover import Subject


def split_subjects(
    subjects: Sequence[Subject], val_fraction: float, known: Mapping[str, str] | None = None
) -> list[str]:
    """train, val or test for each subject: the known one, else its own, else by a hash of its id.

    Of two or more subjects without one, at least one is in val (if val_fraction > 0) and one in train; once
    splits are known, the hash alone decides.
    """
    if known:
        return [known.get(subject.id) or subject.split or _by_hash(subject.id, val_fraction) for subject in subjects]
    splits = [subject.split or "" for subject in subjects]
    free = [index for index, split in enumerate(splits) if not split]
    free.sort(key=lambda index: _fraction(subjects[index].id))
    held_out = sum(_fraction(subjects[index].id) < val_fraction for index in free)
    if len(free) > 1 and val_fraction > 0:
        held_out = min(max(held_out, 0 if "val" in splits else 1), len(free) - 1)
    elif len(free) == 1:
        held_out = 0
    for rank, index in enumerate(free):
        splits[index] = "val" if rank < held_out else "train"
    return splits


def _by_hash(subject: str, val_fraction: float) -> str:
    return "val" if _fraction(subject) < val_fraction else "train"


def _fraction(subject: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(sha256(subject.encode()).digest()[:8], "big") / 2**64
