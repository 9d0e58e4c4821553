"""Shards copied to a node-local folder, once per node for all ranks and jobs of a user.

<stage_dir>/hpc_ddpm-<user id>/   nobody else can write here; refused where another user has made it
    <SHA-256>.h5            a shard; complete when it exists
    packed-<hash>/          index.json, and links to its shards: an ordinary packed dataset; delete a link that leads to
                            a damaged shard, and it is copied again
    .copying/               while a process copies: `hpc_ddpm.workers`
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.pool import Progress
from hpc_ddpm.data.shards import INDEX, Index, ShardEntry, open_packed, read_index, write_index
from hpc_ddpm.errors import ClusterError, ConfigError, DataFormatError
from hpc_ddpm.files import atomic_path, private_folder, writing_to
from hpc_ddpm.workers.claims import Writer, visiting

GIB = 2**30
BLOCK_BYTES = 2**24
COPIES_AT_ONCE = 4
WAIT_S = 0.2
STATE = ".copying"


def stage(data: DataConfig, progress: Progress = lambda done, total: None) -> Path:
    """Where to read the packed dataset: `data.path`, or its copy below `data.stage_dir`, made where it is missing.

    All ranks of a node may call it: one copies, the others wait for it.

    Args:
        data: names both folders.
        progress: called with (shards that are there, all shards) while this call copies or waits.

    Raises:
        ConfigError: an environment variable in `data.stage_dir` is not set.
        ClusterError: not enough space, or a folder that cannot be used or is another user's.
        DataFormatError: a shard is missing or differs from its SHA-256.
    """
    source = Path(data.path)
    if not data.stage_dir:
        return source
    open_packed(source)
    index, folder = read_index(source), expand(data.stage_dir) / f"hpc_ddpm-{os.getuid()}"
    content = json.dumps([index.data, index.shards]).encode()
    target = folder / f"packed-{sha256(content).hexdigest()[:16]}"
    with writing_to(folder, "data.stage_dir"):
        private_folder(folder)
        if not _is_whole(target, index):
            with visiting(folder / STATE, "stage") as writer:
                _fill(source, target, index, writer, progress)
    return target


def _fill(source: Path, target: Path, index: Index, writer: Writer, progress: Progress) -> None:
    """Copy what is missing, or wait for another process that does."""
    while not _is_whole(target, index):
        with writer.claim("copies") as is_ours:
            if is_ours:
                _copy_missing(source, target, index, progress)
                _assemble(target, index)
        if not is_ours:
            progress(len(index.shards) - len(_missing(target, index)), len(index.shards))
            time.sleep(WAIT_S)


def expand(stage_dir: str) -> Path:
    """The folder, with environment variables in it replaced.

    Raises:
        ConfigError: one is not set.
    """
    for name in re.findall(r"\$\{?(\w+)", stage_dir):
        if not os.environ.get(name):
            raise ConfigError(
                f"data.stage_dir={stage_dir}: the environment variable {name} is not set on {socket.gethostname()}; "
                "name a node-local folder, or leave data.stage_dir empty"
            )
    return Path(os.path.expandvars(stage_dir)).absolute()


def _is_whole(target: Path, index: Index) -> bool:
    """Whether the links to all shards, in full, and the index are there."""
    is_there = (target / INDEX).exists() and all(_is_there(target / entry["file"], entry) for entry in index.shards)
    return is_there and _is_indexed(target, index)


def _is_indexed(target: Path, index: Index) -> bool:
    """Whether the copy's index says what the original's says."""
    with suppress(DataFormatError):
        found = read_index(target)
        return (found.data, found.shards) == (index.data, index.shards)
    return False


def _missing(target: Path, index: Index) -> list[ShardEntry]:
    """Shards that are not there in full, or whose links were deleted since."""
    linked = {path.name for path in target.iterdir()} if (target / INDEX).exists() else None
    return [
        entry
        for entry in index.shards
        if not _is_there(_staged(target, entry), entry) or (linked is not None and entry["file"] not in linked)
    ]


def _staged(target: Path, entry: ShardEntry) -> Path:
    return target.with_name(f"{entry['sha256']}.h5")


def _is_there(path: Path, entry: ShardEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry["size_bytes"]


def _copy_missing(source: Path, target: Path, index: Index, progress: Progress) -> None:
    folder = target.parent
    for left_by_a_killed_copier in folder.glob(".*.tmp"):
        left_by_a_killed_copier.unlink()
    missing, total = _missing(target, index), len(index.shards)
    needed, free = sum(entry["size_bytes"] for entry in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise ClusterError(
            f"{folder}: {needed / GIB:.2f} GiB needed for {len(missing)} of {total} shards, {free / GIB:.2f} GiB are "
            "free; choose another data.stage_dir, or leave it empty to read the shards where they are"
        )
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        copies = pool.map(partial(_copy, source, target), missing)
        for done, _ in enumerate(copies, total - len(missing) + 1):
            progress(done, total)


def _copy(source: Path, target: Path, entry: ShardEntry) -> None:
    """What has arrived is compared, not what was sent."""
    digest = sha256()
    with atomic_path(_staged(target, entry)) as temporary:
        shutil.copyfile(source / entry["file"], temporary)
        with temporary.open("rb") as reader:
            while block := reader.read(BLOCK_BYTES):
                digest.update(block)
        if digest.hexdigest() != entry["sha256"]:
            raise DataFormatError(
                f"{source / entry['file']}: SHA-256 differs from {INDEX}; see `hpc-ddpm data verify`, then copy the "
                "shard again or pack again"
            )


def _assemble(target: Path, index: Index) -> None:
    """A packed dataset of links; its index comes last."""
    target.mkdir(exist_ok=True)
    for entry in index.shards:
        link = target / entry["file"]
        if not _is_there(link, entry):
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", _staged(target, entry).name))
    if not _is_indexed(target, index):
        write_index(target, index.data, index.shards)
