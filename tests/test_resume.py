"""What a run may change when it goes on; the training loop itself refuses the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpc_ddpm.checkpoint import FORMAT_VERSION, checkpoint_dir
from hpc_ddpm.config import Config, load_config, with_overrides
from hpc_ddpm.data.resplit import resplit
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.distributed import Ranks, process_group
from hpc_ddpm.errors import ConfigError, HpcDdpmError
from hpc_ddpm.files import write_json
from hpc_ddpm.training.loop import train
from hpc_ddpm.training.resume import check_data, check_resume, stored_config
from tests.conftest import TINY


def config(*overrides: str) -> Config:
    return load_config(None, [*TINY, *overrides]).config


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run directory whose newest checkpoint is of step 3."""
    checkpoint_dir(tmp_path / "checkpoints", 3).mkdir(parents=True)
    write_json(tmp_path / "config.json", config().dump())
    return tmp_path


def test_the_loop_refuses_another_batch_with_the_arithmetic(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")
    with (
        process_group(Ranks()) as device,
        pytest.raises(ConfigError, match=r"3 steps x 4 = 12 volumes .* after 3 x 8 = 24; keep 4") as error,
    ):
        train(config("training.global_batch=8"), begun, Ranks(), device)
    assert "\n" not in str(error.value)
    assert stored_config(begun) == config()


def test_a_refused_start_leaves_no_trace_to_trip_over(
    tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_DDPM_DEVICE", "cpu")
    data = f"data.path={tiny_packed}"
    wrong = {
        "no data": [],
        r"data\.fit: .* was packed with crop_pad": [data, "data.fit=resize"],
        "matches no parameter": [data, "training.freeze=[time_embd]"],
    }
    with process_group(Ranks()) as device:
        for problem, settings in wrong.items():
            with pytest.raises(HpcDdpmError, match=problem):
                train(config(*settings), tmp_path / "run", Ranks(), device)
    check_resume(tmp_path / "run", config("training.freeze=[time_embed]"))


def test_other_volumes_are_refused(tiny_packed: Path, tmp_path: Path) -> None:
    digest = open_packed(tiny_packed).digest("train")
    write_json(
        tmp_path / "MANIFEST.json", {"format_version": FORMAT_VERSION, "step": 3, "files": {}, "data_digest": digest}
    )
    check_data(tmp_path, tiny_packed)
    shutil.copytree(tiny_packed, tmp_path / "packed")
    ids = [subject.id for subject in open_packed(tiny_packed).subjects()]
    resplit(tmp_path / "packed", dict.fromkeys(ids, "train"))
    with pytest.raises(ConfigError, match="trained on other volumes"):
        check_data(tmp_path, tmp_path / "packed")


def test_the_length_of_a_cosine_is_part_of_it(tmp_path: Path) -> None:
    cosine = "training.lr_schedule=cosine"
    write_json(tmp_path / "config.json", config(cosine).dump())
    with pytest.raises(ConfigError, match=r"training\.num_steps 6 -> 12"):
        check_resume(tmp_path, config(cosine, "training.num_steps=12"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="put it back"):
        stored_config(tmp_path)


def test_changes_are_checked_against_what_the_run_has() -> None:
    stored = config("training.zero_stage=3", "diffusion.condition_dropout=0.1")
    changed = with_overrides(stored, ["training.offload_parameters=cpu", "sampling.guidance_scale=2"])
    assert (changed.training.zero_stage, changed.sampling.guidance_scale) == (3, 2)
    with pytest.raises(ConfigError, match=r"offload_parameters=cpu needs zero_stage=3, found 1 \(set: .* command line"):
        with_overrides(config(), ["training.offload_parameters=cpu"])


def test_what_may_change_and_what_may_not(begun: Path, tmp_path: Path) -> None:
    check_resume(begun, config("training.global_batch=8", "training.allow_batch_change=true"))
    check_resume(begun, config("training.zero_stage=3", "training.micro_batch=2", "sampling.num_steps=9"))
    check_resume(tmp_path / "new", config("seed=7"))
    covariates = "data.covariates={age: {mean: 50, std: 15}}"
    swapped = "data.labels.names={2: tumour, 1: head}"  # its order is that of the channels
    problems = {"seed=7": "seed 0 -> 7", covariates: r"data\.covariates {} -> ", swapped: r"data\.labels\.names"}
    for setting, problem in problems.items():
        with pytest.raises(ConfigError, match=f"was started with other settings: {problem}"):
            check_resume(begun, config(setting, "training.global_batch=8", "training.allow_batch_change=true"))
