"""`hpc-ddpm bench ...`: measure on your own machine, beside what else one might use."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc_ddpm.errors import ConfigError
from launch.options import ConfigOption, Overrides, Quiet

if TYPE_CHECKING:
    from hpc_ddpm.benchmark.compare import Comparison

bench_app = typer.Typer(help="Measure speed, beside what else one might use.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
MarkdownFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write the page to this Markdown file.")]
Repeats = Annotated[int, typer.Option(min=1, help="Turns of every contestant.")]


@bench_app.callback()
def bench() -> None:
    """Measure speed, beside what else one might use."""


@bench_app.command()
def data(
    config: ConfigOption = "brats_192",
    overrides: Overrides = None,
    packed: Annotated[Path | None, typer.Option("--data", help="Packed dataset: read its first subject.")] = None,
    source: Annotated[Path | None, typer.Option(help="NIfTI: read its first subject. Else a synthetic one.")] = None,
    med_ddpm: Annotated[
        Path | None, typer.Option(help="Clone of github mobaidoctor/med-ddpm, to measure its own loader.")
    ] = None,
    json_file: JsonFile = None,
    out: MarkdownFile = None,
    repeats: Repeats = 15,
    quiet: Quiet = False,
) -> None:
    """Read one subject with everything that can: memory map, HDF5, NIfTI, Zarr, WebDataset, MONAI, Med-DDPM."""
    from hpc_ddpm.benchmark.data.report import to_markdown
    from hpc_ddpm.benchmark.data.run import bench_data
    from hpc_ddpm.benchmark.record import write_report
    from hpc_ddpm.config import load_config
    from hpc_ddpm.files import write_text
    from launch.progress import progress_bar

    settings = load_config(config, overrides or []).config.data
    with progress_bar("reading", show=not quiet) as update:
        report = bench_data(settings, data=packed, source=source, med_ddpm=med_ddpm, repeats=repeats, progress=update)
    if json_file is not None:
        write_report(json_file, report)
    page = to_markdown(report)
    if out is not None:
        write_text(out, page)
    typer.echo(page, nl=False)


Packed = Annotated[Path | None, typer.Option("--data", help="Packed dataset; else synthetic heads.")]
Work = Annotated[
    Path | None, typer.Option(help="Where to work; several nodes must share it. By default a temp folder.")
]
Price = Annotated[float | None, typer.Option(min=0, help="Of a GPU-hour, in any currency.")]
Samples = Annotated[int, typer.Option(min=2, help="Repeats that count.")]
LocalRanks = Annotated[int, typer.Option(min=1, help="Of every run, started on this node.")]


@bench_app.command()
def train(
    config: ConfigOption = None,
    overrides: Overrides = None,
    packed: Packed = None,
    work: Work = None,
    repeats: Samples = 20,
    steps_per_repeat: Annotated[int, typer.Option(min=1, help="Optimizer steps in each.")] = 1,
    price: Price = None,
    json_file: JsonFile = None,
    out: MarkdownFile = None,
    quiet: Quiet = False,
) -> None:
    """Time the training loop: volumes/s per GPU, MFU, memory, waiting, energy, cost. Alone or under torchrun, srun."""
    from hpc_ddpm.config import load_config
    from launch.bench_stages import bench_train_stage

    options = {"repeats": repeats, "steps_per_repeat": steps_per_repeat, "price": price}
    settings = load_config(config, overrides or []).config
    _finish(bench_train_stage(settings, packed, work, options, show_progress=not quiet), json_file, out)


@bench_app.command()
def sample(
    config: ConfigOption = None,
    overrides: Overrides = None,
    packed: Packed = None,
    work: Work = None,
    repeats: Samples = 10,
    volumes: Annotated[int, typer.Option(min=1, help="Per rank in each repeat.")] = 1,
    price: Price = None,
    json_file: JsonFile = None,
    out: MarkdownFile = None,
    quiet: Quiet = False,
) -> None:
    """Time mass generation, from mask to written volume. Alone or under torchrun, srun."""
    from hpc_ddpm.config import load_config
    from launch.bench_stages import bench_sample_stage

    options = {"repeats": repeats, "volumes": volumes, "price": price}
    settings = load_config(config, overrides or []).config
    _finish(bench_sample_stage(settings, packed, work, options, show_progress=not quiet), json_file, out)


def _finish(report: dict[str, Any] | None, json_file: Path | None, out: Path | None) -> None:
    """Write and print on rank 0, which alone has a report."""
    from hpc_ddpm.benchmark.record import describe
    from hpc_ddpm.benchmark.tables import report_tables
    from hpc_ddpm.files import write_json, write_text

    if report is None:
        return
    if json_file is not None:
        write_json(json_file, report, indent=2)
    page = f"{report_tables(report)}\n\n{describe(report['environment'])}\n"
    if out is not None:
        write_text(out, page)
    typer.echo(page, nl=False)


@bench_app.command()
def comm(
    config: ConfigOption = None,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=2, help="New ones on this machine, where none are started.")] = 2,
    json_file: JsonFile = None,
    out: MarkdownFile = None,
    quiet: Quiet = False,
) -> None:
    """Time all-reduce, reduce-scatter and all-gather of this network's gradients. Alone or under torchrun, srun."""
    from hpc_ddpm.config import load_config
    from launch.scaling_stages import comm_stage

    settings = load_config(config, overrides or []).config
    _finish(comm_stage(settings, ranks, show_progress=not quiet), json_file, out)


class Mode(StrEnum):
    """What stays the same along a curve."""

    WEAK = "weak"
    STRONG = "strong"


@bench_app.command()
def scaling(
    out: Annotated[Path, typer.Option("--out", "-o", help="Results folder: scaling.json, scaling.md. Nodes share it.")],
    config: ConfigOption = None,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Points of the curve, such as 1,2,4,8; on a CPU, ranks.")] = "1,2",
    mode: Annotated[
        Mode, typer.Option(help="training.global_batch is that of one GPU (weak), or of all together (strong).")
    ] = Mode.WEAK,
    engines: Annotated[str, typer.Option(help="Side by side: ddp and ZeRO stages.")] = "ddp,0,1,2,3",
    packed: Packed = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every point is measured, in turns.")] = 3,
    repeats: Annotated[int, typer.Option(min=2, help="Turns of every engine in each round.")] = 10,
    steps_per_repeat: Annotated[int, typer.Option(min=1, help="Optimizer steps in each.")] = 1,
    price: Price = None,
    cluster: Annotated[str | None, typer.Option(help="Submit it as one job, with this profile.")] = None,
    quiet: Quiet = False,
) -> None:
    """Time training on several numbers of GPUs: efficiency, ZeRO beside DDP, where the time goes, and a prediction.

    Alone it starts ranks on this machine; under srun or torchrun, points take the first of the ranks that are there.
    """
    from hpc_ddpm.config import load_config
    from hpc_ddpm.files import writing_to
    from launch.scaling_stages import read_points, scaling_stage, submit_scaling

    settings = load_config(config, overrides or []).config
    points, names = read_points(gpus, engines)
    if cluster is not None:
        words: list[Any] = [
            "--gpus",
            gpus,
            "--mode",
            mode.value,
            "--engines",
            engines,
            "--rounds",
            rounds,
            "--repeats",
            repeats,
        ]
        words += ["--steps-per-repeat", steps_per_repeat, *(["--price", price] if price is not None else [])]
        words += [
            *(["--config", config] if config else []),
            *(["--data", packed] if packed else []),
            *(overrides or []),
        ]
        return submit_scaling(settings, [str(word) for word in words], out, cluster, points, mode.value)
    with writing_to(out):
        counts = {"rounds": rounds, "repeats": repeats, "steps": steps_per_repeat}
        found = scaling_stage(
            settings, packed, out, points, mode.value, names, **counts, price=price, show_progress=not quiet
        )
        _finish(found, out / "scaling.json", out / "scaling.md")


@bench_app.command("all")
def everything(
    out: Annotated[Path, typer.Option("--out", "-o", help="Results folder: a report of each part, report.html.")],
    config: ConfigOption = None,
    overrides: Overrides = None,
    packed: Packed = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="For everything; a part may take half of what is left.")] = 30,
    price: Price = None,
) -> None:
    """Train, sample, comm, data and scaling on this machine. Exit code 2 if a part fails; the rest goes on."""
    from hpc_ddpm.config import load_config
    from launch.bench_all import bench_all

    stage = load_config(config, overrides or []).config.training.zero_stage
    words = [*(["--config", config] if config else []), *(overrides or [])]
    raise typer.Exit(bench_all(out, words, stage, packed, minutes, price))


@bench_app.command()
def tune(
    out: Annotated[Path, typer.Option("--out", "-o", help="YAML with the best settings, for `train --config`.")],
    config: ConfigOption = None,
    overrides: Overrides = None,
    packed: Packed = None,
    ranks: LocalRanks = 1,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB of one rank to stay within; by default what is free.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="What to search; may be repeated. channels_last, compile, micro_batch, activation_checkpointing, "
            "zero_stage, num_workers; by default all."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Optimizer steps of each trial that count.")] = 5,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Try every combination.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest settings that fit: layout, compile, micro batch, checkpointing, ZeRO stage, readers."""
    from hpc_ddpm.config import load_config
    from launch.bench_stages import tune_stage

    def tell(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    settings = load_config(config, overrides or []).config
    options = (settings, packed, out, ranks, memory, only or (), repeats, tell)
    typer.echo(tune_stage(*options, is_exhaustive=exhaustive))


FailIfSlower = Annotated[
    str | None, typer.Option(help="Exit code 2 if B is significantly slower by more than this, such as 5%.")
]


@bench_app.command()
def ab(
    config: ConfigOption = None,
    overrides: Overrides = None,
    against: Annotated[str | None, typer.Option(help="A is the code of this git commit, branch or tag.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE of B alone; may be repeated.")
    ] = None,
    what: Annotated[str, typer.Option(help="train or sample.")] = "train",
    packed: Packed = None,
    ranks: LocalRanks = 1,
    pairs: Annotated[int, typer.Option(min=6, help="Runs of each; 6 are the fewest that can tell.")] = 6,
    repeats: Samples = 10,
    fail_if_slower: FailIfSlower = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the reports.")] = Path("bench-ab"),
    quiet: Quiet = False,
) -> None:
    """Is B slower than A? Measured in turns on this machine: this code against another commit, or other settings."""
    from launch.bench_stages import ab_stage

    limit = None if fail_if_slower is None else _share(fail_if_slower)
    if not against and not settings:
        raise ConfigError("A and B are the same: give --against COMMIT, or --set SECTION.KEY=VALUE")
    if what not in ("train", "sample"):
        raise ConfigError(f"--what {what}: train or sample is expected")
    arguments = [*(overrides or []), "--repeats", str(repeats)]
    arguments += ["--config", config] if config else []
    arguments += ["--data", str(packed)] if packed else []
    _judge(ab_stage(what, arguments, settings or [], against, ranks, pairs, out, show_progress=not quiet), limit)


@bench_app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="A B [A B]...", help="Reports, A and B in turn.")],
    fail_if_slower: FailIfSlower = None,
) -> None:
    """Is B slower than A? One pair is compared by its repeats, six or more pairs measured in turns pair by pair."""
    from hpc_ddpm.benchmark.compare import compare as compare_reports
    from hpc_ddpm.benchmark.record import read_report

    limit = None if fail_if_slower is None else _share(fail_if_slower)
    if len(files) % 2:
        raise ConfigError(f"{len(files)} reports found, pairs expected: give A B, or A1 B1 A2 B2 ...")
    reports = [read_report(file) for file in files]
    _judge(compare_reports(list(zip(reports[::2], reports[1::2], strict=True))), limit)


def _judge(found: Comparison, limit: float | None) -> None:
    """Say what was found, and exit."""
    typer.echo(f"{found.sentence()}\nmethod: {found.method}")
    for key, (first, second) in found.differing.items():
        typer.echo(f"A and B differ: {key} {first} -> {second}")
    raise typer.Exit(2 if limit is not None and found.is_slower_than(limit) else 0)


def _share(text: str) -> float:
    """`5%` or `0.05` to 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if value < 0:
        raise ConfigError(f"--fail-if-slower {text}: a share such as 5% or 0.05 is expected")
    return value


@bench_app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Reports (--json), or a GPU check's summary.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page; the same in Markdown is written beside it.")],
) -> None:
    """One self-contained page of reports: figures, roofline, time, memory, and any two runs compared."""
    from hpc_ddpm.benchmark.page import to_page
    from hpc_ddpm.benchmark.record import read_report
    from hpc_ddpm.files import write_text

    html, markdown = to_page({str(file): read_report(file) for file in files})
    write_text(out, html)
    write_text(out.with_suffix(".md"), markdown)
    typer.echo(f"{out}")


@bench_app.command("gpu-check")
def gpu_check(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Results folder: summary.md, summary.json, a file per part.")
    ],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    size: Annotated[str, typer.Option(help="full: the presets themselves; small: a minute on a CPU.")] = "full",
    minutes: Annotated[float, typer.Option(min=0.1, help="For everything; the most valuable parts come first.")] = 9.0,
    only: Annotated[list[str] | None, typer.Option(help="Parts to run; may be repeated.")] = None,
) -> None:
    """Prove that this GPU computes rightly, and take every single-GPU figure. Exit code 2 if a part did not pass."""
    from hpc_ddpm.benchmark.gpu_check.run import gpu_check as run
    from hpc_ddpm.files import writing_to

    if device not in ("cuda", "cpu") or size not in ("full", "small"):
        raise typer.BadParameter(f"--device {device} --size {size}; use cuda or cpu, full or small")

    def tell(name: str, result: dict[str, Any]) -> None:
        typer.echo(f"{name:32} {result['status']:8} {result.get('seconds', 0):6.1f} s  {result.get('error', '')}")

    with writing_to(out):
        results = run(out, device=device, size=size, minutes=minutes, only=only or (), on_part=tell)
    typer.echo(f"{out / 'summary.md'}")
    raise typer.Exit(0 if all(result["status"] == "passed" for result in results.values()) else 2)
