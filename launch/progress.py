"""Progress bars for long phases: rank 0 draws, the others are silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Update = Callable[[int, int, str], None]
"""(done, total, note)"""


@contextmanager
def progress_bar(title: str, *, show: bool) -> Iterator[Update]:
    """A bar on standard error, with rate and time left; a no-op where `show` is False."""
    if not show:
        yield lambda done, total, note: None
        return
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


def training_note(values: Mapping[str, float]) -> str:
    """Loss and speed for the end of the bar; empty between two logs."""
    if "volumes_per_s" not in values:
        return ""
    return f"loss {values['loss']:.4f}  {values['volumes_per_s']:.2f} volumes/s"
