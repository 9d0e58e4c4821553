"""Checkpoints that are complete or absent: `checkpoints/step_00000100/` with a hash of every file.

    step_N.tmp/ -> every rank writes its files -> MANIFEST.json -> fsync -> rename to step_N

The tensors are stored in pieces, as the ranks hold them, each with its place in the whole tensor. So a
checkpoint does not depend on the world size or the ZeRO stage that wrote it: nothing is gathered to save,
nothing is converted to load.

A crash at any instant leaves at most a `.tmp` folder, which the next save removes. Readers take the newest
folder whose manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from hpc_ddpm.distributed import Ranks, broadcast_object
from hpc_ddpm.errors import CheckpointError
from hpc_ddpm.files import fsync, write_json

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
_STEP = re.compile(r"step_(\d{8})")


def step_dirs(root: Path) -> list[Path]:
    """Published checkpoints of a run's `checkpoints` folder, oldest first; not verified."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _STEP.fullmatch(path.name)
    if not match:
        raise CheckpointError(f"{path} is not a checkpoint folder (step_ and eight digits)")
    return int(match.group(1))


def save_checkpoint(
    root: Path, step: int, facts: dict[str, Any], write: Callable[[Path], list[Path]], ranks: Ranks, keep: int
) -> Path:
    """Publish one checkpoint; a collective. `write(folder)` writes this rank's files and returns them.

    Raises:
        CheckpointError: on every rank, when any rank could not write (full or read-only disk); the unfinished
            folder is removed and older checkpoints stay.
    """
    final = root / f"step_{step:08d}"
    temporary = root / f"{final.name}.tmp"
    _together(ranks, lambda: _fresh(temporary) if ranks.is_main else None, f"prepare {temporary}")
    try:
        rows = _together(ranks, lambda: [_describe(path) for path in write(temporary)], f"write {temporary}")
        files = {name: row for part in rows for name, row in part}
        manifest = {"format_version": FORMAT_VERSION, "step": step, **facts, "files": files}
        _together(ranks, lambda: _publish(temporary, final, manifest) if ranks.is_main else None, f"publish {final}")
    except CheckpointError:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if ranks.is_main:
        prune_checkpoints(root, keep)
    return final


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _describe(path: Path) -> tuple[str, dict[str, Any]]:
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return path.name, {"size": path.stat().st_size, "sha256": digest}


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_json(temporary / MANIFEST, manifest, indent=2)
    if final.exists():  # the same step saved again, after a resume from an older one
        shutil.rmtree(final)
    temporary.replace(final)
    fsync(final.parent)


def _together(ranks: Ranks, work: Callable[[], Any], what: str) -> list[Any]:
    """Run `work` on every rank; if it fails on one, all raise the same error instead of hanging."""
    try:
        outcome: tuple[str, Any] = ("", work())
    except OSError as error:
        outcome = (f"rank {ranks.rank}: {error.strerror or error}", None)
    outcomes: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(outcomes, outcome)
    failures = [failure for failure, _ in outcomes if failure]
    if failures:
        raise CheckpointError(f"cannot {what}: {failures[0]}; free space or fix permissions, then run the same command")
    return [value for _, value in outcomes]


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint folder says of itself; its files are not looked at.

    Raises:
        CheckpointError: no manifest, or one of another format version.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable {MANIFEST} ({error}); this checkpoint is incomplete") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}")
    return manifest


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint folder; reads and hashes every file.

    Raises:
        CheckpointError: names the first file that is missing or differs from the manifest.
    """
    manifest = read_manifest(path)
    for name, row in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != row["size"]:
            raise CheckpointError(f"{file}: missing or not {row['size']} bytes long")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != row["sha256"]:
                raise CheckpointError(f"{file}: its SHA-256 is not the one in {MANIFEST}; the file is damaged")
    return manifest


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are reported and passed over."""
    for path in reversed(step_dirs(root)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def agree_on_latest(root: Path, ranks: Ranks) -> Path | None:
    """Rank 0's `latest_checkpoint`, on every rank."""
    return broadcast_object(latest_checkpoint(root) if ranks.is_main else None)


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep`, and leftovers of killed saves; what cannot be deleted is a warning."""
    for path in [*step_dirs(root)[:-keep], *root.glob("step_*.tmp")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            warnings.warn(f"could not delete old checkpoint {path}: {error.strerror}", stacklevel=2)


# -------------------------------------------------------------------------------------- tensors in pieces


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one named tensor: elements `start .. start + values.numel()` of its flat view."""

    kind: str
    """`master` (fp32 weights), `exp_avg`, `exp_avg_sq` or `ema`."""
    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    values: torch.Tensor
    """1-D fp32."""


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """One rank's pieces as a safetensors file; which rank wrote what does not matter to a reader."""
    pieces = list(pieces)
    tensors = {f"{piece.kind}/{piece.name}@{piece.start}": piece.values.detach().cpu() for piece in pieces}
    shapes = json.dumps({piece.name: piece.shape for piece in pieces})
    save_file(tensors, path, metadata={"shapes": shapes})


class PieceReader:
    """Reads tensors, or any range of them, from the piece files of a checkpoint written at any world size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, list[tuple[int, Path, str]]] = {}
        for path in sorted(folder.glob("pieces-*.safetensors")):
            with safe_open(path, "pt") as file:
                shapes = json.loads(file.metadata()["shapes"])
                self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    stem, _, start = key.rpartition("@")
                    self._where.setdefault(stem, []).append((int(start), path, key))

    def has(self, kind: str) -> bool:
        """Whether any tensor of this kind is stored."""
        return any(stem.startswith(f"{kind}/") for stem in self._where)

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start .. start + numel` of a tensor's flat view, fp32 on CPU.

        Raises:
            CheckpointError: the tensor, or a part of it, is in no file.
        """
        result = torch.empty(numel)
        filled = 0
        for piece_start, path, key in self._where.get(f"{kind}/{name}", []):
            with safe_open(path, "pt") as file:
                piece = file.get_slice(key)
                low, high = max(start, piece_start), min(start + numel, piece_start + piece.get_shape()[0])
                if low < high:
                    result[low - start : high - start] = piece[low - piece_start : high - piece_start]
                    filled += high - low
        if filled != numel:
            raise CheckpointError(f"{self.folder}: {kind} of '{name}' has {filled} of the {numel} elements asked for")
        return result

    def full(self, kind: str) -> dict[str, torch.Tensor]:
        """Every tensor of one kind, whole: a state dict of the network for `master` and `ema`."""
        return {name: self.read(kind, name, 0, math.prod(shape)).reshape(shape) for name, shape in self.shapes.items()}
