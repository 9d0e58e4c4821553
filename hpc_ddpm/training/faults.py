"""What `hpc-ddpm drill` makes go wrong inside a training, to see that the run survives it."""

from __future__ import annotations

import os
import re
import signal

import torch

from hpc_ddpm.distributed import Ranks
from hpc_ddpm.errors import ConfigError

VARIABLE = "HPC_DDPM_FAULT"
"""`nan@5`: the last rank's loss of step 5 is not a number. `kill@5`: that rank is killed there. Once in a job."""


class Fault:
    """The fault that the environment asks for, if it does; a restarted job has none.

    Raises:
        ConfigError: something else is asked for.
    """

    def __init__(self, ranks: Ranks) -> None:
        text = os.environ.get(VARIABLE, "")
        found = re.fullmatch(r"(nan|kill)@(\d+)", text)
        if text and not found:
            raise ConfigError(f"{VARIABLE}={text}: expected nan@STEP, kill@STEP or nothing; unset it")
        is_here = ranks.rank == ranks.world_size - 1 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        self.kind, self.step = (found[1], int(found[2])) if found and is_here else ("", 0)

    def harm(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """The loss of a micro step of `step`, which counts from 1."""
        if not self.kind or step != self.step:
            return loss
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss * torch.nan
