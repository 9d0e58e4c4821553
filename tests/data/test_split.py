from pathlib import Path

from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.split import split_subjects


def subjects(*names: str, splits: dict[str, str] | None = None) -> list[Subject]:
    return [Subject(name, Path(name), {}, (splits or {}).get(name)) for name in names]


def test_share_and_stability() -> None:
    names = [f"s{i}" for i in range(1000)]
    first = dict(zip(names, split_subjects(subjects(*names), 0.2), strict=True))
    assert 150 < sum(split == "val" for split in first.values()) < 250
    mixed = dict(zip(names[500:], split_subjects(subjects(*names[500:]), 0.2), strict=True))
    assert all(first[name] == split for name, split in mixed.items())


def test_at_least_one_on_each_side() -> None:
    assert sorted(split_subjects(subjects("a", "b"), 0.01)) == ["train", "val"]
    assert sorted(split_subjects(subjects("a", "b"), 0.99)) == ["train", "val"]
    assert split_subjects(subjects("a", "b", "c"), 0) == ["train"] * 3
    assert split_subjects(subjects("a"), 0.99) == ["train"]


def test_own_splits_win() -> None:
    given = {"a": "val", "b": "test"}
    assert split_subjects(subjects("a", "b", "c", "d", splits=given), 1e-9) == [
        "val",
        "test",
        "train",
        "train",
    ]
    assert "val" in split_subjects(subjects("b", "c", "d", splits={"b": "test"}), 1e-9)
