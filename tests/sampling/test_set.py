"""A generated set: planned, grown, resumed, and what every volume says of itself."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

import hpc_ddpm
from hpc_ddpm.config import load_config
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.data.shards import INT16_SCALE, open_packed
from hpc_ddpm.data.team import Team
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.sampling.folder import SampleFolder
from hpc_ddpm.sampling.masks import MaskSource, find_mask_files
from hpc_ddpm.sampling.plan import build_plan, read_manifest, try_seed
from hpc_ddpm.sampling.run import plan_set, run_sampling
from hpc_ddpm.sampling.verify import verify_set
from hpc_ddpm.workers.claims import Writer
from tests.conftest import TINY
from tests.sampling.conftest import Generate, save_random_weights, sidecars, voxels

ALL = "sampling.output.formats=[nifti,bids,packed]"


def test_plan_grows_without_changing() -> None:
    a, b, c = (MaskSource(name, f"{name}.nii.gz", "tree") for name in "abc")
    small, large = build_plan([a, b], 1, seed=5), build_plan([a, b, c], 3, seed=5)
    assert {item.id: item for item in small}.items() <= {item.id: item for item in large}.items()
    assert len({item.seed for item in large}) == 9
    assert build_plan([a], 1, seed=6)[0].seed != small[0].seed
    assert len({try_seed(small[0].seed, attempt) for attempt in range(4)}) == 4


def test_manifest_only_gets_more_lines(weights: Path, heads: Path, tmp_path: Path) -> None:
    model = hpc_ddpm.load_model(weights)
    record = {"path": str(weights), "sha256": model.sha256, "provenance": {}}
    sources = find_mask_files(heads)
    plan_set(tmp_path, model.config, record, sources[:2])
    before = (tmp_path / "manifest.jsonl").read_text()
    assert len(before.splitlines()) == 2
    grown = load_config(weights / "config.json", ["sampling.replicas=3"]).config
    items, wanted = plan_set(tmp_path, grown, record, sources[1:])
    assert (len(items), len(wanted)) == (13, 12)
    items, _ = plan_set(tmp_path, grown, record, [])
    assert len(items) == 15
    assert (tmp_path / "manifest.jsonl").read_text().startswith(before)
    moved = [MaskSource("head_0000", "/elsewhere/head_0000.nii.gz", "tree")]
    with pytest.raises(ConfigError, match=r"head_0000_r000 is planned from .*choose another --out"):
        plan_set(tmp_path, grown, record, moved)
    other = load_config(weights / "config.json", ["seed=1", "sampling.num_steps=3"]).config
    with pytest.raises(ConfigError, match=r"another sampling\.num_steps, seed"):
        plan_set(tmp_path, other, record, sources)
    with pytest.raises(ConfigError, match="another weights"):
        plan_set(tmp_path, grown, record | {"sha256": "0"}, sources)


def test_finished_volumes_are_skipped_and_the_set_grows(generate_set: Generate, tmp_path: Path) -> None:
    first = generate_set(tmp_path)
    assert (first.generated, first.done, first.planned, first.failed) == (5, 5, 5, {})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    second = generate_set(tmp_path, "sampling.replicas=2", masks=None)
    assert (second.generated, second.done) == (5, 10)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}.items()
    assert len(set(voxels(tmp_path).values())) == 10
    assert not (tmp_path / ".sample").exists()
    assert verify_set(tmp_path) == []


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_change_no_bit(generate_set: Generate, tmp_path: Path, batch_size: int) -> None:
    generate_set(tmp_path / "one")
    generate_set(tmp_path / "many", f"sampling.batch_size={batch_size}")
    assert voxels(tmp_path / "one") == voxels(tmp_path / "many")


def test_inexact_batches_stay_close(generate_set: Generate, tmp_path: Path) -> None:
    generate_set(tmp_path / "one")
    generate_set(tmp_path / "batch", "sampling.exact=false", "sampling.batch_size=3")
    for name in voxels(tmp_path / "one"):
        one, batch = (read_nifti(tmp_path / kind / "t1" / f"{name}.nii.gz").data for kind in ("one", "batch"))
        np.testing.assert_allclose(one, batch, atol=5e-4)
    timed = [["seconds" in record for record in sidecars(tmp_path / kind).values()] for kind in ("one", "batch")]
    assert all(timed[0]) and not any(timed[1])  # nobody knows which of a batch took how long


def test_the_sidecar_says_how_it_was_made(generate_set: Generate, weights: Path, tmp_path: Path) -> None:
    generate_set(tmp_path)
    record = sidecars(tmp_path)["head_0002_r000"]
    item = next(item for item in read_manifest(tmp_path) if item.id == "head_0002_r000")
    assert (record["seed"], record["mask_id"], record["mask"]) == (item.seed, "head_0002", "head_0002.nii.gz")
    assert record["weights"]["sha256"] == hpc_ddpm.load_model(weights).sha256
    assert (record["precision"], record["device"], record["sampling"]["num_steps"]) == ("float32", "cpu", 2)
    assert record["versions"]["torch"]
    assert record["threads"] >= 2
    again = hpc_ddpm.load_model(weights)
    mask = read_nifti(tmp_path / "mask" / "head_0002_r000.nii.gz", dtype=np.uint8)
    volume = hpc_ddpm.generate(again, mask.data, seed=item.seed).numpy()
    np.testing.assert_allclose(read_nifti(tmp_path / "t1" / "head_0002_r000.nii.gz").data, volume[0], atol=1e-4)


def test_all_formats_hold_the_same_volume(generate_set: Generate, tmp_path: Path) -> None:
    generate_set(tmp_path, ALL)
    subject = tmp_path / "bids" / "sub-head0001r000" / "anat" / "sub-head0001r000"
    plain = tmp_path / "t1" / "head_0001_r000.nii.gz"
    assert subject.with_name(f"{subject.name}_T1w.nii.gz").read_bytes() == plain.read_bytes()
    packed = open_packed(tmp_path / "packed")
    assert [entry.id for entry in packed.subjects("train")] == sorted(voxels(tmp_path))
    image, mask = packed.read(1)
    assert np.abs(image[0] / INT16_SCALE - np.clip(read_nifti(plain).data, -1, 1)).max() < 1.6e-5
    assert (mask == read_nifti(tmp_path / "mask" / "head_0001_r000.nii.gz").data).all()
    assert (packed.affine(1) == read_nifti(plain).affine).all()
    generate_set(tmp_path, ALL, "sampling.replicas=2", masks=None)
    assert len(open_packed(tmp_path / "packed")) == 10
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "index.json",
        "shard-00000.h5",
        "shard-00001.h5",
    ]
    assert verify_set(tmp_path) == []


@pytest.mark.parametrize(
    ("dtype", "value_range", "tolerance"),
    [("int16", "model", 2e-5), ("int16", "zero_one", 2e-5), ("uint8", "unit", 4e-3), ("float32", "zero_one", 1e-7)],
)
def test_values_on_disk(generate_set: Generate, tmp_path: Path, dtype: str, value_range: str, tolerance: float) -> None:
    generate_set(tmp_path / "model")
    settings = (f"sampling.output.dtype={dtype}", f"sampling.output.value_range={value_range}")
    generate_set(tmp_path / "other", *settings, "sampling.output.compression_level=9")
    name = "head_0003_r000.nii.gz"
    image = nibabel.load(tmp_path / "other" / "t1" / name)
    assert image.get_data_dtype() == dtype
    expected = np.clip(nibabel.load(tmp_path / "model" / "t1" / name).get_fdata(), -1, 1)
    expected = (expected + 1) / 2 if value_range == "zero_one" else expected
    assert np.abs(image.get_fdata() - expected).max() <= tolerance
    assert voxels(tmp_path / "model") == voxels(tmp_path / "other")


def test_two_masks_of_one_bids_name(generate_set: Generate, heads: Path, tmp_path: Path) -> None:
    for name in ("a_1", "a1"):
        (tmp_path / "masks").mkdir(exist_ok=True)
        (tmp_path / "masks" / f"{name}.nii.gz").write_bytes((heads / "head_0000.nii.gz").read_bytes())
    with pytest.raises(ConfigError, match="would both be sub-a1r000"):
        generate_set(tmp_path / "out", ALL, masks=tmp_path / "masks")


def test_what_is_refused_leaves_a_set_as_it_is(generate_set: Generate, heads: Path, tmp_path: Path) -> None:
    """The plan only grows, so what cannot be written must not come into it."""
    (tmp_path / "masks").mkdir()
    for name in ("a1", "a-1"):
        (tmp_path / "masks" / f"{name}.nii.gz").write_bytes((heads / "head_0000.nii.gz").read_bytes())
    bids, out = "sampling.output.formats=bids", tmp_path / "out"
    one = tmp_path / "masks" / "a1.nii.gz"
    generate_set(out, bids, masks=one)
    with pytest.raises(ConfigError, match="would both be sub-a1r000"):
        generate_set(out, bids, masks=tmp_path / "masks")
    assert generate_set(out, bids, masks=one).planned == 1
    with pytest.raises(ConfigError, match="brats_raw needs labels"):
        generate_set(tmp_path / "raw", "sampling.output.mask_coding=brats_raw")
    assert generate_set(tmp_path / "raw", masks=one).done == 1
    with pytest.raises(ConfigError, match=r"sampling\.output\.formats=\[\]"):
        load_config(None, ["sampling.output.formats=[]"])


def test_what_another_worker_has_begun_is_left_to_it(generate_set: Generate, weights: Path, tmp_path: Path) -> None:
    generate_set(tmp_path)
    for item in ("head_0001_r000", "head_0003_r000"):
        SampleFolder(tmp_path).sidecar(item).unlink()
    with Writer(tmp_path / ".sample", "sample") as other, other.claim("head_0001_r000"):
        report = generate_set(tmp_path, masks=None, team=Team("x", stays=False))
    assert (report.generated, report.done) == (1, 4)
    assert generate_set(tmp_path, masks=None).done == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "preset", "size", "label"),
    [("whole_head", "whole_head_128", 32, 1), ("brats2021", "brats_192", 48, 4)],
)
def test_real_masks_keep_their_place_in_the_world(
    shared_data: Path, tmp_path: Path, source: str, preset: str, size: int, label: int
) -> None:
    """On the model's grid the mask lies where the real one lies; on the original grid affine and voxels are its own."""
    small = ["model.base_channels=8", "model.num_groups=8", "model.attention_factors=[]", "data.fit=resize"]
    small += [f"data.size=[{size},{size},{size}]", "sampling.sampler=dpmpp_2m", "sampling.num_steps=2"]
    save_random_weights(tmp_path / "weights", load_config(preset, small).config, std=0.02)
    folder, ending = ("mask", "") if source == "whole_head" else ("seg", "_seg")
    for original in (False, True):
        settings = [f"sampling.output.original_grid={str(original).lower()}", "sampling.output.dtype=int16"]
        model = hpc_ddpm.load_model(tmp_path / "weights", overrides=settings)
        out = tmp_path / str(original)
        record = {"path": "", "sha256": model.sha256, "provenance": {}}
        report = run_sampling(model, out, record, find_mask_files(shared_data / source))
        assert report.done == report.planned > 0
        for path in (out / "mask").iterdir():
            real = nibabel.load(shared_data / source / folder / path.name.replace("_r000", ending))
            made, volume = nibabel.load(path), nibabel.load(out / model.config.data.modalities[-1] / path.name)
            np.testing.assert_array_equal(made.affine, volume.affine)
            assert made.header["sform_code"] == real.header["sform_code"]
            if original:
                np.testing.assert_allclose(volume.affine, real.affine, atol=1e-6)
                assert volume.shape == real.shape
                ours, theirs = (np.asarray(image.dataobj) > 0 for image in (made, real))
                assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.93
            centres = [
                nibabel.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == label).mean(axis=0))
                for image in (made, real)
            ]
            assert np.linalg.norm(centres[0] - centres[1]) < 1.5, centres


@pytest.mark.slow
def test_a_synthetic_set_trains_the_next_model(generate_set: Generate, cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    generate_set(tmp_path / "set", "sampling.output.formats=packed")
    options = ("train", "--out", tmp_path / "run", "--data", tmp_path / "set" / "packed", *TINY, "training.num_steps=2")
    done = cli(*options)
    assert done.returncode == 0, done.stderr
