"""All parts, each in a process of its own with a limit of its own; what was found is on disk after each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc_ddpm.benchmark.record import describe, environment, new_report, table, write_report
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import write_json, write_text
from hpc_ddpm.sealed import read_json

LEAST_S = 8.0
"""With less time than this left, a part is not begun."""
SMALL_S = 240.0
"""Limit of a part with tiny networks, also on a busy CPU."""
Result = dict[str, Any]


def gpu_check(
    out: Path,
    *,
    device: str = "cuda",
    size: str = "full",
    minutes: float = 9.0,
    only: Sequence[str] = (),
    on_part: Callable[[str, Result], None] = lambda name, result: None,
) -> dict[str, Result]:
    """Run the parts and write NAME.json for each, summary.json (everything) and summary.md into `out`.

    Args:
        out: results folder, created where missing.
        device: `cuda` or `cpu`.
        size: `full` is the presets themselves; `small` takes a CPU under a minute.
        minutes: for all parts together; what does not fit in is left out and said so.
        only: names of parts; empty is all.
        on_part: called with each finished part.

    Returns:
        Name -> status (passed, failed, error, crashed, timeout or skipped), seconds and rows.

    Raises:
        ConfigError: an unknown part, or no CUDA device.
    """
    import torch

    from hpc_ddpm.benchmark.gpu_check.parts import PARTS

    unknown = sorted(set(only) - set(PARTS))
    if unknown:
        raise ConfigError(f"no part {', '.join(unknown)}; choose among {', '.join(PARTS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"no CUDA device is visible to PyTorch {torch.__version__}; use --device cpu --size small")
    where, end = environment(), time.monotonic() + 60 * minutes
    results: dict[str, Result] = {}
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        limit = min(part.seconds if size == "full" else SMALL_S, end - time.monotonic())
        if limit < LEAST_S:
            results[name] = {"status": "skipped", "error": "no time left; raise --minutes", "rows": []}
        else:
            command = [sys.executable, "-m", "hpc_ddpm.benchmark.gpu_check.parts", name, device, size]
            results[name] = run_limited([*command, str(out / f"{name}.json")], out / f"{name}.json", limit, device)
        write_json(out / f"{name}.json", results[name], indent=1)
        rows = [{"part": part, **result} for part, result in results.items()]
        report = new_report("gpu-check", where, {"device": device, "size": size, "minutes": minutes}, rows)
        write_report(out / "summary.json", report)
        write_text(out / "summary.md", to_markdown(results, describe(where)))
        on_part(name, results[name])
    return results


def run_limited(
    command: Sequence[str], path: Path, limit_s: float, device: str = "cpu", variables: Mapping[str, str] | None = None
) -> Result:
    """Run a command that writes its result to `path`, and end it and its children after `limit_s`.

    `variables` win over this process's; what the command said is in `log` where it did not end well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    full = {"OMP_WAIT_POLICY": "passive"} | dict(os.environ) | dict(variables or {})
    if device == "cpu":
        full |= {"HPC_DDPM_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=full, start_new_session=True)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        tail = log.read()[-2000:]
    result: Result = {"status": "unfinished", "rows": []}
    with suppress(DataFormatError):
        result = read_json(path, Result, "measure again")
    result["seconds"] = round(time.monotonic() - began, 1)
    if code is None:
        result |= {"status": "timeout", "error": f"ended after {limit_s:.0f} s", "log": tail}
    elif code:
        result |= {"status": "crashed", "error": f"exit code {code}", "log": tail}
    return result


def to_markdown(results: dict[str, Result], footer: str) -> str:
    """One line per part, then its rows."""
    lines = [
        [name, each["status"], f"{each.get('seconds', 0):.0f}", each.get("error", "")] for name, each in results.items()
    ]
    blocks = ["# GPU check", table(["part", "status", "seconds", "why"], lines)]
    for name, result in results.items():
        if result["rows"]:
            blocks += [f"## {name}", rows_table(result["rows"])]
    return "\n\n".join([*blocks, footer]) + "\n"


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """A column for every key that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return table([key.replace("_", " ") for key in keys], ([_cell(row.get(key)) for key in keys] for row in rows))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = [f"{key} {_cell(each)}" for key, each in value.items()]
    text = "; ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
    return text.replace("|", "/").replace("\n", " ")
