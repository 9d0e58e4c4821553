"""Only one process may own a folder. A second one is refused while the owner lives, and takes over from a dead owner.

This is how the whole project locks. `flock` is not used: network file systems answer it in many ways, or wrongly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_ddpm.errors import ClusterError
from hpc_ddpm.workers.claims import Writer, visiting
from hpc_ddpm.workers.owner import LEASE_S

UNIT = "all"
WAIT_S = 0.5


def _note(line: str) -> None:
    print(f"hpc-ddpm: note: {line}", file=sys.stderr, flush=True)


class Sole:
    """This process as the only owner of a folder."""

    def __init__(self, writer: Writer, refuse: Callable[[str], str]) -> None:
        self._writer = writer
        self._refuse = refuse

    def check(self) -> None:
        """Check in the file system that nobody has taken over.

        Raises:
            ClusterError: another process did, because this one was silent for too long.
        """
        name = self._writer.claimant(UNIT)
        if name != self._writer.name and self._writer.state.parent.exists():  # else whoever writes there will say so
            pulse = self._writer.look(name) if name else None
            raise ClusterError(self._refuse(str(pulse.owner) if pulse else "another process"))

    def check_quickly(self) -> None:
        """Like `check`, but uses what the last heartbeat found and touches no file."""
        if UNIT in self._writer.lost:
            self.check()


@contextmanager
def sole_owner(
    state: Path, purpose: str, refuse: Callable[[str], str], say: Callable[[str], None] = _note
) -> Iterator[Sole]:
    """Own the folder `state` alone until the end of the block, which removes the folder.

    An owner on another machine that has never been heard may be dead: it is given LEASE_S to show that it lives.

    Args:
        state: made where it is missing, with its parents.
        purpose: what this process does, for people who look.
        refuse: makes the message from the holder in words (`process 7 on n1 (SLURM job 42), for 12 min`).
        say: told, in one line, why it waits.

    Raises:
        ClusterError: another process has it.
    """
    with visiting(state, purpose) as writer, _claimed(writer, refuse, say):
        yield Sole(writer, refuse)


@contextmanager
def _claimed(writer: Writer, refuse: Callable[[str], str], say: Callable[[str], None]) -> Iterator[None]:
    has_said = False
    while True:
        with writer.claim(UNIT) as is_ours:
            if is_ours:
                yield
                return
        name = writer.claimant(UNIT)
        if name and (pulse := writer.look(name)):
            if pulse.is_heard:
                raise ClusterError(refuse(f"{pulse.owner}{writer.age_in_words(UNIT)}"))
            if not has_said:
                say(f"{writer.state.parent}: is {pulse.owner} still at work? Waiting {LEASE_S:.0f} s at most")
                has_said = True
            time.sleep(WAIT_S)
