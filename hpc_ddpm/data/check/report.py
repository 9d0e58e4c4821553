"""The page to look through a source by eye: every case's planes with the mask's outlines, and what was found."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.check.cohort_checks import Facts
from hpc_ddpm.data.check.findings import KINDS, SEVERITIES, Finding, by_kind
from hpc_ddpm.data.check.pictures import colours
from hpc_ddpm.data.check.run import CheckReport
from hpc_ddpm.files import atomic_path

MAX_EMBEDDED = 200
"""Cases whose pictures go into the page; with more, they become files in a folder beside it."""
MAX_GENERAL = 50
"""Findings about no subject of their own that are listed on top."""

STYLE = """
:root { color-scheme: dark; --rule: #2a3038; --dim: #98a2b0; --error: #ff6b6b; --warning: #ffb454; --note: #7aa2d6; }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.2rem; background: #0e1116; color: #e8ebef; font: .9rem/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; }
p, .dim { color: var(--dim); margin: .2rem 0; }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  padding: .6rem 0; background: #0e1116; border-bottom: 1px solid var(--rule); }
input, select { font: inherit; padding: .25rem .5rem; background: #171c23; color: inherit; border-radius: 6px;
  border: 1px solid var(--rule); }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .8rem; margin-top: .8rem; }
article { background: #171c23; border-radius: 8px; overflow: hidden; content-visibility: auto;
  contain-intrinsic-size: 20rem 12rem; }
article[hidden] { display: none; }
article img { display: block; width: 100%; height: auto; background: #000; }
article div { padding: .4rem .7rem .6rem; }
ul { margin: .3rem 0 0; padding: 0; list-style: none; }
.error b { color: var(--error); } .warning b { color: var(--warning); } .note b { color: var(--note); }
i { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 .9em; border-radius: 2px; }
"""

SCRIPT = """
const form = document.querySelector("form"), cards = [...document.querySelectorAll("article")];
form.addEventListener("input", () => {
  const text = form.id_filter.value.toLowerCase(), kind = form.kind_filter.value;
  let shown = 0;
  for (const card of cards) {
    const fits = card.dataset.id.includes(text) && (!kind || card.dataset.kinds.split(" ").includes(kind));
    card.hidden = !fits;
    shown += fits;
  }
  form.querySelector("output").value = shown + " of " + cards.length;
});
form.addEventListener("submit", event => event.preventDefault());
"""


def write_check_report(path: Path, report: CheckReport) -> Path:
    """Write the page; it loads nothing but, for more than `MAX_EMBEDDED` cases, pictures in `<name>_files/`.

    Args:
        path: of the HTML file.
        report: from `check` with pictures.
    """
    folder = path.with_name(f"{path.stem}_files") if len(report.cases) > MAX_EMBEDDED else None
    own: dict[str, list[Finding]] = {case.id: [] for case in report.cases}
    for finding in report.findings:
        for subject in finding.subjects:
            own[subject].append(finding)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as page:
        page.write(_head(report))
        for number, case in enumerate(report.cases):
            page.write(_card(case, own[case.id], _source(case.picture, folder, number), report.config.labels.names))
        page.write(f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n")
    return path


def open_page(title: str) -> str:
    """A page that loads nothing, up to and with its heading."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>"""


def legend(labels: LabelsConfig) -> str:
    """Colour and name of every label, as the pictures draw them."""
    return "".join(
        f'<i style="background:#{"".join(f"{round(255 * part):02x}" for part in colour)}"></i>'
        f"{escape(labels.names[label])}"
        for label, colour in colours(labels).items()
    )


def _head(report: CheckReport) -> str:
    groups = by_kind(report.findings)
    counts = {name: sum(f.severity == name for f in report.findings) for name in SEVERITIES}
    totals = ", ".join(f"{count} {name}s" for name, count in counts.items())
    options = "".join(f'<option value="{kind}">{kind} ({len(group)})</option>' for kind, group in groups.items())
    general = [finding for finding in report.findings if not finding.subjects]
    listed = "".join(_line(finding) for finding in general[:MAX_GENERAL])
    more = f"<li>and {len(general) - MAX_GENERAL} more</li>" if len(general) > MAX_GENERAL else ""
    title = f"{len(report.cases)} subjects of {report.source}"
    return f"""{open_page(title)}
<p>{totals}. Axial, coronal and sagittal plane through the largest piece of the rarest label, one row per modality
({escape(", ".join(report.config.modalities))}); the patient's left is on the left.</p>
<ul>{listed}{more}</ul>
<form>
<input name="id_filter" placeholder="subject contains …" aria-label="subject contains">
<select name="kind_filter" aria-label="with this finding"><option value="">all subjects</option>{options}</select>
<output>{len(report.cases)} of {len(report.cases)}</output>
<span>{legend(report.config.labels)}</span>
</form>
<main>
"""


def _card(case: Facts, findings: Sequence[Finding], source: str, names: Mapping[int, str]) -> str:
    image = f'<img loading="lazy" alt="planes of {escape(case.id)}" src="{source}">' if source else ""
    kinds = " ".join(sorted({finding.kind for finding in findings}))
    facts = " · ".join(escape(fact) for fact in _facts(case, names))
    return (
        f'<article data-id="{escape(case.id.lower())}" data-kinds="{kinds}">{image}<div><b>{escape(case.id)}</b>'
        f"<p>{facts}</p><ul>{''.join(_line(finding) for finding in findings)}</ul></div></article>\n"
    )


def _facts(case: Facts, names: Mapping[int, str]) -> Iterator[str]:
    if case.shape and case.voxel_size_mm:
        yield "×".join(str(side) for side in case.shape)
        yield "×".join(f"{side:g}" for side in case.voxel_size_mm) + " mm"
        yield case.orientation
    for name, count in zip(names.values(), case.label_voxels or (), strict=False):
        yield f"{name} {count}"


def _line(finding: Finding) -> str:
    file = f' title="{escape(finding.file)}"' if finding.file else ""
    advice = escape(KINDS[finding.kind].advice)
    return (
        f'<li class="{finding.severity}"{file}><b>{finding.kind}</b> {escape(finding.found)} '
        f'<span class="dim">→ {advice}</span></li>'
    )


def _source(picture: bytes | None, folder: Path | None, number: int) -> str:
    """What `src` of an image says; writes the file if there is a folder for it."""
    if picture is None:
        return ""
    if folder is None:
        return f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
    name = f"{number:06d}.png"
    with atomic_path(folder / name, durable=False) as temporary:
        temporary.write_bytes(picture)
    return f"{quote(folder.name)}/{name}"
