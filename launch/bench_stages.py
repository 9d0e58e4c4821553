"""`hpc-ddpm bench train|sample|tune` as one rank runs it: join the others, make the data, call the library, report."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_ddpm.config import Config
from hpc_ddpm.distributed import Ranks, broadcast_object, detect_ranks, keep_freed_memory, process_group
from launch.progress import progress_bar

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
    from hpc_ddpm.distributed import resolve_precision
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


def tune_stage(config: Config, out: Path, world_size: int, memory_gib: float | None, show_progress: bool) -> str:
    """`hpc-ddpm bench tune`; writes the whole configuration with the best settings, and returns the table."""
    import torch
    import yaml

    from hpc_ddpm.benchmark.gpu_check.run import rows_table
    from hpc_ddpm.benchmark.tune import tune
    from hpc_ddpm.distributed import local_device, resolve_precision
    from hpc_ddpm.files import write_text
    from hpc_ddpm.host import free_memory
    from hpc_ddpm.model.planner import GIB

    device = local_device(Ranks())
    precision = resolve_precision(config.training.precision, device, config.training_depths)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    budget = free if memory_gib is None else int(memory_gib * GIB)
    with progress_bar("tuning", show=show_progress) as update:
        best, rows = tune(config, device, precision, world_size, budget, on_candidate=_repeats(update))
    tree = config.dump()
    for section, values in best.settings().items():
        tree[section] |= values
    write_text(out, yaml.safe_dump(tree, sort_keys=False))
    chosen = " ".join(
        f"{section}.{key}={value}" for section, kv in best.settings().items() for key, value in kv.items()
    )
    return f"{rows_table(rows)}\n\nfastest: {chosen}\n{out}"


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
    from hpc_ddpm.benchmark.record import environment, new_report

    if not ranks.is_main:
        return None
    settings = {"config": config.dump(), "config_digest": config.digest()}
    return dict(new_report(name, environment(gpu=describe_gpu(device)), settings, [row]))
