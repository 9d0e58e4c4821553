"""Write the stacks of a rank that hangs and end it, so that its job does not hold nodes until the time limit."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from hpc_ddpm.distributed import TIMEOUT_S
from hpc_ddpm.errors import LostRankError

STACKS = "stacks-of-rank-{:05d}.txt"
"""In the run directory: where each thread of a rank stood when it hung. It is not there before."""
TICK_S = 0.5
STANDARD_ERROR = 2
GRACE_S = 3.0
"""Seconds between writing the stacks and the exit, which may end other ranks: they need time to write theirs."""


class Watchdog:
    """Ends this process with `LostRankError.exit_code` when `beat` has not been called for `timeout_s`.

    Until the first call, which comes after loading and compiling, it is half an hour at least. Where one rank hangs,
    the others wait for it, so all of them end. Time in which the process is stopped does not count. A rank that holds
    the interpreter's lock, or cannot write to the run directory, has its stacks on standard error.
    """

    def __init__(self, run_dir: Path, rank: int, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self.path = run_dir / STACKS.format(rank)
        self._limit_s, self._after = max(timeout_s, TIMEOUT_S), "the start"
        self._idle_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            self._keep_earlier_stacks()
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._is_over.set()
        self._thread.join()

    def beat(self, after: str) -> None:
        """Restart the timer after a step, a validation or a save."""
        self._limit_s, self._after, self._idle_s = self.timeout_s, after, 0.0
        self._arm()

    def _keep_earlier_stacks(self) -> None:
        """Rename the stacks of earlier starts, of all their ranks: they say nothing about this start."""
        for path in self.path.parent.glob(STACKS.replace("{:05d}", "*")):
            with suppress(OSError):
                path.replace(path.with_name(f"previous-{path.name}"))

    def _arm(self) -> None:
        """Set a timer that works without the interpreter's lock, in case `_write_stacks` cannot finish."""
        faulthandler.dump_traceback_later(self._limit_s + GRACE_S / 2, file=STANDARD_ERROR)

    def _watch(self) -> None:
        while not self._is_over.wait(TICK_S):
            was_idle_s, self._idle_s = self._idle_s, self._idle_s + TICK_S
            if was_idle_s < self._limit_s <= self._idle_s:  # in a thread: storage that hangs must not keep it alive
                threading.Thread(target=self._write_stacks, daemon=True).start()
            if self._idle_s >= self._limit_s + GRACE_S:
                found = f"nothing was done in the {self._limit_s:g} s (training.hang_timeout_s) after {self._after}"
                where = f"so this rank or another one hangs; where it stands: {self.path}"
                print(f"hpc-ddpm: rank {self.rank}: {found}, {where}", file=sys.stderr, flush=True)
                os._exit(LostRankError.exit_code)

    def _write_stacks(self) -> None:
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
            faulthandler.cancel_dump_traceback_later()
