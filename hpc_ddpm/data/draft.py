"""A first version of a table for a source that no layout fits: every volume below it, by subject and role, to edit."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_ddpm.data.layouts.base import MASK, is_volume, is_volume_name, stem
from hpc_ddpm.data.patients import BY_NAME, KNOWN_NAMES, patient_by_name
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import is_file_name, reading_from, write_text

MASK_WORDS = {
    *("mask", "masks", "seg", "segm", "segs", "segmentation", "segmentations", "label", "labels", "labelstr", "roi"),
    *("dseg", "gt", "ground", "truth", "gtv", "aseg", "aparc+aseg", "lesion", "lesions", "contour", "contours"),
    *("annotation", "annotations", "glistrboost", "tumormask", "hippocampal"),
}
MODALITY_WORDS = {
    "t1": "t1", "t1w": "t1", "t1n": "t1", "mprage": "t1", "mpr": "t1", "mp-rage": "t1", "spgr": "t1",
    "t1ce": "t1ce", "t1c": "t1ce", "t1gd": "t1ce", "t1gad": "t1ce", "t1post": "t1ce",
    "t2": "t2", "t2w": "t2", "flair": "flair", "t2f": "flair", "ct": "ct", "cta": "cta", "cine": "cine",
    "adc": "adc", "dwi": "dwi", "swi": "swi", "pd": "pd", "pdw": "pd", "bold": "bold",
}  # fmt: skip
"""Words in names that tell a modality."""
IMAGE = "image"
"""Column of images whose modality no name tells."""
PLAIN = {
    *("image", "images", "img", "imgs", "imagestr", "volume", "volumes", "scan", "scans", "data", "orig", "nii"),
    *("nifti", "anat", "mri", "dicom"),
}
"""Words in names that tell nothing."""
SURE, NOTE = "yes", "note"


@dataclass(frozen=True)
class _Candidate:
    """A volume, and what its name and folders tell."""

    path: Path
    """Below the source."""
    role: str
    """mask, a modality, or `image`."""
    rest: str
    """The name without the words that tell the role."""


@dataclass(frozen=True)
class Draft:
    """A table to edit."""

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    """The last column says `yes` where everything is clear, else what to look at."""

    @property
    def num_sure(self) -> int:
        """Rows that need no look."""
        return sum(row[NOTE] == SURE for row in self.rows)


def draft_table(source: Path) -> Draft:
    """Find volumes anywhere below `source`, group them by subject and guess what each is.

    Raises:
        DataFormatError: no such folder, or no volume in it.
    """
    if not source.is_dir():
        raise DataFormatError(f"{source}: no such folder; give the folder that holds the volumes")
    with reading_from(source):
        candidates = [_candidate(path.relative_to(source)) for path in _volumes(source)]
    if not candidates:
        raise DataFormatError(f"{source}: no volumes found below; expected files such as .nii.gz, or DICOM series")
    groups = max((_group(candidates, key) for key in KEYS), key=_clarity)
    roles = list(dict.fromkeys(one.role for group in groups.values() for one in group if one.role != MASK))
    columns = ("subject", "patient", MASK, *sorted(roles, key=lambda role: (role == IMAGE, role)), NOTE)
    rows = tuple(_row(subject, groups[subject], columns) for subject in sorted(groups))
    return Draft(columns, rows)


def write_draft(draft: Draft, source: Path, out: Path) -> None:
    """Write the table; paths are relative to its folder where the source lies in it, else absolute.

    Raises:
        DataFormatError: `out` is there already, or has another ending than .csv or .tsv.
    """
    if out.suffix.lower() not in (".csv", ".tsv"):
        raise DataFormatError(f"{out}: a table ending in .csv or .tsv expected; give such a name")
    if out.exists():
        raise DataFormatError(f"{out}: there already, and it may have been edited; give another --out")
    base, folder = source.resolve(), out.parent.resolve()
    root = base.relative_to(folder) if base.is_relative_to(folder) else base
    text = io.StringIO()
    delimiter = "\t" if out.suffix.lower() == ".tsv" else ","
    table = csv.DictWriter(text, draft.columns, delimiter=delimiter, lineterminator="\n")
    table.writeheader()
    for row in draft.rows:
        cells = ("subject", "patient", NOTE)
        table.writerow({name: cell if name in cells or not cell else str(root / cell) for name, cell in row.items()})
    write_text(out, text.getvalue())


def _volumes(source: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(source, followlinks=True):
        here = Path(place)
        if here != source and is_volume(here):
            yield here
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in sorted(files) if is_volume_name(here / name) and not name.startswith("."))


def _candidate(path: Path) -> _Candidate:
    """The role by the words of the name, else by those of the nearest folder that tells one."""
    name = stem(path)
    role = MASK if path.name.lower().endswith(".seg.nrrd") else _role(name)
    rest = re.sub(r"[^\w+]+|_+", "_", _without_words(name)).strip("_")
    for folder in reversed(path.parts[:-1]):
        role = role or _role(folder)
    return _Candidate(path, role or IMAGE, rest)


def _words(text: str) -> list[str]:
    return [
        word.lower() for word in re.split(r"[^A-Za-z0-9+]+|(?<=[A-Za-z])(?=\d{2})|(?<=[a-z])(?=[A-Z])", text) if word
    ]


def _role(text: str) -> str | None:
    words = [*_words(text), *(word.lower() for word in re.split(r"[^A-Za-z0-9+]+", text))]
    if any(word in MASK_WORDS for word in words):
        return MASK
    found = [MODALITY_WORDS[word] for word in words if word in MODALITY_WORDS]
    return found[-1] if found else None


def _without_words(name: str) -> str:
    """A name without the words that tell roles, so that a mask and its image have the same rest."""
    drop = MASK_WORDS | PLAIN | set(MODALITY_WORDS)
    parts = re.split(r"([^A-Za-z0-9+]+|(?<=[A-Za-z])(?=\d{2}))", name)
    return "".join(part for part in parts if part.lower() not in drop)


def _by_name(candidate: _Candidate) -> str:
    return candidate.rest


def _by_folder(candidate: _Candidate) -> str:
    """The folder, above those that only tell a role."""
    parts = [part for part in candidate.path.parts[:-1] if _role(part) is None and part.lower() not in PLAIN]
    return parts[-1] if parts else ""


def _by_top(candidate: _Candidate) -> str:
    return candidate.path.parts[0] if len(candidate.path.parts) > 1 else ""


def _by_known_name(candidate: _Candidate) -> str:
    """The part of the path whose name is known to tell a patient, such as sub-01_ses-1 or BraTS-GLI-00001-000."""
    parts = (*candidate.path.parts[:-1], candidate.rest)
    return next((part for part in parts if any(pattern.fullmatch(part) for pattern in KNOWN_NAMES)), "")


KEYS: tuple[Callable[[_Candidate], str], ...] = (_by_known_name, _by_name, _by_folder, _by_top)
"""What may name the subject of a volume; the one that leaves the fewest questions is taken."""


def _group(candidates: list[_Candidate], key: Callable[[_Candidate], str]) -> dict[str, list[_Candidate]]:
    groups = defaultdict(list)
    for candidate in candidates:
        groups[key(candidate)].append(candidate)
    return groups


def _clarity(groups: Mapping[str, list[_Candidate]]) -> tuple[int, int]:
    """How many subjects leave no question, and then, how few volumes have no subject."""
    clear = sum(not _questions(group) for name, group in groups.items() if is_file_name(name))
    return clear, -sum(len(group) for name, group in groups.items() if not is_file_name(name))


def _questions(group: list[_Candidate]) -> list[str]:
    roles = [one.role for one in group]
    twice = [role for role in dict.fromkeys(roles) if roles.count(role) > 1]
    missing = [what for what, is_there in ((MASK, MASK in roles), (IMAGE, set(roles) - {MASK})) if not is_there]
    return [*(f"no {role} found" for role in missing), *(f"{roles.count(role)} files for {role}" for role in twice)]


def _row(subject: str, group: list[_Candidate], columns: tuple[str, ...]) -> dict[str, str]:
    files: dict[str, list[Path]] = defaultdict(list)
    for one in group:
        files[one.role].append(one.path)
    notes = [] if is_file_name(subject) else ["no name for the subject"]
    notes += _questions(group)
    more = [str(path) for paths in files.values() for path in paths[1:]]
    if more:
        notes.append(f"not used: {' '.join(more[:5])}")
    first = {role: str(paths[0]) for role, paths in files.items()}
    patient = patient_by_name(subject, BY_NAME)
    about = {"subject": subject, "patient": patient, NOTE: "; ".join(notes) or SURE}
    return {name: about.get(name, first.get(name, "")) for name in columns}
