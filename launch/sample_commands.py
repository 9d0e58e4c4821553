"""`hpc-ddpm sample ...`: plan, generate, and look at what was generated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.options import Json, Overrides, Quiet


class _RunByDefault(TyperGroup):
    """`sample RUN ...` is `sample run RUN ...`: a first word that is no command belongs to `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


sample_app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Generate volumes for masks, by any number of workers; plan, watch, verify, look. "
    "[bold]hpc-ddpm sample RUN --out OUT[/] is short for [bold]sample run[/].",
)

Source = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory or imported weights.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the volumes.")]
GeneratedSet = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `sample` wrote.")]
Masks = Annotated[Path | None, typer.Option(help="Mask, folder of masks, tree, or table.")]
Split = Annotated[str | None, typer.Option(help="Without --masks: this split of the packed data; val by default.")]
Covariates = Annotated[
    list[str] | None, typer.Option("--covariate", help="NAME=VALUE for all masks, instead of their own; repeatable.")
]
Replicas = Annotated[int | None, typer.Option(min=1, help="Volumes per mask (sampling.replicas).")]
Weights = Annotated[Path | None, typer.Option(help="Where the weights are now, if they moved.")]
RejectBelow = Annotated[float | None, typer.Option(min=0, max=1, help="Make volumes again whose fidelity is lower.")]
MaxTries = Annotated[int | None, typer.Option(min=1, help="Seeds per volume before it counts as failed.")]
Workers = Annotated[int | None, typer.Option(min=1, help="All cores by default.")]


@sample_app.command()
def run(
    source: Source,
    out: Out,
    masks: Masks = None,
    split: Split = None,
    covariates: Covariates = None,
    overrides: Overrides = None,
    replicas: Replicas = None,
    reject_below: RejectBelow = None,
    max_tries: MaxTries = None,
    quiet: Quiet = False,
) -> None:
    """Generate what is planned, and these masks too. Any number of workers may join; finished volumes are skipped."""
    from launch.sample_stages import run_stage

    settings = as_settings(overrides, replicas, reject_below, max_tries)
    raise typer.Exit(run_stage(source, out, masks, split, covariates or [], settings, show_progress=not quiet))


@sample_app.command()
def plan(
    source: Source,
    out: Out,
    masks: Masks = None,
    split: Split = None,
    covariates: Covariates = None,
    overrides: Overrides = None,
    replicas: Replicas = None,
    reject_below: RejectBelow = None,
) -> None:
    """Write down what is to be generated, or add to it: one line per volume, its seed and mask."""
    from launch.sample_stages import plan_stage

    settings = as_settings(overrides, replicas, reject_below, None)
    plan_stage(source, out, masks, split, covariates or [], settings)


@sample_app.command()
def status(out: GeneratedSet, as_json: Json = False) -> None:
    """How far it is: done, failed and why, at work, rate, time left. Exit code 2 if something failed."""
    from hpc_ddpm.sampling.status import read_status
    from launch.data_tables import print_json
    from launch.sample_tables import print_status

    found = read_status(out)
    print_json(found) if as_json else print_status(found)
    raise typer.Exit(2 if found["failed"] else 0)


@sample_app.command()
def verify(
    out: GeneratedSet,
    as_json: Json = False,
    workers: Workers = None,
    quiet: Quiet = False,
    share: Annotated[
        Path | None, typer.Option(help="If all is well, write the set here without paths, hosts and commands.")
    ] = None,
) -> None:
    """Compare every file with manifest and sidecars. Exit code 2 if anything is missing, extra or changed."""
    from dataclasses import asdict

    from hpc_ddpm.data.parallel import num_cores
    from hpc_ddpm.sampling.verify import verify_set
    from launch.data_tables import print_json
    from launch.progress import progress_bar
    from launch.sample_tables import print_problems

    with progress_bar("verifying", show=not quiet) as update:
        problems = verify_set(
            out, num_workers=workers or num_cores(), progress=lambda done, total: update(done, total, "")
        )
    print_json([asdict(problem) for problem in problems]) if as_json else print_problems(out, problems)
    if share is not None and not problems:
        from hpc_ddpm.files import writing_to
        from hpc_ddpm.sampling.privacy import share_set

        with writing_to(share, "--share"):
            typer.echo(
                f"{share_set(out, share)} volumes to share, without paths, hosts and commands: {share}", err=as_json
            )
    raise typer.Exit(2 if problems else 0)


@sample_app.command()
def reproduce(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A generated file, or its sidecar.")],
    weights: Weights = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a volume again from its sidecar and report the largest difference. Exit code 2 if there is one."""
    from launch.data_tables import print_json
    from launch.sample_stages import reproduce_stage

    found = reproduce_stage(path, weights, show_progress=not quiet)
    if as_json:
        print_json(found)
    else:
        same = "the same bits" if found["is_identical"] else "other bits"
        typer.echo(f"{found['id']}: {same} as generated; largest difference in its files {found['max_difference']:.3g}")
    raise typer.Exit(0 if found["is_identical"] and found["max_difference"] == 0 else 2)


@sample_app.command()
def retry(
    out: GeneratedSet,
    weights: Weights = None,
    overrides: Overrides = None,
    max_tries: MaxTries = None,
    quiet: Quiet = False,
) -> None:
    """Make the failed volumes again, and only those; by any number of workers."""
    from launch.sample_stages import retry_stage

    settings = as_settings(overrides, None, None, max_tries)
    raise typer.Exit(retry_stage(out, weights, settings, show_progress=not quiet))


@sample_app.command()
def gallery(out: GeneratedSet, workers: Workers = None, quiet: Quiet = False) -> None:
    """Write OUT/gallery.html: three planes of every volume with the mask's outline, to filter and sort."""
    from hpc_ddpm.data.parallel import num_cores
    from hpc_ddpm.sampling.gallery import write_gallery
    from launch.progress import progress_bar

    with progress_bar("drawing", show=not quiet) as update:
        page = write_gallery(
            out, num_workers=workers or num_cores(), progress=lambda done, total: update(done, total, "")
        )
    typer.echo(str(page))


@sample_app.command()
def anonymize(
    source: Source,
    subjects: Annotated[list[str], typer.Argument(metavar="SUBJECT...", help="Ids; `data ls` lists them.")],
    out: Out,
    data: Annotated[Path | None, typer.Option("--data", help="Packed dataset; the run's own by default.")] = None,
    replicas: Replicas = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE; may be repeated.")] = None,
    quiet: Quiet = False,
) -> None:
    """Keep real subjects' masks, draw new appearances, and report how close these are to the training set."""
    from launch.sample_stages import anonymize_stage

    changes = as_settings([*(settings or []), *([f"data.path={data.resolve()}"] if data else [])], replicas, None, None)
    raise typer.Exit(anonymize_stage(source, subjects, out, changes, show_progress=not quiet))


@sample_app.command()
def compare(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for table and figure; finished cells are kept.")],
    masks: Masks = None,
    split: Split = None,
    max_masks: Annotated[int, typer.Option(min=1, help="Use the first so many masks.")] = 4,
    samplers: Annotated[str, typer.Option(help="Comma-separated.")] = "ddpm,ddim,dpmpp_2m,unipc,deis,ipndm,heun",
    steps: Annotated[str, typer.Option(help="Network evaluations per volume, comma-separated.")] = "5,10,20,50",
    spacings: Annotated[str, typer.Option(help="Comma-separated; by default that of sampling.spacing.")] = "",
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Compare samplers and step counts on fixed masks and seeds: a table and a figure of quality against cost."""
    from launch.sample_stages import compare_stage

    cells = (samplers.split(","), steps.split(","), spacings.split(",") if spacings else [])
    compare_stage(source, out, masks, split, max_masks, cells, overrides or [], show_progress=not quiet)


def as_settings(
    overrides: list[str] | None, replicas: int | None, reject_below: float | None, max_tries: int | None
) -> list[str]:
    """Options as settings; they win."""
    options = {
        "sampling.replicas": replicas,
        "sampling.fidelity.reject_below": reject_below,
        "sampling.fidelity.max_tries": max_tries,
    }
    return [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]
