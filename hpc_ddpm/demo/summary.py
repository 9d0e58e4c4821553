"""The report of a finished run from what its stages left: the first volumes beside the real ones, curve, figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from hpc_ddpm.config import Config, config_from_dict
from hpc_ddpm.data.dataset import to_unit_range
from hpc_ddpm.data.shards import Packed, open_packed
from hpc_ddpm.demo.report import Case, voxel_correlation, write_report
from hpc_ddpm.runlog import package_versions, read_metrics
from hpc_ddpm.sampling.folder import find_folder
from hpc_ddpm.sampling.read import read_generated
from hpc_ddpm.sealed import Count, read_json

MAX_CASES = 4


class Provenance(TypedDict):
    """What this report needs of a run's provenance.json."""

    world_size: Count


def report_run(
    out: Path,
    packed_dir: Path,
    run_dir: Path,
    samples: Path,
    commands: Sequence[str],
    more_facts: Mapping[str, str] | None = None,
    *,
    title: str,
) -> tuple[Path, Path]:
    """Write `report.png` and `report.html` to `out`; returns their paths.

    Args:
        out: folder of the report.
        packed_dir: what was trained on.
        run_dir: of the training.
        samples: a generated set.
        commands: what ran, one line each.
        more_facts: name -> value, shown after the report's own.
        title: headline.

    Raises:
        DataFormatError: the dataset or a volume is missing or damaged.
        ConfigError: matplotlib is missing.
    """
    stored = run_dir / "config.json"
    config = config_from_dict(read_json(stored, dict[str, Any], "give a folder that `train` wrote"), str(stored))
    packed = open_packed(packed_dir)
    records = list(find_folder(samples).records())
    index = {subject.id: subject.index for subject in packed.subjects()}
    cases = [_case(record, samples, packed, index.get(record["mask_id"]), config) for record in records[:MAX_CASES]]
    facts = _facts(run_dir, records, packed, config) | dict(more_facts or {})
    curve, names = list(read_metrics(run_dir)), config.data.labels.names
    return write_report(out, cases, curve, facts, commands, title=title, label_names=names)


def _case(record: dict[str, Any], samples: Path, packed: Packed, index: int | None, config: Config) -> Case:
    made = read_generated(samples, record, config.data)
    real = None if index is None else to_unit_range(torch.from_numpy(packed.read(index)[0])).numpy()
    if real is not None and real.shape != made.image.shape:  # it was put back on the grid of its mask
        real = None
    similarity = None if real is None else voxel_correlation(real, made.image, made.mask).inside
    x, y, z = np.linalg.norm(made.affine[:3, :3], axis=0).tolist()
    names, orientation = config.data.modalities, config.data.orientation
    return Case(record["mask_id"], made.mask, real, made.image, (x, y, z), names, similarity, orientation)


def _facts(run_dir: Path, records: Sequence[dict[str, Any]], packed: Packed, config: Config) -> dict[str, str]:
    logged = [row for row in read_metrics(run_dir) if "volumes_per_s" in row]
    speed = statistics.median(row["volumes_per_s"] for row in logged[1:] or logged)
    seconds = statistics.median(record["seconds"] for record in records)
    num_ranks = read_json(run_dir / "provenance.json", Provenance, "train again")["world_size"]
    splits = {split: len(packed.subjects(split)) for split in ("train", "val")}
    steps, versions = config.training.num_steps, package_versions()
    return {
        "trained on": f"{_subjects(splits['train'])}, {steps} steps of {config.training.global_batch} volumes",
        "held out": _subjects(splits["val"]) if splits["val"] else "none (too few subjects)",
        "volume": "×".join(str(side) for side in config.data.size) + f", {config.data.num_modalities} channel(s)",
        "training": f"{speed:.2f} volumes/s on {num_ranks} ranks, ZeRO-{config.training.zero_stage}",
        "sampling": f"{seconds:.2f} s per volume and rank, {config.sampling.sampler} {config.sampling.num_steps} steps",
        "computed in": f"{records[0]['precision']} on {records[0]['device']}",
        "versions": f"hpc_ddpm {versions['hpc_ddpm']}, torch {versions['torch']}, deepspeed {versions['deepspeed']}",
    }


def _subjects(count: int) -> str:
    return f"{count} subject{'' if count == 1 else 's'}"
