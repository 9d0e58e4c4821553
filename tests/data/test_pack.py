import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import discover
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.preprocess import prepare
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.data.verify import verify
from hpc_ddpm.errors import DataFormatError

ONE_PER_SHARD = 1e-9


def content(path: Path) -> dict[str, Any]:
    """Everything a reader sees."""
    packed = open_packed(path)
    return {
        subject.id: (subject.split, *(array.tobytes() for array in packed.read(subject.index)))
        for subject in packed.subjects()
    }


@pytest.mark.parametrize("storage", ["int16", "float32"])
def test_what_is_packed_is_what_was_prepared(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig], storage: str
) -> None:
    config = tiny(storage_dtype=storage, size=(8, 8, 12))
    report = pack(heads, tmp_path / "out", config)
    assert (report.num_subjects, report.num_written, report.layout) == (6, 6, "tree")
    packed = open_packed(tmp_path / "out")
    assert (packed.data.layout, packed.data.path, len(packed)) == ("tree", str(tmp_path / "out"), 6)
    for subject, entry in zip(discover(heads, config).subjects, packed.subjects(), strict=True):
        expected = prepare(subject, config)
        image, mask = packed.read(entry.index)
        assert (entry.id, image.dtype) == (subject.id, np.dtype(storage))
        scale = 32767 if storage == "int16" else 1
        np.testing.assert_allclose(image / scale, expected.image, atol=1.6e-5 if scale > 1 else 0)
        np.testing.assert_array_equal(mask, expected.mask)
        np.testing.assert_array_equal(packed.affine(entry.index), expected.affine)
        np.testing.assert_array_equal(packed.intensity(entry.index), expected.intensity)
        assert packed.geometry(entry.index) == expected.geometry
        assert packed.label_voxels(entry.index).tolist() == [(mask == 1).sum(), (mask == 2).sum()]


def test_splits(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    report = pack(heads, tmp_path / "out", tiny(val_fraction=0.3))
    packed = open_packed(tmp_path / "out")
    assert report.splits == {split: len(packed.subjects(split)) for split in ("train", "val")}
    assert sum(report.splits.values()) == 6
    assert packed.subjects("test") == []


def test_finished_work_is_not_redone(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    out, seen = tmp_path / "out", list[tuple[int, int]]()
    config = tiny(shard_size_gib=ONE_PER_SHARD)
    first = pack(heads, out, config, progress=lambda done, total: seen.append((done, total)))
    assert (seen[-1], len(list(out.glob("shard-*.h5")))) == ((6, 6), 6)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    second = pack(heads, out, config.model_copy(update={"num_workers": 7, "layout": "tree"}))
    assert second.num_written == 0
    assert {**vars(first), "num_written": 0} == vars(second)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "shard-00002.h5").unlink()
    expected = before.keys()
    assert pack(heads, out, config).num_written == 1
    assert {path.name for path in out.iterdir()} == expected
    assert len(content(out)) == 6


def test_another_configuration_or_source_is_refused(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    out = tmp_path / "out"
    pack(heads, out, tiny(shard_size_gib=ONE_PER_SHARD))
    with pytest.raises(DataFormatError, match=r"other settings \(data\.size.*\); pack into another --out, or rep"):
        pack(heads, out, tiny(size=(8, 8, 8), shard_size_gib=ONE_PER_SHARD))
    before = content(out)
    os.utime(heads / "t1" / "head_0001.nii.gz")
    with pytest.raises(DataFormatError, match=r"1 packed subject\(s\) changed since \(head_0001\); pack into another"):
        pack(heads, out, tiny(shard_size_gib=ONE_PER_SHARD))
    (heads / "t1" / "head_0005.nii.gz").unlink()
    with pytest.raises(
        DataFormatError, match=r"not in the source any more \(head_0005\); 1 .* changed since \(head_0001"
    ):
        pack(heads, out, tiny(shard_size_gib=ONE_PER_SHARD))
    assert content(out) == before
    report = pack(heads, out, tiny(), overwrite=True)
    assert (report.num_written, [path.name for path in sorted(out.iterdir())]) == (
        5,
        ["index.json", "shard-00000.h5"],
    )


def unfinished(heads: Path, out: Path, *configs: DataConfig, overwrite: bool = False) -> None:
    """Leave what packing with these settings finishes while a file is damaged; mends it."""
    cut = heads / "t1" / "head_0005.nii.gz"
    facts, whole = cut.stat(), cut.read_bytes()
    cut.write_bytes(whole[:200])
    for config in configs:
        with pytest.raises(DataFormatError, match="1 of 6 subjects cannot be packed"):
            pack(heads, out, config, overwrite=overwrite)
    cut.write_bytes(whole)
    os.utime(cut, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_what_other_settings_left_unfinished_is_not_taken(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    one, two = (tiny(shard_size_gib=ONE_PER_SHARD, normalization=how) for how in ("percentile", "zscore"))
    unfinished(heads, tmp_path / "out", one, two)
    assert pack(heads, tmp_path / "out", one).num_written == 1
    assert verify(tmp_path / "out") == []
    pack(heads, tmp_path / "plain", one)
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def test_covariates_that_changed_and_changed_back(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    config = tiny(shard_size_gib=ONE_PER_SHARD, covariates={"age": {"mean": 50, "std": 20}})

    def set_age(age: int) -> None:
        table = "".join(f"head_000{i}\t{age}\n" for i in range(6))
        (heads / "participants.tsv").write_text("participant_id\tage\n" + table)

    for age in (30, 88):
        set_age(age)
        unfinished(heads, tmp_path / "out", config)
    set_age(30)
    pack(heads, tmp_path / "out", config)
    assert open_packed(tmp_path / "out").covariates(config.covariates)[:, 0].tolist() == [30] * 6


def test_a_finished_shard_that_is_gone_is_written_again(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    config = tiny(shard_size_gib=ONE_PER_SHARD)
    unfinished(heads, tmp_path / "out", config)
    next((tmp_path / "out" / ".pack" / "shards").glob("*.h5")).unlink()
    assert pack(heads, tmp_path / "out", config).num_written == 2
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_stay(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig], overwrite: bool) -> None:
    out, config = tmp_path / "out", tiny(shard_size_gib=ONE_PER_SHARD)
    out.mkdir()
    for name in ("shard-00001.h5", "shard-backup.h5", "shard-00009.h5"):
        (out / name).write_text("mine")
    with pytest.raises(DataFormatError, match=r"shard-00001\.h5: not a shard, but a shard gets this name; move it or"):
        pack(heads, out, config, overwrite=overwrite)
    assert sorted(path.name for path in out.iterdir()) == ["shard-00001.h5", "shard-00009.h5", "shard-backup.h5"]
    (out / "shard-00001.h5").unlink()
    pack(heads, out, config, overwrite=overwrite)
    assert {(out / name).read_text() for name in ("shard-backup.h5", "shard-00009.h5")} == {"mine"}


def test_a_dataset_that_lost_its_index(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    out, config = tmp_path / "out", tiny(shard_size_gib=ONE_PER_SHARD)
    pack(heads, out, config)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "index.json").unlink()
    with pytest.raises(DataFormatError, match=r"shard-00000\.h5: a shard of other settings or subjects, in no index"):
        pack(heads, out, tiny(normalization="zscore"))
    assert pack(heads, out, config).num_written == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "index.json").unlink()
    pack(heads, out, tiny(normalization="zscore"), overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "shard-00000.h5"]


def test_a_replaced_dataset_stays_until_the_new_one_is_whole(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    out, config = tmp_path / "out", tiny(shard_size_gib=ONE_PER_SHARD, normalization="zscore")
    pack(heads, out, tiny(shard_size_gib=ONE_PER_SHARD))
    before = content(out)
    unfinished(heads, out, config, overwrite=True)
    assert (content(out), verify(out)) == (before, [])
    assert pack(heads, out, config, overwrite=True).num_written == 1
    assert verify(out) == []
    assert content(out) != before


def test_bad_subjects_are_all_named_and_nothing_is_published(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    out = tmp_path / "out"
    cut = heads / "t1" / "head_0001.nii.gz"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:200])
    (heads / "mask" / "head_0004.nii.gz").write_bytes(b"x")
    with pytest.raises(DataFormatError, match="2 of 6 subjects cannot be packed") as caught:
        pack(heads, out, tiny())
    assert str(cut) in str(caught.value)
    assert "head_0004" in str(caught.value)
    with pytest.raises(DataFormatError, match="packing has not finished here"):
        open_packed(out)
    report = pack(heads, out, tiny(), skip_bad=True)
    assert (report.num_subjects, report.num_written, len(report.failures)) == (4, 0, 2)
    assert len(content(out)) == 4
    assert pack(heads, out, tiny(), skip_bad=True).failures == report.failures
    with pytest.raises(DataFormatError, match="2 of 6"):
        pack(heads, out, tiny())
    cut.write_bytes(whole)
    report = pack(heads, out, tiny(), skip_bad=True)
    assert (report.num_subjects, report.num_written, len(report.failures)) == (5, 1, 1)
    assert pack(heads, out, tiny(), skip_bad=True).num_written == 0
    assert [subject.id for subject in open_packed(out).subjects()] == [f"head_000{i}" for i in (0, 1, 2, 3, 5)]


def test_a_link_that_leads_nowhere_is_one_bad_subject(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    link = heads / "t1" / "head_0001.nii.gz"
    link.rename(tmp_path / "annexed.nii.gz")
    link.symlink_to("nowhere")
    with pytest.raises(
        DataFormatError, match=r"1 of 6 subjects cannot be packed.*: .*head_0001\.nii\.gz: no such file"
    ):
        pack(heads, tmp_path / "out", tiny())
    assert pack(heads, tmp_path / "out", tiny(), skip_bad=True).num_subjects == 5
    link.unlink()
    link.symlink_to(tmp_path / "annexed.nii.gz")
    assert pack(heads, tmp_path / "out", tiny()).num_subjects == 6


def test_a_mended_file_joins_the_finished_ones(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    cut = heads / "t1" / "head_0001.nii.gz"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:200])
    with pytest.raises(DataFormatError, match="1 of 6"):
        pack(heads, tmp_path / "out", tiny())
    cut.write_bytes(whole)
    assert pack(heads, tmp_path / "out", tiny()).num_written == 1
    pack(heads, tmp_path / "plain", tiny())
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def test_all_bad(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    with pytest.raises(DataFormatError, match="6 of 6 subjects cannot be packed") as caught:
        pack(heads, tmp_path / "out", tiny(normalization="none"), skip_bad=True)
    assert "values from 0" in str(caught.value)


def test_report_of_labels_never_found(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    labels = {"names": {1: "head", 2: "tumour", 3: "vessel"}}
    assert pack(heads, tmp_path / "out", tiny(labels=labels)).labels_never_found == ("vessel",)


def test_workers_change_nothing(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    (heads / "mask" / "head_0002.nii.gz").write_bytes(b"x")
    for workers in (0, 2):
        pack(heads, tmp_path / f"out{workers}", tiny(), num_workers=workers, skip_bad=True)
    names = sorted(path.name for path in (tmp_path / "out0").iterdir())
    for name in names:
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def command(source: Path, out: Path, config: DataConfig, folder: Path) -> list[str]:
    script = folder / "pack_here.py"
    script.write_text(
        "import sys\n"
        "from hpc_ddpm.config import DataConfig\n"
        "from hpc_ddpm.data.pack import pack\n"
        "if __name__ == '__main__':\n"
        "    config = DataConfig.model_validate_json(sys.argv[3])\n"
        "    tick = lambda done, total: print(done, flush=True)\n"
        "    pack(sys.argv[1], sys.argv[2], config, num_workers=int(sys.argv[4]), progress=tick)\n"
    )
    return [sys.executable, str(script), str(source), str(out), config.model_dump_json(), "0"]


def kill_somewhere(arguments: list[str], rng: random.Random) -> bool:
    """Start packing, kill it a moment after its first sign of life; whether it was still running."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.25))
        running = process.poll() is None
        process.kill()
        process.communicate(timeout=30)  # ends when the workers, who share the pipe, are gone too
    return running


@pytest.mark.slow
def test_killed_with_workers_it_goes_on_and_leaves_none_behind(tmp_path: Path) -> None:
    source = write_phantoms(tmp_path / "heads", 24, (32, 32, 32))
    config = DataConfig(size=(32, 32, 32), shard_size_gib=1e-3)
    arguments = [*command(source, tmp_path / "out", config, tmp_path)[:-1], "2"]
    rng = random.Random(1)
    assert sum(kill_somewhere(arguments, rng) for _ in range(3)) > 0
    pack(source, tmp_path / "out", config)
    pack(source, tmp_path / "straight", config)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


@pytest.mark.parametrize("shard_size_gib", [1.0, 1e-4])
def test_killed_anywhere_it_goes_on(heads: Path, tmp_path: Path, shard_size_gib: float) -> None:
    config = DataConfig(size=(32, 32, 32), shard_size_gib=shard_size_gib)
    begin = time.perf_counter()
    pack(heads, tmp_path / "straight", config)
    whole_s = time.perf_counter() - begin
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    while kills < 10:
        child = multiprocessing.get_context("fork").Process(target=pack, args=(heads, out, config))
        child.start()
        time.sleep(rng.uniform(0, whole_s))
        kills += child.is_alive()
        child.kill()
        child.join()
        if (out / "index.json").exists():
            assert content(out) == content(tmp_path / "straight")
            shutil.rmtree(out)
    pack(heads, out, config)
    assert content(out) == content(tmp_path / "straight")
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in (tmp_path / "straight").iterdir())
    for path in (tmp_path / "straight").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_an_unfinished_shard_is_continued(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    out = tmp_path / "out"

    finished = []

    def stop_after_three(done: int, total: int) -> None:
        finished.append(done)
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(heads, out, tiny(), progress=stop_after_three)
    assert not (out / "index.json").exists()
    assert pack(heads, out, tiny()).num_written == 6 - finished[-1] > 0
    assert len(content(out)) == 6


@pytest.mark.parametrize("how", ["torn", "crc", "plan"])
def test_an_unfinished_shard_that_cannot_be_trusted(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig], how: str
) -> None:
    out = tmp_path / "out"
    broken = heads / "mask" / "head_0005.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(b"x")
    with pytest.raises(DataFormatError):
        pack(heads, out, tiny())
    broken.write_bytes(whole)
    row = next((out / ".pack" / "rows").glob("*.h5"))
    config = tiny()
    if how == "torn":
        row.write_bytes(row.read_bytes()[:2000])
    elif how == "crc":
        with h5py.File(row, "r+") as file:
            file["crc32_mask"][0] = 1
    else:
        config = tiny(val_fraction=0.5)
    assert pack(heads, out, config).num_written == {"torn": 2, "crc": 2, "plan": 6}[how]
    assert len(content(out)) == 6


def test_plain_h5py_reads_the_shards(heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    pack(heads, tmp_path / "out", tiny())
    with h5py.File(tmp_path / "out" / "shard-00000.h5") as file:
        assert (file.attrs["format"], file.attrs["version"], file.attrs["axes"]) == (
            "hpc_ddpm packed dataset",
            2,
            "CZYX",
        )
        assert json.loads(file.attrs["labels"])["names"] == {"1": "head", "2": "tumour"}
        assert json.loads(file.attrs["modalities"]) == ["t1"]
        assert file["image"].fletcher32
        assert (file["image"].chunks, file["mask"].chunks) == ((1, 1, 12, 10, 8), (1, 12, 10, 8))
        volume = file["image"][0].astype("f4") * file.attrs["image_scale"]
        assert (volume.min(), volume.max()) == (-1, 1)
        assert file["id"].asstr()[:].tolist() == [f"head_000{i}" for i in range(6)]
