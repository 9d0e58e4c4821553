"""The rows of a report as Markdown, by kind of benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_ddpm.benchmark.data.report import stage_tables
from hpc_ddpm.benchmark.figures import figures_table
from hpc_ddpm.benchmark.record import table
from hpc_ddpm.benchmark.scaling.curve import curve_table, parts_table, sentences


def report_tables(report: Mapping[str, Any]) -> str:
    """The tables of a report of `bench train`, `sample`, `data`, `comm` or `scaling`, as text."""
    rows, settings = report["rows"], report["settings"]
    if report["benchmark"] == "data":
        titled = ((f"{title}:", *tables) for title, tables in stage_tables(rows).items())
        return "\n\n".join(block for blocks in titled for block in blocks)
    if report["benchmark"] == "comm":
        return f"{_ring(settings)}\n\n{comm_table(rows)}"
    if report["benchmark"] != "scaling":
        return figures_table(rows, [report["benchmark"]])
    points = [row for row in rows if row["kind"] != "collective"]
    collectives = [row for row in rows if row["kind"] == "collective"]
    blocks = [f"NOTE: {note}." for note in settings["notes"]]
    blocks += [f"{count} ranks were not measured: {error}" for count, error in settings["errors"].items()]
    batch = settings["config"]["training"]["global_batch"]
    kept = "per GPU" if settings["mode"] == "weak" else "over all GPUs"
    blocks.append(
        f"{settings['mode'].capitalize()} scaling on {settings['device']}, {batch} volumes {kept} and step; "
        f"{settings['rounds']} rounds of {settings['repeats']} turns; ratios are medians of pairs (p10 to p90)."
    )
    blocks += [curve_table(points), "Time of a volume on one GPU, by part:", parts_table(points), *sentences(points)]
    blocks += [line for line in [_errors(points)] if line]
    if collectives:
        blocks += [_ring(settings), comm_table(collectives)]
    return "\n\n".join(blocks)


def comm_table(rows: list[dict[str, Any]]) -> str:
    """Every collective and size."""
    lines = [
        [
            row["operation"].replace("_", "-"),
            str(row["ranks"]),
            f"{row['bytes'] / 2**20:.4g}" + (" (bucket)" if row["is_bucket"] else ""),
            f"{1e3 * row['seconds']['median']:.4g}",
            f"{1e3 * row['seconds']['p10']:.4g} to {1e3 * row['seconds']['p90']:.4g}",
            f"{row['algorithm_gb_per_s']:.3g}",
            f"{row['bus_gb_per_s']:.3g}",
            f"{1e3 * row['ring_fit_s']:.4g}",
        ]
        for row in rows
    ]
    return table(["collective", "ranks", "MiB", "ms", "p10 to p90", "algorithm GB/s", "bus GB/s", "ring fit ms"], lines)


def _ring(settings: Mapping[str, Any]) -> str:
    latency, speed = settings["ring_latency_us"], settings["ring_gb_per_s"]
    return f"Fitted ring: {latency:.3g} us for each message, {speed:.3g} GB/s on each link."


def _errors(points: list[dict[str, Any]]) -> str:
    """One sentence about the errors of the model on the measured points."""
    errors = [row["prediction_error"] for row in points if "prediction_error" in row]
    held_out = [row["held_out_error"] for row in points if "held_out_error" in row]
    if not errors:
        return ""
    text = (
        f"The model behind the predictions is off by at most {max(map(abs, errors)):.1%} in time on the measured points"
    )
    if held_out:
        return f"{text}; fitted without the largest point, by at most {max(map(abs, held_out)):.1%} on it."
    return f"{text}, to which it was fitted; with three or more points it is also tried on one that it has not seen."
