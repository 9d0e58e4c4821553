"""`hpc-ddpm doctor` and `hpc-ddpm drill`: is this cluster fit, before anything that matters is queued?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.options import Json

MARKS = {"pass": "[green]pass[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}


def doctor(
    cluster: Annotated[str | None, typer.Option(help="Also check that the cluster has what this profile asks.")] = None,
    path: Annotated[Path, typer.Option(help="A folder on the disk that jobs will use.")] = Path(),
    as_json: Json = False,
) -> None:
    """Check this machine and this cluster before anything is queued. Exit code 2 when something fails."""
    from launch.data_tables import print_json
    from launch.doctor import examine
    from launch.profiles import load_profile

    findings = []
    for finding in examine(load_profile(cluster) if cluster else None, path):
        findings.append(finding)
        if not as_json:
            _print(finding.status, finding.check, finding.found, finding.advice)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    raise typer.Exit(2 if any(finding.status == "fail" for finding in findings) else 0)


def drill(
    cluster: Annotated[str, typer.Option(help="Profile name or file, of a SLURM cluster.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder on a shared disk; takes the certificate.")],
    as_json: Json = False,
) -> None:
    """Disturb short trainings on this cluster: signal, killed rank, NaN, torn checkpoint, fewer ranks."""
    from launch.data_tables import print_json
    from launch.drill import drill as run_drill
    from launch.profiles import load_profile

    verdicts = run_drill(load_profile(cluster), out, say=lambda line: typer.echo(line, err=True))
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            _print("pass" if verdict.passed else "fail", f"{verdict.trial:26}", verdict.found)
        typer.echo(f"certificate: {out / 'drill.json'}")
    raise typer.Exit(0 if all(verdict.passed for verdict in verdicts) else 2)


def _print(status: str, name: str, found: str, advice: str = "") -> None:
    from rich.console import Console
    from rich.markup import escape

    arrow = f"  -> {escape(advice)}" if advice else ""
    Console(soft_wrap=True, highlight=False).print(f"{MARKS[status]}  {name:11} {escape(found)}{arrow}")
