"""Runs several trainings in one process group: `torchrun … runs.py PLAN.json`; each is {run, overrides, preset}."""

import json
import sys
from pathlib import Path

import torch

from hpc_ddpm.config import load_config
from hpc_ddpm.distributed import detect_ranks, process_group
from hpc_ddpm.training import engine
from hpc_ddpm.training.loop import peak_memory_gib, train


def allow_fp16_on_cpu() -> None:
    """Slow there, but arithmetic like any other. The loss scale starts so high that it must fall."""
    ours = engine.deepspeed_config
    engine.deepspeed_config = lambda *given: ours(*given) | {"fp16": ours(*given)["fp16"] | {"initial_scale_power": 24}}
    engine.resolve_precision = lambda precision, device: precision
    engine.import_deepspeed(torch.device("cpu")).accelerator.get_accelerator().is_fp16_supported = lambda: True


if __name__ == "__main__":
    ranks = detect_ranks()
    with process_group(ranks) as device:
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run = Path(job["run"])
            if "training.precision=fp16" in job["overrides"] and device.type == "cpu":
                allow_fp16_on_cpu()
            train(load_config(job.get("preset"), job["overrides"]).config, run, ranks, device)
            (run / f"peak-{ranks.rank}.txt").write_text(str(peak_memory_gib(device)))
