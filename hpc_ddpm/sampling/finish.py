"""What happens to a volume once it is computed: checked, scored, written, recorded; or marked as failed."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_ddpm.config import Config
from hpc_ddpm.errors import ClusterError
from hpc_ddpm.files import CANNOT_WRITE, write_json
from hpc_ddpm.runlog import package_versions
from hpc_ddpm.sampling.fidelity import Fidelity
from hpc_ddpm.sampling.folder import Failure, SampleFolder
from hpc_ddpm.sampling.masks import Mask
from hpc_ddpm.sampling.plan import Item, try_seed
from hpc_ddpm.sampling.privacy import item_record, weights_record, without_places
from hpc_ddpm.sampling.write import voxels_sha256, write_outputs

MAX_FAILED_WRITES = 3
"""Failed writes in a row after which the disk, not the volume, counts as the problem."""


@dataclass(frozen=True, eq=False)
class Job:
    """A volume for which this worker holds the lease."""

    item: Item
    mask: Mask
    lease: ExitStack
    rejected: tuple[dict[str, Any], ...] = ()
    """Earlier tries: attempt, seed and fidelity of each."""

    @property
    def seed(self) -> int:
        """Seed of this try."""
        return try_seed(self.item.seed, len(self.rejected))


@dataclass
class Finisher:
    """Checks, writes and records volumes; several threads may call it."""

    folder: SampleFolder
    config: Config
    weights: dict[str, Any]
    model: torch.nn.Module
    scratch: Path
    fidelity: tuple[str, Fidelity] | None
    run: str
    failed: dict[str, str] = field(default_factory=dict, init=False)
    """Kind of failure by id, found by this worker; kept here because a full disk takes no record."""
    fitted: set[str] = field(default_factory=set, init=False)
    """Ids of masks that had to be changed to fit."""
    generated: int = field(default=0, init=False)
    _failed_writes: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        parameter = next(self.model.parameters())
        is_gpu, is_asked = parameter.device.type == "cuda", self.config.sampling.output.record_origin
        sampling = self.config.sampling.model_dump(mode="json")
        self._made_by = {
            "weights": self.weights if is_asked else weights_record(self.weights),
            "sampling": sampling if is_asked else without_places(sampling),
            "precision": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
            "device_name": torch.cuda.get_device_name(parameter.device) if is_gpu else "",
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
            **({"host": socket.gethostname()} if is_asked else {}),
        }

    def finish(self, job: Job, volume: NDArray[np.float32], seconds: float | None) -> Job | None:
        """Write a volume (C, D, H, W), or mark it as failed; returns the next try where it was rejected.

        Raises:
            ClusterError: several volumes in a row could not be written.
        """
        if not np.isfinite(volume).all():
            self.fail(job.item, "nan", "the volume has NaN or infinite voxels; try precision fp32 or other weights")
            return None
        score = None if self.fidelity is None else round(self.fidelity[1](volume, job.mask.labels), 6)
        if score is not None and score < self.config.sampling.fidelity.reject_below:
            return self._reject(job, score)
        try:
            self._write(job, volume, seconds, score)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            self.fail(job.item, "write", f"{error.strerror}: {error.filename or self.folder.path}")
            if self._count(is_written=False) >= MAX_FAILED_WRITES:
                raise ClusterError(
                    f"{self.folder.path}: {MAX_FAILED_WRITES} volumes in a row could not be written "
                    f"({error.strerror}); make room, then run `hpc-ddpm sample retry {self.folder.path}` for those "
                    "that are marked, and the same command again for the rest"
                ) from None
        else:
            self._count(is_written=True)
        return None

    def fail(self, item: Item, kind: str, reason: str) -> None:
        """Mark a volume as failed, on disk if that can be written."""
        self.failed[item.id] = kind
        with suppress(OSError):
            self.folder.write_failure(Failure(item.id, kind, reason, self.run), self.scratch)

    def failures(self, ids: set[str]) -> dict[str, int]:
        """Number of failed volumes among `ids` by kind, whichever worker found them."""
        kinds = self.failed | {failure.id: failure.kind for failure in self.folder.failures()}
        left = ids - self.folder.done()
        return dict(Counter(kind for item_id, kind in kinds.items() if item_id in left))

    def _count(self, *, is_written: bool) -> int:
        """Count one volume; return how many in a row, up to this one, could not be written."""
        with self._lock:
            self.generated += is_written
            self._failed_writes = 0 if is_written else self._failed_writes + 1
            return self._failed_writes

    def _reject(self, job: Job, score: float) -> Job | None:
        wanted = self.config.sampling.fidelity
        tries = (*job.rejected, {"attempt": len(job.rejected), "seed": job.seed, "fidelity": score})
        if len(tries) < wanted.max_tries:
            return replace(job, rejected=tries)
        scores = ", ".join(f"{one['fidelity']:.3f}" for one in tries)
        self.fail(job.item, "rejected", f"fidelity {scores} in {len(tries)} tries, {wanted.reject_below} asked for")
        return None

    def _write(self, job: Job, volume: NDArray[np.float32], seconds: float | None, score: float | None) -> None:
        item, mask = job.item, job.mask
        outputs = write_outputs(self.folder.path, item, volume, mask, self.config, self.scratch)
        record = {
            **(asdict(item) if self.config.sampling.output.record_origin else item_record(item)),
            "seed": job.seed,
            "planned_seed": item.seed,
            "attempt": len(job.rejected),
            "rejected": list(job.rejected),
            "mask_sha256": mask.sha256,
            "mask_changes": list(mask.changes),
            "mask_coding": self.config.sampling.output.mask_coding,
            "fidelity": score,
            "fidelity_method": self.fidelity[0] if self.fidelity else None,
            "voxels_sha256": voxels_sha256(volume),
            **outputs,
            **self._made_by,
            **({} if seconds is None else {"seconds": round(seconds, 3)}),
        }
        if mask.changes:
            self.fitted.add(item.mask_id)
        write_json(self.folder.sidecar(item.id), record, indent=2, scratch=self.scratch)
        with suppress(OSError):
            self.folder.failure(item.id).unlink(missing_ok=True)
