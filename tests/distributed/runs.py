"""Runs several trainings in one process group: `torchrun … runs.py PLAN.json`; each is {run, overrides, preset}."""

import json
import sys
from pathlib import Path

from hpc_ddpm.config import load_config
from hpc_ddpm.distributed import detect_ranks, process_group
from hpc_ddpm.training.loop import peak_memory_gib, train

if __name__ == "__main__":
    ranks = detect_ranks()
    with process_group(ranks) as device:
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run = Path(job["run"])
            train(load_config(job.get("preset"), job["overrides"]).config, run, ranks, device)
            (run / f"peak-{ranks.rank}.txt").write_text(str(peak_memory_gib(device)))
