"""Checkpoints that are complete or absent: `checkpoints/step_00000100/` with a hash of every file.

    step_N.tmp/ -> every rank writes its files -> MANIFEST.json -> fsync -> rename to step_N

The tensors are stored in pieces, as the ranks hold them, each with its place in the whole tensor. So a
checkpoint does not depend on the world size or the ZeRO stage that wrote it: nothing is gathered to save,
nothing is converted to load.

A crash at any instant leaves at most a `.tmp` folder, which the next save removes. Readers take the newest
folder whose manifest verifies.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, cast

import torch
from pydantic import ConfigDict, with_config
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from hpc_ddpm.distributed import Ranks, all_or_none, broadcast_object
from hpc_ddpm.errors import CheckpointError, ClusterError
from hpc_ddpm.files import FileName, fsync, write_json
from hpc_ddpm.sealed import Count, read_json

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
UNREADABLE = (errno.ENOENT, errno.EIO, errno.ESTALE)
"""Deleted while it is read, or on failing storage: another checkpoint may be whole. What is forbidden is no damage."""
USE_ANOTHER = "use another checkpoint of the run"
_STEP = re.compile(r"step_(\d{8})")


class FileFacts(TypedDict):
    """What a manifest says of a file."""

    size: Count
    """Bytes."""
    sha256: str


@with_config(ConfigDict(extra="allow"))
class Manifest(TypedDict, total=False):
    """MANIFEST.json; what a later version adds is kept."""

    format_version: Required[int]
    step: Required[Count]
    files: Required[dict[FileName, FileFacts]]
    created: str
    config_digest: str
    data_digest: str
    optimizer_step: Count
    ema_updates: Count
    loss_scaler: dict[str, Any] | None
    precision: str
    weights: list[str]
    zero_stage: Count
    world_size: Count


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


def checkpoint_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return root / f"step_{step:08d}"


def unfinished_dir(final: Path) -> Path:
    """Where a checkpoint is written before it is published, and where it is moved before it is deleted."""
    return final.with_name(f"{final.name}.tmp")


def publish(final: Path, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Make an unfinished checkpoint, whose files are all on the disk, a complete one.

    Raises:
        CheckpointError: a file is not there any more, or of another size; nothing is published.
    """
    manifest = {"format_version": FORMAT_VERSION, "step": step_of(final), **facts, "files": files}
    temporary = unfinished_dir(final)
    check_files(temporary, files)
    write_json(temporary / MANIFEST, manifest, indent=2)
    if final.exists():  # a damaged one of the same step, which the resume passed over
        replaced = final.with_name(f"{final.name}.replaced.tmp")
        shutil.rmtree(replaced, ignore_errors=True)
        final.replace(replaced)
    temporary.replace(final)
    fsync(final.parent)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint folder says of itself; its files are not looked at.

    Raises:
        CheckpointError: no manifest, a damaged one, or one of another format version.
        ClusterError: it may not be read.
    """
    try:
        manifest = cast("dict[str, Any]", read_json(path / MANIFEST, Manifest, USE_ANOTHER, CheckpointError))
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            _refuse_forbidden(path / MANIFEST, error.__cause__)
        raise
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {manifest['format_version']}, this version reads {FORMAT_VERSION}")
    return manifest


def _refuse_forbidden(file: Path, error: OSError) -> None:
    """What may not be read is no damage: or a run would begin again at step 0.

    Raises:
        ClusterError: it may not be.
    """
    if error.errno not in UNREADABLE:
        raise ClusterError(
            f"{file}: cannot be read ({error.strerror}); mend its permissions, then run the same command"
        ) from error


def check_sizes(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder whose files are all there, as long as they should be; none is read.

    Raises:
        CheckpointError: names the first file that is not.
    """
    manifest = read_manifest(path)
    check_files(path, manifest["files"])
    return manifest


def check_files(path: Path, files: Mapping[str, Any]) -> None:
    """Whether the files of a manifest are in this folder, with their sizes.

    Raises:
        CheckpointError: names the first file that is not.
    """
    for name, row in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != row["size"]:
            raise CheckpointError(f"{file}: missing or not {row['size']} bytes long")


def summarise_checkpoint(path: Path) -> dict[str, Any]:
    """What `checkpoint ls` shows of a folder, damaged or not: `problem` is None or says what is wrong."""
    manifest: dict[str, Any] = {}
    problem = None
    try:
        manifest = read_manifest(path)
        check_sizes(path)
    except CheckpointError as error:
        problem = str(error)
    facts = ("created", "world_size", "zero_stage", "precision", "weights")
    return {
        "step": step_of(path),
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        **{key: manifest.get(key, [] if key == "weights" else "") for key in facts},
        "problem": problem,
    }


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint folder; reads and hashes every file.

    Raises:
        CheckpointError: names the first file that is missing or differs from the manifest.
        ClusterError: a file may not be read.
    """
    manifest = check_sizes(path)
    for name, row in manifest["files"].items():
        try:
            with (path / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            _refuse_forbidden(path / name, error)
            raise CheckpointError(f"{path / name}: cannot be read ({error.strerror})") from error
        if found != row["sha256"]:
            raise CheckpointError(f"{path / name}: its SHA-256 is not the one in {MANIFEST}; the file is damaged")
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
    return broadcast_object(all_or_none(lambda: latest_checkpoint(root) if ranks.is_main else None))


def prunable(newest: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Checkpoints beyond `newest`, a whole one, and `keep - 1` before it; not those of multiples of `keep_every` steps.

    Later ones are damaged and were passed over, or are being published: they do not count and stay.
    """
    counted = [path for path in step_dirs(newest.parent) if step_of(path) <= step_of(newest)]
    return [path for path in counted[:-keep] if not keep_every or step_of(path) % keep_every]


def delete_checkpoints(paths: Iterable[Path]) -> None:
    """Delete checkpoint folders; what cannot be deleted is a warning.

    A killed deletion leaves a `.tmp` folder, never a checkpoint with files missing.
    """
    for path in paths:
        doomed = path if path.suffix == ".tmp" else unfinished_dir(path)
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"could not delete old checkpoint {path}: {error.strerror}", stacklevel=2)


def leftovers(root: Path) -> list[Path]:
    """What killed saves and deletions left behind; only the run's own next save may delete it."""
    return sorted(root.glob("step_*.tmp"))


# -------------------------------------------------------------------------------------- tensors in pieces


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one named tensor: elements `start .. start + values.numel()` of its flat view."""

    kind: str
    """`master` (fp32 weights), `exp_avg`, `exp_avg_sq`, or the name of an average."""
    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    values: torch.Tensor
    """1-D fp32."""


def write_pieces(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """One rank's pieces as a safetensors file, on the disk at return; its size and hash for the manifest.

    Which rank wrote what does not matter to a reader. One piece at a time is copied, where safetensors' own
    writer would hold all of them twice.
    """
    header: dict[str, Any] = {"__metadata__": {"shapes": json.dumps({piece.name: piece.shape for piece in pieces})}}
    offset = 0
    for piece in pieces:
        numel = piece.values.numel()
        key = f"{piece.kind}/{piece.name}@{piece.start}"
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, offset + 4 * numel]}
        offset += 4 * numel
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        values: Iterable[Any] = (piece.values.detach().cpu().contiguous().numpy() for piece in pieces)
        for data in (len(text).to_bytes(8, "little"), text, *values):
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": 8 + len(text) + offset, "sha256": digest.hexdigest()}


class PieceReader:
    """Reads tensors, or any range of them, from the piece files of a checkpoint written at any world size.

    Raises:
        CheckpointError: a file is torn; damaged values only `verify_checkpoint` sees.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, list[tuple[int, Path, str]]] = {}
        for path in sorted(folder.glob("pieces-*.safetensors")):
            with _opened(path) as file:
                shapes = json.loads(file.metadata()["shapes"])
                self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    stem, _, start = key.rpartition("@")
                    self._where.setdefault(stem, []).append((int(start), path, key))

    @property
    def kinds(self) -> list[str]:
        """What is stored: `master`, the moments, the averages."""
        return sorted({stem.partition("/")[0] for stem in self._where})

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start .. start + numel` of a tensor's flat view, fp32 on CPU.

        Raises:
            CheckpointError: the tensor, or a part of it, is in no file, or its file is torn.
        """
        result = torch.empty(numel)
        filled = 0
        for piece_start, path, key in self._where.get(f"{kind}/{name}", []):
            with _opened(path) as file:
                piece = file.get_slice(key)
                low, high = max(start, piece_start), min(start + numel, piece_start + piece.get_shape()[0])
                if low < high:
                    result[low - start : high - start] = piece[low - piece_start : high - piece_start]
                    filled += high - low
        if filled != numel:
            raise CheckpointError(f"{self.folder}: {kind} of '{name}' has {filled} of the {numel} elements asked for")
        return result

    def full(self, kind: str) -> dict[str, torch.Tensor]:
        """Every tensor of one kind, whole: a state dict of the network for `master` and the averages."""
        return {name: self.read(kind, name, 0, math.prod(shape)).reshape(shape) for name, shape in self.shapes.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable file of pieces ({error}); use another checkpoint") from error
