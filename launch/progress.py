"""Progress of long phases, which only rank 0 shows: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Update = Callable[[int, int, str], None]
"""(done, total, note)"""
LINE_EVERY_S = 30.0
"""Seconds between two lines in a log."""


@contextmanager
def progress_bar(title: str, *, show: bool, unit: str = "") -> Iterator[Update]:
    """A bar on standard error, or lines where that is no terminal, with time left; nothing where `show` is False.

    Args:
        title: of the phase, for example training.
        show: whether this process is the one that tells.
        unit: of what is counted, in the lines.
    """
    if not show:
        yield lambda done, total, note: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(title) as update:
            yield update
    else:
        yield _Lines(title, unit).update


@contextmanager
def _bar(title: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(title, total=None, note="")

    def update(done: int, total: int, note: str) -> None:
        if progress.finished and done >= total:
            return  # or the whole bar would be drawn once more
        progress.start()  # at the first news, so that an early error stands alone; later calls do nothing
        if note:
            progress.update(task, note=note)
        progress.update(task, completed=done, total=total)
        if done >= total:
            progress.stop()  # what comes next may draw a bar of its own

    try:
        yield update
    finally:
        if progress.live.is_started:  # stopping a bar that never was prints an empty line
            progress.stop()


class _Lines:
    """Prints a line at the first update, then about every LINE_EVERY_S while updates come, and at the end."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit, self.note = title, unit, ""
        self._began: tuple[float, int] | None = None
        self._last_s = 0.0
        self._is_over = False

    def update(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        is_first, self.note = self._began is None, note or self.note
        if self._began is None:
            self._began = (now, done)
        is_end = done >= total and not self._is_over
        self._is_over = done >= total
        is_due = not self._is_over and (is_first or now - self._last_s >= LINE_EVERY_S)
        if is_due or (is_end and not is_first):  # nothing is said where all was done before
            self._last_s = now
            print(self._line(done, total, now), file=sys.stderr, flush=True)

    def _line(self, done: int, total: int, now: float) -> str:
        assert self._began is not None
        seconds, steps = now - self._began[0], done - self._began[1]
        unit = f" {self.unit}".rstrip()
        rate = f"{steps / seconds:.3g}{unit}/s" if steps > 0 and seconds > 0 else ""
        parts = [f"{self.title}: {done}/{total}{unit}", self.note or rate]
        if steps > 0 and done < total:
            parts.append(f"{format_duration((total - done) * seconds / steps)} left")
        elif done >= total:
            parts.append(f"took {format_duration(seconds)}")
        return ", ".join(filter(None, parts))


def format_duration(seconds: float) -> str:
    """The duration as SLURM writes it: hours:minutes:seconds."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def tell_steps(update: Update, total: int) -> Callable[[int, Mapping[str, float]], None]:
    """A function for training to call after every step; it shows the steps so far, and loss and speed if measured."""

    def tell(step: int, values: Mapping[str, float]) -> None:
        if "volumes_per_s" in values:
            update(step, total, f"loss {values['loss']:.4f}, {values['volumes_per_s']:.2f} volumes/s")
        elif not values:  # other rows tell of steps that were counted already
            update(step, total, "")

    return tell
