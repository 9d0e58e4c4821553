"""Guards against failing runs: they count skipped steps, roll back, and warn of spikes in the loss.

A loss that is not finite makes all its gradients NaN (`Engine.backward`), the reduction carries that to every rank,
and DeepSpeed takes no step where the global gradient norm is not finite. So all ranks skip together, know it without
another message, and nothing has moved: no weight, no moment, no average.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from hpc_ddpm.checkpoint import agree_on_latest, step_dirs, step_of
from hpc_ddpm.config import TrainingConfig
from hpc_ddpm.distributed import Ranks, broadcast_object
from hpc_ddpm.errors import TrainingError
from hpc_ddpm.files import write_json
from hpc_ddpm.sealed import Count, read_json

ROLLBACKS = "rollbacks.json"
SPIKE_SCORE = 10.0
SPIKE_WINDOW = 200
SPIKE_MIN_LOSSES = 30
TO_STANDARD_DEVIATION = 1.4826
"""Factor from the median absolute deviation to the standard deviation, for normally distributed values."""


class Rollbacks(TypedDict):
    """rollbacks.json."""

    rollbacks: list[dict[str, Count]]


RECORD: Any = Rollbacks | list[dict[str, Count]]
"""Earlier versions wrote the list alone."""


class DivergedError(Exception):
    """Too many skipped steps in a row; never leaves `train`."""

    def __init__(self, step: int, last_good_step: int) -> None:
        super().__init__(f"diverged at step {step}")
        self.step, self.last_good_step = step, last_good_step


class StepGuard:
    """Counts skipped steps; every rank sees the same."""

    def __init__(self, max_bad_steps: int, start: int, *, tell: bool) -> None:
        self.max_bad_steps, self.tell = max_bad_steps, tell
        self.last_good_step = start
        """Last step with finite gradients; the weights before this step were sound."""
        self.bad_in_a_row = 0
        self._skipped = 0

    def saw(self, step: int, *, is_bad: bool) -> None:
        """Record whether a step was taken or skipped.

        Raises:
            DivergedError: it is the last of `max_bad_steps` bad ones in a row.
        """
        if not is_bad:
            self.last_good_step, self.bad_in_a_row = step, 0
            return
        self.bad_in_a_row += 1
        self._skipped += 1
        if self.tell and self.bad_in_a_row == 1:
            warnings.warn(f"step {step} skipped on all ranks: its loss or gradient is not finite", stacklevel=2)
        if self.bad_in_a_row >= self.max_bad_steps:
            raise DivergedError(step, self.last_good_step)

    def take_skipped(self) -> int:
        """Steps skipped since the last call."""
        skipped, self._skipped = self._skipped, 0
        return skipped


def count_rollbacks(run_dir: Path, ranks: Ranks) -> int:
    """How often the run was rolled back; a collective."""
    return broadcast_object(len(_read(run_dir)) if ranks.is_main else 0)


def roll_back(run_dir: Path, diverged: DivergedError, training: TrainingConfig, ranks: Ranks) -> Path | None:
    """The newest checkpoint whose weights have taken a good step since, or None for the start; a collective.

    Newer ones are set aside as `step_N.diverged-K`. The roll-back is on record in `rollbacks.json` before anything
    changes: its number decides the order of the data.

    Raises:
        TrainingError: it would be more than `max_rollbacks`.
    """
    num_before = count_rollbacks(run_dir, ranks)
    if num_before >= training.max_rollbacks:
        raise TrainingError(
            f"{run_dir}: {training.max_bad_steps} steps up to {diverged.step} had no finite loss or gradient, after "
            f"{num_before} roll-backs (training.max_rollbacks); check the data (`hpc-ddpm verify`), or start a new run "
            "with a lower training.learning_rate or training.gradient_clip=1"
        )
    root = run_dir / "checkpoints"
    if ranks.is_main:
        row = {"diverged_at": diverged.step, "last_good_step": diverged.last_good_step}
        write_json(run_dir / ROLLBACKS, {"rollbacks": [*_read(run_dir), row]}, indent=2)
        for folder in step_dirs(root):
            if step_of(folder) >= diverged.last_good_step:
                folder.rename(folder.with_name(f"{folder.name}.diverged-{num_before + 1}"))
    target = agree_on_latest(root, ranks)
    if ranks.is_main:
        warnings.warn(
            f"{training.max_bad_steps} steps in a row were not finite: back from step {diverged.step} to "
            f"{step_of(target) if target else 0} with another data order (roll-back {num_before + 1} of "
            f"{training.max_rollbacks})",
            stacklevel=2,
        )
    return target


def _read(run_dir: Path) -> list[dict[str, int]]:
    path = run_dir / ROLLBACKS
    if not path.is_file():
        return []
    record = read_json(path, RECORD, "restore it: it decides the order of the data")
    rows: list[dict[str, int]] = record if isinstance(record, list) else record["rollbacks"]
    return rows


class SpikeDetector:
    """How far a loss lies above the median of those before it, in robust standard deviations. It changes nothing."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def score(self, loss: float) -> float:
        """Score this loss against the recent ones, then add it to them; 0 if they are few or the loss is not finite."""
        if not math.isfinite(loss):
            return 0.0
        score = 0.0
        if len(self._losses) >= SPIKE_MIN_LOSSES:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(other - median) for other in self._losses)
            score = (loss - median) / max(TO_STANDARD_DEVIATION * deviation, 1e-12)
        self._losses.append(loss)
        return score

    def watch(self, step: int, loss: float) -> dict[str, float]:
        """`{"loss_spike": score}` with a warning where the score is above SPIKE_SCORE, else nothing."""
        score = self.score(loss)
        if score <= SPIKE_SCORE:
            return {}
        warnings.warn(f"step {step}: loss {loss:.4g} is {score:.0f} deviations above its median", stacklevel=2)
        return {"loss_spike": score}
