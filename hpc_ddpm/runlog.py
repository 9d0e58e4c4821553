"""What a run leaves behind to read: metrics.jsonl, TensorBoard, provenance.json, one console line."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from hpc_ddpm import __version__
from hpc_ddpm.files import append_lines, write_text
from hpc_ddpm.sealed import read_log

PACKAGES = (
    "torch",
    "deepspeed",
    "mpi4py",
    "h5py",
    "hdf5plugin",
    "nibabel",
    "submitit",
    "numpy",
    "scipy",
    "safetensors",
)
METRICS, LOST = "metrics.jsonl", "lost.jsonl"
"""Files of a run: one row for every step that counts, and the rows of steps that were repeated after a loss."""
COMMIT_FILE = "COMMIT"
"""File in a copy of this package outside a checkout; it names the commit from which the copy was made."""


def package_versions() -> dict[str, str]:
    """Installed versions of what shapes a result."""
    versions = {"hpc_ddpm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the checkout this code runs from, with `+changes` if edited; None outside a checkout."""
    folder = folder or Path(__file__).parent
    if (folder / COMMIT_FILE).is_file():
        return (folder / COMMIT_FILE).read_text(encoding="utf-8")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def provenance() -> dict[str, Any]:
    """Command, versions, commit, host and time, for run directories and weights."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": package_versions(),
        "git_commit": git_commit(),
        "host": socket.gethostname(),
    }


class RunLog:
    """Scalars of one run: metrics.jsonl and TensorBoard on rank 0, nothing on the others.

    A resumed run first moves what was logged after `start_step` to lost.jsonl, so that one sequence of steps remains.
    """

    def __init__(self, run_dir: Path, *, is_main: bool, start_step: int = 0) -> None:
        self._file = None
        self._writer = None
        if not is_main:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        path, rows = run_dir / METRICS, read_metrics(run_dir)
        lost = [row for row in rows if row["step"] > start_step]
        if lost:
            append_lines(run_dir / LOST, map(json.dumps, lost))
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= start_step))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        self._show, threading.excepthook = threading.excepthook, self._on_thread_error

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """Report errors of threads, except TensorBoard's: its next write raises the error again."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._show(args)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of one step, and the time in seconds since the epoch."""
        if self._file is None or self._writer is None:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def image(self, step: int, name: str, png: bytes) -> None:
        """Show a PNG in TensorBoard."""
        if self._writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(png[start : start + 4]) for start in (16, 20))  # of its IHDR chunk
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        """Flush to disk."""
        if self._file is not None and self._writer is not None:
            self._file.close()
            try:
                self._writer.close()
            finally:
                threading.excepthook = self._show


def _with_step(row: dict[str, int | float]) -> dict[str, int | float]:
    if not isinstance(row.get("step"), int) or row["step"] < 0:
        raise ValueError("a row with its step expected")
    return row


Row = Annotated[dict[str, int | float], AfterValidator(_with_step)]
"""A row of metrics.jsonl; NaN where a loss was none. Nothing is decided by it, so it carries no checksum."""


def read_metrics(run_dir: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, or of LOST, in order; torn and damaged lines are left out."""
    return read_log(run_dir / name, Row, is_sealed=False)
