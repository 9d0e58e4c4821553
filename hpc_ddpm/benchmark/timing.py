"""Timing in turns: what else happens on a machine then hits all contestants alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import numpy as np

Result = TypeVar("Result")


class Spread(TypedDict):
    """What repeats gave."""

    median: float
    p10: float
    p90: float


def spread(values: list[float]) -> Spread:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


@dataclass(frozen=True)
class Timing:
    """What something took, for each unit of work."""

    wall_s: float
    cpu_s: float
    """Processor time of all threads of this process."""


def timed(function: Callable[[], object]) -> Timing:
    """One call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(
    contestants: Mapping[str, Callable[[], Result]],
    repeats: int,
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Result]]:
    """Results of every contestant, after one warm-up each; the order moves on by one in every round.

    Args:
        contestants: each call is one turn.
        repeats: rounds that count.
        on_turn: called after every turn, warm-up included.
    """
    names = list(contestants)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            result = contestants[name]()
            if turn:
                results[name].append(result)
            on_turn(name)
    return results
