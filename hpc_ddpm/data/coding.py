"""What the integers in mask files mean: as `data.labels.names` says, or as BraTS coded them in one of its years."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hpc_ddpm.config import LabelsConfig

CORE, EDEMA, ENHANCING, BRAIN = "necrotic core", "edema", "enhancing tumour", "brain"
CODINGS: dict[str, dict[int, str]] = {
    "brats2021": {1: CORE, 2: EDEMA, 4: ENHANCING},
    "brats2023": {1: CORE, 2: EDEMA, 3: ENHANCING},
    "brats2024": {1: CORE, 2: EDEMA, 3: ENHANCING, 4: "resection cavity"},
    "brats_ped": {1: ENHANCING, 2: "non-enhancing tumour", 3: "cystic component", 4: EDEMA},
}
"""Value on disk -> meaning: adults until 2021, adults and metastases of 2023, after treatment, children."""
WORDS = {
    "resection cavity": r"\bcavity\b|\brc\b",
    CORE: r"\bnon ?enhancing tumou?r core\b|\bnetc\b|\bncr\b|necro|\bcore\b",
    "non-enhancing tumour": r"\bnon ?enhancing|\bnet\b",
    ENHANCING: r"\benhanc|\bet\b|\bactive\b",
    EDEMA: r"edema|\bed\b|\bsnfh\b|\bnon ?enhancing flair\b",
    "cystic component": r"cyst|\bcc\b",
    BRAIN: r"^(?!.*(tumou?r|lesion|metast|stem\b)).*\bbrain\b",
}
"""Meaning -> by which its names are known, the first that fits; names in lower case with spaces between words."""
USUAL = {CORE: 1, EDEMA: 2, ENHANCING: 3}
"""Which label has a meaning in a scheme whose names say nothing."""
REFUSED = -1
"""In `remap`: a value that no label of the scheme stands for."""
BRATS_ENHANCING_ON_DISK, BRATS_ENHANCING, BRATS_BRAIN = 4, 3, 4


def meaning_of(name: str) -> str | None:
    """What a label's name means, as far as BraTS knows it."""
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    return next((meaning for meaning, words in WORDS.items() if re.search(words, text)), None)


def speaks_brats(labels: LabelsConfig) -> bool:
    """Whether the names of a scheme are of two or more parts of a tumour, as BraTS has them."""
    return len({meaning_of(name) for name in labels.names.values()} - {None, BRAIN}) > 1


def brain_label(labels: LabelsConfig) -> int | None:
    """The label whose name says brain."""
    return next((label for label, name in labels.names.items() if meaning_of(name) == BRAIN), None)


def resolve_labels(labels: LabelsConfig, layout: str) -> LabelsConfig:
    """The scheme with the rules of its coding in `remap` and `foreground_label`; auto is what the layout implies."""
    if labels.coding == "auto":
        return brats_raw_labels(labels) if layout == "brats_raw" else labels
    return coded_labels(labels, labels.coding)


def brats_raw_labels(labels: LabelsConfig) -> LabelsConfig:
    """The scheme for raw BraTS masks until 2023 (0, 1, 2, 3 or 4): 4 becomes 3, and 4, where named, is the rest.

    A scheme that remaps labels itself is left alone, and so is a label 4 that is another part of the tumour.
    """
    if labels.remap:
        return labels
    update: dict[str, Any] = {"remap": {BRATS_ENHANCING_ON_DISK: BRATS_ENHANCING}}
    is_brain = meaning_of(labels.names.get(BRATS_BRAIN, "")) in (BRAIN, None)
    if BRATS_BRAIN in labels.names and is_brain and labels.foreground_label is None:
        update["foreground_label"] = BRATS_BRAIN
    return labels.model_copy(update=update)


def coded_labels(labels: LabelsConfig, coding: str) -> LabelsConfig:
    """The scheme for masks of a coding: each value gets the label of its meaning, and the brain is to be derived.

    Labels are found by their names; where these say nothing, they are 1 (core), 2 (edema) and 3 (enhancing).
    A value without a label is refused unless `labels.remap`, which comes first, says what becomes of it.
    """
    if coding == "as_named":
        return labels
    rules: dict[Any, int] = dict.fromkeys(labels.names, REFUSED)
    rules |= {value: _label_of(labels, meaning) for value, meaning in CODINGS[coding].items()}
    update: dict[str, Any] = {"remap": {**rules, **labels.remap}}
    if labels.foreground_label is None:
        update["foreground_label"] = brain_label(labels)
    return labels.model_copy(update=update)


def _label_of(labels: LabelsConfig, meaning: str) -> int:
    named = [label for label, name in labels.names.items() if meaning_of(name) == meaning]
    usual = USUAL.get(meaning)
    if not named and usual in labels.names and meaning_of(labels.names[usual]) is None:
        return usual
    return named[0] if len(named) == 1 else REFUSED


def become(value: int, labels: LabelsConfig) -> int:
    """Which label a value on disk becomes, 0 for background; one that the scheme does not have is to be refused."""
    rules: Mapping[Any, int] = {-1: 0, **labels.remap}
    if value in rules:
        return rules[value]
    return value if value == 0 or value in labels.names else rules.get("*", value)


def merged(values: Iterable[int], labels: LabelsConfig) -> tuple[int, int] | None:
    """Two values, of which the first stays and the second becomes the same label, though `remap` lists but that one."""
    present = set(values)
    for value in sorted(present & set(labels.names) - set(labels.remap)):
        for other in sorted(present - {value}):
            if other in labels.remap and labels.remap[other] == value:
                return value, other
    return None


def can_merge(labels: LabelsConfig) -> bool:
    """Whether `merged` may find something."""
    targets = {label for label in labels.remap.values() if label in labels.names}
    return bool(targets - set(labels.remap))


def describe(value: int, coding: str) -> str:
    """`4 (resection cavity)`."""
    meaning = CODINGS.get(coding, {}).get(value)
    return f"{value} ({meaning})" if meaning else str(value)
