"""The main job end to end, by the commands a user would type: pack, train, sample, report."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpc_ddpm.config import Config, flatten_config, load_config
from hpc_ddpm.data.dataset import to_unit_range
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.data.shards import Packed, open_packed
from hpc_ddpm.demo.cohort import write_cohort
from hpc_ddpm.demo.report import Case, voxel_correlation, write_report
from hpc_ddpm.demo.source import describe_source
from hpc_ddpm.errors import HpcDdpmError
from hpc_ddpm.files import write_text
from hpc_ddpm.runlog import package_versions, read_metrics

NUM_SUBJECTS = 24
MAX_CASES = 4

Note = Callable[[str], None]


def run_demo(
    out: Path,
    data: Path | None,
    num_ranks: int,
    overrides: Sequence[str],
    *,
    say: Note = print,
    on_cohort: Callable[[int, int], None] = lambda done, total: None,
    quiet: bool = False,
) -> Path:
    """Run all stages into `out`; what is finished is reused. Returns the report's HTML file.

    Args:
        out: gets cohort/, packed/, train/, samples/, demo.yaml, report.png and report.html.
        data: a source that `hpc-ddpm pack` takes; None makes a cohort from the ICBM-152 template.
        num_ranks: processes for training and sampling.
        overrides: `section.key=value` on top of the demo preset.
        say: prints one line about each stage.
        on_cohort: progress of making the cohort.
        quiet: no progress bars in the stages.

    Raises:
        HpcDdpmError: whatever the stages say; a stage's own message is already on the screen.
    """
    began = time.perf_counter()
    if data is None:
        source = out / "cohort"
        say(f"1/5 brains: {NUM_SUBJECTS} subjects from the ICBM-152 template -> {source}")
        write_cohort(source, NUM_SUBJECTS, progress=on_cohort)
        settings: list[str] = []
    else:
        source = data
        say(f"1/5 brains: yours -> {source}")
        settings = describe_source(source, load_config("demo", overrides).config)
    config = load_config("demo", [*settings, *overrides]).config
    preset = _write_config(out / "demo.yaml", config)
    stages = _Stages(say, num_ranks, ["--quiet"] if quiet else [])

    packed_dir, run_dir, samples = out / "packed", out / "train", out / "samples"
    stages.run(f"2/5 packing -> {packed_dir}", ["pack", source, "--out", packed_dir, "--config", preset], ranks=1)
    packed = open_packed(packed_dir)
    train: list[str | Path] = ["train", "--config", preset, "--data", packed_dir, "--out", run_dir]
    stages.run(f"3/5 training on {num_ranks} ranks -> {run_dir}", train, ranks=num_ranks)
    has_held_out = bool(packed.subjects("val"))
    masks: list[str | Path] = ["--split", "val"] if has_held_out else ["--masks", source]
    sample: list[str | Path] = ["sample", run_dir, "--out", samples, *masks]
    stages.run(f"4/5 sampling on {num_ranks} ranks -> {samples}", sample, ranks=num_ranks)

    say("5/5 report")
    cases = _cases(samples, packed, config)
    facts = _facts(run_dir, samples, packed, config, num_ranks)
    title = "New volumes for held-out masks" if has_held_out else "New volumes for the masks given"
    png, page = write_report(
        out,
        cases,
        list(read_metrics(run_dir)),
        facts,
        stages.shown,
        title=title,
        label_names=config.data.labels.names,
    )
    say("")
    say(f"report    {page}")
    say(f"picture   {png}")
    say(f"volumes   {samples}")
    say(f"training  {run_dir} (tensorboard --logdir {run_dir})")
    say(f"took      {time.perf_counter() - began:.0f} s; the same command reuses what is finished")
    say("ran       " + "\n          ".join(stages.shown))
    return page


class _Stages:
    """Runs stages as the command line would, and remembers the commands."""

    def __init__(self, say: Note, num_ranks: int, options: list[str]) -> None:
        self.say = say
        self.options = options
        self.shown: list[str] = []
        threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
        self.env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}

    def run(self, title: str, arguments: Sequence[str | Path], ranks: int) -> None:
        words = [str(argument) for argument in arguments]
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "launch.cli"] if ranks > 1 else []
        self.shown.append(shlex.join([*(launcher or ["hpc-ddpm"]), *words]))
        self.say(title)
        if ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
        else:
            command = [sys.executable, "-m", "launch.cli"]
        code = subprocess.run([*command, *words, *self.options], env=self.env, check=False).returncode
        if code in (130, -2):
            raise KeyboardInterrupt
        if code:
            raise HpcDdpmError(f"this stage failed (exit code {code}); its own message is above: {self.shown[-1]}")


def _write_config(path: Path, config: Config) -> Path:
    """The demo's settings as a file that `--config` takes."""
    tree: dict[str, Any] = config.dump()
    write_text(path, "# The resolved settings of this demo.\n" + yaml.safe_dump(tree, sort_keys=False))
    return path


def _cases(samples: Path, packed: Packed, config: Config) -> list[Case]:
    index = {subject.id: subject.index for subject in packed.subjects()}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((samples / "sidecar").glob("*.json"))]
    return [_case(record, samples, packed, index.get(record["mask_id"]), config) for record in records[:MAX_CASES]]


def _case(record: dict[str, Any], samples: Path, packed: Packed, index: int | None, config: Config) -> Case:
    name = f"{record['id']}.nii.gz"
    volumes = [read_nifti(samples / modality / name) for modality in config.data.modalities]
    synthetic = np.stack([volume.data for volume in volumes])
    mask = read_nifti(samples / "mask" / name, dtype=np.uint8).data
    real = None if index is None else _real(packed, index)
    similarity = None if real is None else voxel_correlation(real, synthetic, mask).inside
    x, y, z = np.linalg.norm(volumes[0].affine[:3, :3], axis=0).tolist()
    orientation = config.data.orientation
    return Case(record["mask_id"], mask, real, synthetic, (x, y, z), config.data.modalities, similarity, orientation)


def _real(packed: Packed, index: int) -> Any:
    import torch

    return to_unit_range(torch.from_numpy(packed.read(index)[0])).numpy()


def _facts(run_dir: Path, samples: Path, packed: Packed, config: Config, num_ranks: int) -> dict[str, str]:
    logged = [row for row in read_metrics(run_dir) if "volumes_per_s" in row]
    speed = statistics.median(row["volumes_per_s"] for row in logged[1:] or logged)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (samples / "sidecar").glob("*.json")]
    seconds = statistics.median(record["seconds"] for record in records)
    splits = {split: len(packed.subjects(split)) for split in ("train", "val")}
    steps = flatten_config(config)["training.num_steps"]
    versions = package_versions()
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
