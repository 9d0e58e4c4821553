"""Workers that are killed at random and started again: `python tests/sampling/harness.py OUT [VOLUMES]`.

Prints how long it took, how many workers were killed, and whether the set is what one undisturbed process makes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_ddpm.config import load_config
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.sampling.verify import verify_set
from tests.conftest import rank_environment
from tests.forks import Fork, Server
from tests.sampling.conftest import QUICK, save_random_weights, voxels

NUM_WORKERS, NUM_MASKS = 4, 10


@dataclass(frozen=True)
class Outcome:
    volumes: int
    killed: int
    seconds: float
    undisturbed_seconds: float
    problems: tuple[str, ...]
    is_identical: bool


def generate_under_fire(folder: Path, num_volumes: int, seed: int = 0) -> Outcome:
    """The same set by killed workers and by one process that is left alone."""
    weights = save_random_weights(folder / "weights", load_config(None, QUICK).config)
    masks = write_phantoms(folder / "masks", NUM_MASKS, (16, 16, 16), seed=1) / "mask"
    command = ["-m", "launch.cli", "sample", str(weights), "--masks", str(masks), "--quiet"]
    command += ["--replicas", str(num_volumes // NUM_MASKS), "--out"]
    began = time.monotonic()
    with Server(rank_environment()) as server:
        killed = _run_workers(
            server, [*command, str(folder / "fire")], num_volumes, folder / "fire", random.Random(seed)
        )
        middle = time.monotonic()
        assert _start(server, [*command, str(folder / "calm")]).wait() == 0
    return Outcome(
        num_volumes,
        killed,
        round(middle - began, 1),
        round(time.monotonic() - middle, 1),
        tuple(f"{problem.kind} {problem.id}: {problem.found}" for problem in verify_set(folder / "fire")),
        voxels(folder / "fire") == voxels(folder / "calm") and _files(folder / "fire") == _files(folder / "calm"),
    )


def _start(server: Server, command: list[str]) -> Fork:
    with Path(os.devnull).open("w") as nowhere:
        return Fork(server, command, rank_environment(), stdout=nowhere)


def _run_workers(server: Server, command: list[str], num_volumes: int, out: Path, dice: random.Random) -> int:
    """Start workers, kill one every few seconds and start another, until all volumes are there."""
    workers, killed, next_kill = [_start(server, command) for _ in range(NUM_WORKERS)], 0, 0
    while any(worker.poll() is None for worker in workers):
        time.sleep(dice.uniform(0.2, 0.6))
        done = len(list((out / "sidecar").glob("[!.]*.json"))) if (out / "sidecar").is_dir() else 0
        if next_kill <= done < num_volumes:  # every few seconds, and never so often that nobody gets to work
            victim = dice.choice(workers)
            workers.remove(victim)
            if victim.poll() is None:
                victim.send_signal(signal.SIGKILL)
                killed += 1
            victim.wait()
            workers.append(_start(server, command))
            next_kill = done + max(1, num_volumes // 40)
    assert [worker.wait() for worker in workers] == [0] * NUM_WORKERS
    return killed


def _files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.nii.gz")}


if __name__ == "__main__":
    outcome = generate_under_fire(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
    print(json.dumps(asdict(outcome), indent=2))
    sys.exit(0 if outcome.is_identical and not outcome.problems else 1)
