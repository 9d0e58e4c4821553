"""One training step of hpc_ddpm beside Med-DDPM's own, on one CPU, in one run.

    python tests/peers/bench_step_vs_med_ddpm.py --med-ddpm PATH_OF_A_CLONE [--size 64 --base 32 --rounds 7]

A step is Med-DDPM's inner loop at batch 1 without accumulation: loss (L1 on epsilon), backward, Adam step. The
variants take turns, so that other load on the machine falls on all; each variant's peak memory is the maximal
resident size of a process of its own that makes two steps.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

VARIANTS = ("med-ddpm fp32", "fp32", "bf16")
Step = Callable[[], float]


def main() -> None:
    options = parse()
    if options.child:
        return child(options)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    workers = {name: start(options, name) for name in VARIANTS}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            times[name].append(ask(worker))
    for worker in workers.values():
        worker.communicate("")
    print(report(options, times, {name: peak_mib(options, name) for name in VARIANTS}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--med-ddpm", type=Path, required=True, help="clone of github mobaidoctor/med-ddpm")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--base", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------- processes, one per variant


def start(options: argparse.Namespace, name: str, count: int = 0) -> subprocess.Popen[str]:
    arguments = ["--med-ddpm", options.med_ddpm, "--size", options.size, "--base", options.base]
    arguments += ["--threads", options.threads, "--child", name, "--count", count]
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen[str]) -> float:
    """Let a waiting worker make one step; its time in seconds."""
    assert worker.stdin and worker.stdout
    worker.stdin.write("step\n")
    worker.stdin.flush()
    return float(json.loads(worker.stdout.readline()))


def peak_mib(options: argparse.Namespace, name: str) -> float:
    output, _ = start(options, name, count=2).communicate()
    return float(json.loads(output.splitlines()[-1]))


def child(options: argparse.Namespace) -> None:
    """Two warm-up steps, then one timed step per line on stdin; with --count, steps and peak memory."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr  # Med-DDPM prints on import
    step = med_ddpm_step(options) if options.child == "med-ddpm fp32" else our_step(options)
    for _ in range(options.count):
        step()
    if options.count:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=answers, flush=True)
        return
    step(), step()
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, file=answers, flush=True)


# -------------------------------------------------------------------------------------------- the two steps


def data(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    size = (options.size,) * 3
    return torch.rand(1, 1, *size) * 2 - 1, (torch.rand(1, 2, *size) > 0.5).float() * 2 - 1


def med_ddpm_step(options: argparse.Namespace) -> Step:
    """Its network with its whole-head settings, its loss, its optimizer."""
    unet, trainer = import_med_ddpm(options.med_ddpm)
    network = unet.create_model(128, options.base, 1, attention_resolutions="16", in_channels=3, out_channels=1)
    diffusion = trainer.GaussianDiffusion(
        network, image_size=options.size, depth_size=options.size, timesteps=250, loss_type="l1", with_condition=True
    )
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-5)
    volume, condition = data(options)

    def step() -> float:
        loss = diffusion(volume, condition_tensors=condition).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def import_med_ddpm(clone: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Network and diffusion modules of a clone, with empty stand-ins for packages that a step does not use."""

    class Unused(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    importlib.import_module("torch._dynamo")  # before the stand-ins, which it would look into
    for name in ("torchvision", "PIL", "nibabel", "tqdm", "einops", "torch.utils.tensorboard", "apex"):
        sys.modules.setdefault(name, Unused(name))
    sys.path.insert(0, str(clone))
    return importlib.import_module("diffusion_model.unet"), importlib.import_module("diffusion_model.trainer")


def our_step(options: argparse.Namespace) -> Step:
    """The same network and loss; bf16 keeps float32 master weights, as training does."""
    from hpc_ddpm.config import load_config
    from hpc_ddpm.diffusion import build_schedule, draw_training, training_loss
    from hpc_ddpm.model import build_unet

    sizes = [f"model.base_channels={options.base}", f"data.size={[options.size] * 3}", "model.channels_last=true"]
    config = load_config("whole_head_128", sizes).config
    network = build_unet(config).train()
    is_bf16 = options.child == "bf16"
    masters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in network.parameters()]
    if is_bf16:
        network = network.bfloat16()
    weights = list(network.parameters())
    optimizer = torch.optim.Adam(masters if is_bf16 else weights, lr=1e-5, fused=True)
    schedule = build_schedule(config.diffusion)
    volume, condition = data(options)
    count = iter(range(1 << 30))

    def step() -> float:
        draw = draw_training(0, [next(count)], volume.shape[1:], config.diffusion)
        loss = training_loss(network, volume, condition, draw, schedule, config.diffusion).mean()
        loss.backward()
        if is_bf16:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
        optimizer.step()
        if is_bf16:
            torch._foreach_copy_([weight.data for weight in weights], [master.data for master in masters])
        network.zero_grad()
        return loss.item()

    return step


# -------------------------------------------------------------------------------------------------- report


def report(options: argparse.Namespace, times: dict[str, list[float]], peaks: dict[str, float]) -> str:
    base = VARIANTS[0]
    lines = [
        f"{options.size}^3, {options.base} base channels, batch 1, {options.threads} threads, {options.rounds} rounds "
        f"in turns; load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, Python {platform.python_version()}",
        "",
        "| step | median s | min - max s | median speed-up (min - max of pairs) | peak memory MiB |",
        "|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        ratios = [theirs / ours for theirs, ours in zip(times[base], times[name], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(times[name]):.2f} | {min(times[name]):.2f} - {max(times[name]):.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | {peaks[name]:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
