"""Workers that are killed at random and started again: `python tests/sampling/harness.py OUT [VOLUMES] [--array]`.

`--array` makes them tasks of an array on the development cluster, which `SLURM_CONF` names. Prints how long it took,
how many workers were killed, and whether the set is what one undisturbed process makes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from hpc_ddpm.config import load_config
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.sampling.verify import verify_set
from tests.conftest import rank_environment
from tests.forks import Fork, Server
from tests.sampling.conftest import QUICK, save_random_weights, voxels

NUM_WORKERS, NUM_MASKS, NUM_TASKS = 4, 10, 8


@dataclass(frozen=True)
class Outcome:
    volumes: int
    killed: int
    seconds: float
    undisturbed_seconds: float
    problems: tuple[str, ...]
    is_identical: bool


def generate_under_fire(folder: Path, num_volumes: int, seed: int = 0, *, as_array: bool = False) -> Outcome:
    """The same set by killed workers, here or on the cluster, and by one process that is left alone."""
    weights = save_random_weights(folder / "weights", load_config(None, QUICK).config)
    masks = write_phantoms(folder / "masks", NUM_MASKS, (16, 16, 16), seed=1) / "mask"
    words = [str(weights), "--masks", str(masks), "--quiet", "--replicas", str(num_volumes // NUM_MASKS), "--out"]
    began = time.monotonic()
    with Server(rank_environment()) as server:
        run_workers = _run_array if as_array else partial(_run_workers, server)
        killed = run_workers([*words, str(folder / "fire")], num_volumes, folder / "fire", random.Random(seed))
        middle = time.monotonic()
        assert _start(server, [*words, str(folder / "calm")]).wait() == 0
    return Outcome(
        num_volumes,
        killed,
        round(middle - began, 1),
        round(time.monotonic() - middle, 1),
        tuple(f"{problem.kind} {problem.id}: {problem.found}" for problem in verify_set(folder / "fire")),
        voxels(folder / "fire") == voxels(folder / "calm") and _files(folder / "fire") == _files(folder / "calm"),
    )


def _start(server: Server, words: list[str]) -> Fork:
    with Path(os.devnull).open("w") as nowhere:
        return Fork(server, ["-m", "launch.cli", "sample", *words], rank_environment(), stdout=nowhere)


def _count_done(out: Path) -> int:
    return len(list((out / "sidecar").glob("[!.]*.json"))) if (out / "sidecar").is_dir() else 0


def _run_workers(server: Server, words: list[str], num_volumes: int, out: Path, dice: random.Random) -> int:
    """Start workers, kill one every few seconds and start another, until all volumes are there."""
    workers, killed, next_kill = [_start(server, words) for _ in range(NUM_WORKERS)], 0, 0
    while any(worker.poll() is None for worker in workers):
        time.sleep(dice.uniform(0.2, 0.6))
        done = _count_done(out)
        if next_kill <= done < num_volumes:  # every few seconds, and never so often that nobody gets to work
            victim = dice.choice(workers)
            workers.remove(victim)
            if victim.poll() is None:
                victim.send_signal(signal.SIGKILL)
                killed += 1
            victim.wait()
            workers.append(_start(server, words))
            next_kill = done + max(1, num_volumes // 40)
    assert [worker.wait() for worker in workers] == [0] * NUM_WORKERS
    return killed


def _run_array(words: list[str], num_volumes: int, out: Path, dice: random.Random) -> int:
    """Submit an array, kill one of its running tasks every few seconds, submit lost ones again until all are there."""
    submit = ["submit", "sample", "--cluster", "devcluster", "--tasks", str(NUM_TASKS)]
    job, killed, next_kill = _job(_say("hpc-ddpm", *submit, *words)), 0, 0
    while _count_done(out) < num_volumes:
        time.sleep(dice.uniform(0.2, 0.6))
        if not _tasks(job, "PENDING,RUNNING,COMPLETING"):
            job = _job(_say("hpc-ddpm", "jobs", "retry", str(out)))
        done, running = _count_done(out), _tasks(job, "RUNNING")
        if next_kill <= done < num_volumes and running:
            _say("scancel", "--signal=KILL", dice.choice(running), check=False)  # it may have ended by now
            killed += 1
            next_kill = done + max(1, num_volumes // 40)
    _say("hpc-ddpm", "jobs", "wait", str(out), check=False)
    return killed


def _say(*command: str, check: bool = True) -> str:
    slurm = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    return subprocess.run(
        command, env=rank_environment() | slurm, check=check, stdout=subprocess.PIPE, text=True
    ).stdout


def _job(said: str) -> str:
    return said.split("job ", 1)[1].split(":")[0]


def _tasks(job: str, states: str) -> list[str]:
    return _say("squeue", "--noheader", "--array", f"--states={states}", "--format=%i", "--jobs", job).split()


def _files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.nii.gz")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("volumes", type=int, nargs="?", default=1000)
    parser.add_argument("--array", action="store_true")
    options = parser.parse_args()
    outcome = generate_under_fire(options.out, options.volumes, as_array=options.array)
    print(json.dumps(asdict(outcome), indent=2))
    sys.exit(0 if outcome.is_identical and not outcome.problems else 1)
