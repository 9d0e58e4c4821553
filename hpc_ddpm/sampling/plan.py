"""What is to be generated: one line per volume in manifest.jsonl, each with its own seed; lines are only added.

Who generates what is decided by leases while it runs, and never stored.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import FileName, atomic_path, first_unfit
from hpc_ddpm.sampling.masks import MaskSource
from hpc_ddpm.sealed import Count, read_lines, seal
from hpc_ddpm.text import show
from hpc_ddpm.workers.claims import Writer

MANIFEST = "manifest.jsonl"
WAIT_S = 0.05
UNSAID: dict[str, Any] = {"covariates": {}, "coding": "auto", "root": "", "images": ()}
"""What is not written, so that a plan is read by those who do not know it."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Item:
    """One volume to be: from which mask, which replica of it, and the seed that makes it this one."""

    id: FileName
    mask_id: FileName
    mask: str
    """File, or packed dataset in which `mask_id` is the subject."""
    layout: str
    """`packed`, or how the file is coded: see `DataConfig.layout`."""
    replica: Count
    seed: Count
    covariates: Mapping[str, float | str] = field(default_factory=dict)
    """Those that are known; they are in the id."""
    coding: str = "auto"
    """What the values of the mask mean, see `data.labels.coding`."""
    root: str = field(default="", compare=False)
    """Folder below which sidecars name the mask."""
    images: tuple[str, ...] = field(default=(), compare=False)
    """Files beside the mask from which labels of the scheme come, such as the brain; see `MaskSource`."""

    @property
    def source(self) -> MaskSource:
        """Where its mask is."""
        return MaskSource(
            self.mask_id, self.mask, self.layout, self.covariates, self.coding, self.root, tuple(self.images)
        )


def build_plan(masks: Iterable[MaskSource], replicas: int, seed: int) -> list[Item]:
    """Every mask `replicas` times; more replicas or masks later leave the earlier items as they are.

    Volumes that differ in covariates alone have the same seed: the same noise, so that they can be compared.
    """
    return [
        Item(
            f"{mask.id}{_tag(mask.covariates)}_r{replica:03d}",
            mask.id,
            mask.path,
            mask.layout,
            replica,
            volume_seed(seed, mask.id, replica),
            mask.covariates,
            mask.coding,
            mask.root,
            mask.images,
        )
        for mask in masks
        for replica in range(replicas)
    ]


def item_of(record: Mapping[str, Any]) -> Item:
    """The item in a sidecar."""
    known = {entry.name: record[entry.name] for entry in fields(Item) if entry.name in record}
    return Item(**known)


def text_of(value: float | str) -> str:
    """A covariate's value in names of files: letters, digits and `.`."""
    return re.sub(r"[^0-9A-Za-z.]", "", f"{value:g}" if isinstance(value, float) else value)


def _tag(covariates: Mapping[str, float | str]) -> str:
    """`_age-63_sex-F`."""
    return "".join(f"_{name}-{text_of(value)}" for name, value in covariates.items())


def volume_seed(seed: int, mask_id: str, replica: int) -> int:
    """63 bits of SHA-256 over the run's seed, the mask and the replica."""
    return _hash63(f"{seed}\0{mask_id}\0{replica}")


def try_seed(seed: int, attempt: int) -> int:
    """The seed of a volume's later tries; try 0 is the planned seed itself."""
    return seed if attempt == 0 else _hash63(f"{seed}\0try {attempt}")


def read_manifest(out: Path) -> list[Item]:
    """The planned volumes in their order; empty where nothing is planned.

    Raises:
        DataFormatError: a line that is no item.
    """
    path = out / MANIFEST
    if not path.is_file():
        return []
    advice = "restore the file, or move it away and run `hpc-ddpm sample` as before: it plans the same"
    return read_lines(path, Item, advice)


def extend_manifest(out: Path, wanted: Iterable[Item], writer: Writer) -> list[Item]:
    """Add what is not planned yet, and return the whole plan.

    Raises:
        ConfigError: a volume is planned already from another mask file or with another seed, or its id is no name.
    """
    wanted = list(wanted)
    if (unfit := first_unfit([item.id for item in wanted])) is not None:
        raise ConfigError(f"{show(unfit)} cannot be the name of a file; rename the mask")
    while True:
        planned = read_manifest(out)
        new = _missing(out, planned, wanted)
        if not new:
            return planned
        with writer.claim(MANIFEST) as is_ours:
            if is_ours:
                planned = read_manifest(out)
                write_manifest(out / MANIFEST, [*planned, *_missing(out, planned, wanted)], writer.scratch)
        time.sleep(0 if is_ours else WAIT_S)


def _missing(out: Path, planned: Iterable[Item], wanted: Iterable[Item]) -> list[Item]:
    known = {item.id: item for item in planned}
    for item in wanted:
        found = known.get(item.id, item)
        if found != item:
            raise ConfigError(
                f"{out}: {item.id} is planned from {_origin(found)}, asked for from {_origin(item)}; "
                "choose another --out"
            )
    return [item for item in wanted if item.id not in known]


def _origin(item: Item) -> str:
    covariates = "".join(f", {name} {value}" for name, value in item.covariates.items())
    return f"{item.mask} with seed {item.seed}{covariates}"


def write_manifest(path: Path, items: Iterable[Item], scratch: Path) -> None:
    """One line per volume, atomically."""
    with atomic_path(path, scratch=scratch) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in items:
            line = {name: value for name, value in asdict(item).items() if value != UNSAID.get(name)}
            file.write(seal(json.dumps(line, ensure_ascii=False)) + "\n")


def _hash63(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
