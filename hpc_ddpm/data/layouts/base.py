"""What a layout is, which words name a role, and the files that a layout finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpc_ddpm.data.formats import is_volume, is_volume_name, stem
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import is_file_name

MASK = "mask"
MASK_FOLDERS = ("mask", "masks", "seg", "labels")
IMAGE_FOLDERS = ("image", "images")
MORE_MASK_FOLDERS = ("label", "segmentation", "segmentations")
MORE_IMAGE_FOLDERS = ("img", "imgs", "volume", "volumes")
"""Names that count where none of the others is there."""
MASK_ENDINGS = ("seg", "mask", "label", "labels")
ALIASES = {"t1": ("t1n",), "t1ce": ("t1c", "t1gd"), "t2": ("t2w",), "flair": ("t2f",)}
"""BraTS-2023 names of the modalities, besides their own."""
MORE_ENDINGS = {
    MASK: ("segm", "tumor_segmentation", "gtv", "glistrboost_manuallycorrected"),
    "t1": ("t1w",),
    "t1ce": ("t1gad", "t1post"),
}
"""Names that count where a subject has no file with one of the others."""
LAST_ENDINGS = {MASK: ("glistrboost",)}
"""Names that count where there are none of those either."""
SEPARATORS = ("_", "-", ".")
MAX_DEPTH = 3
"""Folders between a source and the cases in it (BraTS 2018 has HGG/ and LGG/; downloads add their own)."""


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
class Roles:
    """What is looked for: a mask and some modalities, and the words in names that tell them."""

    modalities: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`data.names`: words for a role, instead of the usual ones."""

    def tiers(self, role: str) -> tuple[tuple[str, ...], ...]:
        """Words for a role, in lower case, the most telling first; of a tier, all count the same."""
        if role in self.names:
            return (tuple(name.lower() for name in self.names[role]),)
        key = role.lower()
        first = MASK_ENDINGS if role == MASK else (key, *ALIASES.get(key, ()))
        return tuple(filter(None, (first, MORE_ENDINGS.get(key, ()), LAST_ENDINGS.get(key, ()))))

    def words(self, role: str) -> tuple[str, ...]:
        """All words for a role."""
        return tuple(word for tier in self.tiers(role) for word in tier)

    def endings(self) -> dict[str, tuple[str, int]]:
        """Word -> (role, number of its tier), of the roles looked for and of modalities that are known."""
        known = [*(modality for modality in ALIASES if modality not in self.lowered), *self.modalities, MASK]
        return {
            word: (role, number)
            for role in known
            for number, tier in reversed(list(enumerate(self.tiers(role))))
            for word in tier
        }

    @property
    def lowered(self) -> dict[str, str]:
        """Lower case -> modality."""
        return {modality.lower(): modality for modality in self.modalities}

    def channel(self, modality: str, channels: Iterable[str]) -> int | None:
        """Which of these channels, as a dataset calls them, is the modality; the only one is the only modality."""
        names = [name.lower() for name in channels]
        for word in self.words(modality):
            if word in names:
                return names.index(word)
        return 0 if len(names) == len(self.modalities) == 1 and modality not in self.names else None


@dataclass
class Files:
    """Candidate files by (subject id, role); a role is `mask` or a modality."""

    found: dict[tuple[str, str], dict[int, list[Path]]] = field(default_factory=dict)
    """By rank: where there are several, those of the lowest rank count."""
    unmatched: list[Unmatched] = field(default_factory=list)
    splits: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    """Patient by subject, where the layout knows it."""

    def add(self, subject: str, role: str, path: Path, rank: int = 0) -> None:
        """A candidate, unless its name will not do."""
        if reason := fault(subject, path):
            self.leave_out(path, reason)
        else:
            self.found.setdefault((subject, role), {}).setdefault(rank, []).append(path)

    def leave_out(self, path: Path, reason: str, kind: str = "unmatched-file") -> None:
        """Say why it is not used."""
        self.unmatched.append(Unmatched(printable(path), reason, kind))

    def best(self, subject: str, role: str) -> list[Path]:
        """Those that count; more than one is a contradiction."""
        ranks = self.found.get((subject, role), {})
        return ranks[min(ranks)] if ranks else []

    def set_aside(self, subject: str) -> Iterator[Path]:
        """Those of all roles that others outrank."""
        for (owner, _), ranks in self.found.items():
            if owner == subject:
                yield from (path for rank in sorted(ranks)[1:] for path in ranks[rank])

    @property
    def subjects(self) -> list[str]:
        """All that have a file, sorted."""
        return sorted({subject for subject, _ in self.found})


@dataclass(frozen=True)
class Layout:
    """One way to organise a source."""

    name: str
    """As `data.layout` has it."""
    looks_like: str
    """For people, as the end of "expected ..."."""
    fits: Callable[[Path], bool]
    """Whether a source is organised so; looks at names alone."""
    read: Callable[[Path, Roles], Files]
    modalities: Callable[[Path], tuple[str, ...]]
    """Those that a source offers, in its own order."""


# ------------------------------------------------------------------------------------------------- names


def volumes(folder: Path) -> list[Path]:
    """What `read_nifti` takes in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if is_volume(path) and not path.name.startswith("."))


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and files' namesakes.

    Raises:
        DataFormatError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataFormatError(f"{folder}: no such folder; check the path")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def below(source: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """The folders in a folder, each followed by those in it; none that is called like a file."""
    for folder in folders(source):
        if not is_volume_name(folder):
            yield folder
            if depth > 1:
                yield from below(folder, depth - 1)


def ending(name: str, words: Iterable[str], marks: tuple[str, ...] = ("_", "-")) -> str | None:
    """Which of these words the name closes with, after one of these marks; the longest."""
    lowered = name.lower()
    ends = (word for word in words if lowered.endswith(tuple(f"{mark}{word}" for mark in marks)))
    return max(ends, key=len, default=None)


def beginning(name: str, words: Iterable[str]) -> str | None:
    """Which of these words the name opens with, before `_`, `-`, `.` or a digit; the longest."""
    lowered = name.lower()
    marks = (*SEPARATORS, *"0123456789")
    starts = (word for word in words if lowered.startswith(word) and lowered[len(word) :].startswith(marks))
    return max(starts, key=len, default=None)


def subject_id(path: Path, words: Iterable[str]) -> str:
    """The name without its suffix, and without one of these words at its end."""
    name = stem(path)
    end = ending(name, words)
    return name[: -len(end) - 1] if end else name


def fault(subject: str, path: Path) -> str:
    """Why the file cannot be used under its name; empty where it can."""
    if printable(path) != path:
        return "its name is not UTF-8; rename it"
    if not is_file_name(subject):
        return f"the subject would be called {subject!r}; rename it: not empty, hidden, or with slashes or line breaks"
    return ""


def printable(path: Path) -> Path:
    """The path, with backslashes for what is not UTF-8."""
    return Path(str(path).encode(errors="backslashreplace").decode())
