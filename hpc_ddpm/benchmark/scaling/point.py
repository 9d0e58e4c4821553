"""One point of a curve as its ranks run it: `python -m hpc_ddpm.benchmark.scaling.point PLAN.json RESULT.json`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Before torch is loaded: ranks that share cores must not spin while they wait."""

from hpc_ddpm.benchmark.comm import bench_comm  # noqa: E402
from hpc_ddpm.benchmark.device import describe_gpu, device_name, measure_ceilings  # noqa: E402
from hpc_ddpm.benchmark.scaling.race import race  # noqa: E402
from hpc_ddpm.config import config_from_dict  # noqa: E402
from hpc_ddpm.device import resolve_precision  # noqa: E402
from hpc_ddpm.distributed import detect_ranks, process_group  # noqa: E402
from hpc_ddpm.errors import HpcDdpmError  # noqa: E402
from hpc_ddpm.files import write_json  # noqa: E402
from hpc_ddpm.model.planner import DTYPES  # noqa: E402
from hpc_ddpm.sealed import read_json  # noqa: E402


def run_point(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was measured, on rank 0; all ranks call it.

    Args:
        plan: `config` of this number of ranks, `contestants`, `repeats`, `steps`, `warm_up`, `with_comm`.
        folder: that all ranks see, for checkpoints.
    """
    config, ranks = config_from_dict(plan["config"], "the plan"), detect_ranks()
    with process_group(ranks) as device:
        precision = resolve_precision(config.training.precision, device, config.training_depths)
        result: dict[str, Any] = {
            "device": device_name(device),
            "gpu": describe_gpu(device),
            "precision": precision,
            "ceilings": measure_ceilings(device, DTYPES[precision], budget_s=0.2),
            "collectives": bench_comm(config, ranks, device) if plan["with_comm"] and ranks.world_size > 1 else [],
        }
        options = {name: plan[name] for name in ("repeats", "steps")}
        warm_up = plan["warm_up"][device.type]
        rows = race(config, plan["contestants"], folder, ranks, device, **options, warm_up=warm_up)
    return result | {"rows": rows}


def main() -> None:
    """As one rank."""
    plan, path = read_json(Path(sys.argv[1]), dict[str, Any], "measure again"), Path(sys.argv[2])
    try:
        result = run_point(plan, path.with_suffix(""))
    except HpcDdpmError as error:
        sys.exit(f"hpc-ddpm: {error}")
    if result["rows"]:
        write_json(path, result)


if __name__ == "__main__":
    main()
