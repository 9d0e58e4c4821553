"""`hpc-ddpm bench scaling|comm` where ranks are started for every measurement: plan, run in turns, report."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_ddpm.config import Config
from hpc_ddpm.distributed import Ranks, all_gather, broadcast_object, detect_ranks, process_group
from hpc_ddpm.errors import ClusterError, ConfigError
from hpc_ddpm.files import write_json
from hpc_ddpm.runlog import provenance
from hpc_ddpm.sealed import read_json
from launch.bench_stages import workplace
from launch.child_ranks import Agents, agents
from launch.progress import progress_bar

LEAST_WARM_UP = {"cuda": 20, "cpu": 1}


def scaling_stage(
    config: Config,
    data: Path | None,
    out: Path,
    gpus: Sequence[int],
    mode: str,
    contestants: Sequence[str],
    *,
    rounds: int,
    repeats: int,
    steps: int,
    price: float | None,
    show_progress: bool,
) -> dict[str, Any] | None:
    """`hpc-ddpm bench scaling` as every agent runs it; returns the report on rank 0.

    Raises:
        ConfigError: a batch cannot be divided, or a setting may vary between points.
        ClusterError: there are fewer ranks or GPUs than asked for, or no point could be measured.
    """
    from hpc_ddpm.benchmark.scaling.curve import config_at

    points = {count: config_at(config, count, mode) for count in sorted(set(gpus))}
    with agents() as team, workplace(config, data, out, team.ranks) as (folder, chosen):
        import torch

        most = team.most(0 if team.environment.get("HPC_DDPM_DEVICE") == "cpu" else torch.cuda.device_count())
        if most is not None and max(points) > most:
            raise ClusterError(f"--gpus {max(points)}: {most} are here; start more ranks or ask for fewer")
        plan = {"contestants": list(contestants), "repeats": repeats, "steps": steps, "warm_up": LEAST_WARM_UP}
        results: dict[int, list[dict[str, Any]]] = defaultdict(list)
        errors: dict[int, str] = {}
        turns = [(number, count) for number in range(rounds) for count in _rotated(list(points), number)]
        with progress_bar("scaling", show=show_progress and team.ranks.is_main) as update:
            for done, (number, count) in enumerate(turns):
                if count not in errors:
                    point = points[count].model_copy(update={"data": chosen.data})
                    found, error = _run_point(team, point, plan | {"with_comm": number == 0}, count, folder)
                    results[count] += found
                    errors |= {count: error} if error else {}
                update(done + 1, len(turns), f"{count} ranks")
        hosts = all_gather(socket.gethostname())
        if not team.ranks.is_main:
            return None
        complete = {count: found for count, found in results.items() if count not in errors}
        if not complete:
            raise ClusterError(f"no point could be measured: {next(iter(errors.values()))}")
        facts = {"mode": mode, "rounds": rounds, "repeats": repeats, "steps_per_repeat": steps, "errors": errors}
        return _report(config, complete, team.ranks, hosts, price, facts)


def _rotated(counts: list[int], number: int) -> list[int]:
    first = number % len(counts)
    return counts[first:] + counts[:first]


def _run_point(
    team: Agents, config: Config, plan: dict[str, Any], count: int, folder: Path
) -> tuple[list[dict[str, Any]], str]:
    """What one round of a point found, on rank 0, or why it failed."""
    plan_path, result = folder / f"plan-{count}.json", folder / f"result-{count}.json"
    if team.ranks.is_main:
        write_json(plan_path, plan | {"config": config.dump()})
        result.unlink(missing_ok=True)
    broadcast_object(None)  # it is there
    words = ["-m", "hpc_ddpm.benchmark.scaling.point", str(plan_path), str(result)]
    error = team.run(words, count, folder / f"logs-{count}")
    if error or not team.ranks.is_main:
        return [], error
    return [read_json(result, dict[str, Any], "measure again")], ""


def _report(
    config: Config,
    results: dict[int, list[dict[str, Any]]],
    ranks: Ranks,
    hosts: Sequence[str],
    price: float | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    from hpc_ddpm.benchmark.comm import fit_ring
    from hpc_ddpm.benchmark.record import environment, new_report
    from hpc_ddpm.benchmark.scaling.curve import measured_rows
    from hpc_ddpm.benchmark.scaling.model import predict

    largest = max(results)
    per_node = ranks.local_world_size if ranks.world_size > 1 else largest
    first = results[largest][0]
    rows = measured_rows(results, config, facts["mode"], per_node, price)
    collectives = [row for found in results.values() for row in found[0]["collectives"]]
    predicted = []
    if collectives:
        ring = fit_ring(collectives)
        facts |= {"ring_latency_us": 1e6 * ring.latency_s, "ring_gb_per_s": ring.bytes_per_s / 1e9}
        predicted = predict(rows, config, facts["mode"], first["precision"], ring, per_node)
    facts |= {"config": config.dump(), "config_digest": config.digest(), "gpus_per_node": per_node}
    facts["device"] = first["device"]
    facts["notes"] = _notes(largest, per_node, hosts, first["gpu"] is None, bool(predicted))
    kinds = [{"kind": "collective", **row} for row in collectives]
    return dict(new_report("scaling", environment(gpu=first["gpu"]), facts, [*rows, *predicted, *kinds]))


def _notes(largest: int, per_node: int, hosts: Sequence[str], is_cpu: bool, has_prediction: bool) -> list[str]:
    """What a reader must know to not be misled."""
    notes = []
    most = max(Counter(hosts[:largest]).values()) if len(hosts) > 1 else largest
    cores = os.cpu_count() or 1
    if is_cpu:
        notes.append("CPU ranks of one thread each stand for GPUs")
        if most > cores:
            notes.append(
                f"OVERSUBSCRIBED: up to {most} ranks share the {cores} cores of a machine: points above {cores} ranks "
                "show how cores are shared, not how training scales"
            )
    if has_prediction and largest <= per_node:
        notes.append(
            f"no measured point spans nodes of {per_node}: predictions beyond leave out the network between them"
        )
    return notes


def comm_stage(config: Config, num_ranks: int, show_progress: bool) -> dict[str, Any] | None:
    """`hpc-ddpm bench comm`: on the ranks that it is started with, or on new ones of this machine; report on rank 0.

    Raises:
        ClusterError: the new ranks failed.
    """
    from hpc_ddpm.benchmark.comm import bench_comm, fit_ring
    from hpc_ddpm.benchmark.device import describe_gpu
    from hpc_ddpm.benchmark.record import environment, new_report

    ranks = detect_ranks()
    if ranks.world_size == 1:
        return _comm_on_new_ranks(config, num_ranks)
    with process_group(ranks) as device:
        with progress_bar("collectives", show=show_progress and ranks.is_main) as update:
            rows = bench_comm(config, ranks, device, on_size=lambda done, total: update(done, total, ""))
        gpu = describe_gpu(device)
    ring = fit_ring(rows)
    facts: dict[str, Any] = {"config": config.dump(), "config_digest": config.digest()}
    facts |= {"ring_latency_us": 1e6 * ring.latency_s, "ring_gb_per_s": ring.bytes_per_s / 1e9}
    return dict(new_report("comm", environment(gpu=gpu), facts, rows)) if ranks.is_main else None


def _comm_on_new_ranks(config: Config, num_ranks: int) -> dict[str, Any]:
    with agents() as team, tempfile.TemporaryDirectory(prefix="hpc_ddpm-bench-") as name:
        folder = Path(name)
        write_json(folder / "config.yaml", config.dump())  # JSON is YAML
        words = ["--config", str(folder / "config.yaml"), "--json", str(folder / "comm.json"), "--quiet"]
        error = team.run(["-m", "launch.cli", "bench", "comm", *words], num_ranks, folder / "logs")
        if error:
            raise ClusterError(f"the ranks failed: {error}")
        report = read_json(folder / "comm.json", dict[str, Any], "measure again")
    report["environment"]["command"] = provenance()["command"]
    return report


def read_points(gpus: str, engines: str) -> tuple[list[int], list[str]]:
    """`1,2,4` and `ddp,0,1` as numbers, ascending, and names of contestants.

    Raises:
        ConfigError: anything else.
    """
    words = gpus.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--gpus {gpus}: numbers such as 1,2,4,8 are expected")
    names = [word if word == "ddp" else f"zero{word}" for word in engines.split(",")]
    if not set(names) <= {"ddp", "zero0", "zero1", "zero2", "zero3"}:
        raise ConfigError(f"--engines {engines}: ddp and ZeRO stages are expected, such as ddp,0,1,2,3")
    return sorted({int(word) for word in words}), list(dict.fromkeys(names))


def submit_scaling(config: Config, words: list[str], out: Path, cluster: str, points: Sequence[int], mode: str) -> None:
    """One job with as many ranks as the largest point; what would fail in it fails here.

    Raises:
        ConfigError: see `scaling_stage`, or no such profile.
        ClusterError: SLURM refuses.
    """
    from hpc_ddpm.benchmark.scaling.curve import config_at
    from launch.executor import Request, submit
    from launch.jobs import run_command
    from launch.profiles import load_profile

    profile, most = load_profile(cluster), max(points)
    for count in points:
        config_at(config, count, mode)
    per_node = min(most, profile.gpus_per_node)
    if most % per_node:
        raise ConfigError(f"--gpus {most}: not a multiple of the {per_node} GPUs of a node; choose whole nodes")
    command = ("bench", "scaling", "--out", str(out), *words)
    if profile.executor == "debug":
        sys.exit(run_command(command))
    submission = submit(Request("bench", command, out, profile, 0, most // per_node, per_node))
    print(
        f"submitted job {submission.job_id}: {most // per_node} nodes x {per_node} GPUs, results in {out}/scaling.json"
    )
    print(f"watch:  hpc-ddpm jobs show {out}   hpc-ddpm jobs logs -f {out}")
