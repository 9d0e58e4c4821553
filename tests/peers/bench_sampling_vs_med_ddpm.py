"""Sampling by hpc_ddpm beside Med-DDPM's own loop, on one CPU, in one run.

    python tests/peers/bench_sampling_vs_med_ddpm.py --med-ddpm PATH_OF_A_CLONE [--size 64 --base 32 --rounds 5]

One volume at a time, the same network and mask. Each variant takes turns at `--part` evaluations of its loop (all
of a chain's steps cost the same; --part 250 makes whole chains), so that other load on the machine falls on all.
Volumes per hour follow from the seconds per evaluation and the evaluations per volume. CPU seconds, of all threads,
show how far the wall time suffers from other load. The last row runs the network's convolutions and nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from bench_step_vs_med_ddpm import data, import_med_ddpm

VARIANTS = {
    "med-ddpm fp32, ddpm": 250,
    "fp32, ddpm": 250,
    "bf16, ddpm": 250,
    "bf16, dpmpp_2m": 20,
    "bf16, convolutions alone": 250,
}
"""Name -> evaluations per volume."""
Loop = Callable[[int], None]
"""Runs so many evaluations."""


def main() -> None:
    options = parse()
    if options.child:
        return child(options)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    workers = {name: start(options, name) for name in VARIANTS}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            times[name].append(ask(worker))
    for worker in workers.values():
        worker.communicate("")
    print(report(options, times))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--med-ddpm", type=Path, required=True, help="clone of github mobaidoctor/med-ddpm")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--base", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", type=int, default=20, help="evaluations per turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(options: argparse.Namespace, name: str) -> subprocess.Popen[str]:
    arguments = ["--med-ddpm", options.med_ddpm, "--size", options.size, "--base", options.base]
    arguments += ["--threads", options.threads, "--part", options.part, "--child", name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen[str]) -> tuple[float, float]:
    """Let a waiting worker take its turn; wall and CPU seconds per evaluation."""
    assert worker.stdin and worker.stdout
    worker.stdin.write("go\n")
    worker.stdin.flush()
    wall, cpu = json.loads(worker.stdout.readline())
    return wall, cpu


def child(options: argparse.Namespace) -> None:
    """Two evaluations to warm up, then one turn per line on stdin."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr  # Med-DDPM prints on import and in its loop
    run = med_ddpm_loop(options) if options.child.startswith("med-ddpm") else our_loop(options)
    part = min(options.part, VARIANTS[options.child])
    run(2)
    for _ in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        run(part)
        seconds = (time.perf_counter() - began) / part, (time.process_time() - cpu_began) / part
        print(json.dumps(seconds), file=answers, flush=True)


def med_ddpm_loop(options: argparse.Namespace) -> Loop:
    """Its network with its whole-head settings, its sampling step, from the last timestep down."""
    unet, trainer = import_med_ddpm(options.med_ddpm)
    network = unet.create_model(128, options.base, 1, attention_resolutions="16", in_channels=3, out_channels=1)
    diffusion = trainer.GaussianDiffusion(
        network, image_size=options.size, depth_size=options.size, timesteps=250, loss_type="l1", with_condition=True
    ).eval()
    volume, condition = data(options)

    def run(evaluations: int) -> None:
        x = torch.randn_like(volume)
        for timestep in reversed(range(250 - evaluations, 250)):
            x = diffusion.p_sample(x, torch.full((1,), timestep), condition_tensors=condition)

    return run


def our_loop(options: argparse.Namespace) -> Loop:
    """The same network through `sample`, as `hpc-ddpm sample` runs it."""
    from hpc_ddpm.config import load_config
    from hpc_ddpm.diffusion import NoiseSource, build_schedule, sample
    from hpc_ddpm.distributed import keep_freed_memory
    from hpc_ddpm.model import build_unet

    keep_freed_memory()
    precision, _, kind = options.child.partition(", ")
    sizes = [f"model.base_channels={options.base}", f"data.size={[options.size] * 3}", "model.channels_last=true"]
    config = load_config("whole_head_128", sizes).config
    network = build_unet(config).eval().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    schedule = build_schedule(config.diffusion)
    volume, condition = data(options)
    if kind == "convolutions alone":
        return convolutions(network, volume, condition)

    def run(evaluations: int) -> None:
        sampling = config.sampling.model_copy(update={"sampler": kind, "num_steps": evaluations})
        noise = NoiseSource([0])
        with torch.inference_mode():
            sample(network, condition, noise(volume.shape), schedule, "epsilon", sampling, noise=noise)

    return run


def convolutions(network: torch.nn.Module, volume: torch.Tensor, condition: torch.Tensor) -> Loop:
    """Each 3-D convolution of one evaluation, on an input that is there already."""
    calls: list[tuple[torch.nn.Conv3d, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, _: calls.append((layer, inputs[0].clone())))
        for layer in network.modules()
        if isinstance(layer, torch.nn.Conv3d)
    ]
    with torch.inference_mode():
        network(volume, condition, torch.tensor([100]))
    for hook in hooks:
        hook.remove()

    def run(evaluations: int) -> None:
        with torch.inference_mode():
            for _ in range(evaluations):
                for layer, x in calls:
                    F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)

    return run


def report(options: argparse.Namespace, times: dict[str, list[tuple[float, float]]]) -> str:
    base, *_ = VARIANTS
    lines = [
        f"{options.size}^3, {options.base} base channels, batch 1, {options.threads} threads, {options.rounds} rounds "
        f"of {options.part} evaluations in turns; load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "",
        "| sampling | evaluations per volume | median s per evaluation (min - max) | CPU s per evaluation | "
        "volumes per hour | ratio of volumes per hour (min - max of rounds) |",
        "|---|---|---|---|---|---|",
    ]
    for name, evaluations in VARIANTS.items():
        wall, cpu = zip(*times[name], strict=True)
        ratios = [
            theirs * VARIANTS[base] / (ours * evaluations)
            for (theirs, _), (ours, _) in zip(times[base], times[name], strict=True)
        ]
        per_hour = 3600 / (statistics.median(wall) * evaluations)
        lines.append(
            f"| {name} | {evaluations} | {statistics.median(wall):.3f} ({min(wall):.3f} - {max(wall):.3f}) "
            f"| {statistics.median(cpu):.3f} | {per_hour:.1f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
