"""`hpc-ddpm checkpoint ...`: what a run's checkpoints are, whether they are whole, and which may go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_ddpm.errors import CheckpointError
from launch.options import Json

checkpoint_app = typer.Typer(help="Look at a run's checkpoints, verify, consolidate, prune.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Step = Annotated[int | None, typer.Option(min=0, help="Only the checkpoint of this step.")]
GIB = 2**30


@checkpoint_app.command()
def ls(run: Run, as_json: Json = False) -> None:
    """List the checkpoints; files are compared by size, `verify` reads them."""
    from rich.console import Console
    from rich.table import Table

    from hpc_ddpm.checkpoint import summarise_checkpoint
    from launch.data_tables import print_json

    rows = [summarise_checkpoint(path) for path in _checkpoints(run)]
    if as_json:
        print_json(rows)
        return
    table = Table("step", "created", "GiB", "ranks", "ZeRO", "precision", "weights", "valid", box=None, pad_edge=False)
    for row in rows:
        facts = [str(row[key]) for key in ("world_size", "zero_stage", "precision")]
        weights, state = ", ".join(row["weights"]), row["problem"] or "yes"
        table.add_row(str(row["step"]), str(row["created"]), f"{row['bytes'] / GIB:.3f}", *facts, weights, state)
    Console().print(table)


@checkpoint_app.command()
def verify(run: Run, step: Step = None, as_json: Json = False) -> None:
    """Read and hash every file. Exit code 2 if a checkpoint is damaged."""
    from hpc_ddpm.checkpoint import step_of, verify_checkpoint
    from launch.data_tables import print_json

    problems: dict[int, str | None] = {}
    for path in _checkpoints(run, step):
        try:
            verify_checkpoint(path)
            problems[step_of(path)] = None
        except CheckpointError as error:
            problems[step_of(path)] = str(error)
    if as_json:
        print_json([{"step": number, "problem": problem} for number, problem in problems.items()])
    else:
        for number, problem in problems.items():
            typer.echo(f"step {number}: {problem or 'whole'}")
    raise typer.Exit(2 if any(problems.values()) else 0)


@checkpoint_app.command()
def consolidate(
    run: Run,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for weights.safetensors and its configuration.")],
    weights: Annotated[str, typer.Option(help="An average (`ema`, `ema_0.9999`, ...) or `master`.")] = "ema",
    step: Step = None,
) -> None:
    """Join the pieces of one checkpoint (the newest) into one file of weights that `sample` and `load_model` take."""
    from hpc_ddpm.checkpoint import verify_checkpoint
    from hpc_ddpm.weights import find_run_weights, save_weights

    checkpoint = _checkpoints(run, step)[-1]
    verify_checkpoint(checkpoint)
    save_weights(out, *find_run_weights(run, [f"sampling.weights={weights}"], checkpoint))
    typer.echo(f"{weights} of {checkpoint} -> {out}")


@checkpoint_app.command()
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(min=1, help="The newest ones that stay.")],
    every: Annotated[int, typer.Option(min=0, help="Multiples of this step stay too; 0 is off.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete old checkpoints; safe while the run trains. The newest whole one stays, later ones do not count."""
    from hpc_ddpm.checkpoint import delete_checkpoints, latest_checkpoint, prunable

    _checkpoints(run)
    newest = latest_checkpoint(run / "checkpoints")
    doomed = prunable(newest, keep, every) if newest else []
    freed = sum(file.stat().st_size for path in doomed for file in path.iterdir())
    what = f"{len(doomed)} checkpoints ({freed / GIB:.3f} GiB): {_names(doomed)}"
    if dry_run or not doomed:
        typer.echo(f"would delete {what}" if doomed else "nothing to delete")
        return
    if not yes:
        typer.confirm(f"delete {what}?", abort=True)
    delete_checkpoints(doomed)
    typer.echo(f"deleted {what}")


def _checkpoints(run: Path, step: int | None = None) -> list[Path]:
    """Published ones, oldest first; at least one."""
    from hpc_ddpm.checkpoint import step_dirs, step_of

    found = step_dirs(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run} has no checkpoint; give the run directory that `train --out` named")
    chosen = [path for path in found if step is None or step_of(path) == step]
    if not chosen:
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has {_names(found)}")
    return chosen


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
