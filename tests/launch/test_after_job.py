"""Whether a job comes back after its end."""

from __future__ import annotations

import pytest

from launch.after_job import End, decide


def ended(mark: str, *, is_excused: bool = False, is_orderly: bool = False) -> dict[str, object]:
    return {"event": "end", "mark": mark, "is_excused": is_excused, "is_orderly": is_orderly}


def stopped(mark: str) -> dict[str, object]:
    return ended(mark, is_orderly=True)


def at_limit(mark: str) -> End:
    return End(140, mark, (140,), share=0.99)


@pytest.mark.parametrize(
    ("end", "ends", "restarts", "comes_back", "part"),
    [
        (End(0), [], 0, False, "done"),
        (End(2), [], 0, False, "failed with exit code 2; the log says why"),
        (End(143, ranks=(2,)), [], 0, False, "failed with exit code 2"),  # srun ended the others, the highest code wins
        (End(143, "a", (143, 143)), [], 9, True, "stopped by SIGTERM"),
        (End(143, "a", (143,), share=0.1), [ended("a", is_excused=True)] * 8, 8, True, "stopped by SIGTERM"),
        (at_limit("b"), [stopped("a"), stopped("a")], 2, True, "stopped by SIGUSR2, requeued after 2 restarts"),
        (at_limit("a"), [stopped("0"), stopped("a"), stopped("a")], 3, True, "stopped by SIGUSR2"),
        (
            at_limit("a"),
            [stopped("a")] * 3,
            3,
            False,
            "3 starts in a row without progress, the last: stopped by SIGUSR2",
        ),
        (at_limit("a"), [stopped("a"), ended("a", is_excused=True), stopped("a")], 3, True, "stopped by SIGUSR2"),
        (at_limit("a"), [ended("a"), stopped("a")], 2, False, "3 starts in a row without progress"),
        (End(137, "a", (75,)), [stopped("a"), ended("a")], 2, True, "a rank was lost"),
        (End(143, "a", (140,)), [], 8, True, "stopped by SIGUSR2"),  # srun ended a slower rank
        (End(143, "a", (143,)), [], 10, False, "max_requeues"),
        (End(137, "a", (75,)), [], 0, True, "a rank was lost"),
        (End(143, "a"), [], 0, True, "ended by a signal before it could save"),
        (End(143, "a", is_hang=True), [], 0, True, "a rank hung, see stacks-of-rank-*.txt"),
        (End(143, "a"), [ended("a")] * 2, 2, False, "3 starts in a row without progress, the last: ended by a signal"),
        (End(137, "a"), [ended("0"), ended("a")], 2, True, "a rank was lost"),
        (End(137, "a"), [ended("a"), ended("a"), ended("a", is_excused=True)], 3, True, "a rank was lost"),
    ],
)
def test_what_comes_back(end: End, ends: list[dict[str, object]], restarts: int, comes_back: bool, part: str) -> None:
    found, why = decide(end, ends, restarts, max_requeues=10, max_crashes=3)
    assert found == comes_back
    assert part in why
