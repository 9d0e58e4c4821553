"""The parts in the order of their value, and one part run in a process of its own.

python -m hpc_ddpm.benchmark.gpu_check.parts NAME cuda|cpu full|small OUT.json
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hpc_ddpm.benchmark.gpu_check import correctness, speed
from hpc_ddpm.benchmark.gpu_check.setup import Part, Row, Setup
from hpc_ddpm.files import write_json

WHOLE_HEAD, BRATS = "whole_head_128", "brats_192"


@dataclass(frozen=True)
class Limit:
    """One part: what it runs, and the seconds that it may take."""

    run: Part
    seconds: float


PARTS = {
    "environment": Limit(correctness.environment, 40),
    "conv3d": Limit(speed.conv3d, 60),
    "ceilings": Limit(speed.ceilings, 30),
    "network": Limit(correctness.network, 90),
    f"steps_{WHOLE_HEAD}": Limit(partial(speed.steps, preset=WHOLE_HEAD), 110),
    f"steps_{BRATS}": Limit(partial(speed.steps, preset=BRATS), 150),
    "checkpointing": Limit(correctness.checkpointing, 60),
    "zero1": Limit(correctness.zero1, 80),
    f"sampling_{WHOLE_HEAD}": Limit(partial(speed.sampling, preset=WHOLE_HEAD), 45),
    f"sampling_{BRATS}": Limit(partial(speed.sampling, preset=BRATS), 70),
    "samplers": Limit(correctness.samplers, 60),
    "layers": Limit(correctness.layers, 40),
    "data_path": Limit(correctness.data_path, 30),
    f"compiled_steps_{WHOLE_HEAD}": Limit(partial(speed.compiled_steps, preset=WHOLE_HEAD), 180),
    f"compiled_sampling_{WHOLE_HEAD}": Limit(partial(speed.compiled_sampling, preset=WHOLE_HEAD), 120),
    f"compiled_steps_{BRATS}": Limit(partial(speed.compiled_steps, preset=BRATS), 180),
    f"compiled_sampling_{BRATS}": Limit(partial(speed.compiled_sampling, preset=BRATS), 120),
}


def run_part(part: Part, setup: Setup, path: Path) -> str:
    """Run it, writing its rows to `path` as they come; returns its status: passed, failed or error."""
    rows: list[Row] = []
    began = time.monotonic()

    def write(status: str, **more: str) -> None:
        seconds = round(time.monotonic() - began, 1)
        write_json(path, {"status": status, "seconds": seconds, "rows": rows, **more}, indent=1, durable=False)

    write("unfinished")
    try:
        for row in part(setup):
            rows.append(row)
            write("unfinished")
    except Exception as error:
        write("error", error=f"{type(error).__name__}: {error}"[:500], traceback=traceback.format_exc()[-3000:])
        return "error"
    status = "failed" if any(row.get("is_ok") is False for row in rows) else "passed"
    write(status)
    return status


def main() -> None:
    """One part, as the arguments say."""
    name, device, size, path = sys.argv[1:]
    warnings.simplefilter("ignore")  # other people's; what counts is in the rows
    setup = Setup(torch.device("cuda", 0) if device == "cuda" else torch.device("cpu"), size == "full")
    run_part(PARTS[name].run, setup, Path(path))


if __name__ == "__main__":
    main()
