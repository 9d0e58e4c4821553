"""`hpc-ddpm bench data` on a tiny subject."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_ddpm.benchmark.data import med_ddpm
from hpc_ddpm.benchmark.data.contestants import NETWORK, OURS, STORED, build_contestants
from hpc_ddpm.benchmark.data.report import to_markdown
from hpc_ddpm.benchmark.data.run import bench_data
from hpc_ddpm.benchmark.data.sample import make_sample
from hpc_ddpm.benchmark.record import describe, environment, read_report, table, write_report
from hpc_ddpm.benchmark.timing import spread, take_turns, timed
from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.errors import ConfigError, DataFormatError
from launch.cli import main

TINY = DataConfig(size=(8, 10, 12), modalities=("t1", "t2"))
BRATS = DataConfig(
    size=(8, 8, 12), modalities=("t1", "t1ce", "t2", "flair"), labels=LabelsConfig(names={1: "core", 4: "brain"})
)
PEERS = ("zarr", "webdataset", "monai.data")


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were not installed; and turns are short."""
    monkeypatch.setattr("hpc_ddpm.benchmark.data.run.MIN_TURN_S", 0.01)
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)


def test_turns_are_fair() -> None:
    order: list[str] = []
    results = take_turns({name: lambda name=name: order.append(name) or name for name in "abc"}, 2)
    assert "".join(order) == "abc" + "bca" + "cab"  # the first round is warm-up
    assert results == {name: [name] * 2 for name in "abc"}


def test_a_timing_counts_all_threads() -> None:
    timing = timed(lambda: np.ones(10**6).sum())
    assert 0 < timing.wall_s < 60
    assert 0 < timing.cpu_s < 60
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"p10": 1.4, "median": 3.0, "p90": 4.6}


def test_record(tmp_path: Path) -> None:
    where = environment(["numpy", "no-such-package"])
    assert where["versions"]["numpy"] == np.__version__
    assert "no-such-package" not in where["versions"]
    page = describe(where)
    assert where["cpu"] in page
    assert "host" not in where
    (tmp_path / "other.json").write_text('{"schema": "hpc_ddpm benchmark", "version": 9}')
    with pytest.raises(DataFormatError, match=r"hpc_ddpm benchmark 9 found, hpc_ddpm benchmark 1 expected"):
        read_report(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataFormatError, match="not a benchmark report"):
        read_report(tmp_path / "other.json")
    assert table(["a", "b"], [["1", "22"]]) == "| a | b  |\n|---|----|\n| 1 | 22 |"


def test_report_of_a_synthetic_subject(tmp_path: Path, no_peers: None) -> None:
    turns: list[tuple[int, int]] = []
    report = bench_data(TINY, repeats=1, workers=(0, 2), progress=lambda done, total, note: turns.append((done, total)))
    assert turns[-1][0] == turns[-1][1] == len(turns)
    write_report(tmp_path / "data.json", report)
    assert read_report(tmp_path / "data.json") == report
    assert report["benchmark"] == "data"
    assert report["settings"]["shape"] == [2, 12, 10, 8]
    assert report["settings"]["missing"] == {
        "Zarr": "zarr",
        "WebDataset": "webdataset",
        "MONAI PersistentDataset": "monai",
    }
    disciplines = {("written", None), ("cold", None), ("warm", None), ("warm", 0), ("warm", 2)}
    found: dict[tuple[str, str], set[tuple[str, int | None]]] = {}
    for row in report["rows"]:
        found.setdefault((row["stage"], row["contestant"]), set()).add((row["cache"], row["workers"]))
        assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert row["cpu_ms"]["median"] >= 0
        assert row["volumes_per_s"] == pytest.approx(1e3 / row["ms"]["median"])
        assert row["mb_per_s"] == pytest.approx(row["volumes_per_s"] * 8 * 10 * 12 * 5 / 1e6)
        assert row["contestant"] != OURS or row["times_ours"] == 1
    assert found == dict.fromkeys(
        [
            *((STORED, name) for name in (OURS, f"{OURS}, uncompressed", "memory map", "memory map, kept")),
            *((STORED, name) for name in ("HDF5 with h5py", "nii.gz with nibabel")),
            *((NETWORK, name) for name in (OURS, "naive loader")),
        ],
        disciplines,
    )
    page = to_markdown(report)
    assert "Zarr (`pip install zarr`)" in page
    assert "at least 15 times as fast as naive loader" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peers' own, such as files they leave open
def test_peers_read_the_same(tmp_path: Path) -> None:
    sample = make_sample(TINY, tmp_path, None, None)
    found, missing = build_contestants(sample, tmp_path, None)  # compares voxels
    assert all(path.is_file() for contestant in found for path in contestant.files)
    for contestant in found:  # nothing comes from memory, and only some compress
        is_small = contestant.name in (OURS, "nii.gz with nibabel", "Zarr") or contestant.stage == NETWORK
        assert is_small or sum(path.stat().st_size for path in contestant.files) >= sample.num_bytes, contestant.name
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install 'hpc_ddpm[bench]'")
    assert len(found) == 11


def test_the_subject_of_a_packed_dataset(tiny_packed: Path, tmp_path: Path, no_peers: None) -> None:
    sample = make_sample(TINY, tmp_path, tiny_packed, None)
    assert (sample.packed, sample.image.shape) == (tiny_packed, (1, 16, 16, 16))
    build_contestants(sample, tmp_path, None)  # compares the voxels of the uncompressed copy


def test_the_first_subject_of_a_source(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "source", 2, TINY.size, modalities=TINY.modalities, labels=TINY.labels)
    (tmp_path / "work").mkdir()
    sample = make_sample(TINY, tmp_path / "work", None, tmp_path / "source")
    assert {path.name for path in sample.nifti.values()} == {"head_0000.nii.gz"}
    with pytest.raises(DataFormatError, match="no such folder or table"):
        make_sample(TINY, tmp_path / "work", None, tmp_path / "gone")


CLONE = """
    import torchvision_that_is_not_there.transforms as transforms
    import torch

    class NiftiPairImageGenerator(torch.utils.data.Dataset):
        def __init__(self, *folders, input_size, depth_size, transform, target_transform, full_channel_mask):
            assert [folder.rsplit("/", 1)[1] for folder in folders] == ["mask", "t1", "t1ce", "t2", "flair"]
            self.shape, self.transform = (input_size, input_size, depth_size), transform
        def __getitem__(self, index):
            volume = self.transform(torch.zeros(*self.shape, 4).numpy())
            return {"input": volume, "target": volume}
"""


def test_med_ddpm_from_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_peers: None) -> None:
    sample = make_sample(BRATS, tmp_path, None, None)
    with pytest.raises(ConfigError, match=r"no dataset_brats\.py found; give a clone of"):
        build_and_find(sample, tmp_path / "a", tmp_path)
    (tmp_path / "dataset_brats.py").write_text(textwrap.dedent(CLONE))
    unused = ("torchvision_that_is_not_there", "torchvision_that_is_not_there.transforms")
    monkeypatch.setattr(med_ddpm, "UNUSED", unused)
    monkeypatch.delitem(sys.modules, "dataset_brats", raising=False)
    image, condition = build_and_find(sample, tmp_path / "b", tmp_path).open()()
    assert image.shape == condition.shape == (1, 4, 12, 8, 8)
    assert not set(unused) & set(sys.modules)
    (tmp_path / "small").mkdir()
    with pytest.raises(ConfigError, match=r"reads 4 modalities of N x N x D voxels, the sample has 2 of 8 x 10 x 12"):
        build_and_find(make_sample(TINY, tmp_path / "small", None, None), tmp_path / "c", tmp_path)


def build_and_find(sample: Any, folder: Path, clone: Path) -> Any:
    folder.mkdir()
    found, _ = build_contestants(sample, folder, clone)
    return found[-1]


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_peers: None
) -> None:
    monkeypatch.setattr("hpc_ddpm.benchmark.data.run.WORKERS", (0,))
    monkeypatch.chdir(tmp_path)
    settings = ["data.size=[16,16,16]", "--repeats", "1", "-q", "--json", "data.json", "--out", "data.md"]
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "bench", "data", *settings])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None)
    page = Path("data.md").read_text()
    assert capfd.readouterr().out == page
    assert "\nhpc-ddpm bench data data.size=[16,16,16] --repeats 1" in page
    assert read_report(Path("data.json"))["settings"]["shape"][0] == 4
