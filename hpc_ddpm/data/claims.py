"""Who packs what: processes on any node share the work through a folder alone, and outlive each other.

    writers/NAME/   of one living writer: owner.json, and files it has not finished; touched every HEARTBEAT_S
    claims/UNIT     a symbolic link to the NAME that works on it: made in one step, by one of many

A claim saves work; it does not protect files. Should two writers believe that they have it (a process that was
stopped for longer than LEASE_S), both write the same bytes, and each renames a whole file.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

HEARTBEAT_S = 10.0
LEASE_S = 60.0


@dataclass(frozen=True)
class Owner:
    """The process behind a writer."""

    host: str
    namespace: str
    """Process ids mean something within it only."""
    pid: int
    started: str
    """Tells a process from a later one with the same id."""
    job: str
    purpose: str
    """Writers of one purpose help each other."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (SLURM job {self.job})" if self.job else "")

    @property
    def is_gone(self) -> bool:
        """Known to have ended; False for processes of other hosts."""
        return (self.host, self.namespace) == _here() and _started(self.pid) != self.started


class Writer:
    """This process among the writers of a folder; a context manager."""

    def __init__(self, state: Path, purpose: str) -> None:
        host, namespace = _here()
        job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
        self.owner = Owner(host, namespace, os.getpid(), _started(os.getpid()), job, purpose)
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.state = state
        self.scratch = state / "writers" / self.name
        """For files that this writer has not finished."""
        self._end = threading.Event()
        self._last_beat = 0.0

    def __enter__(self) -> Writer:
        while not self._join():
            pass
        self._beat()
        self._bury()
        threading.Thread(target=self._keep_beating, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def _join(self) -> bool:
        """Appear among the writers, at once; False where the last of them has just cleared away."""
        begin = self.state / f".{self.name}"
        begin.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            (begin / "owner.json").write_text(json.dumps(asdict(self.owner)), encoding="utf-8")
            self.scratch.parent.mkdir(exist_ok=True)
            begin.rename(self.scratch)
            return True
        return False

    def leave(self) -> bool:
        """End being a writer; whether this one was the last."""
        self._end.set()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._bury()
        return not self.others()

    def clear_away(self) -> None:
        """Remove the whole folder after `leave`, unless another writer has joined meanwhile."""
        with suppress(OSError):
            self.scratch.parent.rmdir()
            for entry in self.state.iterdir():
                if entry.is_file():
                    entry.unlink()
                elif entry != self.scratch.parent:  # made again by one who joins now
                    shutil.rmtree(entry, ignore_errors=True)
            self.state.rmdir()

    @contextmanager
    def claim(self, unit: str) -> Iterator[bool]:
        """Whether the piece of work called `unit` is ours until the end of the block."""
        is_ours = self._take(unit)
        try:
            yield is_ours
        finally:
            if is_ours and self._claimant(unit) == self.name:
                (self.state / "claims" / unit).unlink(missing_ok=True)

    def others(self) -> list[Owner]:
        """Living writers of the folder, without this one."""
        alive = [folder for folder in self._folders() if folder != self.scratch and self._is_alive(folder)]
        return [owner for owner in map(_owner, alive) if owner]

    def _take(self, unit: str) -> bool:
        link = self.state / "claims" / unit
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(self.name)
        except FileExistsError:
            claimant = self._claimant(unit)
            if claimant is not None and self._is_alive(self.scratch.with_name(claimant)):
                return False
            link.unlink(missing_ok=True)
            with suppress(FileExistsError):
                link.symlink_to(self.name)
        return self._claimant(unit) == self.name

    def _claimant(self, unit: str) -> str | None:
        try:
            return str((self.state / "claims" / unit).readlink())
        except FileNotFoundError:
            return None

    def _folders(self) -> list[Path]:
        """One per writer, living or not."""
        with suppress(FileNotFoundError):  # the last writer has just cleared away
            return [entry for entry in self.scratch.parent.iterdir() if entry.name[0] != "."]
        return []

    def _bury(self) -> None:
        """Remove what dead writers left."""
        for folder in self._folders():
            if not self._is_alive(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _is_alive(self, folder: Path) -> bool:
        return _is_alive(folder, self._last_beat)

    def _keep_beating(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            self._beat()

    def _beat(self) -> None:
        with suppress(OSError):
            os.utime(self.scratch)
            self._last_beat = self.scratch.stat().st_mtime


def look_at_claims(state: Path) -> tuple[list[Owner], set[str]]:
    """Living writers of a folder, and the units of work that they have claimed; without joining them."""
    writers, claims = state / "writers", state / "claims"
    if not writers.is_dir():
        return [], set()
    now = _file_system_time(state)
    alive = [entry for entry in writers.iterdir() if entry.name[0] != "." and _is_alive(entry, now)]
    names, held = {folder.name for folder in alive}, set()
    for link in claims.iterdir() if claims.is_dir() else ():
        with suppress(OSError):
            if str(link.readlink()) in names:
                held.add(link.name)
    return [owner for owner in map(_owner, alive) if owner], held


def _is_alive(folder: Path, now: float) -> bool:
    """Judged by the clock of the file system: `now` is the time of something just written there."""
    try:
        silence_s = now - folder.stat().st_mtime
    except FileNotFoundError:
        return False
    owner = _owner(folder)
    return owner is not None and not owner.is_gone and silence_s < LEASE_S


def _file_system_time(folder: Path) -> float:
    """By its own clock where a file can be written, else by ours."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _owner(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / "owner.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _here() -> tuple[str, str]:
    """Host name and process namespace (empty where the system has none)."""
    try:
        return socket.gethostname(), str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname(), ""


def _started(pid: int) -> str:
    """When the process began, in the system's own unit; empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        return ""
