"""`python odd_node.py FAULT RANK ARGUMENTS`: `hpc-ddpm ARGUMENTS` where this rank's node is odd in one way.

stale: its second checkpoint meets a stale file handle, as after the restart of an NFS server. backwards: its clock, and
with it all time stamps that it sets, goes back by a minute whenever one looks.
"""

import errno
import os
import sys
import time
from typing import Any

from hpc_ddpm.training import saver
from launch.cli import main

WRITE, UTIME = saver.write_pieces, os.utime
NUM_WRITTEN = iter(range(100))


def stale(*arguments: Any) -> Any:
    if next(NUM_WRITTEN) == 1:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(arguments[0]))
    return WRITE(*arguments)


def backwards() -> None:
    now = time.time()

    def look() -> float:
        nonlocal now
        now -= 60
        return now

    time.time, time.time_ns = look, lambda: int(look() * 1e9)
    os.utime = lambda path, times=None, **more: UTIME(path, (look(),) * 2)


if __name__ == "__main__":
    fault, rank, *sys.argv[1:] = sys.argv[1:]
    if os.environ["RANK"] == rank and fault == "stale":
        saver.write_pieces = stale
    elif os.environ["RANK"] == rank:
        backwards()
    main()
