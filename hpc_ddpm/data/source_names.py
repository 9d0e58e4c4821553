"""What a source calls its labels, against the names of the scheme: dataset.json (Decathlon, nnU-Net), BIDS tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.coding import become, meaning_of
from hpc_ddpm.errors import DataFormatError

DESCRIPTION, TABLE = "dataset.json", "dseg.tsv"
BIDS_DEPTH = 4
"""Folders above a mask that may hold its table: anat, ses-*, sub-*, and the root."""
SAME_WORDS = {"cancer": "tumor", "tumour": "tumor", "lesion": "tumor", "tumours": "tumor", "tumors": "tumor"}


def refuse_contradictions(masks: Iterable[Path], given: LabelsConfig, resolved: LabelsConfig) -> None:
    """Refuse a scheme under which a value gets a label with another name than the source has for it.

    What `data.labels.remap` lists is the user's word, and stands.

    Args:
        masks: files; dataset.json lies in their folder or in the one above, dseg.tsv up to the root of a BIDS tree.
        given: the scheme as configured.
        resolved: with the rules of its coding.

    Raises:
        DataFormatError: names the file, the value, and both names.
    """
    masks = list(masks)
    folders = {folder for mask in masks for folder in list(mask.parents)[:BIDS_DEPTH]}
    near = {folder for mask in masks for folder in list(mask.parents)[:2]}
    for file in (*sorted(folder / DESCRIPTION for folder in near), *sorted(folder / TABLE for folder in folders)):
        named = _read_table(file) if file.name == TABLE else _read(file)
        for value, name in named.items():
            label = become(value, resolved)
            if value in given.remap or label not in resolved.names:
                continue
            ours = resolved.names[label]
            if not _agree(name, ours) or _is_another(name, ours, resolved, named):
                raise DataFormatError(
                    f"{file}: value {value} is called {name!r}, data.labels.names calls what it becomes {ours!r} "
                    f"({label}); put the names in the order of the file, or say in data.labels.remap what each value "
                    f"becomes, such as {{{value}: {label}}} if they mean the same",
                    "label-names-differ",
                )


def _read(file: Path) -> dict[int, str]:
    """Value -> name, without background and regions of several values; empty where the file says nothing of labels."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    labels = content.get("labels") if isinstance(content, dict) else None
    pairs = labels.items() if isinstance(labels, dict) else ()
    return {value: name for value, name in map(_pair, pairs) if value > 0}


def _read_table(file: Path) -> dict[int, str]:
    """Value -> name by the columns `index` and `name`; empty where there are none."""
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines(), delimiter="\t"))
    except (OSError, ValueError, csv.Error):
        return {}
    pairs = (_pair((row.get("index") or "", row.get("name") or "")) for row in rows)
    return {value: name for value, name in pairs if value > 0}


def _pair(entry: tuple[str, Any]) -> tuple[int, str]:
    """Value and name from an item of {"1": "liver"} or {"liver": 1}; the value is 0 for anything else."""
    key, other = entry
    if isinstance(other, str) and key.isascii() and key.isdigit():
        return int(key), other
    return (other, key) if isinstance(other, int) and not isinstance(other, bool) else (0, "")


def _words(name: str) -> frozenset[str]:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    return frozenset(SAME_WORDS.get(word, word) for word in words)


def _agree(one: str, other: str) -> bool:
    """Whether two names may mean the same: they have a word in common, or one meaning in BraTS."""
    meanings = {meaning_of(one), meaning_of(other)}
    if None not in meanings:
        return len(meanings) == 1
    return bool(_words(one) & _words(other)) or any(len(words) == 0 for words in (_words(one), _words(other)))


def _is_another(name: str, ours: str, labels: LabelsConfig, named: Mapping[int, str]) -> bool:
    """Whether one of the two names is, word for word, that of another label on the other side."""
    if _words(name) == _words(ours):
        return False
    theirs = {_words(other) for other in named.values() if other != name}
    return _words(ours) in theirs or _words(name) in {_words(other) for other in labels.names.values() if other != ours}
