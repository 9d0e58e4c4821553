"""Checkpoints are complete or absent, verified, and independent of how they were cut into pieces."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from typer.testing import CliRunner

from hpc_ddpm.checkpoint import (
    MANIFEST,
    Piece,
    PieceReader,
    check_sizes,
    latest_checkpoint,
    prunable,
    step_dirs,
    step_of,
    verify_checkpoint,
    write_pieces,
)
from hpc_ddpm.config import TrainingConfig
from hpc_ddpm.distributed import Ranks, process_group
from hpc_ddpm.errors import CheckpointError, ClusterError
from hpc_ddpm.files import write_json
from hpc_ddpm.training.saver import Saver
from hpc_ddpm.workers.sole import sole_owner
from launch.checkpoint_commands import checkpoint_app

FILE_DIGEST = hashlib.file_digest
TENSOR = torch.arange(24.0).reshape(2, 3, 4)


PIECES = [Piece("master", "weight", (2, 3, 4), 0, TENSOR.flatten())]


@contextmanager
def saver(root: Path, **settings: int) -> Iterator[Saver]:
    with process_group(Ranks()) as device:
        saver = Saver(root, TrainingConfig(**settings), Ranks(), device)
        yield saver
        saver.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    with saver(tmp_path / "checkpoints") as ours:
        for step in (1, 2, 3):
            ours.save(step, {"note": step}, PIECES, background=False)
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
    with saver(root, keep_checkpoints=2, keep_every_steps=2) as ours:
        ours.save(4, {}, PIECES, background=False)
        ours.save(5, {}, PIECES, background=False)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000002", "step_00000004", "step_00000005"]
    assert [step_of(path) for path in prunable(root / "step_00000005", 1)] == [2, 4]


def test_a_background_save_holds_what_was_there_when_it_began(tmp_path: Path) -> None:
    values = TENSOR.flatten().clone()
    with saver(tmp_path) as ours:
        ours.save(1, {}, [Piece("master", "weight", (2, 3, 4), 0, values)], background=True)
        values.zero_()
        while not step_dirs(tmp_path):
            ours.poll()
        ours.finish()
        assert ours.take_stall_s() > 0
    assert torch.equal(PieceReader(verified(tmp_path)).full("master")["weight"], TENSOR)


def verified(root: Path) -> Path:
    newest = latest_checkpoint(root)
    assert newest is not None
    return newest


def test_a_background_failure_surfaces_at_a_step_boundary(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, pieces: list[Piece]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpc_ddpm.training.saver.write_pieces", full_disk)
    with saver(root) as ours:
        ours.save(4, {}, PIECES, background=True)
        with pytest.raises(CheckpointError, match="No space left"):
            for _ in range(1000):
                ours.poll()
                time.sleep(0.01)
    assert verified(root).name == "step_00000003"


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


def test_later_damaged_ones_do_not_displace_what_is_saved(root: Path) -> None:
    damage_flip(root / "step_00000003")
    with saver(root, keep_checkpoints=1) as ours:
        ours.save(2, {"note": "again"}, PIECES, background=False)
    assert [step_of(path) for path in step_dirs(root)] == [2, 3]
    with pytest.warns(UserWarning, match=r"passed over: .*step_00000003"):
        assert verify_checkpoint(verified(root))["note"] == "again"
    with saver(root, keep_checkpoints=1) as ours:
        ours.save(4, {}, PIECES, background=False)
    assert [step_of(path) for path in step_dirs(root)] == [4]


@pytest.mark.parametrize("damaged", [(3,), (2, 3), (1, 2, 3)])
def test_pruning_keeps_the_newest_whole_ones(root: Path, damaged: tuple[int, ...]) -> None:
    for step in damaged:
        damage_flip(root / f"step_0000000{step}")
    with pytest.warns(UserWarning, match="passed over"):
        result = CliRunner().invoke(checkpoint_app, ["prune", str(root.parent), "--keep", "1", "--yes"])
    assert result.exit_code == 0, result.output
    left = [step_of(path) for path in step_dirs(root)]
    assert left == [step for step in (1, 2, 3) if step >= 3 - len(damaged)]


def test_torn_pieces_are_one_line(root: Path) -> None:
    file = next((root / "step_00000003").glob("pieces-*"))
    reader, content = PieceReader(file.parent), file.read_bytes()
    for damaged in (content[:-1], content.replace(b"weight@0", b"weight@x"), b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pieces-00000-of-00001.safetensors: not a readable file of pieces"):
            PieceReader(file.parent)
    with pytest.raises(CheckpointError, match="not a readable file of pieces"):
        reader.read("master", "weight", 0, 24)


def test_one_that_is_deleted_while_it_is_read_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_and_lose(path: Path) -> dict[str, Any]:
        manifest = check_sizes(path)
        if path.name == "step_00000003":
            damage_missing(path)
        return manifest

    monkeypatch.setattr("hpc_ddpm.checkpoint.check_sizes", check_and_lose)
    with pytest.warns(UserWarning, match=r"step_00000003.* cannot be read \(No such file"):
        assert latest_checkpoint(root) == root / "step_00000002"


@pytest.mark.parametrize(("code", "is_damage"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False)])
def test_storage_that_fails_is_damage_and_a_prohibition_is_not(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_damage: bool
) -> None:
    """Or a run whose checkpoints may not be read would begin again at step 0."""

    def refuse(stream: BinaryIO, name: str) -> Any:
        if "step_00000003" in stream.name:
            raise OSError(code, os.strerror(code))
        return FILE_DIGEST(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    if is_damage:
        with pytest.warns(UserWarning, match="cannot be read"):
            assert latest_checkpoint(root) == root / "step_00000002"
    else:
        with pytest.raises(ClusterError, match=r"cannot be read \(Permission denied\); mend"):
            latest_checkpoint(root)


def test_another_format_is_refused(root: Path) -> None:
    path = root / "step_00000003" / MANIFEST
    write_json(path, json.loads(path.read_text()) | {"format_version": 99})
    with pytest.raises(CheckpointError, match="format 99"):
        verify_checkpoint(path.parent)


def test_a_failed_write_leaves_what_was_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, pieces: list[Piece]) -> None:
        write_pieces(path, pieces)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpc_ddpm.training.saver.write_pieces", full_disk)
    with saver(root) as ours, pytest.raises(CheckpointError, match=r"rank 0: No space left.*free space"):
        ours.save(4, {}, PIECES, background=False)
    assert [path.name for path in sorted(root.iterdir())] == [f"step_0000000{step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: os.truncate(file, 8)])
def test_one_whose_files_another_took_is_not_published(
    root: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    """Whoever deletes or cuts them between their writing and their publishing."""

    def write_and_lose(path: Path, pieces: list[Piece]) -> dict[str, Any]:
        row = write_pieces(path, pieces)
        harm(path)
        return row

    monkeypatch.setattr("hpc_ddpm.training.saver.write_pieces", write_and_lose)
    with saver(root) as ours, pytest.raises(CheckpointError, match=r"step_00000004.tmp/pieces-.* missing or not \d+ b"):
        ours.save(4, {}, PIECES, background=False)
    assert [path.name for path in sorted(root.iterdir())] == [f"step_0000000{step}" for step in (1, 2, 3)]


def test_who_has_lost_the_run_publishes_nothing(root: Path) -> None:
    """Nor does it delete what another writes."""
    state = root.parent / ".train"
    with sole_owner(state, "train", str) as sole, saver(root) as ours:
        ours.sole = sole
        ours.save(4, {}, PIECES, background=False)
        shutil.rmtree(state)
        with sole_owner(state, "train", str), pytest.raises(ClusterError, match=r"process \d+ on"):
            ours.save(5, {}, PIECES, background=False)
    assert step_of(verified(root)) == 4
    assert (root / "step_00000005.tmp").exists()


def test_the_same_step_saved_again(root: Path) -> None:
    with saver(root) as ours:
        ours.save(3, {"note": "again"}, PIECES, background=False)
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
    assert reader.kinds == ["ema"]


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


WRITER = """
import os
import sys
from pathlib import Path
import torch
from hpc_ddpm.checkpoint import Piece, latest_checkpoint, step_of
from hpc_ddpm.config import TrainingConfig
from hpc_ddpm.distributed import Ranks, process_group
from hpc_ddpm.training.saver import Saver

def work(root):
    with process_group(Ranks()) as device:
        newest = latest_checkpoint(root)
        saver = Saver(root, TrainingConfig(keep_checkpoints=1), Ranks(), device)
        for step in range(step_of(newest) + 1 if newest else 1, 10**6):
            pieces = [Piece("master", str(i), (100_000,), 0, torch.full((100_000,), float(step))) for i in range(3)]
            saver.save(step, {}, pieces, background=step % 2 == 0)
            saver.finish()
            print(step, flush=True)

while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        work(Path(sys.argv[1]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_instant_the_last_one_that_was_reported_is_there(tmp_path: Path) -> None:
    """A writer that does nothing but save, keeping one, is killed 25 times; each time it goes on where it was."""
    chance = random.Random(0)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for _ in range(25):
            print("start", file=writer.stdin, flush=True)
            child, first = int(writer.stdout.readline()), writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            reported = [first, *iter(writer.stdout.readline, "killed\n")]
            newest = verified(tmp_path)
            assert step_of(newest) - int(reported[-1]) in {0, 1}
            full = PieceReader(newest).full("master")
            assert all((values == step_of(newest)).all() for values in full.values())
            for path in step_dirs(tmp_path):
                verify_checkpoint(path)
        writer.stdin.close()
