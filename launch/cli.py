"""The one command line. Commands import what they need when they run: `--help` loads no torch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from hpc_ddpm.errors import HpcDdpmError
from hpc_ddpm.text import one_line
from launch.bench_commands import bench_app
from launch.border import as_users_error, check_words, end
from launch.checkpoint_commands import checkpoint_app
from launch.data_commands import data_app
from launch.doctor_command import doctor, drill
from launch.jobs_commands import jobs_app
from launch.options import ConfigOption, Json, Overrides, Quiet
from launch.sample_commands import sample_app
from launch.submit_commands import REST, submit
from launch.templates import templates

STAGES, START = "Stages (each alone, under torchrun, mpirun or srun)", "Start here"
CLUSTER = "Cluster"

app = typer.Typer(
    name="hpc-ddpm",
    help="Mask-conditioned 3-D brain MRI diffusion (Med-DDPM) for clusters: pack, train, sample, look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="Med-DDPM checkpoints in and out.", no_args_is_help=True)
config_app = typer.Typer(help="Look at settings and presets.", no_args_is_help=True)
app.add_typer(sample_app, name="sample", rich_help_panel=STAGES)
app.add_typer(weights_app, name="weights", rich_help_panel="Tools")
app.add_typer(config_app, name="config", rich_help_panel="Tools")
app.add_typer(data_app, name="data", rich_help_panel="Tools")
app.add_typer(bench_app, name="bench", rich_help_panel="Tools")
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel="Tools")
app.command(rich_help_panel=CLUSTER, context_settings=REST)(submit)
app.add_typer(jobs_app, name="jobs", rich_help_panel=CLUSTER)
app.command(rich_help_panel=CLUSTER)(doctor)
app.command(rich_help_panel=CLUSTER)(drill)
app.command(rich_help_panel=CLUSTER)(templates)


@app.command(rich_help_panel=START)
def demo(
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    data: Annotated[Path | None, typer.Option(help="Your own pairs instead of the embedded brains.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes for training and sampling.")] = 2,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """The main job end to end: pack, train on 2 ranks, sample new volumes for held-out masks, report."""
    from launch.stages import demo_stage

    demo_stage(out, data, ranks, overrides or [], show_progress=not quiet)


@app.command(rich_help_panel=STAGES)
def pack(
    source: Annotated[Path, typer.Argument(help="Folder of NIfTI pairs, or a CSV/TSV/JSON table.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed dataset.")],
    config: ConfigOption = None,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default all cores, or 1 per rank where ranks share a node.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave out subjects that cannot be read or do not fit.")] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a dataset of other settings, or of subjects that changed or are gone.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Pack NIfTI pairs into HDF5 shards. Run it again to go on, or to add new subjects."""
    from hpc_ddpm.config import load_config
    from launch.stages import pack_stage

    settings = load_config(config, overrides or []).config
    raise typer.Exit(pack_stage(source, out, settings, workers, skip_bad, overwrite, show_progress=not quiet))


@app.command(rich_help_panel=STAGES)
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run directory; the same command resumes it.")],
    config: ConfigOption = None,
    data: Annotated[Path | None, typer.Option("--data", help="Packed dataset (data.path).")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option("--from", help="Run or imported weights to start from; without --config, also its settings."),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of steps 3 to 5 goes.")] = False,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train, or go on where the run directory stands."""
    from launch.stages import train_stage, training_settings

    source, settings = training_settings(config, overrides, data, init_from)
    if profile:
        settings.append("training.profile_steps=[3,5]")
    raise typer.Exit(train_stage(out, source, settings, show_progress=not quiet))


@app.command(rich_help_panel="Tools")
def estimate(
    source: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Preset name or YAML file.")] = None,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="A name such as h100-80g, or memory in GiB.")] = "h100-80g",
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 1,
    measure: Annotated[bool, typer.Option(help="Also run one real step here and compare.")] = False,
    as_json: Json = False,
) -> None:
    """What a run will need before it is submitted: memory by part, what fits, GPU-hours, disk."""
    from launch.estimate import estimate_command

    estimate_command(source, overrides or [], gpu, nodes * gpus_per_node, measure=measure, as_json=as_json)


@app.command(rich_help_panel="Tools")
def report(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of `submit pipeline`: packed, run, synthetic.")],
    quiet: Quiet = False,
) -> None:
    """One page about a pipeline: pictures beside the real volumes, loss, figures, where the time went."""
    from launch.pipeline import report_stage

    typer.echo(str(report_stage(out, show_progress=not quiet)))


@weights_app.command("import")
def weights_import(
    source: Annotated[Path, typer.Argument(help="A published Med-DDPM .pt file.")],
    preset: Annotated[str, typer.Option(help="The preset it was trained as: whole_head_128 or brats_192.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for weights, configuration and provenance.")],
    overrides: Overrides = None,
    ema: Annotated[bool, typer.Option(help="Take the averaged weights (as its samplers do) or the raw ones.")] = True,
) -> None:
    """Turn a Med-DDPM checkpoint into safetensors with configuration and provenance."""
    from hpc_ddpm.config import load_config
    from hpc_ddpm.weights import import_med_ddpm, save_weights

    save_weights(out, *import_med_ddpm(source, load_config(preset, overrides or []).config, ema=ema))
    typer.echo(f"imported {source} -> {out}")


@weights_app.command("export")
def weights_export(
    source: Annotated[Path, typer.Argument(help="Imported weights or a run directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .pt file that Med-DDPM's samplers load.")],
) -> None:
    """Write weights as a Med-DDPM checkpoint."""
    from hpc_ddpm.weights import export_med_ddpm

    export_med_ddpm(source, out)
    typer.echo(f"exported {source} -> {out}")


@config_app.command("ls")
def config_ls() -> None:
    """List the presets."""
    from hpc_ddpm.config import list_presets, presets_dir

    for name in list_presets():
        first = (presets_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:18} {first.removeprefix('#').strip()}")


@config_app.command("show")
def config_show(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Every setting, its value, and where the value came from."""
    import json

    from rich.console import Console
    from rich.table import Table

    from hpc_ddpm.config import flatten_config, load_config

    loaded = load_config(config, overrides or [])
    table = Table("setting", "value", "from", box=None, header_style="bold", pad_edge=False)
    for key, value in flatten_config(loaded.config).items():
        origin = loaded.origin(key)
        table.add_row(key, json.dumps(value), origin, style="dim" if origin == "default" else None)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    """Entry point: 0 done, 2 the user's mistake in one line, 75 a lost rank, 130 Ctrl-C; a bug has a traceback (1)."""
    warnings.showwarning = lambda message, *_: print(f"hpc-ddpm: warning: {one_line(str(message))}", file=sys.stderr)
    try:
        check_words(sys.argv[1:])
        code = app(prog_name="hpc-ddpm", standalone_mode=False)
    except KeyboardInterrupt:
        print("hpc-ddpm: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        known = error if isinstance(error, HpcDdpmError) else as_users_error(error)
        if known is None:
            raise
        end(known)
    else:
        sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
