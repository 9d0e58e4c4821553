"""New splits: deterministic, by subject, and nothing but index.json is touched."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.resplit import draw_splits, resplit
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.data.summary import find_subject, list_subjects, summarise
from hpc_ddpm.data.table import read_splits
from hpc_ddpm.data.verify import verify
from hpc_ddpm.errors import ConfigError, DataFormatError

IDS = [f"s{number:03d}" for number in range(200)]


def test_a_draw_depends_on_seed_and_ids_alone() -> None:
    drawn = draw_splits(IDS, 0.2, 0.1, 0)
    assert drawn == draw_splits(IDS[::-1], 0.2, 0.1, 0)
    assert drawn != draw_splits(IDS, 0.2, 0.1, 1)
    counts = Counter(drawn.values())
    assert 25 <= counts["val"] <= 55 and 10 <= counts["test"] <= 32
    grown = draw_splits([*IDS, "new"], 0.2, 0.1, 0)
    assert {subject: grown[subject] for subject in IDS} == drawn
    assert set(draw_splits(IDS, 0, 0, 0).values()) == {"train"}


@pytest.mark.parametrize("count", [3, 4, 5])
def test_every_split_gets_a_subject(count: int) -> None:
    for seed in range(20):
        assert set(draw_splits(IDS[:count], 0.4, 0.5, seed).values()) == {"train", "val", "test"}


def test_impossible_draws() -> None:
    with pytest.raises(ConfigError, match=r"--val 0.5 and --test 0.5 leave nothing to train on; give"):
        draw_splits(IDS, 0.5, 0.5, 0)
    with pytest.raises(ConfigError, match="leave nothing"):
        draw_splits(IDS, -0.1, 0.5, 0)
    for fractions in ((math.nan, 0), (0, math.nan), (0.1, math.inf)):
        with pytest.raises(ConfigError, match="leave nothing"):
            draw_splits(IDS, *fractions, 0)
    with pytest.raises(ConfigError, match="2 subjects cannot be divided into 3 splits; set --val or --test to 0"):
        draw_splits(IDS[:2], 0.1, 0.1, 0)


@pytest.fixture
def packed(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> Path:
    """Six subjects in three shards."""
    pack(heads, tmp_path / "packed", tiny(shard_size_gib=2 * 8 * 10 * 12 * 3 / 2**30))
    return tmp_path / "packed"


def splits_of(path: Path) -> dict[str, str]:
    return {subject.id: subject.split for subject in open_packed(path).subjects()}


def test_only_the_index_changes(packed: Path, heads: Path, tiny: Callable[..., DataConfig]) -> None:
    before = {file.name: file.read_bytes() for file in packed.glob("*.h5")}
    wanted = draw_splits(list(splits_of(packed)), 0.3, 0.3, 5)
    assert resplit(packed, wanted) == {name: count for name, count in sorted_counts(wanted)}
    assert splits_of(packed) == wanted
    assert {file.name: file.read_bytes() for file in packed.glob("*.h5")} == before
    assert verify(packed, deep=True) == []
    pack(heads, packed, tiny(shard_size_gib=2 * 8 * 10 * 12 * 3 / 2**30))
    assert splits_of(packed) == wanted


def sorted_counts(splits: dict[str, str]) -> list[tuple[str, int]]:
    counts = Counter(splits.values())
    return [(name, counts[name]) for name in ("train", "val", "test") if counts[name]]


def test_a_table_of_splits(packed: Path, tmp_path: Path) -> None:
    ids = list(splits_of(packed))
    table = tmp_path / "splits.csv"
    splits = ("train", "train", "val", "train", "test", "test")
    rows = [f"{subject},9,{split}\n" for subject, split in zip(ids, splits, strict=True)]
    table.write_text("Subject,age,split\n" + "".join(rows))
    wanted = read_splits(table)
    assert Counter(wanted.values()) == {"train": 3, "val": 1, "test": 2}
    resplit(packed, wanted)
    assert splits_of(packed) == wanted
    missing = {subject: split for subject, split in wanted.items() if subject != ids[2]}
    with pytest.raises(DataFormatError, match=rf"1 packed subjects have no split \({ids[2]}\); name exactly"):
        resplit(packed, missing)
    with pytest.raises(DataFormatError, match=r"1 subjects are not packed \(ghost\)"):
        resplit(packed, wanted | {"ghost": "val"})
    assert splits_of(packed) == wanted


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,dev", "row 1: subject 'a' and split 'dev' found, a subject and one of train, val, test expected"),
        (",val", "row 1: subject '' and split 'val' found"),
        ("a,val\na,test", "row 2: a is in val and test; give it one split"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(f"subject,split\n{rows}\n")
    with pytest.raises(DataFormatError, match=message):
        read_splits(tmp_path / "t.csv")


def test_summary_and_list(packed: Path) -> None:
    rows = list_subjects(packed)
    assert [row["id"] for row in rows] == list(splits_of(packed))
    dataset = open_packed(packed)
    for row, subject in zip(rows, dataset.subjects(), strict=True):
        assert list(row["voxels"].values()) == dataset.label_voxels(subject.index).tolist()
    assert [row["shard"] for row in rows] == [f"shard-{n // 2:05d}.h5" for n in range(6)]
    assert {row["split"] for row in list_subjects(packed, "val")} == {"val"}
    totals = summarise(packed)
    assert (totals["subjects"], totals["shards"], totals["size"]) == (6, 3, [8, 10, 12])
    assert totals["labels"]["head"]["voxels"] == sum(row["voxels"]["head"] for row in rows)
    assert totals["voxel_sizes_mm"] == {"24x19.2x16": 6}
    assert totals["size_bytes"] == sum(file.stat().st_size for file in packed.glob("*.h5"))
    json.dumps([rows, totals])
    shutil.rmtree(packed)
    with pytest.raises(DataFormatError, match="no such packed dataset"):
        summarise(packed)


def test_a_subject_that_is_not_there(packed: Path) -> None:
    with pytest.raises(DataFormatError, match=r"no subject head_003; nearest of 6: head_0003, .*`hpc-ddpm data ls`"):
        find_subject(packed, "head_003")
    assert find_subject(packed, "head_0003")[1] == 3
