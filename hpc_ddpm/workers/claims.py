"""Who does what: processes on any node share the work through a folder alone, and outlive each other.

    writers/NAME/   of one living writer: owner.json with its heartbeat, and files that it has not finished
    claims/UNIT     a symbolic link to the NAME that works on it: made in one step, by one of many

A claim saves work; it does not protect files. Should two writers believe that they have it (a process that was
stopped for longer than LEASE_S), both write the same bytes, and each renames a whole file. Where only one may go on,
see `hpc_ddpm.workers.sole`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from hpc_ddpm.files import is_file_name
from hpc_ddpm.workers.owner import HEARTBEAT_S, LEASE_S, RECORD, Owner, Pulse, Watch, read_owner, this_process

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems that have no symbolic links."""
NOBODY = "nobody"
LOOKS_PER_BEAT = 8
"""Other writers that each heartbeat looks at; the limit keeps a thousand writers from overloading the storage."""


class Writer:
    """This process as one of the writers of a folder; a context manager."""

    def __init__(self, state: Path, purpose: str) -> None:
        self.owner = this_process(purpose)
        self.name = f"{self.owner.host}-{self.owner.pid}-{secrets.token_hex(4)}"
        self.state = state
        self.scratch = state / "writers" / self.name
        """Folder for files that this writer has not finished."""
        self.lost: set[str] = set()
        """Claims of this writer that others took over, because it was silent for too long."""
        self._held: set[str] = set()
        self._has_links = True
        self._watch = Watch()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> Writer:
        self.state.mkdir(parents=True, exist_ok=True)
        while not self._join():
            pass
        self._remove_dead(self._folders())
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def _join(self) -> bool:
        """Join the writers in one step; False if the last writer has just removed the folder."""
        begin = self.state / f".{self.name}"
        _make_folder(self.state)  # not with its parents: what was moved away must not come back
        with suppress(FileNotFoundError):
            _make_folder(begin)
            self.owner.write(begin)
            _make_folder(self.scratch.parent)
            begin.rename(self.scratch)
            return True
        return False

    def leave(self) -> bool:
        """Stop being a writer; return whether this was the last one."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._remove_dead(self._folders())
        return not self.others()

    def clear_away(self) -> None:
        """Remove the whole folder after `leave`, unless another writer has joined meanwhile."""
        with suppress(OSError):
            self.scratch.parent.rmdir()
            claims = self._link("")
            for entry in self.state.iterdir():
                if entry.is_file():
                    entry.unlink()
                elif entry not in (claims, self.scratch.parent):  # which one who joins now may have made again
                    self._remove(entry)
            for link in claims.iterdir() if claims.is_dir() else ():
                if (name := self.claimant(link.name)) and self.look(name) is None:
                    link.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                claims.rmdir()
            self.state.rmdir()

    def _remove(self, entry: Path) -> None:
        """Remove a folder that may be of one who joins at this moment: either its files go with it, or none."""
        away = self.state / f".{self.name}-{secrets.token_hex(4)}"
        with suppress(FileNotFoundError):  # the other has renamed it first, and has joined
            entry.rename(away)
            shutil.rmtree(away, ignore_errors=True)

    @contextmanager
    def claim(self, unit: str) -> Iterator[bool]:
        """Try to claim a unit of work until the end of the block; yields whether this writer has it."""
        is_ours = self._take(unit)
        if is_ours:
            self._held.add(unit)
            self.lost.discard(unit)
        try:
            yield is_ours
        finally:
            if is_ours:
                self._held.discard(unit)
                with suppress(OSError):  # it ends with this writer at the latest
                    if self.claimant(unit) == self.name:
                        self._link(unit).unlink(missing_ok=True)

    def claimant(self, unit: str) -> str | None:
        """Name of the writer, alive or dead, that holds the claim; None if nobody holds it."""
        if not self._has_links:
            return self.name
        try:
            name = str(self._link(unit).readlink())
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return NOBODY  # a copy of the folder has files where links were
        return name if is_file_name(name) else NOBODY

    def age_in_words(self, unit: str) -> str:
        """How long a claim has been held by the file system's clock, as `, for 12 min`; empty if unknown."""
        with suppress(OSError):
            minutes = (_file_system_time(self.scratch) - self._link(unit).lstat().st_mtime) / 60
            if minutes >= 0:
                return f", for {minutes / 60:.1f} h" if minutes >= 60 else f", for {minutes:.0f} min"
        return ""

    def look(self, name: str) -> Pulse | None:
        """What is known about another writer, by its name; None if it is dead."""
        return self._watch.look(self.scratch.with_name(name))

    def others(self) -> list[Owner]:
        """Owners of the other living writers of the folder."""
        return [pulse.owner for pulse in self.pulses()]

    def has_heard_all(self) -> bool:
        """Whether all other writers are known to live; one that has been silent since this one joined may be dead."""
        return all(pulse.is_heard for pulse in self.pulses())

    def pulses(self) -> list[Pulse]:
        """What is known about each other writer that lives or may live."""
        return [pulse for folder in self._folders() if (pulse := self._watch.look(folder))]

    def _take(self, unit: str) -> bool:
        if self._make(unit):
            return True
        claimant = self.claimant(unit)
        if claimant is None:
            return self._make(unit)
        if claimant == self.name:  # the answer of a server was lost, and the same was asked again
            return unit not in self._held
        return self.look(claimant) is None and self._inherit(unit, claimant)

    def _make(self, unit: str) -> bool:
        try:
            _make_folder(self._link(""), parents=True)
            self._link(unit).symlink_to(self.name)
        except FileExistsError:
            return False
        except FileNotFoundError:  # one who leaves has just cleared away
            return self._make(unit)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if self._has_links:
                warnings.warn(
                    f"{self.state}: this file system has no symbolic links ({error.strerror}), so nobody notices "
                    "others that do the same work at the same time; start one process only",
                    stacklevel=2,
                )
            self._has_links = False
        return True

    def _inherit(self, unit: str, dead: str) -> bool:
        """Take over a dead writer's claim. Several may try; a claim named after both lets one of them do it."""
        with self.claim(f".{sha256(f'{unit}/{dead}'.encode()).hexdigest()[:32]}") as is_heir:
            if not is_heir or self.claimant(unit) != dead:
                return False
            mine = self._link(f".{self.name}-{secrets.token_hex(4)}")
            with suppress(FileNotFoundError):  # one who leaves has just cleared away
                mine.symlink_to(self.name)
                mine.replace(self._link(unit))
                return True
            return False

    def _link(self, unit: str) -> Path:
        return self.state / "claims" / unit

    def _folders(self) -> list[Path]:
        """One folder for each other writer, alive or dead."""
        with suppress(OSError):  # the last writer has just cleared away
            return [entry for entry in self.scratch.parent.iterdir() if entry.name[0] != "." and entry != self.scratch]
        return []

    def _remove_dead(self, folders: list[Path]) -> None:
        """Remove the folders of those writers that are dead."""
        for folder in folders:
            if self._watch.look(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def _keep_beating(self) -> None:
        ahead: list[Path] = []
        while not self._end.wait(HEARTBEAT_S):
            with suppress(OSError):
                self._beat()
                ahead = ahead[LOOKS_PER_BEAT:] or self._folders()
                self._remove_dead(ahead[:LOOKS_PER_BEAT])
                self.lost |= {unit for unit in tuple(self._held) if self.claimant(unit) != self.name}

    def _beat(self) -> None:
        try:
            os.utime(self.scratch / RECORD)
        except FileNotFoundError:  # others took this writer for dead
            self._join()


def _make_folder(folder: Path, *, parents: bool = False) -> None:
    """Make a folder unless it exists; `exist_ok` fails if another process removes the folder at the same time."""
    with suppress(FileExistsError):
        folder.mkdir(parents=parents)


@contextmanager
def visiting(state: Path, purpose: str) -> Iterator[Writer]:
    """A writer for the block; the folder is removed afterwards, unless another writer has joined."""
    writer = Writer(state, purpose)
    try:
        with writer:
            yield writer
    finally:
        if writer.leave():
            writer.clear_away()


def look_at_claims(state: Path) -> tuple[list[Owner], set[str]]:
    """Writers of a folder that seem to live, and the units that they have claimed; this process does not join.

    For people only: one look can go by nothing but time stamps.
    """
    writers, claims = state / "writers", state / "claims"
    if not writers.is_dir():
        return [], set()
    now, alive, held = _file_system_time(state), dict[str, Owner](), set[str]()
    for folder in writers.iterdir():
        with suppress(OSError):
            owner, stamp = read_owner(folder)
            if folder.name[0] != "." and not owner.is_gone and now - stamp / 1e9 < LEASE_S:
                alive[folder.name] = owner
    for link in claims.iterdir() if claims.is_dir() else ():
        with suppress(OSError):
            if link.name[0] != "." and str(link.readlink()) in alive:
                held.add(link.name)
    return list(alive.values()), held


def _file_system_time(folder: Path) -> float:
    """Seconds since the epoch by the file system's clock if a file can be written, else by this machine's clock."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
