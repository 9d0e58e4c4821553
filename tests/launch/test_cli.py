"""The command line as a user meets it: help, exit codes, one line per mistake, the whole path."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.weights import load_model
from launch.cli import main
from launch.stages import resume_config
from tests.conftest import TINY, rank_environment

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_help_loads_no_torch() -> None:
    code = """
import sys
from launch.cli import app
for command in ["", *sys.argv[1:]]:
    try:
        app([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, command
    assert "torch" not in sys.modules and "numpy" not in sys.modules, f"heavy import by {command} --help"
"""
    commands = ["pack", "train", "sample", "weights", "config", "demo", "estimate", "submit", "jobs", "doctor", "drill"]
    words = [sys.executable, "-c", code, *commands]
    done = subprocess.run(words, capture_output=True, text=True, env=rank_environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == 1 + len(commands)


def test_importing_the_package_is_light() -> None:
    code = "import sys, hpc_ddpm; assert 'torch' not in sys.modules; hpc_ddpm.__version__"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_config_show_and_ls(cli: Cli) -> None:
    shown = cli("config", "show", "-c", "demo", "training.zero_stage=2")
    assert shown.returncode == 0
    line = next(line for line in shown.stdout.splitlines() if line.startswith("training.zero_stage"))
    assert line.split() == ["training.zero_stage", "2", "command", "line"]
    assert "whole_head_128" in cli("config", "ls").stdout


@pytest.fixture(scope="module")
def run(cli: Cli, tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = cli("train", "--out", folder, "--data", tiny_packed, "-q", *TINY)
    assert done.returncode == 0, done.stderr
    assert f"trained to step 6: {folder}" in done.stdout
    return folder


def test_a_run_directory_says_everything(run: Path) -> None:
    assert json.loads((run / "config.json").read_text())["training"]["num_steps"] == 6
    record = json.loads((run / "provenance.json").read_text())
    assert {"torch", "deepspeed", "hpc_ddpm"} <= set(record["versions"])
    assert record["world_size"] == 1
    settings = json.loads((run / "deepspeed.json").read_text())["resolved"]
    assert settings["zero_optimization"]["stage"] == 1
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "step_time_s",
        "volumes_per_s",
        "data_wait_share",
    }
    assert wanted | {"memory_gib"} <= set(last)
    assert list((run / "tensorboard").glob("events*"))


def test_a_finished_run_is_left_alone(run: Path, cli: Cli) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    done = cli("train", "--out", run, "-q")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "trained to step 6 (went on from step 6)")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_experiment_is_refused(run: Path, cli: Cli) -> None:
    done = cli("train", "--out", run, "-q", "training.learning_rate=1e-3")
    assert done.returncode == 2
    assert "started with other settings: training.learning_rate 0.01 -> 0.001" in done.stderr


def test_another_batch_is_refused_with_the_arithmetic(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 steps x 4 = 24 volumes .* after 6 x 8 = 48.*allow_batch_change"):
        resume_config(run, None, ["training.global_batch=8"])
    allowed = resume_config(run, None, ["training.global_batch=8", "training.allow_batch_change=true"])
    assert allowed.training.global_batch == 8


@pytest.mark.slow
def test_checkpoint_commands(run: Path, cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000006"
    shutil.copytree(newest, copy / "checkpoints" / "step_00000005")
    rows = json.loads(cli("checkpoint", "ls", copy, "--json").stdout)
    assert [(row["step"], row["problem"], row["world_size"]) for row in rows] == [(5, None, 1), (6, None, 1)]
    assert cli("checkpoint", "verify", copy).returncode == 0
    assert cli("checkpoint", "consolidate", copy, "--out", tmp_path / "weights").returncode == 0
    ours, theirs = load_model(tmp_path / "weights").state_dict(), load_model(copy).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert "would delete 1" in cli("checkpoint", "prune", copy, "--keep", "1", "--dry-run").stdout
    piece = next(newest.glob("pieces-*"))
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    damaged = cli("checkpoint", "verify", copy)
    assert damaged.returncode == 2
    assert "step 5: whole" in damaged.stdout
    assert "step 6: " in damaged.stdout
    assert "nothing to delete" in cli("checkpoint", "prune", copy, "--keep", "1", "--yes").stdout


def test_sampling_writes_volumes_once(run: Path, cli: Cli, tmp_path: Path) -> None:
    first = cli("sample", run, "--out", tmp_path / "out", "-q", "sampling.replicas=2")
    assert first.returncode == 0, first.stderr
    sidecars = sorted((tmp_path / "out" / "sidecar").glob("*.json"))
    records = [json.loads(path.read_text()) for path in sidecars]
    assert len(records) >= 2
    assert len({record["seed"] for record in records}) == len(records)
    record = records[0]
    assert record["weights"]["provenance"]["source"]["checkpoint"] == "step_00000006"
    assert record["sampling"]["sampler"] == "dpmpp_2m"
    volume = nibabel.load(tmp_path / "out" / "t1" / f"{record['id']}.nii.gz")
    mask = nibabel.load(tmp_path / "out" / "mask" / f"{record['id']}.nii.gz")
    assert volume.shape == mask.shape == (16, 16, 16)
    assert np.array_equal(volume.affine, mask.affine)
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2}
    stamps = [path.stat().st_mtime_ns for path in sidecars]
    again = cli("sample", run, "--out", tmp_path / "out", "-q", "sampling.replicas=2")
    assert "0 volumes generated" in again.stdout
    assert [path.stat().st_mtime_ns for path in sidecars] == stamps
    other = cli("sample", run, "--out", tmp_path / "out", "-q", "sampling.num_steps=3")
    assert other.returncode == 2
    assert "made with another sampling" in other.stderr


@pytest.mark.slow
def test_volumes_do_not_depend_on_ranks_or_batch(run: Path, cli: Cli, torchrun: Cli, tmp_path: Path) -> None:
    common = ["sample", run, "--split", "train", "-q", "sampling.sampler=ddpm"]
    assert cli(*common, "--out", tmp_path / "one").returncode == 0
    done = torchrun(2, "-m", "launch.cli", *common, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert cli(*common, "--out", tmp_path / "batched", "sampling.batch_size=3").returncode == 0
    names = sorted(path.name for path in (tmp_path / "one" / "t1").iterdir())
    assert len(names) >= 6
    for other in ("two", "batched"):
        assert names == sorted(path.name for path in (tmp_path / other / "t1").iterdir())
        for name in names:
            one, two = ((tmp_path / part / "t1" / name).read_bytes() for part in ("one", other))
            assert one == two


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "--out", "RUN", "training.zero_stag=2"], "did you mean 'training.zero_stage'"),
        (["train", "--out", "RUN"], "no data: give --data"),
        (["train", "--out", "RUN", "--data", "nowhere"], "nowhere"),
        (["train", "--out", "RUN", "--data", "PACKED"], "was packed with"),
        (["train", "--out", "RUN", "--config", "demoo"], "did you mean 'demo'"),
        (["pack", "nowhere", "--out", "RUN"], "no such folder or table"),
        (["sample", "nowhere", "--out", "RUN"], "no weights at nowhere"),
        (["weights", "import", "nowhere.pt", "--preset", "brats_192", "--out", "RUN"], "no file nowhere.pt"),
        (["demo", "--data", "nowhere", "--out", "RUN"], "no such folder or table"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tiny_packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    part: str,
) -> None:
    places = {"RUN": str(tmp_path / "run"), "PACKED": str(tiny_packed)}
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", *[places.get(word, word) for word in arguments]])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("hpc-ddpm: ")
    assert part in lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_output_that_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "sample", str(run), "--out", str(out), "-q"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert f"{out}: cannot write here (Not a directory)" in error
    assert "Traceback" not in error


def test_batch_that_does_not_divide(cli: Cli, tiny_packed: Path, tmp_path: Path) -> None:
    done = cli("train", "--out", tmp_path / "run", "--data", tiny_packed, *TINY, "training.micro_batch=3")
    assert done.returncode == 2
    assert "4 is not a multiple of micro_batch x ranks = 3 x 1 = 3" in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import cli as module

    monkeypatch.setattr(module, "app", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.main()


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from launch import cli as module

    def interrupted(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "app", interrupted)
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_estimate_says_what_fits(cli: Cli) -> None:
    done = cli("estimate", "demo", "--gpu", "24", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["parameters"] > 1_000_000
    assert facts["suggestion"] == {"activation_checkpointing": "none", "micro_batch": 2}
    assert facts["run"] is None  # a GPU of unknown speed
    assert "does not fit" in cli("estimate", "brats_192", "--gpu", "10").stdout


def test_estimate_without_a_configuration_is_one_line(cli: Cli) -> None:
    for arguments in ([], ["training.zero_stage=2"]):
        done = cli("estimate", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "no configuration" in done.stderr
    assert "give memory in GiB, or one of" in cli("estimate", "demo", "--gpu", "h1000").stderr
    refused = cli("estimate", "demo", "--gpus-per-node", "8")
    assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (2, 1, "")
    assert "not a multiple of micro_batch x ranks" in refused.stderr


@pytest.mark.slow
def test_auto_checkpointing_is_chosen_and_stored(cli: Cli, tiny_packed: Path, tmp_path: Path) -> None:
    settings = [*TINY, "training.num_steps=1", "model.activation_checkpointing=auto"]
    done = cli("train", "--out", tmp_path / "run", "--data", tiny_packed, "-q", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("activation checkpointing: none, predicted peak"), "not before training"
    choice = json.loads((tmp_path / "run" / "activation_checkpointing.json").read_text())
    assert choice["predicted_peak_gib"] < choice["usable_share"] * choice["free_gib"]
