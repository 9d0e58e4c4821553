"""What the demo needs to know of the user's own pairs, found by looking: modalities, labels, proportions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.data.coding import brats_raw_labels
from hpc_ddpm.data.discover import find_layout, source_modalities
from hpc_ddpm.data.find_masks import find_masks
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.errors import DataFormatError

MAX_MASKS_READ = 8


def describe_source(source: Path, config: Config) -> list[str]:
    """`section.key=value` settings that make the demo's network fit `source`.

    Args:
        source: what `hpc-ddpm pack` takes.
        config: the demo's, for its size and orientation.

    Raises:
        DataFormatError: no masks, no images, or a mask without labels.
    """
    modalities = _in_known_order(source_modalities(source))
    if not modalities:
        raise DataFormatError(f"{source}: no image folder or column found beside the masks; see docs/tutorial.md")
    masks = [read_nifti(path, config.data.orientation) for _, path in find_masks(source)[:MAX_MASKS_READ]]
    values = sorted({int(value) for mask in masks for value in np.unique(np.rint(mask.data))} - {0, -1})
    is_raw = find_layout(source) == "brats_raw"
    names = _names(modalities, values, is_raw)
    depth, height, width = masks[0].data.shape
    size = demo_size((width, height, depth), max(config.data.size), config.model.downsampling_factor)
    return [
        f"data.modalities={json.dumps(list(modalities))}",
        f"data.labels.names={json.dumps({str(value): name for value, name in names.items()})}",
        f"data.size={json.dumps(size)}",
    ]


def _in_known_order(modalities: tuple[str, ...]) -> tuple[str, ...]:
    known = load_config("brats_192").config.data.modalities
    return known if set(modalities) == set(known) else modalities


def demo_size(shape: tuple[int, int, int], longest: int, factor: int) -> list[int]:
    """(X, Y, Z) with the proportions of `shape`, its longest side `longest`, all divisible by `factor`."""
    return [max(factor, round(side * longest / max(shape) / factor) * factor) for side in shape]


def _names(modalities: tuple[str, ...], values: list[int], is_raw: bool) -> dict[int, str]:
    """Med-DDPM's label names where they fit what was found, else numbered ones."""
    for preset in ("whole_head_128", "brats_192"):
        known = load_config(preset).config.data
        named = brats_raw_labels(known.labels).remap if is_raw else {}
        if known.modalities == modalities and {named.get(value, value) for value in values} <= set(known.labels.names):
            return dict(known.labels.names)
    if not values:
        raise DataFormatError("the masks hold no label but 0; a mask must mark something")
    return {value: f"label {value}" for value in values}
