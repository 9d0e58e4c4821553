"""The page to look through a generated set by eye. It stays quick at 10,000 volumes: one page of cards at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hpc_ddpm.config import Config, config_from_dict
from hpc_ddpm.data.check.pictures import picture
from hpc_ddpm.data.check.report import legend, open_page
from hpc_ddpm.data.nifti import ras_voxel_size_mm, turn_to_ras
from hpc_ddpm.data.parallel import ordered_map
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import atomic_path, write_text, writing_to
from hpc_ddpm.sampling.folder import Failure, SampleFolder, find_folder
from hpc_ddpm.sampling.read import read_generated

PAGE, PICTURES = "gallery.html", "gallery"
HEIGHT = 96
CARDS_PER_PAGE = 60
MAX_FAILURES = 50

SCRIPT = """
const all = JSON.parse(document.getElementById("volumes").textContent), form = document.querySelector("form");
const main = document.querySelector("main"), output = document.querySelector("output");
let page = 0, shown = all;
const make = (parent, tag, text) => {
  const node = parent.appendChild(document.createElement(tag));
  node.textContent = text ?? "";
  return node;
};
function draw() {
  const last = Math.max(0, Math.ceil(shown.length / SIZE) - 1);
  page = Math.min(Math.max(page, 0), last);
  output.textContent = `${shown.length} of ${all.length}, page ${page + 1} of ${last + 1}`;
  main.replaceChildren();
  for (const volume of shown.slice(page * SIZE, (page + 1) * SIZE)) {
    const card = make(main, "article");
    if (volume.picture) Object.assign(make(card, "img"), {src: volume.picture, alt: `planes of ${volume.id}`});
    const text = make(card, "div");
    make(text, "b", volume.id);
    for (const fact of volume.facts) make(text, "p", fact);
  }
  scrollTo(0, 0);
}
function choose() {
  const text = form.id_filter.value.toLowerCase(), order = form.order.value;
  const below = form.below.value === "" ? Infinity : Number(form.below.value);
  shown = all.filter(v => v.id.toLowerCase().includes(text) && (below === Infinity || v.fidelity < below));
  const score = v => v.fidelity ?? 2;
  if (order) shown = shown.toSorted((a, b) => order === "worst" ? score(a) - score(b) : score(b) - score(a));
  page = 0;
  draw();
}
form.addEventListener("input", choose);
form.addEventListener("submit", event => event.preventDefault());
form.back.addEventListener("click", () => { page--; draw(); });
form.next.addEventListener("click", () => { page++; draw(); });
draw();
"""


def write_gallery(
    out: Path, *, num_workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write gallery.html, which loads nothing but the pictures in gallery/; pictures that are there are kept.

    Args:
        out: folder of the set.
        num_workers: processes that draw.
        progress: called with (volumes drawn, all volumes).

    Raises:
        DataFormatError: `out` is not a generated set.
        ClusterError: `out` cannot be written.
    """
    folder = find_folder(out)
    config = config_from_dict(folder.made_with()["config"], str(folder.path))
    records = list(folder.records())
    draw = partial(_draw, folder.path, config)
    cards = []
    with writing_to(folder.path, "place for the set"):
        for number, card in enumerate(ordered_map(draw, records, num_workers, preload=__name__), start=1):
            cards.append(card)
            progress(number, len(records))
        write_text(folder.path / PAGE, _page(folder, config, cards, folder.failures()))
    return folder.path / PAGE


def _draw(out: Path, config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """What the page says of one volume; its name changes with its voxels."""
    name = f"{record['id']}-{record['voxels_sha256'][:8]}.png"
    path, problem = out / PICTURES / name, ""
    if not path.exists():
        try:
            made = read_generated(out, record, config.data)
        except DataFormatError as error:
            problem = str(error)
        else:
            volumes = [turn_to_ras(volume, made.affine) for volume in made.image]
            mask, voxels = turn_to_ras(made.mask, made.affine), ras_voxel_size_mm(made.affine)
            png = picture(volumes, mask, voxels, config.data.labels, HEIGHT)
            with atomic_path(path, durable=False) as temporary:
                temporary.write_bytes(png)
    score = record["fidelity"]
    facts = [f"mask {record['mask_id']}, seed {record['seed']}"]
    facts += [f"fidelity {score:.3f}"] if score is not None else []
    facts += [f"try {record['attempt'] + 1}"] if record["attempt"] else []
    facts += [f"mask {change}" for change in record["mask_changes"]]
    facts += [problem] if problem else []
    source = "" if problem else f"{PICTURES}/{quote(name)}"
    return {"id": record["id"], "picture": source, "fidelity": score, "facts": facts}


def _page(folder: SampleFolder, config: Config, cards: list[dict[str, Any]], failures: list[Failure]) -> str:
    failed = "".join(
        f'<li class="error"><b>{escape(failure.id)}</b> {escape(failure.kind)}: {escape(failure.reason)}</li>'
        for failure in failures[:MAX_FAILURES]
    )
    more = f"<li>and {len(failures) - MAX_FAILURES} more</li>" if len(failures) > MAX_FAILURES else ""
    title = f"{len(cards)} generated volumes of {folder.path.resolve().name}"
    modalities, sampling = escape(", ".join(config.data.modalities)), config.sampling
    content = json.dumps(cards, ensure_ascii=False).replace("<", "\\u003c")
    return f"""{open_page(title)}
<p>{sampling.sampler}, {sampling.num_steps} steps. Axial, coronal and sagittal plane through the largest piece of the
rarest label, one row per modality ({modalities}); the patient's left is on the left.</p>
<ul>{failed}{more}</ul>
<form>
<input name="id_filter" placeholder="id contains …" aria-label="id contains">
<input name="below" type="number" min="0" max="1" step="0.01" placeholder="fidelity below" aria-label="fidelity below">
<select name="order" aria-label="order"><option value="">by id</option>
<option value="worst">worst fidelity first</option><option value="best">best fidelity first</option></select>
<button type="button" name="back">←</button><output></output><button type="button" name="next">→</button>
<span>{legend(config.data.labels)}</span>
</form>
<main></main>
<script type="application/json" id="volumes">{content}</script>
<script>const SIZE = {CARDS_PER_PAGE};{SCRIPT}</script>
</body>
</html>
"""
