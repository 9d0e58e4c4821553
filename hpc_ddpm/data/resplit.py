"""New splits for a packed dataset: only index.json is written, volumes stay where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from hpc_ddpm.data.shards import SPLITS, ShardEntry, read_index, write_index
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import writing_to


def draw_splits(subjects: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> dict[str, str]:
    """Subject -> train, val or test, by a hash of seed and id: others do not change when subjects are added.

    Every split with a fraction above 0, and train, gets at least one subject.

    Raises:
        ConfigError: fractions below 0 or 1 and more together, or too few subjects.
    """
    if min(val_fraction, test_fraction) < 0 or not val_fraction + test_fraction < 1:  # NaN is refused too
        raise ConfigError(
            f"--val {val_fraction:g} and --test {test_fraction:g} leave nothing to train on; "
            "give fractions of at least 0 and below 1 together"
        )
    needed = 1 + (val_fraction > 0) + (test_fraction > 0)
    if len(subjects) < needed:
        raise ConfigError(f"{len(subjects)} subjects cannot be divided into {needed} splits; set --val or --test to 0")
    places = {subject: _place(subject, seed) for subject in subjects}
    num_test = max(sum(place < test_fraction for place in places.values()), int(test_fraction > 0))
    held_out = sum(place < test_fraction + val_fraction for place in places.values())
    num_val = max(held_out - num_test, int(val_fraction > 0))
    while num_test + num_val >= len(subjects):
        num_test, num_val = (num_test - 1, num_val) if num_test > num_val else (num_test, num_val - 1)
    names = ["test"] * num_test + ["val"] * num_val + ["train"] * (len(subjects) - num_test - num_val)
    return dict(zip(sorted(subjects, key=places.__getitem__), names, strict=True))


def resplit(path: str | Path, splits: Mapping[str, str]) -> dict[str, int]:
    """Write new splits into the index, at once; readers that have it open keep the old ones.

    Args:
        path: of the packed dataset.
        splits: train, val or test for every packed subject.

    Returns:
        Subjects per split.

    Raises:
        DataFormatError: not a packed dataset, or `splits` names other subjects than it holds.
        ClusterError: it cannot be written.
    """
    path = Path(path)
    index = read_index(path)
    missing, unknown = sorted(set(index.id) - set(splits)), sorted(set(splits) - set(index.id))
    if missing or unknown:
        what = f"{len(missing)} packed subjects have no split" if missing else f"{len(unknown)} subjects are not packed"
        some = ", ".join((missing or unknown)[:5])
        raise DataFormatError(f"{path}: {what} ({some}); name exactly the subjects of `hpc-ddpm data ls`")
    with writing_to(path, "copy of the dataset"):
        write_index(path, index.data, [_with_splits(entry, splits) for entry in index.shards])
    return {name: count for name in SPLITS if (count := Counter(splits.values())[name])}


def _with_splits(entry: ShardEntry, splits: Mapping[str, str]) -> ShardEntry:
    packed = {row: subject for row, subject in enumerate(entry["id"]) if str(row) not in entry["left_out"]}
    rows = {name: [row for row, subject in packed.items() if splits[subject] == name] for name in ("val", "test")}
    return {**entry, "val": rows["val"], "test": rows["test"]}


def _place(subject: str, seed: int) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(sha256(f"{seed}:{subject}".encode()).digest()[:8], "big") / 2**64
