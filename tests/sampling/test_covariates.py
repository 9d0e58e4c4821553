"""Volumes for given covariates: from a table beside the masks or from the command line, in plan, record and id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import hpc_ddpm
from hpc_ddpm.config import CovariateConfig, load_config
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import write_json
from hpc_ddpm.sampling.plan import read_manifest
from hpc_ddpm.sampling.verify import verify_set
from tests.sampling.conftest import QUICK, Run, save_random_weights, sidecars, voxels

COVARIATES = "data.covariates={age: {mean: 50, std: 15}, sex: {values: [F, M]}}"
OUTPUT = "sampling.output.formats=[nifti,bids,packed]"


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditioned") / "weights"
    return save_random_weights(folder, load_config(None, [*QUICK, COVARIATES]).config)


@pytest.fixture
def masks(heads: Path, tmp_path: Path) -> Path:
    """Two masks and what is known of their subjects."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in ("head_0000", "head_0001"):
        shutil.copyfile(heads / f"{name}.nii.gz", folder / f"{name}.nii.gz")
    (folder / "participants.tsv").write_text("participant_id\tage\tsex\nhead_0000\t61.5\tn/a\nhead_0001\t30\tM\n")
    return folder


def test_from_the_table_and_from_the_command_line(run: Run, conditioned: Path, masks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("plan", conditioned, "--out", out, "--masks", masks, OUTPUT)
    assert "sex is not known of 1 of 2 masks" in said and "2 volumes planned" in said
    assert [item.id for item in read_manifest(out)] == ["head_0000_age-61.5_r000", "head_0001_age-30_sex-M_r000"]
    run("run", conditioned, "--out", out, "--masks", masks, "--covariate", "sex=F", "--covariate", "age=61.5", OUTPUT)
    run("run", conditioned, "--out", out, OUTPUT, "--replicas", 2)
    made = sidecars(out)
    assert len(made) == len(set(voxels(out).values())) == 8 == len(read_manifest(out))
    assert made["head_0001_age-61.5_sex-F_r001"]["covariates"] == {"age": 61.5, "sex": "F"}
    assert made["head_0000_age-61.5_r000"]["covariates"] == {"age": 61.5}
    assert made["head_0001_age-61.5_sex-F_r000"]["seed"] == made["head_0001_age-30_sex-M_r000"]["seed"]
    assert (out / "bids" / "sub-head0001age30sexMr001" / "anat").is_dir()
    assert verify_set(out) == []
    assert "the same bits" in run("reproduce", out / "t1" / "head_0001_age-30_sex-M_r001.nii.gz")

    packed, wanted = open_packed(out / "packed"), load_config(conditioned / "config.json").config.data.covariates
    rows = dict(zip((subject.id for subject in packed.subjects()), packed.covariates(wanted).tolist(), strict=True))
    assert rows["head_0001_age-30_sex-M_r000"] == [30, 1]
    assert np.isnan(rows["head_0000_age-61.5_r001"][1])

    sidecar = out / "sidecar" / "head_0001_age-30_sex-M_r001.json"
    record = json.loads(sidecar.read_text())
    write_json(sidecar, {**record, "covariates": {"age": 31.0, "sex": "M"}})
    assert [(problem.kind, problem.id) for problem in verify_set(out)] == [("mismatch", record["id"])]


def test_packed_subjects_bring_their_own(run: Run, conditioned: Path, masks: Path, tmp_path: Path) -> None:
    run("run", conditioned, "--out", tmp_path / "one", "--masks", masks, "sampling.output.formats=packed")
    run("plan", conditioned, "--out", tmp_path / "two", "--split", "train", f"data.path={tmp_path / 'one' / 'packed'}")
    items = {item.mask_id: item.covariates for item in read_manifest(tmp_path / "two")}
    assert items == {"head_0000_age-61.5_r000": {"age": 61.5}, "head_0001_age-30_sex-M_r000": {"age": 30.0, "sex": "M"}}


def test_the_python_call_takes_names_and_values(conditioned: Path, weights: Path) -> None:
    model, mask = hpc_ddpm.load_model(conditioned), np.ones((16, 16, 16), np.uint8)
    unknown, old = hpc_ddpm.generate(model, mask), hpc_ddpm.generate(model, mask, covariates={"age": 80})
    assert (unknown - old).abs().max() > 1e-3
    both = hpc_ddpm.generate(model, np.stack([mask, mask]), seed=[0, 0], covariates=[{"age": "n/a"}, {"age": 80.0}])
    assert both[0].allclose(unknown, atol=1e-3) and both[1].allclose(old, atol=1e-3)
    with pytest.raises(DataFormatError, match="covariate age is not one of the model's: none"):
        hpc_ddpm.generate(hpc_ddpm.load_model(weights), mask, covariates={"age": 80})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("sex=X", "--covariate: sex is 'X', expected F, M, or n/a"),
        ("age=old", "--covariate: age is 'old', expected a number"),
        ("height=3", "--covariate: covariate height is not one of the model's: age, sex"),
        ("age", "expected NAME=VALUE, such as age=63"),
    ],
)
def test_what_the_model_cannot_take_is_one_line(
    run: Run, conditioned: Path, masks: Path, tmp_path: Path, given: str, problem: str
) -> None:
    with pytest.raises((ConfigError, DataFormatError), match=problem):
        run("plan", conditioned, "--out", tmp_path / "out", "--masks", masks, "--covariate", given)
    assert not (tmp_path / "out").exists()


def test_values_that_would_have_the_same_id_are_refused(run: Run, tmp_path: Path, heads: Path) -> None:
    covariates = {"site": CovariateConfig(values=("a-b", "ab"))}
    config = load_config(None, QUICK).config
    config = config.model_copy(update={"data": config.data.model_copy(update={"covariates": covariates})})
    source, out = save_random_weights(tmp_path / "weights", config), tmp_path / "out"
    run("plan", source, "--out", out, "--masks", heads, "--covariate", "site=ab")
    with pytest.raises(
        ConfigError, match=r"head_0000_site-ab_r000 is planned from .*, site ab, asked for .*, site a-b"
    ):
        run("plan", source, "--out", out, "--masks", heads, "--covariate", "site=a-b")
    with pytest.raises(ConfigError, match="has a plan; say for which masks, by --masks or --split"):
        run("plan", source, "--out", out, "--covariate", "site=ab")
