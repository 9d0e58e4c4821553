"""What a record may say of where a volume was made: names and paths below a root; hosts and commands only if asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import write_json
from hpc_ddpm.sampling.bids import BIDS
from hpc_ddpm.sampling.folder import SETTINGS, SampleFolder, find_folder
from hpc_ddpm.sampling.packed import PACKED
from hpc_ddpm.sampling.plan import MANIFEST, Item, read_manifest, write_manifest

PROVENANCE = ("created", "versions", "git_commit")
"""What is said of the origin of weights."""
SOURCE = ("run", "checkpoint", "file", "sha256", "step", "which")
"""What is said of a run or file that weights come from: names, never paths."""
PRIVATE = ("hooks", "host", "command")
"""Entries of settings and provenance that name people's machines, folders or programs."""


def below_root(path: str, root: str) -> str:
    """`path` as seen from `root`; only its name where it lies elsewhere."""
    place = PurePath(path)
    if root and place.is_relative_to(root):
        return place.relative_to(root).as_posix()
    return place.name if place.is_absolute() else place.as_posix()


def item_record(item: Item) -> dict[str, Any]:
    """What a sidecar says of its item."""
    record = asdict(_below_root(item))
    return {name: value for name, value in record.items() if name != "root" and (name != "images" or value)}


def _below_root(item: Item) -> Item:
    """With its files as seen from its root."""
    images = tuple(below_root(image, item.root) for image in item.images)
    return replace(item, mask=below_root(item.mask, item.root), images=images, root="")


def weights_record(weights: Mapping[str, Any]) -> dict[str, Any]:
    """What a sidecar says of the weights: their name and hash, and what they were made with."""
    known = weights.get("provenance", {})
    told = {name: known[name] for name in PROVENANCE if name in known}
    source = known.get("source")
    if isinstance(source, Mapping):
        told["source"] = without_places({name: source[name] for name in SOURCE if name in source})
    return {"path": below_root(weights["path"], ""), "sha256": weights["sha256"], "provenance": told}


def without_places(value: Any) -> Any:
    """Settings without hosts and commands, and with the names of files instead of their absolute paths."""
    if isinstance(value, Mapping):
        return {name: without_places(part) for name, part in value.items() if name not in PRIVATE}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    return below_root(value, "") if isinstance(value, str) else value


def share_set(out: Path, shared: Path) -> int:
    """Write a set that says nothing of where it was made: volumes as hard links (else copies), records anew.

    Failed volumes, leases and galleries are left behind. Covariates stay: they are what the volumes were made with.

    Args:
        out: folder of a set; `verify_set` says whether it is sound.
        shared: a new or empty folder.

    Returns:
        Volumes in `shared`.

    Raises:
        DataFormatError: `out` is not a generated set.
        ConfigError: `shared` is not empty.
    """
    folder = find_folder(out)
    if shared.exists() and (not shared.is_dir() or any(shared.iterdir())):
        raise ConfigError(f"{shared}: not an empty folder; choose another place for the set that is shared")
    done = folder.done()
    items = [_below_root(item) for item in read_manifest(folder.path)]
    finished = [item for item in items if item.id in done]
    for name in _files(folder, finished):
        _link(folder.path / name, shared / name)
    target = SampleFolder(shared)
    for item in finished:
        write_json(target.sidecar(item.id), _shareable(folder.record(item.id), item), indent=2)
    write_json(shared / SETTINGS, without_places(folder.made_with()), indent=2)
    write_manifest(shared / MANIFEST, finished, shared)
    return len(finished)


def _files(folder: SampleFolder, items: list[Item]) -> list[str]:
    """Volumes, what describes them, and the packed dataset."""
    named = [name for item in items for name in folder.record(item.id).get("files", {})]
    others = [*folder.path.glob(f"{BIDS}/*.*"), *folder.path.glob(f"{PACKED}/*.*")]
    return [*named, *(path.relative_to(folder.path).as_posix() for path in others if path.name[0] != ".")]


def _shareable(record: dict[str, Any], item: Item) -> dict[str, Any]:
    cleaned = without_places(record)
    return {**cleaned, **item_record(item), "seed": record["seed"], "weights": weights_record(record["weights"])}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
