"""`hpc-ddpm submit pipeline`: pack, train, sample and draw the gallery, each after the one before it has ended well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hpc_ddpm.config import load_config
from hpc_ddpm.errors import ConfigError
from launch.executor import Request, batch_script, refuse_if_busy, submit
from launch.jobs import run_command
from launch.profiles import Profile


def submit_pipeline(given: dict[str, Any], profile: Profile, sampling: tuple[int, int, int], *, dry_run: bool) -> None:
    """Everything goes below `--out`: packed, run, synthetic. Submitted again, finished stages end at once.

    Args:
        given: parameters of `pack`; its settings are for all stages.
        profile: of the cluster.
        sampling: array tasks, nodes and ranks per node of the sampling.
        dry_run: only show.

    Raises:
        ConfigError: wrong settings, or an executor without dependencies.
        ClusterError: SLURM refuses, or the same pipeline is queued or runs.
    """
    if profile.executor == "local":
        raise ConfigError(
            "a pipeline needs SLURM, or --cluster debug; here `hpc-ddpm demo --data SOURCE` does the same"
        )
    config = load_config(given["config"], given["overrides"] or []).config
    config.training.accumulation(profile.nodes * profile.gpus_per_node)
    requests = _requests(given, profile, sampling)
    if not dry_run:
        for request in requests:
            refuse_if_busy(request.run_dir)
    after = ""
    for request in requests:
        if dry_run:
            typer.echo(f"{batch_script(request)}\nrequest: {request.stage}: {request.in_words}\n")
        elif profile.executor == "debug":
            code = run_command(request.arguments)
            if code:
                raise typer.Exit(code)
        else:
            submission = submit(request.after(after))
            typer.echo(f"submitted job {submission.job_id}: {request.stage}: {request.in_words}")
            after = submission.job_id
    if after:
        typer.echo(f"watch:  hpc-ddpm jobs ls {given['out']}")


def _requests(given: dict[str, Any], profile: Profile, sampling: tuple[int, int, int]) -> list[Request]:
    out: Path = given["out"]
    packed, run, synthetic = (str(out / name) for name in ("packed", "run", "synthetic"))
    settings = [*(["--config", given["config"]] if given["config"] else []), *(given["overrides"] or []), "--quiet"]
    pack = ("pack", str(given["source"]), "--out", packed, *settings)
    train = ("train", "--out", run, "--data", packed, *settings)
    sample = ("sample", "run", run, "--out", synthetic, "--quiet")
    return [
        Request("pack", pack, out / "packed", profile, 0, profile.nodes, 1),
        Request("train", train, out / "run", profile, 0, profile.nodes, profile.gpus_per_node),
        Request("sample", sample, out / "synthetic", profile, *sampling),
        Request("gallery", ("sample", "gallery", synthetic, "--quiet"), out, profile),
    ]
