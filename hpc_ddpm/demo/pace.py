"""How many training steps the demo takes: as many as this machine computes in a few minutes."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.device import resolve_precision
from hpc_ddpm.model.planner import DTYPES
from hpc_ddpm.model.trace import example_batch, example_loss
from hpc_ddpm.model.unet3d import build_unet

TRAINING_S = 190.0
"""With this much training the whole demo takes about five minutes on two cores."""
FEWEST_STEPS = 100
"""With fewer steps the network draws blurs; the demo rather takes longer."""
NUM_TRIALS = 3


def choose_steps(preset: Path, config: Config) -> int:
    """Steps of this demo: what an earlier start wrote to `preset`, its `demo.yaml`, else as many as fit here."""
    if preset.is_file():
        return load_config(str(preset)).config.training.num_steps
    return fitting_steps(config)


def fitting_steps(config: Config) -> int:
    """Steps that take `TRAINING_S` seconds here, at most the configured ones and at least `FEWEST_STEPS`.

    The learning-rate schedule follows the number of steps. On a GPU it is the configured number.
    """
    most = config.training.num_steps
    if torch.cuda.is_available():
        return most
    return max(min(most, FEWEST_STEPS), min(most, int(TRAINING_S / measure_step_s(config))))


def measure_step_s(config: Config) -> float:
    """Seconds of one training step when all cores of this process work on it: the fastest of three trials.

    Ranks that share the cores take about as long together. Communication and the optimizer are left out.
    """
    device = torch.device("cpu")
    dtype = DTYPES[resolve_precision(config.training.precision, device, config.training_depths)]
    network = build_unet(config).train().to(dtype)
    batch = example_batch(config, config.data.training_shape, device)
    seconds = []
    for _ in range(NUM_TRIALS):
        began = time.perf_counter()
        example_loss(network, batch).backward()
        seconds.append(time.perf_counter() - began)
    return config.training.global_batch * min(seconds)
