"""`hpc-ddpm submit STAGE ...`: check the request here, then start it on a cluster."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc_ddpm.errors import ConfigError
from launch.profiles import Profile, load_profile
from launch.submit_checks import check_benchmark, check_packing, check_sampling, check_training

if TYPE_CHECKING:
    from launch.executor import Request

REST = {"allow_extra_args": True, "ignore_unknown_options": True}


NO_JOBS = ("compare", "report", "scaling")
"""Commands of `hpc-ddpm bench` that are no jobs: two only read, and `scaling` submits itself with --cluster."""


ON_ALL_RANKS = ("train", "sample", "comm")
"""Benchmarks that run on all ranks. Each of the others is one process, which starts ranks on its node if needed."""


class Stage(StrEnum):
    """What can be submitted."""

    TRAIN = "train"
    SAMPLE = "sample"
    PACK = "pack"
    BENCH = "bench"
    PIPELINE = "pipeline"


def submit(
    context: typer.Context,
    stage: Stage,
    cluster: Annotated[str, typer.Option(help="Profile name or YAML file: local, debug, your own, ...")] = "local",
    nodes: Annotated[int | None, typer.Option(help="Nodes, instead of the profile's.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs, so ranks, on each node.")] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="sample, pack: an array of so many, with one GPU (or node) each.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one start, HOURS:MINUTES:SECONDS.")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the batch script and what it asks for.")] = False,
) -> None:
    """Run a stage as a job: survives preemption and time limits. All other words go to `hpc-ddpm STAGE`.

    `pipeline` takes those of `pack`: it packs, trains, samples and writes a report, below --out. `bench NAME` runs
    `hpc-ddpm bench NAME`; its results come into the folder --out.
    """
    changes = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time": time}
    changes |= {"partition": partition, "account": account, "qos": qos}
    profile = load_profile(cluster, changes)
    if stage is Stage.PACK and partition is not None:
        profile = profile.model_copy(update={"cpu_partition": partition})
    if stage is Stage.PIPELINE:
        from launch.pipeline import submit_pipeline

        submit_pipeline(_parse("pack", context.args), profile, _shape("sample", profile, tasks), dry_run=dry_run)
        return
    if stage is Stage.BENCH:
        submit_bench(context.args, profile, nodes, gpus_per_node, dry_run=dry_run)
        return
    submit_stage(stage.value, context.args, profile, tasks, dry_run=dry_run)


def submit_stage(stage: str, words: list[str], profile: Profile, tasks: int | None, *, dry_run: bool) -> None:
    """Check, then show or start."""
    from launch.executor import Request

    given = _parse(stage, words)
    command = (*(("sample", "run") if stage == "sample" else (stage,)), *words)
    request = Request(stage, command, given["out"], profile, *_shape(stage, profile, tasks))
    peak_gib = None
    if stage == "pack":
        check_packing(given)
    elif stage == "sample":
        check_sampling(given)
    else:
        peak_gib = check_training(given, request.world_size, with_memory=dry_run)
        request = _after_packing(request, given["data"])
    _show_or_start(request, peak_gib, dry_run=dry_run)


def submit_bench(
    words: list[str], profile: Profile, nodes: int | None, gpus_per_node: int | None, *, dry_run: bool
) -> None:
    """`bench NAME ...` as one job; results go to --out. `nodes` and `gpus_per_node` are what was asked for."""
    from launch.executor import Request

    name, *rest = words or [""]
    benchmark = _bench(name)
    with benchmark.make_context(name, list(rest)) as context:
        given = dict(context.params)
    if given.get("out") is None:
        raise ConfigError(f"no folder for the results: give submit bench {name} --out FOLDER")
    out: Path = given["out"].resolve()
    if "json_file" in given:
        results = ["--out", f"{out / name}.md", "--json", f"{out / name}.json"]
    else:
        results = ["--out", f"{out / name}.yaml" if name == "tune" else str(out / name)]
    work = ["--work", str(out)] if "work" in given and given["work"] is None else []
    command = ("bench", name, *rest, *results, *work)
    if name in ON_ALL_RANKS:
        request = Request("bench", command, out, profile, 0, profile.nodes, profile.gpus_per_node)
        if name == "comm" and request.world_size == 1 and profile.executor != "debug":
            raise ConfigError("bench comm needs two ranks or more: give --nodes or --gpus-per-node")
    else:
        gpus = profile.gpus_per_node if name == "all" else given.get("ranks", 1)
        _refuse_shape(name, gpus, profile, nodes, gpus_per_node)
        request = Request("bench", command, out, profile, gpus_per_rank=gpus)
    check_benchmark(name, given, request.world_size)
    _show_or_start(request, None, dry_run=dry_run)


def _refuse_shape(name: str, gpus: int, profile: Profile, nodes: int | None, gpus_per_node: int | None) -> None:
    """A benchmark that starts its ranks itself does so on one node."""
    has_ranks = name in ("tune", "ab")
    if nodes is not None and nodes > 1:
        raise ConfigError(f"--nodes {nodes}: bench {name} runs on one node; bench train, sample and comm run on more")
    if gpus_per_node not in (None, gpus):
        advice = f"give --ranks {gpus_per_node} instead" if has_ranks else "leave it out"
        raise ConfigError(f"--gpus-per-node {gpus_per_node}: bench {name} uses {gpus} here; {advice}")
    if has_ranks and profile.executor == "slurm" and gpus > profile.gpus_per_node:
        raise ConfigError(f"--ranks {gpus}: bench {name} runs on one node, which has {profile.gpus_per_node} GPUs")


def _after_packing(request: Request, data: Path | None) -> Request:
    """A training of data that a job still packs starts after that."""
    from launch.watch import live_job

    job = live_job(data) if data else None
    if job is None:
        return request
    if request.profile.executor != "slurm":
        raise ConfigError(f"job {job} still packs {data}; `hpc-ddpm jobs wait {data}` tells when it is done")
    typer.echo(f"note: starts when job {job}, which packs {data}, has ended well", err=True)
    return request.after(job)


def _show_or_start(request: Request, peak_gib: float | None, *, dry_run: bool) -> None:
    from launch.executor import batch_script
    from launch.executor import submit as start
    from launch.jobs import run_command

    profile, command = request.profile, request.arguments
    if dry_run:
        if profile.executor == "slurm":
            typer.echo(batch_script(request))
        typer.echo(f"command: hpc-ddpm {shlex.join(command)}\nrequest: {request.in_words}")
        typer.echo(f"memory:  about {peak_gib:.1f} GiB per GPU at the peak" if peak_gib else "memory:  not estimated")
        typer.echo("nothing was submitted (--dry-run)")
        return
    if profile.executor == "debug":
        raise typer.Exit(run_command(command))
    submission = start(request)
    typer.echo(f"submitted job {submission.job_id}: {request.in_words}")
    typer.echo(f"watch:  hpc-ddpm jobs show {request.run_dir}   hpc-ddpm jobs logs -f {request.run_dir}")


def _parse(stage: str, words: list[str]) -> dict[str, Any]:
    """The stage's own parameters; a wrong option is said here, not hours later in a log."""
    from typer.main import get_command

    from launch.cli import app

    command: Any = get_command(app).commands[stage]  # type: ignore[attr-defined]
    if stage == "sample":
        command = command.commands["run"]
    with command.make_context(stage, list(words)) as context:
        return dict(context.params)


def _bench(name: str) -> Any:
    """A benchmark that can be a job."""
    from typer.main import get_command

    from launch.bench_commands import bench_app

    commands: Any = get_command(bench_app).commands  # type: ignore[attr-defined]
    names = [each for each in commands if each not in NO_JOBS]
    if name not in names:
        raise ConfigError(f"'{name}' is no benchmark that can be a job: submit bench {'|'.join(names)} ...")
    return commands[name]


def _shape(stage: str, profile: Profile, tasks: int | None) -> tuple[int, int, int]:
    """Array tasks (0: a plain job), nodes and ranks per node, in the order of `Request`."""
    if stage == "train":
        if tasks is not None:
            raise ConfigError("--tasks: a training is one job; use --nodes and --gpus-per-node")
        return 0, profile.nodes, profile.gpus_per_node
    if tasks is not None and profile.executor != "slurm":
        raise ConfigError(f"--tasks needs a SLURM profile, this one is {profile.executor}; use --gpus-per-node")
    if stage == "pack":
        return _array(tasks, 1) if tasks else (0, profile.nodes, 1)
    if profile.executor != "slurm":
        return 0, 1, profile.gpus_per_node
    return _array(tasks or profile.nodes * profile.gpus_per_node, profile.gpus_per_node)


def _array(workers: int, most_per_task: int) -> tuple[int, int, int]:
    """An array of single workers, or of fewer and larger tasks where the cluster's arrays are shorter."""
    from launch.slurm import max_array_tasks

    limit = max_array_tasks() or workers
    if workers <= limit:
        return (workers if workers > 1 else 0), 1, 1
    ranks = min(most_per_task, -(-workers // limit))
    num_tasks = min(limit, -(-workers // ranks))
    typer.echo(
        f"note: arrays of this cluster have {limit} tasks at most: {num_tasks} tasks of {ranks} rather than {workers}; "
        "each goes on until all is done",
        err=True,
    )
    return num_tasks, 1, ranks
