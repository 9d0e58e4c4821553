"""Runs several trainings in one process group: `torchrun … runs.py PLAN.json`; each is {run, overrides, preset, harm}.

`harm` spoils the micro steps of one rank: {kind, rank, steps}, steps counted as they are executed. `loss` and
`gradient` are not finite; `lost`, `weight` and `noise` are wrong: no gradient, 1.1 times the rank's weight in the mean
of the gradients, noise that is not the sample's. With `micro_step`, counted from 0, only this one of each step.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_ddpm.config import load_config
from hpc_ddpm.diffusion.gaussian import Model, TrainingDraw
from hpc_ddpm.distributed import detect_ranks, process_group
from hpc_ddpm.errors import TrainingError
from hpc_ddpm.training import engine, loop
from hpc_ddpm.training.meter import peak_memory_gib


def allow_fp16_on_cpu() -> None:
    """Slow there, but arithmetic like any other. The loss scale starts so high that it must fall."""
    ours = engine.deepspeed_config
    engine.deepspeed_config = lambda *given: ours(*given) | {"fp16": ours(*given)["fp16"] | {"initial_scale_power": 20}}
    engine.resolve_precision = lambda precision, *where: precision
    engine.import_deepspeed(torch.device("cpu")).accelerator.get_accelerator().is_fp16_supported = lambda: True


TRAINING_LOSS, ADVANCE = loop.training_loss, loop.advance


def spoil(harm: dict[str, Any], rank: int) -> None:
    """From now on, the steps of `harm` go wrong."""
    executed = micro_steps = 0

    def advance(*arguments: Any) -> None:
        nonlocal executed, micro_steps
        executed, micro_steps = executed + 1, 0
        ADVANCE(*arguments)

    def training_loss(model: Model, x: Tensor, condition: Tensor, draw: TrainingDraw, *arguments: Any) -> Tensor:
        nonlocal micro_steps
        micro_step, micro_steps = micro_steps, micro_steps + 1
        is_due = rank == harm["rank"] and executed in harm["steps"] and harm.get("micro_step", micro_step) == micro_step
        if is_due and harm["kind"] == "noise":
            draw = replace(draw, noise=draw.noise.flip(-1))
        loss = TRAINING_LOSS(model, x, condition, draw, *arguments)
        if is_due and harm["kind"] == "loss":
            return loss + math.inf  # its gradients are finite
        if is_due:
            factor = {"gradient": math.nan, "lost": 0.0, "weight": 1.1, "noise": 1.0}[harm["kind"]]
            loss.register_hook(lambda gradient: gradient * factor)
        return loss

    loop.training_loss, loop.advance = training_loss, advance


if __name__ == "__main__":
    ranks = detect_ranks()
    with process_group(ranks) as device:
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run = Path(job["run"])
            if "training.precision=fp16" in job["overrides"] and device.type == "cpu":
                allow_fp16_on_cpu()
            spoil(job.get("harm") or {"rank": -1}, ranks.rank)
            try:
                loop.train(load_config(job.get("preset"), job["overrides"]).config, run, ranks, device)
            except TrainingError as error:
                (run / f"error-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")
            (run / f"peak-{ranks.rank}.txt").write_text(str(peak_memory_gib(device)))
