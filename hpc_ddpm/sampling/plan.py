"""What is to be generated: one item per volume, each with its own seed, the same on every rank.

How the items are split over ranks is derived from the plan and never stored in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpc_ddpm.distributed import Ranks


@dataclass(frozen=True)
class Item:
    """One volume to be: from which mask, which replica of it, and the seed that makes it this one."""

    id: str
    mask_id: str
    replica: int
    seed: int


def build_plan(mask_ids: Iterable[str], replicas: int, seed: int) -> list[Item]:
    """Every mask `replicas` times; more replicas or masks later leave the earlier items as they are."""
    return [
        Item(f"{mask_id}_r{replica:03d}", mask_id, replica, volume_seed(seed, mask_id, replica))
        for mask_id in mask_ids
        for replica in range(replicas)
    ]


def volume_seed(seed: int, mask_id: str, replica: int) -> int:
    """63 bits of SHA-256 over the run's seed, the mask and the replica."""
    digest = hashlib.sha256(f"{seed}\0{mask_id}\0{replica}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def share(items: Sequence[Item], ranks: Ranks) -> list[Item]:
    """This rank's items."""
    return list(items[ranks.rank :: ranks.world_size])
