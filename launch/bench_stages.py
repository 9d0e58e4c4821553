"""`hpc-ddpm bench train|sample|tune|ab`: join the other ranks or start trials, make the data, measure, report."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hpc_ddpm.config import Config
from hpc_ddpm.device import keep_freed_memory
from hpc_ddpm.distributed import Ranks, broadcast_object, detect_ranks, process_group
from hpc_ddpm.errors import ConfigError
from launch.progress import progress_bar

if TYPE_CHECKING:
    from hpc_ddpm.benchmark.compare import Comparison
    from hpc_ddpm.benchmark.record import Report

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Before torch is loaded: ranks that share cores must not spin while they wait."""


def bench_train_stage(
    config: Config, data: Path | None, work: Path | None, options: dict[str, Any], show_progress: bool
) -> dict[str, Any] | None:
    """`hpc-ddpm bench train`; returns the report on rank 0."""
    from hpc_ddpm.benchmark.train import bench_train

    ranks = detect_ranks()
    with process_group(ranks) as device, workplace(config, data, work, ranks) as (folder, chosen):
        with progress_bar("training", show=show_progress and ranks.is_main) as update:
            row = bench_train(chosen, folder / "run", ranks, device, **options, on_repeat=_repeats(update))
        return _report("train", config, row, device, ranks)


def bench_sample_stage(
    config: Config, data: Path | None, work: Path | None, options: dict[str, Any], show_progress: bool
) -> dict[str, Any] | None:
    """`hpc-ddpm bench sample`: with random weights, which take as long as trained ones."""
    import torch

    from hpc_ddpm.benchmark.sample import bench_sample
    from hpc_ddpm.benchmark.step import random_network
    from hpc_ddpm.device import resolve_precision
    from hpc_ddpm.weights import Model

    keep_freed_memory()
    ranks = detect_ranks()
    with process_group(ranks) as device, workplace(config, data, work, ranks) as (folder, chosen):
        is_bf16 = resolve_precision(config.sampling.precision, device) == "bf16"
        model = Model(random_network(config), chosen, {"source": "random weights"}).eval()
        model = model.to(device, torch.bfloat16 if is_bf16 else torch.float32)
        if config.sampling.compile and device.type == "cuda":
            model.network = torch.compile(model.network)  # type: ignore[assignment]
        with progress_bar("sampling", show=show_progress and ranks.is_main) as update:
            row = bench_sample(model, folder, ranks, **options, on_repeat=_repeats(update))
        return _report("sample", config, row, device, ranks)


def tune_stage(
    config: Config,
    data: Path | None,
    out: Path,
    ranks: int,
    memory_gib: float | None,
    only: Sequence[str],
    repeats: int,
    tell: Callable[[str], None],
    *,
    is_exhaustive: bool,
) -> str:
    """`hpc-ddpm bench tune`; writes the whole configuration with the best settings, and returns the table.

    Every trial is `bench train` on `ranks` local ranks, in processes of its own.
    """
    import yaml

    from hpc_ddpm.benchmark.data.synthetic import pack_phantoms
    from hpc_ddpm.benchmark.gpu_check.run import rows_table
    from hpc_ddpm.benchmark.tune import Candidate, search_space, tune
    from hpc_ddpm.device import local_device, resolve_precision
    from hpc_ddpm.files import write_text
    from hpc_ddpm.model.planner import GIB, Planner
    from launch.trials import Trial, run_trial

    device = local_device(Ranks())
    precision = resolve_precision(config.training.precision, device, config.training_depths)
    budget = _free_for_one(device, ranks) if memory_gib is None else int(memory_gib * GIB)
    space = search_space(config, ranks, len(os.sched_getaffinity(0)) // ranks, is_gpu=device.type == "cuda")
    unknown = sorted(set(only) - set(space))
    if unknown:
        raise ConfigError(f"--only {', '.join(unknown)}: choose among {', '.join(space)}")
    space = {key: values for key, values in space.items() if not only or key in only}
    with tempfile.TemporaryDirectory(prefix="hpc_ddpm-tune-") as temporary:
        folder = Path(temporary)
        given, packed = folder / "given.yaml", data or Path(config.data.path or folder / "packed")
        if packed == folder / "packed":
            pack_phantoms(config.data, folder)
        write_text(given, yaml.safe_dump(config.dump(), sort_keys=False))
        arguments = ("--config", str(given), "--data", str(packed), "--repeats", str(repeats))

        def measure(candidate: Candidate) -> dict[str, Any]:
            trial = Trial("train", (*arguments, *candidate.overrides()), ranks)
            result = run_trial(trial, folder / "trial.json", device.type)
            if "error" in result:
                tell(f"{' '.join(candidate.overrides())}: {result['error']}")
                return result
            (row,) = result["rows"]
            tell(f"{' '.join(candidate.overrides())}: {row['seconds_per_volume']['median']:.4g} s per volume")
            return {"samples_s": row["samples_s"], "peak_gib": row["peak_memory_gib"]}

        planner = Planner(config, ranks, precision, device.type)
        best, rows = tune(config, planner, ranks, space, budget, measure, is_exhaustive=is_exhaustive)
    tree = config.dump()
    for section, values in best.settings().items():
        tree[section] |= values
    write_text(out, yaml.safe_dump(tree, sort_keys=False))
    return f"{rows_table(rows)}\n\nfastest: {' '.join(best.overrides())}\n{out}"


def _free_for_one(device: Any, ranks: int) -> int:
    """Bytes for each rank: its GPU's, or its share of the host's."""
    import torch

    from hpc_ddpm.host import free_memory

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() // ranks


def ab_stage(
    what: str,
    arguments: Sequence[str],
    settings: Sequence[str],
    against: str | None,
    ranks: int,
    pairs: int,
    out: Path,
    show_progress: bool,
) -> Comparison:
    """`hpc-ddpm bench ab`: A is the code of `against` or this one, B is this code with `settings`."""
    from hpc_ddpm.benchmark.compare import compare
    from hpc_ddpm.device import local_device
    from launch.trials import Trial, checkout, run_pairs

    out.mkdir(parents=True, exist_ok=True)
    with checkout(against) as code, progress_bar("measuring in turns", show=show_progress) as update:
        a = Trial(what, tuple(arguments), ranks, code)
        b = Trial(what, (*arguments, *settings), ranks)
        found = run_pairs(a, b, pairs, out, local_device(Ranks()).type, _repeats(update))
    return compare([(cast("Report", first), cast("Report", second)) for first, second in found])


@contextmanager
def workplace(config: Config, data: Path | None, work: Path | None, ranks: Ranks) -> Iterator[tuple[Path, Config]]:
    """A folder that all ranks see, removed at the end, and the configuration with a packed dataset; a collective."""
    from hpc_ddpm.benchmark.data.synthetic import pack_phantoms

    if ranks.is_main and work is not None:
        work.mkdir(parents=True, exist_ok=True)
    folder = broadcast_object(Path(tempfile.mkdtemp(prefix="hpc_ddpm-bench-", dir=work)) if ranks.is_main else Path())
    try:
        packed = data or Path(config.data.path or folder / "packed")
        if ranks.is_main and packed == folder / "packed":
            pack_phantoms(config.data, folder)
        broadcast_object(None)  # the others wait
        path = {"path": str(packed.resolve())}
        yield folder, config.model_copy(update={"data": config.data.model_copy(update=path)})
        broadcast_object(None)
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _repeats(update: Callable[[int, int, str], None]) -> Callable[[int, int], None]:
    return lambda done, total: update(done, total, "")


def _report(name: str, config: Config, row: dict[str, Any], device: Any, ranks: Ranks) -> dict[str, Any] | None:
    from hpc_ddpm.benchmark.device import describe_gpu
    from hpc_ddpm.benchmark.gpu_check.speed import conv_kernels
    from hpc_ddpm.benchmark.record import environment, new_report
    from hpc_ddpm.model.planner import DTYPES

    if not ranks.is_main:
        return None
    settings = {"config": config.dump(), "config_digest": config.digest()}
    where = environment(gpu=describe_gpu(device))
    where["conv_kernels"] = conv_kernels(config, device, DTYPES[row["precision"]])
    return dict(new_report(name, where, settings, [row]))
