"""What no noise can move: the operations that a training step and a sampled volume launch, and their FLOPs.

`python tests/benchmark/test_counts.py` writes new counts, for a change that is meant.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))
from hpc_ddpm.benchmark.step import random_network, synthetic_batch
from hpc_ddpm.config import Config, load_config
from hpc_ddpm.diffusion import NoiseSource, build_schedule, draw_training, sample, training_loss
from hpc_ddpm.distributed import detect_ranks, process_group
from hpc_ddpm.model.trace import count_parameters, trace_forward, trace_step
from hpc_ddpm.runlog import package_versions
from hpc_ddpm.training.engine import Engine
from tests.conftest import rank_environment

FILE = Path(__file__).with_name("counts.json")
NETWORK = ["model.base_channels=16", "model.channel_multipliers=[1,2,4]"]
CONFIG = load_config("demo", [*NETWORK, "training.precision=fp32", "data.size=[16,16,16]"]).config
"""A small network with the demo's steps; as many operations at any size."""


class Launches(TorchDispatchMode):
    """Counts operations that do something: views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_training_step(config: Config) -> int:
    """A micro step, the optimizer step and the EMA of the training engine, as the loop drives it."""
    ranks = detect_ranks({})
    with process_group(ranks) as device:
        engine = Engine(config, ranks, device)
        schedule = build_schedule(config.diffusion)
        volume, condition = synthetic_batch(config, device, config.training.micro_batch)
        for number in range(2):  # the first allocates
            with Launches() as launches:
                draw = draw_training(config.seed, [number], volume.shape[1:], config.diffusion, device)
                loss = training_loss(engine.deepspeed, volume, condition, draw, schedule, config.diffusion, 0.0)
                engine.backward(loss.mean())
                engine.step(1e-5)
                engine.ema.update()
        engine.close()
    return launches.count


def count_sampling(config: Config) -> int:
    """One volume with the configured sampler."""
    network = random_network(config).eval()
    _, condition = synthetic_batch(config, torch.device("cpu"), 1)
    noise = NoiseSource([0])
    x = noise((1, config.data.num_modalities, *config.data.spatial_shape))
    schedule, target = build_schedule(config.diffusion), config.diffusion.prediction_type
    with torch.inference_mode(), Launches() as launches:
        sample(network, condition, x, schedule, target, config.sampling, noise=noise)
    return launches.count


def count_all() -> dict[str, Any]:
    """As stored."""
    whole = load_config("demo", NETWORK).config
    forward, step = trace_forward(whole, torch.float32), trace_step(whole, torch.float32)
    config = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"global_batch": 1})})
    versions = package_versions()
    return {
        "versions": {name: versions[name].partition("+")[0] for name in ("torch", "deepspeed")},
        "parameters": count_parameters(whole),
        "flops_per_evaluation": forward.flops,
        "flops_per_training_step": step.flops,
        "operations_per_training_step": count_training_step(config),
        "operations_per_sampled_volume": count_sampling(config),
    }


def test_a_step_and_a_volume_launch_no_more_than_before(tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed remembers the process groups of an earlier engine."""
    subprocess.run([sys.executable, __file__, tmp_path / "counts.json"], env=rank_environment(), check=True)
    stored, found = (json.loads(path.read_text()) for path in (FILE, tmp_path / "counts.json"))
    keys = [key for key in stored if key != "versions"]
    if stored["versions"] != found["versions"]:
        keys = [key for key in keys if not key.startswith("operations")]  # other versions launch other operations
    changed = {key: (stored[key], found[key]) for key in keys if stored[key] != found[key]}
    assert not changed, f"stored and found differ; if that is meant, run python {Path(__file__).name}: {changed}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # some operations come and go with the number of threads
    Path(sys.argv[1] if len(sys.argv) > 1 else FILE).write_text(json.dumps(count_all(), indent=2) + "\n")
