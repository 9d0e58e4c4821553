"""`hpc-ddpm sample ...` as one worker runs it: load the model, call the library, say what came out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ddpm.config import Config, config_from_dict, with_overrides
from hpc_ddpm.device import keep_freed_memory, local_device, resolve_precision
from hpc_ddpm.distributed import detect_ranks
from hpc_ddpm.errors import CheckpointError, ConfigError
from hpc_ddpm.files import write_json, writing_to
from launch.progress import progress_bar
from launch.submit_checks import check_segmenter

if TYPE_CHECKING:
    from hpc_ddpm.sampling.masks import MaskSource
    from hpc_ddpm.sampling.run import SampleReport
    from hpc_ddpm.weights import Model

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Before torch is loaded: workers that share cores must not spin while they wait (20 times slower, measured)."""


def plan_stage(
    source: Path,
    out: Path,
    masks: Path | None,
    split: str | None,
    covariates: Sequence[str],
    overrides: Sequence[str],
) -> None:
    """`hpc-ddpm sample plan`."""
    from hpc_ddpm.sampling.run import plan_set

    model, weights = _load(source, overrides)
    items, wanted = plan_set(out, model.config, weights, _masks(out, masks, split, covariates, model.config))
    print(f"{len(items)} volumes planned, {len(wanted)} of them asked for now: {out}")


def run_stage(
    source: Path,
    out: Path,
    masks: Path | None,
    split: str | None,
    covariates: Sequence[str],
    overrides: Sequence[str],
    show_progress: bool,
) -> int:
    """`hpc-ddpm sample run`: the ranks share the work without talking to each other; returns the exit code."""
    model, weights = _load(source, overrides)
    check_segmenter(model.config, overrides, source)
    return _generate(model, weights, out, _masks(out, masks, split, covariates, model.config), show_progress)


def retry_stage(out: Path, source: Path | None, overrides: Sequence[str], show_progress: bool) -> int:
    """`hpc-ddpm sample retry`; returns the exit code."""
    from hpc_ddpm.sampling.folder import find_folder

    folder = find_folder(out)
    made_with = folder.made_with()
    stored = config_from_dict(made_with["config"], str(folder.path))
    config = with_overrides(stored, overrides)
    check_segmenter(config, overrides, folder.path)
    path = source or _find_weights(made_with["weights"])
    model, weights = _load(path, config=config)
    return _generate(model, weights, folder.path, [], show_progress, retry=True)


def anonymize_stage(
    source: Path, subjects: Sequence[str], out: Path, overrides: Sequence[str], show_progress: bool
) -> int:
    """`hpc-ddpm sample anonymize`, with the subjects' own covariates; returns the exit code.

    Rank 0 compares, and alone says that volumes failed: a rank that leaves with exit code 2 may end the others.
    """
    from hpc_ddpm.sampling.anonymize import find_neighbours
    from hpc_ddpm.sampling.folder import SampleFolder
    from hpc_ddpm.sampling.masks import find_packed_masks
    from hpc_ddpm.sampling.plan import build_plan

    model, weights = _load(source, overrides)
    config, data = model.config, model.config.data.path
    check_segmenter(config, overrides, source)
    masks = find_packed_masks(data, subjects=subjects, covariates=config.data.covariates)
    code = _generate(model, weights, out, masks, show_progress)
    ranks, folder = detect_ranks(), SampleFolder(out)
    if code > 2:
        return code
    if not ranks.is_main:
        return 0
    ids = [item.id for item in build_plan(masks, config.sampling.replicas, config.seed) if item.id in folder.done()]
    with writing_to(out), progress_bar("comparing", show=show_progress) as update:
        closeness = find_neighbours(folder, ids, data, config, lambda done, total: update(done, total, ""))
        write_json(out / "anonymize.json", asdict(closeness), indent=2)
    for one in closeness.neighbours:
        warning = f" > {closeness.threshold:.3f}: TOO CLOSE" if one.is_close else ""
        print(f"{one.id}: nearest {one.nearest} {one.correlation:.3f}{warning}, its own subject {one.own:.3f}")
    close = sum(one.is_close for one in closeness.neighbours)
    print(
        f"{close} of {len(ids)} volumes are closer to one of {closeness.num_training} training volumes than these are "
        f"to each other (correlation above {closeness.threshold:.3f}): {out / 'anonymize.json'}"
    )
    return code


def reproduce_stage(path: Path, source: Path | None, show_progress: bool) -> dict[str, Any]:
    """`hpc-ddpm sample reproduce`; returns what came out."""
    import torch

    from hpc_ddpm.sampling.reproduce import find_record, reproduce

    folder, record = find_record(path)
    tree = folder.made_with()["config"] | {"sampling": record["sampling"]}
    config = config_from_dict(tree, str(folder.path))
    model, weights = _load(source or _find_weights(folder.made_with()["weights"]), config=config)
    model = model.to(getattr(torch, record["precision"]))
    with progress_bar("again", show=show_progress) as update:
        return asdict(reproduce(folder, record, model, weights["sha256"], lambda done, total: update(done, total, "")))


def compare_stage(
    source: Path,
    out: Path,
    masks: Path | None,
    split: str | None,
    max_masks: int,
    cells: tuple[list[str], list[str], list[str]],
    overrides: Sequence[str],
    show_progress: bool,
) -> None:
    """`hpc-ddpm sample compare`; `cells` are samplers, step counts and spacings."""
    from hpc_ddpm.sampling.compare import compare, grid
    from hpc_ddpm.sampling.masks import load_mask

    model, _ = _load(source, overrides)
    samplers, steps, spacings = cells
    chosen = grid(samplers, steps, spacings or [model.config.sampling.spacing])
    found = _masks(out, masks, split, (), model.config)[:max_masks]
    loaded = {mask.id: load_mask(mask, model.config).labels for mask in found}
    with writing_to(out), progress_bar("comparing", show=show_progress) as update:
        compare(model, loaded, out, chosen, on_cell=update)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"figure: {out / 'figure.png'}")


def _find_weights(made_with: dict[str, Any]) -> Path:
    """Where they were when the set was made."""
    path = Path(made_with["path"])
    if not path.exists():
        raise CheckpointError(f"{path}: the weights of this set are not there any more; give their place by --weights")
    return path


def _load(source: Path, overrides: Sequence[str] = (), config: Config | None = None) -> tuple[Model, dict[str, Any]]:
    """The model on this worker's device and in its precision, and what identifies its weights.

    `config`, where it is given, decides instead of the source's own.
    """
    import torch

    from hpc_ddpm.weights import load_model

    keep_freed_memory()
    device = local_device(detect_ranks())
    if config is not None:
        overrides = [f"sampling.weights={config.sampling.weights}"]
    model = load_model(source, overrides=list(overrides))
    model.config = config or model.config
    weights = {"path": str(source.resolve()), "sha256": model.sha256, "provenance": model.provenance}
    is_bf16 = resolve_precision(model.config.sampling.precision, device) == "bf16"
    model = model.to(device, torch.bfloat16 if is_bf16 else torch.float32)
    if model.config.sampling.compile and device.type == "cuda":
        model.network = torch.compile(model.network)  # type: ignore[assignment]
    return model, weights


def _masks(out: Path, masks: Path | None, split: str | None, given: Sequence[str], config: Config) -> list[MaskSource]:
    """What the command line names; nothing where it names none and something is planned already."""
    from hpc_ddpm.sampling.masks import find_mask_files, find_packed_masks, with_coding, with_covariates
    from hpc_ddpm.sampling.plan import read_manifest

    covariates = config.data.covariates
    if masks is not None:
        found, note = with_coding(find_mask_files(masks, covariates, config.data), config.data)
        if note and detect_ranks().is_main:
            print(note)
    elif split is None and read_manifest(out):
        if given:
            raise ConfigError(f"--covariate {given[0]}: {out} has a plan; say for which masks, by --masks or --split")
        return []
    else:
        found = find_packed_masks(config.data.path, split or "val", covariates=covariates)
    found = with_covariates(found, given, covariates)
    for name in covariates:
        unknown = sum(name not in mask.covariates for mask in found)
        if unknown and detect_ranks().is_main:
            print(f"{name} is not known of {unknown} of {len(found)} masks; --covariate {name}=VALUE would say it")
    return found


def _generate(
    model: Model, weights: dict[str, Any], out: Path, masks: list[MaskSource], show_progress: bool, retry: bool = False
) -> int:
    from hpc_ddpm.data.team import detect_team, wait_for_all
    from hpc_ddpm.sampling.run import run_sampling

    ranks = detect_ranks()
    with progress_bar("sampling", show=show_progress and ranks.is_main, unit="volumes") as update:
        report = run_sampling(
            model,
            out,
            weights,
            masks,
            team=detect_team(ranks),
            retry=retry,
            on_volume=lambda done, total: update(done, total, ""),
            say=print if ranks.is_main else lambda line: None,
        )
    wait_for_all(ranks)
    _tell(report, ranks.rank, out)
    return 128 + report.stopped_by if report.stopped_by else 2 if report.failed else 0


def _tell(report: SampleReport, rank: int, out: Path) -> None:
    rate = f", {report.seconds / report.generated:.2f} s per volume" if report.generated else ""
    stopped = f"; stopped by signal {report.stopped_by}, the same command goes on" if report.stopped_by else ""
    stream = sys.stderr if rank else sys.stdout
    print(f"rank {rank}: {report.generated} volumes generated{rate}{stopped}", file=stream)
    if rank:
        return
    if report.fitted:
        print(f"{report.fitted} masks were changed to fit the model; `mask_changes` in the sidecars says how")
    print(f"{report.done} of {report.planned} volumes done: {out}")
    if report.failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.failed.items())
        print(
            f"{sum(report.failed.values())} failed ({kinds}): `hpc-ddpm sample status {out}` says why, "
            f"`hpc-ddpm sample retry {out}` tries them again",
            file=sys.stderr,
        )
