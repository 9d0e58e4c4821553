"""A generated set against its manifest and sidecars: every planned volume once, every file as it was written."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_ddpm.config import Config, config_from_dict
from hpc_ddpm.data.shards import INDEX, Packed, crcs, open_packed, to_hex
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.sampling.bids import BIDS, bids_stem
from hpc_ddpm.sampling.folder import SampleFolder, find_folder
from hpc_ddpm.sampling.packed import PACKED, row_path
from hpc_ddpm.sampling.plan import Item, read_manifest, try_seed
from hpc_ddpm.sampling.write import MASK, file_sha256


@dataclass(frozen=True)
class Problem:
    """Something that is not as manifest and sidecars say."""

    kind: str
    """missing, failed, unreadable, checksum, mismatch or extra."""
    id: str
    """Id of the volume, or path of an extra file."""
    found: str


def verify_set(
    out: Path, *, num_workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Problem]:
    """Compare a set with its manifest and sidecars.

    Args:
        out: folder of the set.
        num_workers: threads that read files.
        progress: called with (volumes looked at, planned volumes).

    Raises:
        DataFormatError: `out` is not a generated set, or its packed dataset cannot be opened.
    """
    folder = find_folder(out)
    config = config_from_dict(folder.made_with()["config"], str(folder.path))
    items = read_manifest(folder.path)
    shards = _open_packed(folder.path)
    problems: list[Problem] = []
    known: set[str] = set()
    unnamed: list[Item] = []
    with ThreadPoolExecutor(num_workers) as threads:
        results = threads.map(lambda item: _check_item(folder, item, shards), items)
        for number, (item, (found, files)) in enumerate(zip(items, results, strict=True), start=1):
            problems += found
            known |= files
            unnamed += [] if files else [item]
            progress(number, len(items))
    return [*problems, *_extra(folder, config, items, known, unnamed)]


def _check_item(
    folder: SampleFolder, item: Item, shards: tuple[Packed, dict[str, int]] | None
) -> tuple[list[Problem], set[str]]:
    """What is wrong with a volume, and the files that its sidecar names."""
    if not folder.sidecar(item.id).exists():
        failure = folder.read_failure(item.id)
        if failure is not None:
            return [Problem("failed", item.id, f"{failure.kind}: {failure.reason}")], set()
        return [Problem("missing", item.id, "planned, not made yet")], set()
    try:
        record = folder.record(item.id)
    except DataFormatError as error:
        return [Problem("unreadable", item.id, str(error))], set()
    files: dict[str, str] = record.get("files", {})
    problems = [problem for path, digest in files.items() if (problem := _check_file(folder, item, path, digest))]
    if "packed" in record:
        problems += _check_row(folder, item, record["packed"], shards)
    return [*problems, *_check_record(item, record)], set(files)


def _check_record(item: Item, record: dict[str, Any]) -> Iterator[Problem]:
    wanted = {
        "id": item.id,
        "mask_id": item.mask_id,
        "replica": item.replica,
        "seed": try_seed(item.seed, record.get("attempt", 0)),
        "covariates": item.covariates,
    }
    for name, value in wanted.items():
        found = record.get(name, {} if name == "covariates" else None)
        if found != value:
            yield Problem("mismatch", item.id, f"{name} {found} in the sidecar, {value} by the manifest")


def _check_file(folder: SampleFolder, item: Item, path: str, digest: str) -> Problem | None:
    try:
        found = file_sha256(folder.path / path)
    except FileNotFoundError:
        return Problem("missing", item.id, f"{path} is not there")
    except OSError as error:
        return Problem("unreadable", item.id, f"{path}: {error.strerror}")
    return None if found == digest else Problem("checksum", item.id, f"{path} differs from what was written")


def _open_packed(out: Path) -> tuple[Packed, dict[str, int]] | None:
    """The published shards, and which index each volume has in them."""
    if not (out / PACKED / INDEX).exists():
        return None
    packed = open_packed(out / PACKED)
    return packed, {subject.id: subject.index for subject in packed.subjects()}


def _check_row(
    folder: SampleFolder, item: Item, wanted: dict[str, str], shards: tuple[Packed, dict[str, int]] | None
) -> Iterator[Problem]:
    """In its shard, or by itself where it is in none yet."""
    if shards is None or item.id not in shards[1]:
        if not row_path(folder.path, item.id).exists():
            yield Problem("missing", item.id, "neither in a shard of packed/ nor a row of its own")
        return
    packed, index = shards
    try:
        image, mask = packed.read(index[item.id])
    except DataFormatError as error:
        yield Problem("checksum", item.id, str(error))
        return
    found = {"crc32_image": to_hex(crcs(image)), "crc32_mask": to_hex([zlib.crc32(mask.data)])}
    if found != wanted:
        yield Problem("checksum", item.id, "its row in packed/ is another volume")


def _extra(
    folder: SampleFolder, config: Config, items: list[Item], known: set[str], unnamed: list[Item]
) -> Iterator[Problem]:
    """Sidecars of unplanned volumes, and image files that nobody made; those without a sidecar yet may stay."""
    ids = {item.id for item in items}
    for item_id in sorted(folder.done() - ids):
        yield Problem("extra", f"sidecar/{item_id}.json", "not in the manifest")
    roles = (*config.data.modalities, MASK)
    allowed = {f"{role}/{item.id}.nii.gz" for item in unnamed for role in roles}
    allowed |= {f"{bids_stem(item, role)}.nii.gz" for item in unnamed for role in roles}
    folders = [folder.path / name for name in (*roles, BIDS) if (folder.path / name).is_dir()]
    for path in sorted(path for top in folders for path in top.rglob("*.nii.gz") if path.name[0] != "."):
        name = path.relative_to(folder.path).as_posix()
        if name not in known | allowed:
            yield Problem("extra", name, "no sidecar names this file")
