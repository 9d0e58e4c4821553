"""`hpc-ddpm bench all`: every benchmark as a command of its own, within one time budget; what fails is named."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_ddpm.benchmark.gpu_check.run import LEAST_S, run_limited
from hpc_ddpm.benchmark.page import to_page
from hpc_ddpm.benchmark.record import Report, read_report, table
from hpc_ddpm.data.parallel import num_cores
from hpc_ddpm.errors import HpcDdpmError
from hpc_ddpm.files import write_text


def bench_all(
    out: Path, words: Sequence[str], stage: int, packed: Path | None, minutes: float, price: float | None
) -> int:
    """Run train, sample, comm, data and scaling, and write NAME.json, summary.md and report.html into `out`.

    Args:
        out: results folder.
        words: configuration and settings, as the commands take them.
        stage: of ZeRO that they ask for; scaling has it beside DDP, and no other.
        packed: dataset; None is synthetic.
        minutes: for everything.
        price: of a GPU-hour.

    Returns:
        The exit code: 2 where a part failed or had no time.
    """
    import torch

    is_gpu = torch.cuda.is_available()
    count = torch.cuda.device_count() if is_gpu else num_cores()
    commands = _commands(out, words, stage, packed, count, [] if price is None else ["--price", str(price)])
    end, lines, reports = time.monotonic() + 60 * minutes, [], {}
    for number, (name, command) in enumerate(commands.items()):
        left = end - time.monotonic()
        limit = left if number == len(commands) - 1 else left / 2
        if limit < LEAST_S:
            result: dict[str, Any] = {"error": "no time left; raise --minutes"}
        else:
            whole = [sys.executable, "-m", "launch.cli", "bench", *command, "--quiet"]
            result = run_limited(whole, out / f"{name}.json", limit, "cuda" if is_gpu else "cpu")
        said = [line for line in result.get("log", "").splitlines() if line.strip()]
        status = "failed" if "error" in result else "done"
        why = ": ".join(filter(None, [result.get("error", ""), said[-1] if said else ""]))
        lines.append([name, status, f"{result.get('seconds', 0):.0f}", why])
        print(f"{name:10} {status:8} {result.get('seconds', 0):6.1f} s  {why}", flush=True)
        if status == "done":
            reports[name] = read_report(out / f"{name}.json")
    write_text(out / "summary.md", table(["part", "status", "seconds", "why"], lines) + "\n")
    _write_page(out, reports)
    return 2 if any(line[1] == "failed" for line in lines) else 0


def _commands(
    out: Path, words: Sequence[str], stage: int, packed: Path | None, count: int, price: list[str]
) -> dict[str, list[str]]:
    """The most valuable first; with one GPU or core there is nothing to talk to."""
    data = [] if packed is None else ["--data", str(packed)]
    options = {"train": [*data, *price], "sample": [*data, *price], "comm": ["--ranks", str(count)], "data": data}
    commands = {name: [name, *words, *own, "--json", str(out / f"{name}.json")] for name, own in options.items()}
    if count < 2:
        del commands["comm"]
        return commands
    points = ",".join(str(2**power) for power in range(count.bit_length()))
    scope = ["--gpus", points, "--engines", f"ddp,{stage}", "--rounds", "2"]
    return commands | {"scaling": ["scaling", *words, *data, *price, *scope, "--out", str(out)]}


def _write_page(out: Path, reports: dict[str, Report]) -> None:
    try:
        html, markdown = to_page(reports)
    except HpcDdpmError as error:
        print(f"no report.html: {error}", file=sys.stderr)
        return
    write_text(out / "report.html", html)
    write_text(out / "report.md", markdown)
    print(out / "report.html")
