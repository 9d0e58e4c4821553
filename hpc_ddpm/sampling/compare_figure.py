"""The figure of a comparison: quality against network evaluations, and the same plane from every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "rms_to_ode": "distance to the many-step ODE",
    "rms_to_ddpm": "distance to the ddpm chain",
    "mask_fit": "variance explained by the mask",
    "sharpness": "sharpness (ddpm chain = 1)",
}
REFERENCES = 3
"""Rows that a table starts with: the chain, the ODE, the chain from other noise."""

Row = Mapping[str, Any]
Planes = Mapping[str, NDArray[np.float32]]


def write_figure(path: Path, rows: Sequence[Row], planes: Planes) -> None:
    """Write the PNG.

    Args:
        path: of the file.
        rows: the table of `compare`, references first.
        planes: cell id -> (H, W) in [-1, 1].

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the figure needs matplotlib: pip install 'hpc_ddpm[demo]'") from error
    lines = _lines(rows[REFERENCES:])
    num_steps = sorted({row["num_steps"] for row in rows[REFERENCES:]})
    figure = Figure(figsize=(15, 4.6 + 1.45 * len(lines)), dpi=100, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[4.6, 1.45 * max(len(lines), 1)])
    top, bottom = halves
    for axes, (key, title) in zip(top.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _curves(axes, lines, rows[:REFERENCES], key, title)
    top.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    grid = bottom.subplots(max(len(lines), 1), len(num_steps) + 2, squeeze=False)
    for cells, (name, line) in zip(grid, lines.items(), strict=False):
        by_steps = {row["num_steps"]: row for row in line}
        shown = [by_steps.get(steps) for steps in num_steps] + [rows[1], rows[0]]
        for axes, row in zip(cells, shown, strict=True):
            axes.set_axis_off()
            if row is not None:
                axes.imshow(planes[cell_id(row)], cmap="gray", vmin=-1, vmax=1, origin="lower")
        cells[0].text(-0.06, 0.5, name, transform=cells[0].transAxes, ha="right", va="center", fontsize=10)
    for axes, title in zip(grid[0], [*map(str, num_steps), "ODE", "ddpm chain"], strict=True):
        axes.set_title(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def cell_id(row: Row) -> str:
    """The id of a row's cell."""
    replica = f"-r{row['replica']}" if row["replica"] else ""
    return f"{row['sampler']}-{row['num_steps']}-{row['spacing']}{replica}"


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by sampler, and by spacing where there are several."""
    has_spacings = len({row["spacing"] for row in rows}) > 1
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["num_steps"]):
        name = f"{row['sampler']} {row['spacing']}" if has_spacings else row["sampler"]
        lines.setdefault(name, []).append(row)
    return lines


def _curves(axes: Axes, lines: Mapping[str, Sequence[Row]], references: Sequence[Row], key: str, title: str) -> None:
    for index, (name, line) in enumerate(lines.items()):
        steps = [row["num_steps"] for row in line]
        axes.plot(steps, [row[key] for row in line], label=name, color=f"C{index % 10}", marker="os^D"[index // 10 % 4])
    chain, ode, other_noise = references
    levels = {"rms_to_ode": [chain], "rms_to_ddpm": [ode, other_noise]}.get(key, [chain, ode])
    for row, style, (x, side) in zip(levels, ("--", ":"), ((0.98, "right"), (0.02, "left")), strict=False):
        label = "ddpm chain, other noise" if row is other_noise else f"{row['sampler']} {row['num_steps']}"
        axes.axhline(row[key], color="0.5", linestyle=style, linewidth=1)
        axes.annotate(label, (x, row[key]), xycoords=("axes fraction", "data"), ha=side, va="bottom", fontsize=8)
    axes.set(title=title, xlabel="network evaluations", xscale="log")
    if key.startswith("rms"):
        axes.set_yscale("log")
    ticks = sorted({row["num_steps"] for line in lines.values() for row in line})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
