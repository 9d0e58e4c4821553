"""The report's pictures: planes of mask, real and synthetic volume, loss curve, facts. No display."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_ddpm.data.slices import (
    RGB,
    Case,
    crop_to_mask,
    grey_window,
    label_colours,
    labels_by_size,
    lesion_centre,
    orthogonal_slices,
    outlined_labels,
    plane_sizes_mm,
)
from hpc_ddpm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 16.0
MARGIN_IN = 0.35
GAP_IN = 0.25
DPI = 120
WHITE, DIM, RULE, LINE = "#f2f4f7", "#98a2b0", "#2a3038", "#ffb454"
KINDS = ("mask", "real", "synthetic")
SIDES = (("L", "R"), ("L", "R"), ("P", "A"))
MAX_ROWS = 6


class Canvas:
    """A black figure measured in inches from its top left corner."""

    def __init__(self, width_in: float, height_in: float) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("the report's pictures need matplotlib: pip install 'hpc_ddpm[demo]'") from error
        self.width, self.height = width_in, height_in
        self.figure: Figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor="black")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """New axes; left and top of the box, its width and height."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, facecolor="black")

    def text(self, left: float, top: float, text: str, size: float = 11, colour: str = WHITE, **style: Any) -> None:
        """One line, or several, of plain text hanging from (left, top)."""
        at = (left / self.width, 1 - top / self.height)
        style = {"va": "top", **style}
        self.figure.text(*at, text, fontsize=size, color=colour, parse_math=False, **style)

    def rule(self, left: float, top: float, width: float) -> None:
        """A thin horizontal line."""
        from matplotlib.lines import Line2D

        y = 1 - top / self.height
        ends = [left / self.width, (left + width) / self.width]
        self.figure.add_artist(Line2D(ends, [y, y], color=RULE, linewidth=1))

    def png(self) -> bytes:
        """The picture; characters that the font lacks become boxes."""
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.figure.savefig(buffer, format="png", facecolor="black")
        return buffer.getvalue()


def colour_map(cases: Sequence[Case]) -> dict[int, RGB]:
    """Label -> colour, the same in all cases; the rarest label gets the accent."""
    labels = labels_by_size(case.mask for case in cases)
    return dict(zip(labels, label_colours(len(labels)), strict=True))


def report_png(
    title: str,
    cases: Sequence[Case],
    colours: Mapping[int, RGB],
    names: Mapping[int, str],
    curve: Sequence[Mapping[str, float]],
    facts: Mapping[str, str],
) -> bytes:
    """Nine planes for each of the first `MAX_ROWS` cases (first modality), the loss curve and the facts."""
    captions = [_caption(case) for case in cases[:MAX_ROWS]]
    shown = [crop_to_mask(case) for case in cases[:MAX_ROWS]]
    group = (WIDTH_IN - 2 * MARGIN_IN - 2 * GAP_IN) / 3
    rows = [strip_height(case, group) + 0.42 for case in shown]
    head, foot = 1.35, max(3.1, 0.55 + 0.27 * len(facts))
    canvas = Canvas(WIDTH_IN, head + sum(rows) + 0.35 + foot)
    canvas.text(MARGIN_IN, 0.26, title, size=18, weight="bold")
    _legend(canvas, colours, names)
    for column, kind in enumerate(KINDS):
        left = MARGIN_IN + column * (group + GAP_IN)
        canvas.text(left + group / 2, 0.92, kind.capitalize(), size=13, ha="center", weight="bold")
        canvas.rule(left, 1.22, group)
    top = head
    for case, caption, height in zip(shown, captions, rows, strict=True):
        canvas.text(MARGIN_IN, top, caption, size=10.5, colour=DIM)
        for column, kind in enumerate(KINDS):
            left = MARGIN_IN + column * (group + GAP_IN)
            draw_strip(canvas, left, top + 0.27, group, case, kind, 0, colours)
        top += height
    _footer(canvas, top + 0.2, foot, curve, facts)
    return canvas.png()


def strip_png(case: Case, kind: str, channel: int, colours: Mapping[int, RGB], width_in: float = 6.0) -> bytes:
    """Three planes of one volume of a case; kind is `mask`, `real` or `synthetic`."""
    case = crop_to_mask(case)
    canvas = Canvas(width_in, strip_height(case, width_in))
    draw_strip(canvas, 0, 0, width_in, case, kind, channel, colours)
    return canvas.png()


def strip_height(case: Case, width_in: float) -> float:
    """Height in inches of three planes side by side over `width_in`."""
    sizes = plane_sizes_mm(case.mask.shape, case.voxel_size_mm)
    return width_in / sum(width for width, _ in sizes) * max(height for _, height in sizes)


def draw_strip(
    canvas: Canvas,
    left: float,
    top: float,
    width: float,
    case: Case,
    kind: str,
    channel: int,
    colours: Mapping[int, RGB],
) -> None:
    """Three planes through the lesion, to one scale in mm; the mask's outline on `synthetic`."""
    height = strip_height(case, width)
    volume = {"mask": case.mask, "real": case.real, "synthetic": case.synthetic}[kind]
    if volume is None:
        canvas.text(left + width / 2, top + height / 2, "no real volume", colour=DIM, ha="center", va="center")
        return
    centre = lesion_centre(case.mask)
    masks = orthogonal_slices(case.mask, centre)
    planes = masks if kind == "mask" else orthogonal_slices(volume[channel], centre)
    sizes = plane_sizes_mm(case.mask.shape, case.voxel_size_mm)
    scale = width / sum(size[0] for size in sizes)
    for plane, mask, sides, (wide, high) in zip(planes, masks, SIDES, sizes, strict=True):
        axes = canvas.axes(left, top + (height - high * scale) / 2, wide * scale, high * scale)
        axes.set_axis_off()
        if kind == "mask":
            axes.imshow(_paint(plane, colours), aspect="auto", interpolation="nearest")
            _mark_sides(axes, sides)
        else:
            low, high_value = grey_window(case, channel)
            axes.imshow(plane, cmap="gray", vmin=low, vmax=high_value, aspect="auto", interpolation="bicubic")
        if kind == "synthetic":
            _outline(axes, mask, outlined_labels(case.mask), colours)
        left += wide * scale


def _paint(labels: NDArray[np.uint8], colours: Mapping[int, RGB]) -> NDArray[np.float64]:
    table = np.zeros((256, 3))
    for label, colour in colours.items():
        table[label] = colour
    return table[labels]


def _mark_sides(axes: Axes, sides: tuple[str, str]) -> None:
    for x, side in zip((0.03, 0.97), sides, strict=True):
        axes.text(x, 0.98, side, transform=axes.transAxes, color=DIM, fontsize=8, ha="center", va="top")


def _outline(axes: Axes, mask: NDArray[np.uint8], labels: Sequence[int], colours: Mapping[int, RGB]) -> None:
    """Edges of the mask (thin, white) and of its small labels, on the picture's own pixels."""
    shapes = [
        (mask > 0, (1.0, 1.0, 1.0), 0.6, 0.45),
        *((mask == label, colours[label], 1.1, 0.95) for label in labels),
    ]
    for shape, colour, width, alpha in shapes:
        if shape.any() and not shape.all():
            smooth = ndimage.gaussian_filter(shape.astype(np.float32), 0.5)
            axes.contour(smooth, levels=[0.5], colors=[colour], linewidths=width, alpha=alpha)


def _legend(canvas: Canvas, colours: Mapping[int, RGB], names: Mapping[int, str]) -> None:
    from matplotlib.patches import Patch

    names = {label: one_line(names.get(label, f"label {label}"), 28).replace("_", " ") for label in colours}
    handles = [Patch(facecolor=colour, label=names[label]) for label, colour in colours.items()]
    legend = canvas.figure.legend(
        handles=handles, loc="upper right",
        bbox_to_anchor=(1 - MARGIN_IN / canvas.width, 1 - 0.2 / canvas.height),
        borderaxespad=0, ncols=min(max(len(handles), 1), 6), frameon=False, labelcolor=WHITE, fontsize=11,
        handlelength=1.0, handleheight=1.0, columnspacing=1.4,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _caption(case: Case) -> str:
    voxel = " × ".join(f"{side:.3g}" for side in case.voxel_size_mm)
    size = " × ".join(str(side) for side in case.mask.shape[::-1])
    parts = [one_line(case.id, 60), one_line(str(case.modality_names[0]), 30), f"{size} voxels of {voxel} mm"]
    if case.similarity is not None and np.isfinite(case.similarity):
        parts.append(f"correlation with the real volume {case.similarity:.3f}")
    return "   ·   ".join(parts)


def _footer(
    canvas: Canvas, top: float, height: float, curve: Sequence[Mapping[str, float]], facts: Mapping[str, str]
) -> None:
    canvas.rule(MARGIN_IN, top, canvas.width - 2 * MARGIN_IN)
    width = 0.47 * canvas.width
    draw_loss(canvas.axes(MARGIN_IN + 0.55, top + 0.5, width - 0.55, height - 1.15), curve)
    canvas.text(MARGIN_IN, top + 0.15, "Training loss", size=13, weight="bold")
    left = MARGIN_IN + width + 0.5
    canvas.text(left, top + 0.15, "Run", size=13, weight="bold")
    for row, (name, value) in enumerate(facts.items()):
        canvas.text(left, top + 0.5 + 0.27 * row, one_line(name, 28), size=10.5, colour=DIM)
        canvas.text(left + 2.4, top + 0.5 + 0.27 * row, one_line(value, 62), size=10.5)


def draw_loss(axes: Axes, curve: Sequence[Mapping[str, float]]) -> None:
    """Loss over optimizer steps, logarithmic: every logged value, and their running mean."""
    rows = [
        (row["step"], row["loss"]) for row in curve if "loss" in row and np.isfinite(row["loss"]) and row["loss"] > 0
    ]
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(which="both", colors=DIM, labelsize=9)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_xlabel("optimizer step", color=DIM)
    if not rows:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, color=DIM, ha="center")
        return
    steps, losses = np.array(rows, dtype=np.float64).T
    axes.semilogy(steps, losses, color=LINE, alpha=0.35, linewidth=1, marker="." if len(rows) < 3 else None)
    axes.semilogy(steps, _running_mean(losses, max(1, len(rows) // 15)), color=LINE, linewidth=2)
    axes.margins(x=0.01)


def _running_mean(values: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """Exponential mean over about `span` values, unbiased at the start."""
    keep = 1 - 1 / span
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return np.array(means)


def loss_png(curve: Sequence[Mapping[str, float]]) -> bytes:
    """The loss curve alone."""
    canvas = Canvas(8.0, 3.2)
    draw_loss(canvas.axes(0.65, 0.2, 7.15, 2.4), curve)
    return canvas.png()


def one_line(text: str, width: int) -> str:
    """`text` without line breaks or control characters, cut to `width` characters."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return plain if len(plain) <= width else plain[: width - 1] + "…"
