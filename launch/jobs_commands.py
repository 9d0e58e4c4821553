"""`hpc-ddpm jobs ...`: what was submitted, how it stands, and how to end or repeat it; all from the run directories."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_ddpm.errors import ClusterError
from launch.options import Json

if TYPE_CHECKING:
    from launch.watch import JobState

jobs_app = typer.Typer(help="Watch, end and repeat what was submitted.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the folder that a stage writes.")]
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 15.0
FOLLOW_S = 0.5


@jobs_app.command()
def ls(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Runs, or folders of runs; `runs` by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the newest job of every run."""
    from launch.data_tables import print_json
    from launch.jobs_tables import describe, print_jobs
    from launch.records import find_runs, read_submissions
    from launch.watch import look

    runs = find_runs(folders or [Path("runs")])
    newest = [found[-1] for run in runs if (found := read_submissions(run, skip_foreign=True))]
    rows = [describe(job) for job in look(newest)]
    print_json(rows) if as_json else print_jobs(rows)


@jobs_app.command()
def show(run: Run, as_json: Json = False) -> None:
    """Everything about the newest job of a run: tasks, progress, where its time went, how it ended."""
    from launch.data_tables import print_json
    from launch.jobs_tables import describe, print_job

    job = _newest(run)
    facts = describe(job, in_full=True)
    print_json(facts) if as_json else print_job(facts)


@jobs_app.command()
def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Of the job, or of each task.")] = 0,
    task: Annotated[int | None, typer.Option(min=0, help="Only this task of an array.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print what a rank of the newest job wrote, over all restarts."""
    job = _newest(run)
    tasks = [f"{job.submission.job_id}_{task}"] if task is not None else list(job.tasks)
    paths = [job.submission.log(name, rank) for name in tasks]
    if not follow and not any(path.exists() for path in paths):
        raise ClusterError(f"{run}: rank {rank} of job {job.submission.job_id} ({job.in_words}) has written nothing")
    places = dict.fromkeys(paths, 0)
    for is_over in map(bool, _until_over(run)) if follow else [True]:
        for path in paths:
            if path.exists():
                with path.open(encoding="utf-8", errors="replace") as file:
                    file.seek(places[path])
                    typer.echo(file.read(), nl=False)
                    places[path] = file.tell()
        if not is_over:
            time.sleep(FOLLOW_S)


@jobs_app.command()
def cancel(run: Run) -> None:
    """End the run's job for good; a training saves first if the site leaves it the time."""
    from launch.watch import cancel as end

    job = _newest(run)
    job.check_is_seen()
    if not job.live:
        raise ClusterError(f"{run}: job {job.submission.job_id} has ended already ({job.in_words}); nothing to cancel")
    end(job)
    typer.echo(f"cancelled job {job.submission.job_id}")


@jobs_app.command()
def wait(run: Run) -> None:
    """Wait for the end of the run's job. Exit code 2 unless all of it ended well."""
    for job in filter(None, _until_over(run)):
        typer.echo(f"job {job.submission.job_id}: {job.in_words}")
        raise typer.Exit(2 if job.unfinished else 0)


@jobs_app.command()
def retry(run: Run) -> None:
    """Start what did not end well again, and only that: the job, or so many tasks of the array as failed."""
    from launch.executor import again, submit

    job = _newest(run)
    if job.live:
        raise ClusterError(f"{run}: job {job.submission.job_id} is not over ({job.in_words}); wait for it or cancel it")
    job.check_is_seen()
    if not job.unfinished:
        raise ClusterError(f"{run}: all of job {job.submission.job_id} ended well; nothing to retry")
    request = again(job.submission, len(job.unfinished))
    submission = submit(request)
    typer.echo(f"submitted job {submission.job_id} for {', '.join(job.unfinished)}: {request.in_words}")


def _newest(run: Path) -> JobState:
    from launch.records import read_submissions
    from launch.watch import look

    submissions = read_submissions(run)
    if not submissions:
        raise ClusterError(f"{run}: no job was submitted for it; `hpc-ddpm submit` starts one, `jobs ls` lists them")
    return look(submissions[-1:])[0]


def _until_over(run: Path) -> Iterator[JobState | None]:
    """None again and again, asking SLURM ever less often, and the newest job once it is over.

    Once SLURM has answered, it may fail to for as long as it likes.
    """
    job, wait_s, asked = _newest(run), FIRST_WAIT_S, time.monotonic()
    job.check_is_seen()
    while job.live:
        yield None
        time.sleep(0.1)
        if time.monotonic() - asked >= wait_s:
            try:
                job = _newest(run)
            except ClusterError as error:
                typer.echo(f"note: {error}; asking again", err=True)
            wait_s, asked = min(1.5 * wait_s, LONGEST_WAIT_S), time.monotonic()
    yield job
