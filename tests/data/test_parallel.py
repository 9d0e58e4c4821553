"""Results in order, whatever the number of processes; a killed process is one line."""

from __future__ import annotations

import os

import pytest

from hpc_ddpm.data.parallel import num_cores, ordered_map
from hpc_ddpm.errors import ClusterError


def square(number: int) -> int:
    return number * number


def die(number: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order(num_workers: int) -> None:
    assert list(ordered_map(square, range(20), num_workers, preload="math")) == [n * n for n in range(20)]


def test_a_killed_process_is_one_line() -> None:
    with pytest.raises(ClusterError, match=r"a worker process was killed, .* fewer --workers"):
        list(ordered_map(die, range(3), 2, preload="math"))


def test_cores() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
