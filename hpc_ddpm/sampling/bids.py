"""Names and descriptions of a BIDS-derivatives tree (BIDS 1.10): one subject per generated volume."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import write_json, write_text
from hpc_ddpm.sampling.plan import Item, text_of

BIDS = "bids"
SUFFIXES = {"t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR"}
MASK_SUFFIX = "desc-condition_dseg"


def subject_label(item: Item) -> str:
    """Letters and digits of the mask's id, covariates, and the replica: `sub-001`, replica 2 -> `001r002`."""
    covariates = "".join(f"{name}{text_of(value)}" for name, value in item.covariates.items())
    name = re.sub("[^0-9A-Za-z]", "", item.mask_id.removeprefix("sub-") + covariates)
    return f"{name}r{item.replica:03d}"


def bids_stem(item: Item, role: str) -> str:
    """Path without suffix, in the output folder; `role` is a modality or `mask`."""
    subject = f"sub-{subject_label(item)}"
    ending = MASK_SUFFIX if role == "mask" else SUFFIXES.get(role.lower(), re.sub("[^0-9A-Za-z]", "", role))
    return f"{BIDS}/{subject}/anat/{subject}_{ending}"


def check_labels(items: Iterable[Item]) -> None:
    """Refuse two volumes that would be one subject.

    Raises:
        ConfigError: names them.
    """
    seen: dict[str, Item] = {}
    for item in items:
        other = seen.setdefault(subject_label(item), item)
        if other.id != item.id:
            raise ConfigError(
                f"{other.id} and {item.id} would both be sub-{subject_label(item)} in the BIDS tree; rename a mask"
            )


def describe_dataset(out: Path, versions: Mapping[str, str], labels: Mapping[int, str], scratch: Path) -> None:
    """Write what the tree says of itself: dataset_description.json and the table of labels."""
    generated_by = {"Name": "hpc_ddpm", "Version": versions["hpc_ddpm"]}
    description: dict[str, Any] = {
        "Name": "Synthetic MRI generated from segmentation masks",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [generated_by],
    }
    path = out / BIDS / "dataset_description.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(0, "background"), *labels.items()]
        write_text(out / BIDS / f"{MASK_SUFFIX}.tsv", "index\tname\n" + "".join(f"{i}\t{name}\n" for i, name in rows))
        write_json(path, description, indent=2, scratch=scratch, is_sealed=False)
