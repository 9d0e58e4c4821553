"""Scaling curves, measured and predicted, and where the time goes along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpc_ddpm.benchmark.scaling.curve import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0b6e99", "#d9730d", "#4d8b31", "#9b3d8f", "#b3261e")
Row = dict[str, Any]


def draw_curves(figure: type[Figure], rows: Sequence[Row]) -> Figure:
    """Volumes per second, and efficiency with the middle 80 % of its rounds; what is dashed is predicted."""
    picture = figure(figsize=(10, 4.4), layout="constrained")
    speed, efficiency = picture.subplots(1, 2)
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    ticks = sorted({row["gpus"] for row in rows})
    for colour, name in zip(COLOURS, names, strict=False):
        measured, predicted = (
            [row for row in rows if row["contestant"] == name and row["kind"] == kind]
            for kind in ("measured", "predicted")
        )
        beyond = [measured[-1], *predicted] if predicted else []
        for axes, key in ((speed, _speed), (efficiency, _efficiency)):
            axes.plot([row["gpus"] for row in beyond], [key(row) for row in beyond], "--", color=colour, linewidth=1.2)
            axes.plot([row["gpus"] for row in measured], [key(row) for row in measured], "o-", color=colour, label=name)
        low, high = ([100 * row["efficiency"][end] for row in measured] for end in ("p10", "p90"))
        efficiency.vlines([row["gpus"] for row in measured], low, high, color=colour, alpha=0.5)
    base = min((row for row in rows if row["kind"] == "measured"), key=lambda row: row["gpus"])
    ideal = [base["volumes_per_s_per_gpu"] * count for count in ticks]
    speed.plot(ticks, ideal, ":", color="grey", label=f"as on {base['gpus']}")
    speed.set(xscale="log", yscale="log", ylabel="volumes/s")
    efficiency.axhline(100, linestyle=":", color="grey")
    efficiency.set(xscale="log", ylabel=f"% of the speed per GPU of {base['gpus']}")
    efficiency.set_ylim(0, 1.06 * max(100.0, *(_efficiency(row) for row in rows)))
    for axes in (speed, efficiency):
        axes.set(xlabel="GPUs; dashed: prediction")
        axes.set_xticks(ticks, [str(count) for count in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speed.legend(frameon=False)
    return picture


def _speed(row: Row) -> float:
    return float(row["volumes_per_s"])


def _efficiency(row: Row) -> float:
    return 100 * float(row["efficiency"]["median"])


def draw_parts(figure: type[Figure], rows: Sequence[Row]) -> Figure:
    """Milliseconds of a volume on one GPU by part, for every engine and number of GPUs."""
    measured = sorted(
        (row for row in rows if row["kind"] == "measured"), key=lambda row: (row["contestant"], row["gpus"])
    )
    picture = figure(figsize=(10, 1.4 + 0.3 * len(measured)), layout="constrained")
    axes = picture.subplots()
    names = [f"{row['contestant']} on {row['gpus']}" for row in measured]
    left = [0.0] * len(measured)
    for colour, part in zip(("#0b6e99", "#6b5d4d", "#d9730d", "#b3261e", "#9b3d8f", "#a8b3bf"), PARTS, strict=True):
        sizes = [1e3 * row["parts_s"][part] for row in measured]
        axes.barh(names, sizes, left=left, color=colour, label=part, height=0.7)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="ms of a volume on one GPU")
    axes.legend(frameon=False, ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1))
    return picture
