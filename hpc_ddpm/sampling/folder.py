"""The folder of a generated set: who is finished, who failed, and with what it was made.

manifest.jsonl      one line per planned volume
sampling.json       seed, weights and settings that all its volumes share
sidecar/ID.json     the record of a finished volume, written last
failed/ID.json      why a volume could not be made
<modality>/, mask/, bids/, packed/   the volumes, as `sampling.output.formats` says
.sample/            leases and unfinished files of living workers
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ConfigDict, with_config

from hpc_ddpm.config import Config
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import FileName, write_json
from hpc_ddpm.sampling.plan import MANIFEST, WAIT_S
from hpc_ddpm.sampling.shapes import MadeWith, Sidecar
from hpc_ddpm.sealed import read_json
from hpc_ddpm.text import show
from hpc_ddpm.workers.claims import Writer

SETTINGS = "sampling.json"
NAMES = frozenset({"sidecar", "failed", "mask", "bids", "packed", "gallery"})
"""Folders of a set, which no modality can be called."""
PURPOSE = "sample"
"""Purpose of all workers; `sampling.json` ensures that they differ in nothing that matters."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Failure:
    """Why a volume could not be made."""

    id: FileName
    kind: str
    """mask, nan, write or rejected; unreadable where the record of it is."""
    reason: str
    run: str
    """Id of the start of the command that found the failure, see `Team`."""


@dataclass(frozen=True)
class SampleFolder:
    """Paths and records of a generated set."""

    path: Path

    @property
    def state(self) -> Path:
        """Leases and unfinished files."""
        return self.path / ".sample"

    def sidecar(self, item_id: str) -> Path:
        """Path of the record of a finished volume."""
        return self.path / "sidecar" / f"{item_id}.json"

    def failure(self, item_id: str) -> Path:
        """Path of the record of a failed volume."""
        return self.path / "failed" / f"{item_id}.json"

    def done(self) -> set[str]:
        """Ids of finished volumes."""
        return _stems(self.path / "sidecar")

    def failed(self) -> set[str]:
        """Ids of volumes that could not be made."""
        return _stems(self.path / "failed") - self.done()

    def failures(self) -> list[Failure]:
        """Records of failed volumes, sorted by id."""
        return [failure for item_id in sorted(self.failed()) if (failure := self.read_failure(item_id))]

    def read_failure(self, item_id: str) -> Failure | None:
        """The record, unless it is gone; a damaged one says so."""
        try:
            found = read_json(self.failure(item_id), Failure, "run `hpc-ddpm sample retry`")
        except DataFormatError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            found = Failure(item_id, "unreadable", str(error), "")
        return found if found.id == item_id else None

    def write_failure(self, failure: Failure, scratch: Path) -> None:
        """Mark a volume as failed."""
        write_json(self.failure(failure.id), asdict(failure), indent=2, scratch=scratch)

    def record(self, item_id: str) -> dict[str, Any]:
        """The sidecar's content.

        Raises:
            DataFormatError: damaged, or the record of another volume.
        """
        path, advice = self.sidecar(item_id), "delete it to make it again"
        record = cast("dict[str, Any]", read_json(path, Sidecar, f"not a readable sidecar; {advice}"))
        if record["id"] != item_id:
            raise DataFormatError(f"{path}: the sidecar of {show(record['id'])}; {advice}")
        return record

    def records(self) -> Iterator[dict[str, Any]]:
        """Records of all finished volumes, sorted by id."""
        return (self.record(item_id) for item_id in sorted(self.done()))

    def made_with(self) -> dict[str, Any]:
        """The content of sampling.json.

        Raises:
            DataFormatError: `path` is not a generated set, or the file is damaged.
        """
        advice = "restore it, or give another folder that `hpc-ddpm sample` wrote"
        return cast("dict[str, Any]", read_json(self.path / SETTINGS, MadeWith, advice))

    def claim(self, config: Config, weights: dict[str, Any], writer: Writer) -> None:
        """Keep volumes of different origin out of one folder.

        Raises:
            ConfigError: `path` holds volumes of other weights or settings.
        """
        wanted = {
            "seed": config.seed,
            "weights": weights,
            "identity": config.sampling.identity,
            "config": config.dump(),
        }
        while not (self.path / SETTINGS).exists():
            with writer.claim(SETTINGS) as is_ours:
                if is_ours and not (self.path / SETTINGS).exists():
                    write_json(self.path / SETTINGS, wanted, indent=2, scratch=writer.scratch)
            time.sleep(0 if is_ours else WAIT_S)
        differing = _differing(self.made_with(), wanted)
        if differing:
            raise ConfigError(
                f"{self.path} holds volumes made with another {', '.join(differing)}; "
                "give the settings it was made with, or another --out"
            )


def find_folder(path: Path) -> SampleFolder:
    """The generated set in or above `path`.

    Raises:
        DataFormatError: there is none.
    """
    for folder in (path, *path.resolve().parents):
        if (folder / SETTINGS).is_file() and (folder / MANIFEST).is_file():
            return SampleFolder(folder)
    raise DataFormatError(f"{path}: no {MANIFEST} and {SETTINGS} here or above; give a folder of `hpc-ddpm sample`")


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = [f"sampling.{name}" for name, value in wanted["identity"].items() if found["identity"].get(name) != value]
    if found["weights"]["sha256"] != wanted["weights"]["sha256"]:
        names.insert(0, "weights")
    return [*names, *(["seed"] if found["seed"] != wanted["seed"] else [])]


def _stems(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json") and entry.name[0] != "."}
