"""Checkpoints are complete or absent, verified, and independent of how they were cut into pieces."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from hpc_ddpm.checkpoint import (
    MANIFEST,
    Piece,
    PieceReader,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    step_dirs,
    step_of,
    verify_checkpoint,
    write_pieces,
)
from hpc_ddpm.distributed import Ranks, process_group
from hpc_ddpm.errors import CheckpointError

TENSOR = torch.arange(24.0).reshape(2, 3, 4)


def write(folder: Path) -> list[Path]:
    path = folder / "pieces-00000-of-00001.safetensors"
    write_pieces(path, [Piece("master", "weight", (2, 3, 4), 0, TENSOR.flatten())])
    return [path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    with process_group(Ranks()):
        for step in (1, 2, 3):
            save_checkpoint(tmp_path / "checkpoints", step, {"note": step}, write, Ranks(), keep=3)
    return tmp_path / "checkpoints"


def test_save_verify_and_choose(root: Path) -> None:
    assert [step_of(path) for path in step_dirs(root)] == [1, 2, 3]
    newest = latest_checkpoint(root)
    assert newest is not None
    assert verify_checkpoint(newest)["note"] == 3
    assert torch.equal(PieceReader(newest).full("master")["weight"], TENSOR)
    assert latest_checkpoint(root / "nothing") is None


def test_old_ones_and_leftovers_go(root: Path) -> None:
    (root / "step_00000009.tmp").mkdir()
    prune_checkpoints(root, keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000002", "step_00000003"]


def damage_flip(path: Path) -> None:
    file = next(path.glob("pieces-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_cut(path: Path) -> None:
    file = next(path.glob("pieces-*"))
    file.write_bytes(file.read_bytes()[:-1])


def damage_missing(path: Path) -> None:
    next(path.glob("pieces-*")).unlink()


def damage_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_missing, damage_manifest])
def test_a_damaged_newest_one_is_passed_over(root: Path, damage) -> None:
    damage(root / "step_00000003")
    with pytest.warns(UserWarning, match=r"passed over: .*step_00000003"):
        assert latest_checkpoint(root) == root / "step_00000002"


def test_another_format_is_refused(root: Path) -> None:
    path = root / "step_00000003" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        verify_checkpoint(path.parent)


def test_a_failed_write_leaves_what_was_there(root: Path) -> None:
    def full_disk(folder: Path) -> list[Path]:
        write(folder)
        raise OSError(28, "No space left on device")

    with process_group(Ranks()), pytest.raises(CheckpointError, match=r"rank 0: No space left.*free space"):
        save_checkpoint(root, 4, {}, full_disk, Ranks(), keep=3)
    assert [path.name for path in sorted(root.iterdir())] == [f"step_0000000{step}" for step in (1, 2, 3)]


def test_the_same_step_saved_again(root: Path) -> None:
    with process_group(Ranks()):
        save_checkpoint(root, 3, {"note": "again"}, write, Ranks(), keep=3)
    assert verify_checkpoint(root / "step_00000003")["note"] == "again"


@pytest.mark.parametrize("cuts", [[0, 24], [0, 5, 24], [0, 1, 2, 12, 24]])
def test_any_range_from_any_cut(tmp_path: Path, cuts: list[int]) -> None:
    flat = TENSOR.flatten()
    for rank, (low, high) in enumerate(itertools.pairwise(cuts)):
        path = tmp_path / f"pieces-{rank:05d}-of-{len(cuts) - 1:05d}.safetensors"
        write_pieces(path, [Piece("ema", "weight", (2, 3, 4), low, flat[low:high])])
    reader = PieceReader(tmp_path)
    assert torch.equal(reader.full("ema")["weight"], TENSOR)
    for start, numel in ((0, 24), (3, 7), (11, 2), (23, 1)):
        assert torch.equal(reader.read("ema", "weight", start, numel), flat[start : start + numel])
    assert reader.has("ema")
    assert not reader.has("master")
    shutil.rmtree(tmp_path)


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    write_pieces(
        tmp_path / "pieces-00000-of-00002.safetensors",
        [Piece("ema", "weight", (2, 3, 4), 0, TENSOR.flatten()[:10])],
    )
    with pytest.raises(CheckpointError, match="ema of 'weight' has 10 of the 24"):
        PieceReader(tmp_path).full("ema")


def test_not_a_step_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        step_of(tmp_path)
