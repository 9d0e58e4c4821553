"""What this machine, and the limits a scheduler has set on this process, leave of its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = (
    ("0::", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (":memory:", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Version 2 and 1: key in /proc/self/cgroup, folder, limit, usage, and what of the usage is given back at need."""


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of the limits that a scheduler has set."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return min([int(available.split()[1]) * 1024, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """What the limits of this process's control groups leave, as far as they can be read."""
    try:
        memberships = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for key, root, limit, usage, reclaimable in CGROUPS:
        for line in memberships:
            if key in line:
                folder = Path(root, line.split(":", 2)[2].lstrip("/"))
                for place in (folder, *folder.parents):
                    with suppress(OSError, ValueError, KeyError):  # no file, "max", no such line
                        numbers = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
                        used = int((place / usage).read_text()) - int(numbers[reclaimable])
                        yield int((place / limit).read_text()) - used
