"""hpc_ddpm beside Med-DDPM, MONAI and plain PyTorch, in one run: training steps, sampling, memory.

    python tests/peers/bench_peers.py --out docs/benchmarks/peers [--med-ddpm CLONE] [--size 64 --base 32 --rounds 5]

Contestants run in processes of their own and take turns, so that other load on the machine falls on all. A turn is one
training step, or `--part` evaluations of a sampling loop (all of a chain's cost the same). Runs on the GPU if there
is one. `--out` gets .md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from hpc_ddpm.benchmark.device import describe_gpu, synchronize
from hpc_ddpm.benchmark.record import Report, describe, environment, new_report, table, write_report
from hpc_ddpm.benchmark.timing import spread, take_turns
from hpc_ddpm.device import local_device
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.files import write_text
from tests.peers.contestants import EVALUATIONS, SAMPLING, TIMESTEPS, TRAINING, Size

WARM_UP = {"cuda": 10, "cpu": 1}
"""Steps or evaluations, before a turn of warm-up."""
LOOPS = {"training": TRAINING, "sampling": SAMPLING}


def main() -> None:
    options = parse()
    if options.child:
        return child(options)
    device = local_device(Ranks())
    where = environment(("monai",), describe_gpu(device))
    rows = [row for loop in LOOPS for row in measure(options, loop)]
    shown = {"size": options.size, "base_channels": options.base, "rounds": options.rounds, "part": options.part}
    report = new_report("peers", where, {**shown, "device": device.type, "threads": options.threads}, rows)
    write_report(options.out.with_suffix(".json"), report)
    write_text(options.out.with_suffix(".md"), to_markdown(report))
    print(to_markdown(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("peers"), help="name of the page, without its suffix")
    parser.add_argument("--med-ddpm", type=Path, help="clone of github mobaidoctor/med-ddpm")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--base", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", type=int, default=2, help="evaluations per turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------- processes, one per contestant


def measure(options: argparse.Namespace, loop: str) -> list[dict[str, Any]]:
    """A row per contestant of one loop."""
    names = [name for name in LOOPS[loop] if options.med_ddpm or not name.startswith("Med-DDPM")]
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(options, loop, name)) for name in names}
        began = {name: answer(process) for name, process in workers.items()}
        turns = take_turns(
            {name: lambda process=process: answer(process, "go") for name, process in workers.items()},
            options.rounds,
            lambda name: print(f"{loop}: {name}", file=sys.stderr),
        )
        ends = {name: answer(process, "peak") for name, process in workers.items()}
    return [
        {"loop": loop, "contestant": name, **began[name], **ends[name], **figures(name, loop, turns[name])}
        for name in names
    ]


@contextmanager
def worker(options: argparse.Namespace, loop: str, name: str):
    arguments = {"--size": options.size, "--base": options.base, "--threads": options.threads, "--part": options.part}
    if options.med_ddpm:
        arguments["--med-ddpm"] = options.med_ddpm
    command = [sys.executable, __file__, *(str(word) for pair in arguments.items() for word in pair)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": variables}
    with subprocess.Popen([*command, "--child", loop, name], **pipes) as process:
        yield process
        process.stdin.close()


def answer(process: subprocess.Popen[str], word: str = "") -> dict[str, Any]:
    """Ask a waiting worker, or with no word hear its first line."""
    if word:
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args[-1]} ended; what it said is above")
    return json.loads(line)


def child(options: argparse.Namespace) -> None:
    """Warm up, then one turn per line on stdin."""
    loop, name = options.child
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = local_device(Ranks())
    answers, sys.stdout = sys.stdout, sys.stderr  # Med-DDPM prints on import
    part = 1 if loop == "training" else options.part
    with LOOPS[loop][name](Size(options.size, options.base, device, options.med_ddpm)) as contestant:
        contestant.run(WARM_UP[device.type])
        print(json.dumps({"parameters": contestant.parameters}), file=answers, flush=True)
        for word in sys.stdin:
            if word == "peak\n":
                print(json.dumps({"peak_mib": peak_mib(device)}), file=answers, flush=True)
                continue
            synchronize(device)
            began, cpu_began = time.perf_counter(), time.process_time()
            contestant.run(part)
            synchronize(device)
            seconds = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
            print(json.dumps({key: value / part for key, value in seconds.items()}), file=answers, flush=True)


def peak_mib(device: torch.device) -> float:
    """Allocated on the GPU, or resident with the interpreter and its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -------------------------------------------------------------------------------------------------- report


def figures(name: str, loop: str, turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Figures of one contestant: seconds per step, or per evaluation and volume."""
    evaluations = 1 if loop == "training" else EVALUATIONS.get(name, TIMESTEPS)
    wall = [turn["wall_s"] for turn in turns]
    return {
        "samples_s": wall,
        "seconds": spread(wall),
        "cpu_seconds": spread([turn["cpu_s"] for turn in turns])["median"],
        "evaluations": evaluations,
    }


def to_markdown(report: Report) -> str:
    """The page: two tables, what was run, where."""
    settings = report["settings"]
    head = (
        f"{settings['size']}³ voxels, {settings['base_channels']} base channels, batch 1, on one {settings['device']}; "
        f"median (p10 - p90) of {settings['rounds']} turns."
    )
    blocks = ["# Beside Med-DDPM, MONAI and plain PyTorch", head]
    for loop, heading in (("training", "A training step"), ("sampling", "Sampling one volume")):
        rows = [row for row in report["rows"] if row["loop"] == loop]
        blocks += [f"## {heading}", _table(loop, rows)]
    return "\n\n".join([*blocks, NOTES, describe(report["environment"])]) + "\n"


def _table(loop: str, rows: Sequence[dict[str, Any]]) -> str:
    unit = ["seconds per step"] if loop == "training" else ["seconds per evaluation", "evaluations", "volumes/h"]
    head = ["contestant", "parameters", *unit, "times as fast (min - max of rounds)", "CPU s", "peak MiB"]
    return table(head, (_line(loop, row, rows[0]) for row in rows))


def _line(loop: str, row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Ratios are of the first row's time over this row's, turn by turn."""
    seconds, evaluations = row["seconds"], row["evaluations"]
    ratios = [
        theirs * base["evaluations"] / (ours * evaluations)
        for theirs, ours in zip(base["samples_s"], row["samples_s"], strict=True)
    ]
    per_volume = [] if loop == "training" else [str(evaluations), f"{3600 / (seconds['median'] * evaluations):.1f}"]
    return [
        row["contestant"],
        f"{row['parameters'] / 1e6:.2f} M",
        f"{seconds['median']:.3f} ({seconds['p10']:.3f} - {seconds['p90']:.3f})",
        *per_volume,
        f"{spread(ratios)['median']:.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
        f"{row['cpu_seconds']:.3f}",
        f"{row['peak_mib']:.0f}",
    ]


NOTES = """\
**Med-DDPM**: its own network, loss, Adam step and `p_sample`, from a clone; its EMA (every 10th step) is left out.
**MONAI**: `DiffusionModelUNet` with the same channels, residual blocks and attention levels, its `DDPMScheduler`, and
its tutorials' step: autocast (fp16 with a gradient scaler on a GPU, bf16 on a CPU), MSE, Adam, no EMA. It differs in
nearest-neighbour upsampling followed by a convolution, in attention's projections and in the time embedding. **Plain
PyTorch**: a DDPM in the style of lucidrains around our network in the standard layout: Adam, EMA in Python; nothing is
sharded or recomputed. **hpc_ddpm**: the training engine as the loop drives it (DeepSpeed ZeRO-1 on one rank, fp32
masters, EMA after every step), and `sample` as `hpc-ddpm sample` calls it; channels_last on a CPU.

Memory is what a GPU's allocator held at most; on a CPU, the largest resident size of the whole process. CPU seconds,
of all threads, show how far the wall time suffers from other load. 20 evaluations of DPM-Solver++(2M) and 250 of DDPM
give different volumes: `docs/benchmarks/generation.md` compares them."""


if __name__ == "__main__":
    main()
