"""`hpc-ddpm submit pipeline`: pack, train, sample and report, each after the one before it has ended well."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from hpc_ddpm.errors import ClusterError, ConfigError
from launch import slurm
from launch.executor import Request, batch_script, refuse_if_busy, submit
from launch.jobs import run_command
from launch.jobs_tables import spent_in_words
from launch.ledger import time_ledger
from launch.profiles import Profile
from launch.progress import progress_bar
from launch.records import Submission, read_submissions
from launch.submit_checks import check_packing

STAGES = ("packed", "run", "synthetic")


def submit_pipeline(given: dict[str, Any], profile: Profile, sampling: tuple[int, int, int], *, dry_run: bool) -> None:
    """Everything goes below `--out`: packed, run, synthetic. Submitted again, finished stages end at once.

    Args:
        given: parameters of `pack`; its settings are for all stages.
        profile: of the cluster.
        sampling: array tasks, nodes and ranks per node of the sampling.
        dry_run: only show.

    Raises:
        ConfigError: wrong settings, no source, an executor without dependencies, or nothing to draw the report with.
        ClusterError: SLURM refuses a stage, and none is left in the queue; or the same pipeline is queued or runs.
    """
    if profile.executor == "local":
        raise ConfigError(
            "a pipeline needs SLURM, or --cluster debug; here `hpc-ddpm demo --data SOURCE` does the same"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a pipeline ends with a report, which needs matplotlib: pip install 'hpc_ddpm[demo]'")
    config = check_packing(given)
    config.training.accumulation(profile.nodes * profile.gpus_per_node)
    requests = _requests(given, profile, sampling)
    if not dry_run:
        for request in requests:
            refuse_if_busy(request.run_dir)
    if dry_run:
        for request in requests:
            typer.echo(f"{batch_script(request)}\nrequest: {request.stage}: {request.in_words}\n")
    elif profile.executor == "debug":
        for request in requests:
            if code := run_command(request.arguments):
                raise typer.Exit(code)
    else:
        _submit_all(requests)
        typer.echo(f"watch:  hpc-ddpm jobs ls {given['out']}")


def _submit_all(requests: Sequence[Request]) -> None:
    """Each after the one before it, or none of them."""
    after = ""
    with ExitStack() as undo:
        for request in requests:
            submission = submit(request.after(after))
            undo.callback(_take_back, submission)
            typer.echo(f"submitted job {submission.job_id}: {request.stage}: {request.in_words}")
            after = submission.job_id
        undo.pop_all()


def _take_back(submission: Submission) -> None:
    try:
        slurm.ask("scancel", submission.job_id)
        typer.echo(f"cancelled job {submission.job_id}: {submission.stage}", err=True)
    except ClusterError as error:
        typer.echo(f"job {submission.job_id}, {submission.stage}, is still queued: {error}", err=True)


def _requests(given: dict[str, Any], profile: Profile, sampling: tuple[int, int, int]) -> list[Request]:
    out: Path = given["out"]
    packed, run, synthetic = (str(out / name) for name in STAGES)
    settings = [*(["--config", given["config"]] if given["config"] else []), *(given["overrides"] or [])]
    options = [*(["--workers", str(given["workers"])] if given["workers"] else [])]
    options += [f"--{name.replace('_', '-')}" for name in ("skip_bad", "overwrite") if given[name]]
    pack = ("pack", str(given["source"]), "--out", packed, *options, *settings)
    train = ("train", "--out", run, "--data", packed, *settings)
    sample = ("sample", "run", run, "--out", synthetic)
    return [
        Request("pack", pack, out / "packed", profile, 0, profile.nodes, 1),
        Request("train", train, out / "run", profile, 0, profile.nodes, profile.gpus_per_node),
        Request("sample", sample, out / "synthetic", profile, *sampling),
        Request("report", ("report", str(out)), out, profile),
    ]


def report_stage(out: Path, show_progress: bool) -> Path:
    """`hpc-ddpm report`: the gallery, a check of every volume, and one page about the whole; its path.

    Raises:
        DataFormatError: a stage has left nothing, or something damaged.
        ConfigError: matplotlib is missing.
    """
    from hpc_ddpm.data.parallel import num_cores
    from hpc_ddpm.demo.summary import report_run
    from hpc_ddpm.sampling.gallery import write_gallery
    from hpc_ddpm.sampling.plan import read_manifest
    from hpc_ddpm.sampling.verify import verify_set

    packed, run, synthetic = (out / name for name in STAGES)
    with progress_bar("drawing", show=show_progress) as update:
        gallery = write_gallery(
            synthetic, num_workers=num_cores(), progress=lambda done, total: update(done, total, "")
        )
    problems = verify_set(synthetic, num_workers=num_cores())
    facts = {
        "volumes": f"{len(read_manifest(synthetic))} planned, "
        + (f"{len(problems)} problems: `hpc-ddpm sample verify`" if problems else "all there, as they were written"),
        "gallery": str(gallery.relative_to(out)),
    }
    commands = []
    for folder in (packed, run, synthetic):
        submissions = read_submissions(folder)
        commands += [f"hpc-ddpm {shlex.join(submissions[-1].arguments)}"] if submissions else []
        spent = time_ledger(submissions, (), time.time())
        facts |= {f"{folder.name}: time": spent_in_words(spent)} if submissions else {}
    _, page = report_run(out, packed, run, synthetic, commands, facts, title=f"New volumes of {out.resolve().name}")
    return page
