"""`hpc-ddpm doctor`: how the findings are shown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.options import Json


def doctor(
    cluster: Annotated[str | None, typer.Option(help="Also check that the cluster has what this profile asks.")] = None,
    path: Annotated[Path, typer.Option(help="A folder on the disk that jobs will use.")] = Path(),
    as_json: Json = False,
) -> None:
    """Check this machine and this cluster before anything is queued. Exit code 2 when something fails."""
    from rich.console import Console
    from rich.markup import escape

    from launch.data_tables import print_json
    from launch.doctor import MARKS, examine
    from launch.profiles import load_profile

    console = Console(soft_wrap=True, highlight=False)
    findings = []
    for finding in examine(load_profile(cluster) if cluster else None, path):
        findings.append(finding)
        if not as_json:
            advice = f"  -> {escape(finding.advice)}" if finding.advice else ""
            console.print(f"{MARKS[finding.status]}  {finding.check:11} {escape(finding.found)}{advice}")
    if as_json:
        print_json([asdict(finding) for finding in findings])
    raise typer.Exit(2 if any(finding.status == "fail" for finding in findings) else 0)
