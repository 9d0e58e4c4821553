"""Benchmark reports as one self-contained HTML page, and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from html import escape
from itertools import combinations, cycle, product
from typing import TYPE_CHECKING, Any

from hpc_ddpm.benchmark.compare import compare
from hpc_ddpm.benchmark.figures import figures_table
from hpc_ddpm.benchmark.gpu_check.run import rows_table, to_markdown
from hpc_ddpm.benchmark.record import Report, describe
from hpc_ddpm.benchmark.scaling.figures import draw_curves, draw_parts
from hpc_ddpm.benchmark.tables import report_tables
from hpc_ddpm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
STYLE = """
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #1c2430; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d8dee6; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85em; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #e6eaef; text-align: left; vertical-align: top; }
th { white-space: nowrap; }
th { background: #f3f5f8; } svg { max-width: 100%; height: auto; }
pre { background: #f3f5f8; padding: .6rem; overflow-x: auto; }
"""
COLOURS = ("#0b6e99", "#d9730d", "#4d8b31", "#9b3d8f", "#b3261e", "#6b5d4d", "#2f4b7c", "#a0a000", "#000000")
MARKERS = "os^Dv"
PARTS = ("at the fused floor", "waiting for data", "the rest")


def to_page(reports: Mapping[str, Report]) -> tuple[str, str]:
    """HTML and Markdown of reports by name (of their files, say).

    Raises:
        ConfigError: matplotlib is missing.
    """
    runs = {name: row for name, report in reports.items() for row in report["rows"] if row.get("samples_s")}
    pictures = _pictures(runs) if runs else {}
    html, markdown = ["<h1>Benchmark report</h1>"], ["# Benchmark report"]

    def add(title: str, *blocks: tuple[str, str]) -> None:
        """A section of (kind, Markdown or SVG) blocks."""
        html.append(f"<h2>{escape(title)}</h2>")
        markdown.append(f"## {title}")
        for kind, text in blocks:
            html.append(text if kind == "svg" else f'<div class="wide">{_to_html(text)}</div>')
            markdown.extend([] if kind == "svg" else [text])

    if runs:
        add("Runs", ("table", figures_table(list(runs.values()), list(runs))))
    for title, svg in pictures.items():
        add(title, ("svg", svg))
    sentences = _comparisons(reports)
    if sentences:
        add("Comparison", *(("text", sentence) for sentence in sentences))
    for name, report in reports.items():
        add(f"How {name} was measured", ("text", describe(report["environment"])))
        if report["benchmark"] == "gpu-check":
            results = {row["part"]: row for row in report["rows"]}
            add(f"GPU check {name}", ("text", to_markdown(results, "")))
        elif report["benchmark"] in ("data", "scaling", "comm"):
            kind = report["benchmark"].capitalize()
            title = kind if kind.lower() == name else f"{kind} {name}"
            add(title, *_scaling_figures(report), ("text", report_tables(report)))
        elif name not in runs:
            add(name, ("table", rows_table(report["rows"])))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmark report</title><style>{STYLE}</style>'
    return head + "\n".join(html) + "\n", "\n\n".join(markdown) + "\n"


def _scaling_figures(report: Report) -> list[tuple[str, str]]:
    points = [row for row in report["rows"] if row.get("kind") in ("measured", "predicted")]
    return [("svg", _svg(draw(_figure_type(), points))) for draw in (draw_curves, draw_parts) if points]


def _comparisons(reports: Mapping[str, Report]) -> list[str]:
    """Every two runs of the same kind."""
    timed = {name: report for name, report in reports.items() if any(row.get("samples_s") for row in report["rows"])}
    sentences = []
    for (a, first), (b, second) in combinations(timed.items(), 2):
        if first["benchmark"] == second["benchmark"]:
            found = compare([(first, second)])
            differing = "; ".join(f"{key}: {was} -> {now}" for key, (was, now) in found.differing.items())
            sentences.append(
                f"A = {a}, B = {b}. {found.sentence()}. Method: {found.method}."
                + (f" They differ in {differing}." if differing else "")
            )
    return sentences


# ------------------------------------------------------------------------------------------------ pictures


def _pictures(runs: Mapping[str, Row]) -> dict[str, str]:
    figure, runs = _figure_type(), {_label(name): row for name, row in runs.items()}
    drawn = {"Roofline": _svg(_roofline(figure, runs)), "Repeats": _svg(_repeats(figure, runs))}
    drawn["Where the time of a volume goes"] = _svg(_breakdown(figure, runs))
    if any(row.get("memory_gib") for row in runs.values()):
        drawn["Memory by part, as planned, and the measured peak"] = _svg(_memory(figure, runs))
    return drawn


def _figure_type() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the report's pictures need matplotlib: pip install 'hpc_ddpm[bench]'") from error
    return Figure


def _label(name: str) -> str:
    """For matplotlib, to which `$` begins a formula, and a first `_` says that no legend shows it."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _styles() -> Iterator[tuple[str, str]]:
    """Markers and colours of runs."""
    return cycle(product(MARKERS, COLOURS))


def _roofline(figure: type[Figure], runs: Mapping[str, Row]) -> Figure:
    """FLOP per byte that must be moved, against FLOP/s reached; the roof is what was measured on the device."""
    picture = figure(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for (marker, colour), (name, row) in zip(_styles(), runs.items(), strict=False):
        peak, bandwidth = row["ceiling_tflops"], row["ceiling_gb_per_s"] / 1e3
        intensity = row["flop_per_byte"]
        ridge = peak / bandwidth
        reach = [ridge / 100, ridge, max(ridge, intensity) * 10]
        axes.plot(reach, [min(peak, bandwidth * x) for x in reach], color=colour, linewidth=1)
        share = f"{name}: {row['of_matmul_ceiling']:.0%}"
        axes.plot(intensity, row["model_tflops"], marker, color=colour, label=share)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the fused network", ylabel="TFLOP/s")
    axes.legend(title="share of the measured matrix-product ceiling", frameon=False)
    axes.grid(alpha=0.3, which="both")
    return picture


def _repeats(figure: type[Figure], runs: Mapping[str, Row]) -> Figure:
    """Every counted repeat: a trend or two levels are seen here and in no percentile."""
    picture = figure(figsize=(8, 3.5), layout="constrained")
    axes = picture.subplots()
    for (marker, colour), (name, row) in zip(_styles(), runs.items(), strict=False):
        repeats = range(1, len(row["samples_s"]) + 1)
        axes.plot(repeats, row["samples_s"], f"{marker}-", color=colour, label=name, markersize=4)
    axes.set(xlabel="repeat", ylabel="seconds per volume and GPU", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return picture


def _breakdown(figure: type[Figure], runs: Mapping[str, Row]) -> Figure:
    picture = figure(figsize=(8, 1.2 + 0.6 * len(runs)), layout="constrained")
    axes = picture.subplots()
    for name, row in runs.items():
        median = row["seconds_per_volume"]["median"]
        if row.get("step_shares"):
            whole = max(1.0, sum(row["step_shares"].values()))  # communication may run beside the others
            _stack(axes, name, {part: median * share / whole for part, share in row["step_shares"].items()})
            axes.plot(min(row["fused_floor_s"], median), name, "k|", markersize=22, markeredgewidth=2)
            continue
        floor, waiting = min(row["fused_floor_s"], median), median * (row.get("data_wait_share") or 0)
        waiting = min(waiting, median - floor)
        _stack(axes, name, dict(zip(PARTS, (floor, waiting, median - floor - waiting), strict=True)))
    _finish_bars(axes, "seconds per volume and GPU; a black mark is the fused floor")
    return picture


def _memory(figure: type[Figure], runs: Mapping[str, Row]) -> Figure:
    with_parts = {name: row for name, row in runs.items() if row.get("memory_gib")}
    picture = figure(figsize=(8, 1.6 + 0.6 * len(with_parts)), layout="constrained")
    axes = picture.subplots()
    for name, row in with_parts.items():
        held = {part: size for part, size in row["memory_gib"].items() if part != "optimizer_step"}
        _stack(axes, name, held)
        axes.plot(row["peak_memory_gib"], name, "k|", markersize=22, markeredgewidth=2)
    _finish_bars(axes, "GiB of one rank; the black mark is measured")
    return picture


def _stack(axes: Any, name: str, parts: Mapping[str, float]) -> None:
    left = 0.0
    for colour, (part, size) in zip(cycle(COLOURS), parts.items(), strict=False):
        axes.barh(name, size, left=left, color=colour, label=part, height=0.6)
        left += size


def _finish_bars(axes: Any, label: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    axes.invert_yaxis()
    axes.set(xlabel=label)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# ------------------------------------------------------------------------------------------------ Markdown


def _to_html(markdown: str) -> str:
    """The little Markdown that our reports use: headings, tables, fenced code, paragraphs."""
    blocks = []
    for block in markdown.strip().split("\n\n"):
        lines = block.splitlines()
        if block.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
            cells = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows)
            blocks.append(f"<table><tr>{''.join(f'<th>{_inline(cell)}</th>' for cell in head)}</tr>{cells}</table>")
        elif block.startswith("```"):
            blocks.append(f"<pre>{escape(block.strip('`').strip())}</pre>")
        elif block.startswith("#"):
            blocks.append(f"<h3>{_inline(block.lstrip('# '))}</h3>")
        else:
            blocks.append(f"<p>{_inline(block)}</p>")
    return "".join(blocks)


def _inline(text: str) -> str:
    """`**no**` marks what failed."""
    return escape(text).replace("**no**", "<b>no</b>")
