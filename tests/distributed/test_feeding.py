"""Augmentation, patches, the cache and staging under real ranks: none of them knows how many there are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.distributed.test_training import ROUNDING, losses, run_all

FEEDING = [
    "data.patch_size=[8,12,16]",
    "augment.flip_probability=[0.5,0,0.5]",
    "augment.affine_probability=0.5",
    "augment.bias_field_probability=0.5",
    "augment.contrast_probability=0.5",
    "augment.gamma_probability=0.5",
    "augment.noise_probability=0.5",
    "training.num_steps=4",
    "training.learning_rate=1e-3",
]
"""At a higher rate Adam turns the sign of gradients that are all rounding into steps."""


@pytest.mark.slow
def test_the_curve_is_the_same_however_it_is_fed(torchrun: Callable, tiny_packed: Path, tmp_path: Path) -> None:
    node = [f"data.stage_dir={tmp_path / 'scratch'}", "data.cache=ram", "data.num_workers=1"]
    run_all(torchrun, 1, {tmp_path / "1": [*FEEDING, "training.micro_batch=4"]}, tiny_packed)
    run_all(torchrun, 2, {tmp_path / "2": FEEDING, tmp_path / "2-node": [*FEEDING, *node]}, tiny_packed)
    run_all(torchrun, 4, {tmp_path / "4-node": [*FEEDING, *node]}, tiny_packed)
    assert losses(tmp_path / "2-node") == losses(tmp_path / "2")
    for name in ("2", "4-node"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "1"), rel=ROUNDING), name
    assert len(list((tmp_path / "scratch").rglob("shard-*.h5"))) == len(list(tiny_packed.glob("*.h5")))


@pytest.mark.slow
def test_no_room_is_one_line(
    real_torchrun: Callable[..., subprocess.CompletedProcess[str]],
    tiny_packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 alone finds no room; the error is said once and all ranks end with it."""
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "ranks.py").write_text(
        "import os, shutil, sys\n"
        "from collections import namedtuple\n"
        "from launch.cli import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    shutil.disk_usage = lambda path: namedtuple('usage', 'free')(1)\n"
        "else:\n"
        "    os.environ['SCRATCH'] = os.environ['SCRATCH'] + '-0'\n"
        "main()\n"
    )
    done = real_torchrun(
        2,
        tmp_path / "ranks.py",
        "train",
        "--out",
        tmp_path / "run",
        "--data",
        tiny_packed,
        *TINY,
        "data.stage_dir=$SCRATCH",
    )
    assert done.returncode != 0
    assert done.stderr.count("are free; choose another data.stage_dir") == 1
    assert "hpc_ddpm/training/loop.py" not in done.stderr  # no traceback but that of torchrun
    assert not (tmp_path / "run" / "config.json").exists()
