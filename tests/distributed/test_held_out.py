"""Validation and previews under real ranks: with the EMA weights, the same at any rank count, and without a trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_ddpm.checkpoint import PieceReader
from hpc_ddpm.config import Config, load_config
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.runlog import read_metrics
from hpc_ddpm.training.held_out import HeldOutVolume
from hpc_ddpm.training.validation import Validation
from tests.conftest import TINY
from tests.distributed.test_guards import state
from tests.distributed.test_training import SMOOTH, Torchrun, losses, run_all

BRAIN = "data.labels.names={1: brain, 2: tumour}"
LOOK = ["training.validate_every_steps=2", "training.preview_every_steps=4"]
STILL = ["training.learning_rate=1e-30", "training.weight_decay=0"]
"""The weights stay, so that ranks cannot differ by the rounding of sums over ranks."""
WAYS = {
    f"{precision}-{stage}": [f"training.precision={precision}", f"training.zero_stage={stage}"]
    for precision in ("fp32", "bf16")
    for stage in (0, 1, 2, 3)
} | {"fp32-3-offload": ["training.zero_stage=3", "training.offload_optimizer=cpu", "training.offload_parameters=cpu"]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed phantoms whose labels cover the whole brain."""
    folder = tmp_path_factory.mktemp("brains")
    data = load_config(None, [*TINY, BRAIN, "data.val_fraction=0.3"]).config.data
    write_phantoms(folder / "source", 10, (16, 16, 16), seed=1, modalities=("t1",), labels=data.labels)
    pack(folder / "source", folder / "packed", data)
    return folder / "packed"


def rows(run: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in read_metrics(run)}


def val_losses(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("val_loss")}


@pytest.mark.slow
def test_looking_leaves_no_trace(torchrun: Torchrun, brains: Path, tmp_path: Path) -> None:
    ways = ["fp32-1", "fp32-3-offload", "bf16-0", "bf16-3"]  # one of each kind of optimizer
    jobs = {tmp_path / f"blind-{way}": [*WAYS[way], BRAIN] for way in ways}
    jobs |= {tmp_path / f"seeing-{way}": [*WAYS[way], BRAIN, *LOOK] for way in ways}
    run_all(torchrun, 2, jobs, brains)
    for way in ways:
        blind, seeing = tmp_path / f"blind-{way}", tmp_path / f"seeing-{way}"
        assert losses(seeing) == losses(blind), way
        tensors = state(blind, 6)
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in state(seeing, 6).items()), way
        logged = rows(seeing)
        assert [step for step, row in logged.items() if "val_loss" in row] == [2, 4, 6]
        assert len({logged[step]["val_loss"] for step in (2, 4, 6)}) == 3, way
        assert logged[4]["preview_s"] > 0
        assert logged[4]["validation_s"] > 0


@pytest.mark.slow
def test_the_same_at_any_rank_count_and_stage(torchrun: Torchrun, brains: Path, tmp_path: Path) -> None:
    run_all(torchrun, 1, {tmp_path / "begun": [BRAIN, "training.num_steps=3"]}, brains)
    ways = {1: ["fp32-0"], 2: ["fp32-0", "fp32-1", "fp32-2", "fp32-3", "fp32-3-offload"], 4: ["fp32-1", "fp32-3"]}
    look = [BRAIN, *STILL, "training.num_steps=4", "training.validate_every_steps=4", "training.preview_every_steps=4"]
    look += ["training.validation_volumes=3", "training.preview_volumes=3"]  # two ranks have a spare one
    for num_ranks, chosen in ways.items():
        jobs = {tmp_path / f"{num_ranks}-{way}": [*WAYS[way], *look] for way in chosen}
        for run in jobs:
            shutil.copytree(tmp_path / "begun", run, ignore=shutil.ignore_patterns("config.json"))  # it would refuse
        run_all(torchrun, num_ranks, jobs, brains)
    reference = tmp_path / "1-fp32-0"
    row = rows(reference)[4]
    names = ["val_loss", *(f"val_loss_t{low}_{low + 9}" for low in range(0, 50, 10))]
    assert list(val_losses(row)) == names
    assert 0 < row["preview_fidelity"] < 1
    pictures = sorted(path.relative_to(reference) for path in reference.glob("previews/**/t1.nii.gz"))
    assert len(pictures) == 3
    for run in tmp_path.glob("[124]-*"):
        assert val_losses(rows(run)[4]) == val_losses(row), run.name
        assert rows(run)[4]["preview_fidelity"] == row["preview_fidelity"], run.name
        assert (run / "previews/step_00000004.png").read_bytes() == (
            reference / "previews/step_00000004.png"
        ).read_bytes()
        for picture in pictures:
            assert np.array_equal(read_nifti(run / picture).data, read_nifti(reference / picture).data), (
                run.name,
                picture,
            )

    config = load_config(None, [*TINY, *SMOOTH, *look, f"data.path={brains}", "data.val_fraction=0.3"]).config
    assert by_hand(config, reference, "ema") == pytest.approx(val_losses(row), rel=1e-6)
    assert by_hand(config, reference, "master") != pytest.approx(val_losses(row), rel=1e-6)


def by_hand(config: Config, run: Path, kind: str) -> dict[str, float]:
    """The validation of a plain network that holds weights of the run's last checkpoint."""
    network = build_unet(config).eval()
    network.load_state_dict(PieceReader(run / "checkpoints/step_00000004").full(kind))
    validation = Validation(config, Path(config.data.path), Ranks(), CPU)
    table = []
    with torch.no_grad():
        for position in validation.volumes.positions:
            item = validation.volumes.dataset[position]
            volume = HeldOutVolume(0, False, position, item["image"][None], item["mask"][None])
            table.append(validation._losses(network, volume))
    by_bucket = torch.stack(table).double().mean(0).tolist()
    return dict(zip(["val_loss", *_bucket_names(validation)], [sum(by_bucket) / 5, *by_bucket], strict=True))


def _bucket_names(validation: Validation) -> list[str]:
    return [f"val_loss_t{bucket[0]}_{bucket[-1]}" for bucket in validation.buckets]
