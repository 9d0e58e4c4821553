"""Which process a worker is, and whether it still lives. The clocks of the machines need not agree.

A worker renews the time stamp of its `owner.json` every HEARTBEAT_S. Whoever looks asks only whether the stamp has
changed since the last look, and measures the silence by its own monotonic clock.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_ddpm.sealed import UnreadableError, parse, seal

HEARTBEAT_S = 10.0
LEASE_S = 60.0
"""Seconds of silence after which other workers count a worker as dead."""
RECORD = "owner.json"


@dataclass(frozen=True)
class Owner:
    """The process that a worker is."""

    host: str
    namespace: str
    """Process ids are valid only within this namespace."""
    pid: int
    started: str
    """Start time, which distinguishes a process from a later one with the same id."""
    job: str
    purpose: str
    """Workers with the same purpose share their work."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (SLURM job {self.job})" if self.job else "")

    @property
    def is_here(self) -> bool:
        """Whether the process belongs to this machine and namespace."""
        return (self.host, self.namespace) == _here()

    @property
    def runs(self) -> bool:
        """Whether the process is known to run; False for processes of other hosts."""
        return self.is_here and _started(self.pid) == self.started

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False for processes of other hosts."""
        return self.is_here and _started(self.pid) != self.started

    def write(self, folder: Path) -> None:
        """Write the record into `folder`; not atomically."""
        (folder / RECORD).write_text(seal(json.dumps(asdict(self))), encoding="utf-8")


NOT_KNOWN = Owner("a host that is not known", "?", 0, "", "", "")
"""Owner that stands for a damaged record."""


def this_process(purpose: str) -> Owner:
    """The owner record of this process."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
    return Owner(*_here(), os.getpid(), _started(os.getpid()), job, purpose)


def read_owner(folder: Path) -> tuple[Owner, int]:
    """The record of a worker, and its time stamp in ns.

    To open the file is what makes a network file system ask its server, and not what it remembers.

    Raises:
        OSError: it cannot be read.
    """
    with (folder / RECORD).open("rb") as file:
        text, stamp = file.read(), os.fstat(file.fileno()).st_mtime_ns
    try:
        return parse(text, Owner)[0], stamp
    except UnreadableError:
        return NOT_KNOWN, stamp


@dataclass
class Pulse:
    """What one process has seen of another worker."""

    owner: Owner
    stamp: int
    looked: float
    silent_s: float = 0.0
    is_heard: bool = False
    """Whether the worker is known to live: a heartbeat was seen, or it runs on this machine."""


class Watch:
    """What this process has seen of other workers; threads may share it."""

    def __init__(self) -> None:
        self._pulses: dict[str, Pulse] = {}
        self._lock = threading.Lock()

    def look(self, folder: Path) -> Pulse | None:
        """What is known about the worker of this folder; None if it has ended or was silent for LEASE_S.

        A long time between two looks counts as little: perhaps the storage did not answer, to nobody.
        """
        with self._lock:
            known = self._pulses.get(folder.name)
            try:
                owner, stamp = read_owner(folder)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError:  # a stale handle, failing storage: it may live
                owner, stamp = (known.owner, known.stamp) if known else (NOT_KNOWN, 0)
            now = time.monotonic()
            if known is None:
                pulse = self._pulses[folder.name] = Pulse(owner, stamp, now)
            else:
                pulse = known
                if has_beaten := stamp != known.stamp:
                    pulse.owner, pulse.stamp, pulse.silent_s = owner, stamp, 0.0
                else:
                    pulse.silent_s += min(now - known.looked, 2 * HEARTBEAT_S)
                pulse.looked, pulse.is_heard = now, pulse.is_heard or has_beaten
            pulse.is_heard |= owner.runs
            return None if owner.is_gone or pulse.silent_s >= LEASE_S else pulse


def _here() -> tuple[str, str]:
    """Host name; and start of the system and process namespace, as nodes may share a name (empty if not known)."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return socket.gethostname(), f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname(), ""


def _started(pid: int) -> str:
    """When the process began, in clock ticks since boot, as text; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        return ""
