"""report.png and report.html: what the demo learned, to be judged by eye. The page loads nothing."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from hpc_ddpm.data.slices import RGB, Case, Correlation, label_colours, orthogonal_slices, voxel_correlation
from hpc_ddpm.demo.figures import colour_map, loss_png, report_png, strip_png
from hpc_ddpm.files import atomic_path

__all__ = ["Case", "Correlation", "label_colours", "orthogonal_slices", "voxel_correlation", "write_report"]

STYLE = """
:root {
  color-scheme: light dark; --ink: #1c2128; --dim: #5b6573; --page: #fff; --card: #f4f6f8;
  --rule: #d9dee4;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebef; --dim: #98a2b0; --page: #0e1116; --card: #171c23; --rule: #2a3038; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 78rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--rule); }
p { color: var(--dim); margin: .3rem 0; max-width: 70ch; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
.legend i {
  display: inline-block; width: .9em; height: .9em; margin-right: .45em; border-radius: 2px;
  vertical-align: -.08em; border: 1px solid var(--rule);
}
.planes {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .8rem;
  margin-bottom: .8rem;
}
figure { margin: 0; background: #000; color: #98a2b0; border-radius: 8px; overflow: hidden; }
.curve { max-width: 44rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { padding: .35rem .7rem .5rem; font-size: .9rem; }
figcaption b { color: #f2f4f7; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); gap: .6rem;
  margin: 0;
}
dl div { background: var(--card); border-radius: 8px; padding: .5rem .8rem; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border-radius: 8px; padding: .8rem; overflow-x: auto; font-size: .88rem; }
"""


def write_report(
    folder: Path,
    cases: Sequence[Case],
    curve: Sequence[Mapping[str, float]],
    facts: Mapping[str, str],
    commands: Sequence[str],
    *,
    title: str = "New volumes for held-out masks",
    label_names: Mapping[int, str] | None = None,
) -> tuple[Path, Path]:
    """Write `report.png` (first modality of the first cases) and `report.html` (everything) to `folder`.

    Args:
        folder: made if it is missing.
        cases: what was sampled; see `Case` for shapes and units.
        curve: rows of metrics.jsonl; `step` and `loss` are drawn.
        facts: name -> value, shown in this order.
        commands: what ran, one line each.
        title: headline of both files.
        label_names: label -> name for the legend; others are called by their number.

    Returns the paths (png, html). Raises ConfigError if matplotlib is missing.
    """
    folder = Path(folder)
    cases = [case.to_ras() for case in cases]
    colours = colour_map(cases)
    names = {label: (label_names or {}).get(label, f"label {label}") for label in colours}
    png, page = folder / "report.png", folder / "report.html"
    with atomic_path(png) as temporary:
        temporary.write_bytes(report_png(title, cases, colours, names, curve, facts))
    with atomic_path(page) as temporary:
        html = _page(title, cases, colours, names, curve, facts, commands)
        temporary.write_text(html, encoding="utf-8", errors="replace")
    return png, page


def _page(
    title: str,
    cases: Sequence[Case],
    colours: Mapping[int, RGB],
    names: Mapping[int, str],
    curve: Sequence[Mapping[str, float]],
    facts: Mapping[str, str],
    commands: Sequence[str],
) -> str:
    swatches = "".join(
        f'<li><i style="background:{_css(colour)}"></i>{escape(names[label].replace("_", " "))}</li>'
        for label, colour in colours.items()
    )
    numbers = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>Each mask was kept out of training. The planes are axial, coronal and sagittal, through the largest piece
of the mask's rarest label, cut to the mask's surroundings; the patient's left is on the left. Real and
synthetic share one grey scale. The outlines on the synthetic volume are those of its mask.</p>
<ul class="legend">{swatches}</ul>
{"".join(_section(case, colours) for case in cases)}
<h2>Training loss</h2>
<figure class="curve">{_image(loss_png(curve), "training loss over optimizer steps")}</figure>
<h2>Run</h2>
<dl>{numbers}</dl>
<h2>Commands</h2>
<pre>{escape(chr(10).join(commands))}</pre>
</body>
</html>
"""


def _section(case: Case, colours: Mapping[int, RGB]) -> str:
    """One case: for every modality a row of mask, real (if there is one) and synthetic."""
    mask = _figure(case, "mask", 0, "", colours)
    kinds = ("synthetic",) if case.real is None else ("real", "synthetic")
    rows = [
        [mask, *(_figure(case, kind, channel, modality, colours) for kind in kinds)]
        for channel, modality in enumerate(case.modality_names)
    ]
    planes = "\n".join(f'<div class="planes">{"".join(row)}</div>' for row in rows)
    note = "there is no real volume for this mask" if case.real is None else ""
    if case.similarity is not None and math.isfinite(case.similarity):
        note = f"correlation with the real volume: {case.similarity:.3f}"
    return f"<h2>{escape(case.id)}</h2>\n<p>{note}</p>\n{planes}\n"


def _figure(case: Case, kind: str, channel: int, modality: str, colours: Mapping[int, RGB]) -> str:
    picture = _image(strip_png(case, kind, channel, colours), f"{kind} {modality} of {case.id}")
    return f"<figure>{picture}<figcaption><b>{kind.capitalize()}</b> {escape(modality)}</figcaption></figure>\n"


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _css(colour: RGB) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)
