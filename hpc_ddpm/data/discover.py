"""Find subjects in a source: pair masks and images by subject id, and name every file that has no partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.bids import MASK, is_bids, read_bids
from hpc_ddpm.data.covariates import read_covariates
from hpc_ddpm.data.formats import is_volume, stem
from hpc_ddpm.data.table import TABLE_SUFFIXES, read_table, table_modalities
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import is_file_name, reading_from

MASK_FOLDERS = ("mask", "masks", "seg", "labels")
IMAGE_FOLDERS = ("image", "images")
MASK_ENDINGS = ("seg", "mask", "label", "labels")
ALIASES = {"t1": ("t1n",), "t1ce": ("t1c", "t1gd"), "t2": ("t2w",), "flair": ("t2f",)}
"""BraTS-2023 names of the modalities, besides their own."""


@dataclass(frozen=True)
class Subject:
    """A mask and one image per modality."""

    id: str
    mask: Path
    images: Mapping[str, Path]
    split: str | None = None
    """train, val or test where the table says so."""
    covariates: tuple[float, ...] = ()
    """One number for each of `data.covariates`; see `covariates.to_numbers`."""


@dataclass(frozen=True)
class Unmatched:
    """A file that is not used, and why."""

    path: Path
    reason: str
    kind: str = "unmatched-file"
    """Which finding of `data.check` it is."""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Discovery:
    """What a source holds."""

    layout: str
    """tree, brats_raw, bids or table."""
    subjects: tuple[Subject, ...]
    """Complete ones, sorted by id."""
    unmatched: tuple[Unmatched, ...]


@dataclass
class _Files:
    """Candidate files by (subject id, role); a role is `mask` or a modality."""

    found: dict[tuple[str, str], list[Path]] = field(default_factory=dict)
    unmatched: list[Unmatched] = field(default_factory=list)
    splits: dict[str, str] = field(default_factory=dict)

    def add(self, subject: str, role: str, path: Path) -> None:
        """A candidate, unless its name will not do."""
        if reason := _fault(subject, path):
            self.leave_out(path, reason)
        else:
            self.found.setdefault((subject, role), []).append(path)

    def leave_out(self, path: Path, reason: str, kind: str = "unmatched-file") -> None:
        """Say why it is not used."""
        self.unmatched.append(Unmatched(_printable(path), reason, kind))


def discover(source: str | Path, config: DataConfig) -> Discovery:
    """Find the subjects of `source` in `config.layout` (auto: by looking).

    Raises:
        DataFormatError: nothing there, an unknown layout, a broken table, not one complete subject, or covariates
            that are missing or wrong.
    """
    source = Path(source)
    layout = find_layout(source) if config.layout == "auto" else config.layout
    with reading_from(source):
        files = _read(layout, source, config.modalities)
    subjects, unmatched = _pair(files, config.modalities)
    if not subjects:
        some = "; ".join(str(entry) for entry in unmatched[:3])
        raise DataFormatError(
            f"{source}: no complete subject found as layout '{layout}' ({len(unmatched)} files do not pair: "
            f"{some or 'no volumes'}); expected a mask and {', '.join(config.modalities)} for each subject"
        )
    if config.covariates:
        numbers = read_covariates(source, config.covariates, [subject.id for subject in subjects])
        subjects = tuple(replace(subject, covariates=of) for subject, of in zip(subjects, numbers, strict=True))
    return Discovery(layout, subjects, unmatched)


def find_layout(source: Path) -> str:
    """`table` for a table, `tree` for a folder with a mask folder, `bids`, or `brats_raw` for one folder per case.

    Raises:
        DataFormatError: none of these; says what is there.
    """
    with reading_from(source):
        return _find_layout(source)


def _find_layout(source: Path) -> str:
    if source.is_file() and source.suffix.lower() in TABLE_SUFFIXES:
        return "table"
    if not source.is_dir():
        found = "not a folder or a table" if source.exists() else "no such folder or table"
        raise DataFormatError(f"{source}: {found}; give a folder of volumes or a .csv, .tsv or .json table")
    folders = _folders(source)
    if any(folder.name.lower() in MASK_FOLDERS for folder in folders):
        return "tree"
    if is_bids(source):
        return "bids"
    if any(_ending(stem(path), MASK_ENDINGS) for case in _cases(source) for path in _volumes(case)):
        return "brats_raw"
    names = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
    raise DataFormatError(
        f"{source}: found {names}; expected a folder called {', '.join(MASK_FOLDERS)} beside one per "
        "modality, sub-*/anat (BIDS), or one folder per case with a *_seg file"
    )


def find_masks(path: str | Path) -> list[tuple[str, Path]]:
    """(subject id, mask), sorted, of one volume, a folder of masks, or any layout.

    Raises:
        DataFormatError: no mask there, a name that will not do, or one id twice.
    """
    path = Path(path)
    with reading_from(path):
        masks = list(_masks(path))
    for subject, file in masks:
        if reason := _fault(subject, file):
            raise DataFormatError(f"{_printable(file)}: {reason}")
    twice = [subject for subject, count in Counter(subject for subject, _ in masks).items() if count > 1]
    if twice:
        raise DataFormatError(f"{path}: more than one mask for {', '.join(sorted(twice)[:5])}; keep one of each")
    if not masks:
        raise DataFormatError(f"{path}: no masks found; expected .nii, .nii.gz, .mgz or .mgh label volumes")
    return sorted(masks)


def _masks(path: Path) -> Iterator[tuple[str, Path]]:
    if path.exists() and is_volume(path):
        yield _subject_id(path, MASK_ENDINGS), path
    elif path.is_dir() and (volumes := _volumes(path)):
        yield from ((_subject_id(file, MASK_ENDINGS), file) for file in volumes)
    else:
        for (subject, role), files in _read(find_layout(path), path, ()).found.items():
            yield from ((subject, file) for file in files if role == MASK)


def source_modalities(source: str | Path) -> tuple[str, ...]:
    """The modalities that a source offers, by its folders, file endings or columns, in its own order.

    A single unnamed image folder is `t1`; empty where there are only masks.
    """
    source = Path(source)
    layout = find_layout(source)
    if layout == "table":
        return table_modalities(source)
    if layout == "brats_raw":
        return tuple(ALIASES)
    if layout == "bids":
        there = {role for _, role, _ in read_bids(source, tuple(ALIASES))}
        return tuple(modality for modality in ALIASES if modality in there)
    with reading_from(source):
        folders = [folder.name for folder in _folders(source) if _volumes(folder)]
    names = tuple(name for name in folders if name.lower() not in MASK_FOLDERS)
    return ("t1",) if len(names) == 1 and names[0].lower() in IMAGE_FOLDERS else names


# ----------------------------------------------------------------------------------------------- layouts


def _read(layout: str, source: Path, modalities: tuple[str, ...]) -> _Files:
    readers: dict[str, Callable[[Path, tuple[str, ...]], _Files]] = {
        "tree": _read_tree,
        "brats_raw": _read_cases,
        "bids": _read_bids,
        "table": _read_rows,
    }
    return readers[layout](source, modalities)


def _read_tree(source: Path, modalities: tuple[str, ...]) -> _Files:
    """mask/ and one folder per modality (a single one may be called image/)."""
    files = _Files()
    for file in _volumes(_one_folder(source, MASK_FOLDERS, "masks")):
        files.add(_subject_id(file, MASK_ENDINGS), MASK, file)
    for modality in modalities:
        names = (modality.lower(), *ALIASES.get(modality.lower(), ()))
        allowed = names + IMAGE_FOLDERS if len(modalities) == 1 else names
        endings = names + IMAGE_FOLDERS
        for file in _volumes(_one_folder(source, allowed, f"modality {modality}")):
            files.add(_subject_id(file, endings), modality, file)
    return files


def _read_cases(source: Path, modalities: tuple[str, ...]) -> _Files:
    """One folder per case, which names the subject; files are told apart by their ending."""
    files = _Files()
    roles = {ending: MASK for ending in MASK_ENDINGS}
    for modality, aliases in ALIASES.items():
        roles |= dict.fromkeys((modality, *aliases), modality)
    wanted = {modality.lower(): modality for modality in modalities}
    roles |= {name: name for name in wanted}
    for case in _cases(source):
        for file in _volumes(case):
            ending = _ending(stem(file), roles)
            if ending is None:
                files.leave_out(file, f"its name ends in none of {', '.join(sorted(roles))}")
            elif roles[ending] == MASK or roles[ending] in wanted:
                files.add(case.name, wanted.get(roles[ending], MASK), file)
    return files


def _read_bids(source: Path, modalities: tuple[str, ...]) -> _Files:
    files = _Files()
    for subject, role, path in read_bids(source, modalities):
        files.add(subject, role, path)
    return files


def _read_rows(source: Path, modalities: tuple[str, ...]) -> _Files:
    files = _Files()
    for row in read_table(source, modalities):
        if row.split:
            files.splits[row.subject] = row.split
        for role, path in row.files.items():
            if _is_there(path):
                files.add(row.subject, role, path)
            else:
                files.leave_out(path, f"{row.place}: no such file", "missing-file")
    return files


def _pair(files: _Files, modalities: tuple[str, ...]) -> tuple[tuple[Subject, ...], tuple[Unmatched, ...]]:
    roles = (MASK, *modalities)
    subjects, unmatched = [], list(files.unmatched)
    for subject in sorted({subject for subject, _ in files.found}):
        groups = {role: files.found.get((subject, role), []) for role in roles}
        missing = [role for role, paths in groups.items() if not paths]
        double = [role for role, paths in groups.items() if len(paths) > 1]
        if not missing and not double:
            images = {modality: groups[modality][0] for modality in modalities}
            subjects.append(Subject(subject, groups[MASK][0], images, files.splits.get(subject)))
            continue
        kind, reason = "unmatched-file", f"subject {subject} has no {', '.join(missing)}"
        if not missing:
            kind, reason = "duplicate-subject", f"subject {subject} has more than one {', '.join(double)}"
        unmatched += [Unmatched(path, reason, kind) for paths in groups.values() for path in paths]
    return tuple(subjects), tuple(unmatched)


# ------------------------------------------------------------------------------------------------- names


def _volumes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_volume(path) and not path.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataFormatError(f"{folder}: no such folder; check the path")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _cases(source: Path) -> list[Path]:
    """Folders with volumes, at most two levels down (BraTS 2018 has HGG/ and LGG/)."""
    first = _folders(source)
    return [folder for top in first for folder in (top, *_folders(top)) if _volumes(folder)]


def _one_folder(source: Path, names: Iterable[str], what: str) -> Path:
    """The folder of `source` with one of these names, in any case."""
    names = tuple(names)
    matches = [folder for folder in _folders(source) if folder.name.lower() in names]
    if len(matches) == 1:
        return matches[0]
    there = ", ".join(folder.name for folder in matches or _folders(source)) or "no folders"
    raise DataFormatError(
        f"{source}: found {there} where one folder of {what} is expected, called {' or '.join(names)}"
    )


def _ending(name: str, endings: Iterable[str]) -> str | None:
    """Which of `endings` the name closes with, after `_` or `-`."""
    lowered = name.lower()
    return next((end for end in endings if lowered.endswith((f"_{end}", f"-{end}"))), None)


def _subject_id(path: Path, endings: Iterable[str]) -> str:
    name = stem(path)
    ending = _ending(name, endings)
    return name[: -len(ending) - 1] if ending else name


def _fault(subject: str, path: Path) -> str:
    """Why the file cannot be used under its name; empty where it can."""
    if _printable(path) != path:
        return "its name is not UTF-8; rename it"
    if not is_file_name(subject):
        return f"the subject would be called {subject!r}; rename it: not empty, hidden, or with slashes or line breaks"
    return ""


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name of more than 255 bytes
        return False


def _printable(path: Path) -> Path:
    return Path(str(path).encode(errors="backslashreplace").decode())
