"""Covariates under real ranks: every way to shard gives the same curve, from the curve of a run without them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.config import load_config
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.runlog import read_metrics
from hpc_ddpm.sampling.verify import verify_set
from tests.conftest import TINY
from tests.distributed.test_training import ROUNDING, Torchrun, losses, run_all

COVARIATES = "data.covariates={age: {mean: 50, std: 15}, sex: {values: [F, M]}}"
LOOK = [
    "training.learning_rate=1e-3",
    "training.validate_every_steps=3",
    "training.preview_every_steps=6",
    "diffusion.condition_dropout=0.2",
]


@pytest.mark.slow
def test_train_resume_fine_tune_and_sample(
    torchrun: Torchrun, cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    data = load_config(None, [*TINY, COVARIATES, "data.val_fraction=0.3"]).config.data
    source = write_phantoms(tmp_path / "source", 10, (16, 16, 16), seed=1, modalities=("t1",), labels=data.labels)
    rows = (f"head_{number:04d}\t{30 + 5 * number}\t{'FM'[number % 2]}\n" for number in range(10))
    (source / "participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(rows))
    pack(source, packed := tmp_path / "packed", data)

    (source / "participants.tsv").write_text((source / "participants.tsv").read_text().replace("\t7", "\t1"))
    pack(source, tmp_path / "repacked", data)

    plain, one, three, crops, young, tuned = (tmp_path / str(name) for name in range(6))
    known = [*LOOK, COVARIATES]
    run_all(torchrun, 1, {plain: LOOK, one: known, young: [*known, f"data.path={tmp_path / 'repacked'}"]}, packed)
    sharded, from_plain = [*known, "training.zero_stage=3"], [*known, f"training.init_from={plain}"]
    run_all(torchrun, 2, {three: [*sharded, "training.num_steps=4"], tuned: from_plain}, packed)
    run_all(torchrun, 2, {three: sharded, crops: [*known, "data.patch_size=[16,16,16]"]}, packed)
    assert losses(one)[:3] == losses(plain)[:3], "covariates have an effect before anything was learnt"
    for other in (plain, young):
        assert losses(one)[3:] != pytest.approx(losses(other)[3:], rel=ROUNDING), "covariates do not matter"
    for run in (three, crops):
        assert losses(run) == pytest.approx(losses(one), rel=ROUNDING)
        mine, theirs = (list(read_metrics(other))[-1]["val_loss"] for other in (run, one))
        assert mine == pytest.approx(theirs, rel=ROUNDING)
    assert json.loads((tuned / "start.json").read_text())["covariates"]["new"] == ["age", "sex"]

    guided = ["sampling.guidance_scale=2", "--covariate", "age=80", "--split", "val"]
    made = cli("sample", tuned, "--out", tmp_path / "set", "--quiet", *guided)
    assert made.returncode == 0, made.stderr
    manifest = [json.loads(line) for line in (tmp_path / "set" / "manifest.jsonl").read_text().splitlines()]
    assert {item["covariates"]["age"] for item in manifest} == {80.0}
    assert {item["covariates"]["sex"] for item in manifest} <= {"F", "M"}
    assert verify_set(tmp_path / "set") == []
