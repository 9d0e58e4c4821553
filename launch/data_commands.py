"""`hpc-ddpm data ...`: look at sources before packing, and at packed datasets afterwards."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.options import ConfigOption, Json, Overrides, Quiet

data_app = typer.Typer(help="Look at data: before packing, and packed.", no_args_is_help=True)


class Split(StrEnum):
    """Parts of a packed dataset."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class Intensities(StrEnum):
    """Units of exported volumes."""

    UNIT = "unit"
    ORIGINAL = "original"


class ExportLayout(StrEnum):
    """Layouts of exported volumes."""

    TREE = "tree"
    NNUNET = "nnunet"


Packed = Annotated[Path, typer.Argument(metavar="PACKED", help="Packed dataset: the folder with index.json.")]
SplitOption = Annotated[Split | None, typer.Option(help="Only this split.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")]


@data_app.command()
def check(
    source: Annotated[Path, typer.Argument(help="Folder of NIfTI pairs, or a CSV/TSV/JSON table.")],
    config: ConfigOption = None,
    overrides: Overrides = None,
    report: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write an HTML page with the planes of every case.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    as_json: Json = False,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Open and judge every pair before packing. Exit code 2 if something must be mended."""
    from hpc_ddpm.config import load_config
    from hpc_ddpm.data.check.findings import exit_code
    from hpc_ddpm.data.check.report import write_check_report
    from hpc_ddpm.data.check.run import check as check_source
    from hpc_ddpm.data.parallel import num_cores
    from hpc_ddpm.files import writing_to
    from launch.data_tables import print_findings, print_json
    from launch.progress import progress_bar

    data = load_config(config, overrides or []).config.data
    if report is not None:
        with writing_to(report.parent, "--report"):  # now, not after hours
            report.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("checking", show=not quiet) as update:
        result = check_source(
            source,
            data,
            num_workers=workers or num_cores(),
            pictures=report is not None,
            progress=lambda done, total: update(done, total, ""),
        )
    if as_json:
        print_json(result.to_json())
    else:
        print_findings(f"{len(result.cases)} subjects of {source} ({result.layout})", result.findings)
        if result.coding:
            typer.echo(result.coding)
    if report is not None:
        with writing_to(report.parent, "--report"):
            write_check_report(report, result)
        if not as_json:
            typer.echo(f"report: {report}")
    raise typer.Exit(exit_code(result.findings, strict=strict))


@data_app.command()
def verify(
    packed: Packed,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every volume and compare its content.")] = False,
    as_json: Json = False,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Compare every byte with the checksums, and say which shards and subjects are hit. Exit code 2 if any."""
    from hpc_ddpm.data.check.findings import exit_code
    from hpc_ddpm.data.parallel import num_cores
    from hpc_ddpm.data.verify import verify as verify_packed
    from launch.data_tables import print_findings, print_json
    from launch.progress import progress_bar

    with progress_bar("verifying", show=not quiet) as update:
        findings = verify_packed(
            packed,
            deep=deep,
            num_workers=workers or num_cores(),
            progress=lambda done, total: update(done, total, ""),
        )
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        print_findings(str(packed), findings)
    raise typer.Exit(exit_code(findings))


@data_app.command("ls")
def list_subjects(packed: Packed, split: SplitOption = None, as_json: Json = False) -> None:
    """List the subjects: split, shard, row, voxels of each label."""
    from hpc_ddpm.data.summary import list_subjects as subject_rows
    from launch.data_tables import print_json, print_subjects

    rows = subject_rows(packed, split)
    print_json(rows) if as_json else print_subjects(rows)


@data_app.command()
def show(
    packed: Packed,
    subject: Annotated[str, typer.Argument(help="Subject id; `data ls` lists them.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a PNG of its planes.")] = None,
    as_json: Json = False,
) -> None:
    """Show one subject: its facts, and a picture of its three planes."""
    from hpc_ddpm.data.summary import describe_subject, draw_subject, find_subject
    from launch.data_tables import print_facts, print_json

    dataset, index = find_subject(packed, subject)
    facts = describe_subject(dataset, index)
    if out is not None:
        draw_subject(dataset, index, out)
    print_json(facts) if as_json else print_facts(facts | ({"picture": str(out)} if out else {}))


@data_app.command()
def stats(packed: Packed, as_json: Json = False) -> None:
    """Totals: splits, label histogram, intensity ranges, voxel sizes."""
    from hpc_ddpm.data.summary import summarise
    from launch.data_tables import print_facts, print_json

    totals = summarise(packed)
    print_json(totals) if as_json else print_facts(totals)


@data_app.command()
def split(
    packed: Packed,
    val: Annotated[float, typer.Option(help="Share of patients for validation.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of patients for testing.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Another seed draws others.")] = 0,
    table: Annotated[
        Path | None, typer.Option(help="Instead: a table with columns subject and split; or where --group's column is.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="As data.group: auto, subject, a column of --table, or a pattern of the names.")
    ] = None,
) -> None:
    """Divide the subjects anew, by a hash of seed and id or by a table; only index.json is written."""
    from hpc_ddpm.data.resplit import divide

    counts = divide(packed, val, test, seed, table, group)
    typer.echo(f"{packed}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


@data_app.command()
def export(
    packed: Packed,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for mask/ and one folder per modality.")],
    split: SplitOption = None,
    original_grid: Annotated[bool, typer.Option("--original-grid", help="On the grid of the subject's file.")] = False,
    intensities: Annotated[Intensities, typer.Option(help="[-1, 1] as packed, or the file's own.")] = Intensities.UNIT,
    layout: Annotated[
        ExportLayout, typer.Option(help="One folder per role, or nnU-Net's raw data.")
    ] = ExportLayout.TREE,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Write the volumes as NIfTI again; what is there is kept, and refused where it was packed anew since."""
    from hpc_ddpm.data.export import export as export_packed
    from hpc_ddpm.data.parallel import num_cores
    from launch.progress import progress_bar

    with progress_bar("exporting", show=not quiet) as update:
        count = export_packed(
            packed,
            out,
            split=split,
            original_grid=original_grid,
            intensities=intensities.value,
            layout=layout.value,
            num_workers=workers or num_cores(),
            progress=lambda done, total: update(done, total, ""),
        )
    typer.echo(f"{count} subjects in {out}")


@data_app.command("table")
def draft(
    source: Annotated[Path, typer.Argument(help="Folder with volumes anywhere below.")],
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The .csv or .tsv table to write.")],
) -> None:
    """Draft a table of subjects for a source that no layout fits: look through it, edit it, then pack the table."""
    from hpc_ddpm.data.draft import draft_table, write_draft
    from hpc_ddpm.files import writing_to

    table = draft_table(source)
    with writing_to(out.parent):
        write_draft(table, source, out)
    roles = ", ".join(name for name in table.columns if name not in ("subject", "patient", "note"))
    typer.echo(f"{out}: {len(table.rows)} subjects with columns {roles}; {table.num_sure} are clear")
    for row in [row for row in table.rows if row["note"] != "yes"][:8]:
        typer.echo(f"  {row['subject'] or '(no name)'}: {row['note']}")
    typer.echo(f"look through it, mend the others, then: hpc-ddpm data check {out} --config ...")
